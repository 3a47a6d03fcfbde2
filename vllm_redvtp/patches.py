"""Every place where vLLM is wrapped or worked around, one function each.

Each says what was observed in vLLM 0.32, why that does not do here, the upstream issue or pull request if one is known,
and the condition under which the function goes. tests/plugin/test_shims.py has a test for each that fails once vLLM
makes it unnecessary. What is installed is handed in, so this file imports no other file of the plugin; heavy imports
are inside the functions, since other models load it too.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.engine.arg_utils import EngineArgs

OPTION = "--plugin"
# Key of a rendered prompt: a function of its sampling parameters that raises for a request that cannot be served.
CHECK = "redvtp_check"
_PLUGIN_GROUP = "vllm.general_plugins"
# Set on a function that wraps one of vLLM's, so that it is not wrapped again.
_MARK = "_redvtp_wrapped"
# vLLM's package that fetches and reads images.
_MEDIA = "vllm.multimodal.media"


def install_plugin_option() -> None:
    """Wrap `EngineArgs.add_cli_args` so that its parser knows `--plugin NAME`: start only if that plugin is installed.

    Observed: vLLM loads installed plugins by default and has no hook for options of general plugins
    (`pre_register_and_update`, vllm-project/vllm#12432, is for platforms). A missing installation shows up as an
    unknown model. `AsyncEngineArgs.add_cli_args` loads the plugins first and calls the wrapped function next.
    Upstream: none known. Goes when vLLM has a `--plugin` option; one that is there is left alone.
    """
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.add_cli_args
    if getattr(original, _MARK, False):
        return

    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        if OPTION not in parser._option_string_actions:
            parser.add_argument(
                OPTION,
                action=PluginAction,
                default=None,
                metavar="NAME",
                help="Refuse to start unless this vLLM plugin is installed (a comma-separated list names several).",
            )
        return parser

    setattr(add_cli_args, _MARK, True)
    EngineArgs.add_cli_args = staticmethod(add_cli_args)  # type: ignore[method-assign]


class PluginAction(argparse.Action):
    """Checks comma-separated plugin names; adds them to VLLM_PLUGINS where that allow-list is in use.

    A MODEL that can only be meant as a path, and is none, is refused here too: vLLM takes it for an id of the Hugging
    Face hub, and says so below 40 lines of traceback. vLLM moves MODEL to the front, so it is known by then.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        names = [name for name in str(values).split(",") if name]
        installed = sorted({entry.name for entry in entry_points(group=_PLUGIN_GROUP)})
        for name in names or [str(values)]:
            if name not in installed:
                parser.error(
                    f"{OPTION} {name}: no such vLLM plugin is installed (installed: {', '.join(installed) or 'none'})"
                )
        _refuse_missing_path(parser, getattr(namespace, "model_tag", None))
        # Unset means "load all"; setting it then would shut every other plugin out.
        allowed = os.environ.get("VLLM_PLUGINS")
        if allowed is not None:
            listed = [name for name in allowed.split(",") if name]
            os.environ["VLLM_PLUGINS"] = ",".join(listed + [name for name in names if name not in listed])
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest, None) or []), *names])


def _refuse_missing_path(parser: argparse.ArgumentParser, model: object) -> None:
    # Here: without the option nothing of it is needed.
    from redvtp.model_folder import looks_like_a_path, why_no_model

    if not isinstance(model, str) or not looks_like_a_path(model) or Path(model).exists():
        # Files and folders are vLLM's to judge: other models have other layouts.
        return
    reason = why_no_model(model)
    if reason is not None:
        parser.error(reason)


def install_check_of_flags(check: Callable[[EngineArgs, ModelConfig], None]) -> None:
    """Let `check` see a server's arguments while unset ones are still None; it raises for those that cannot work.

    Observed: prefix caching and chunked prefill are None until `_set_default_chunked_prefill_and_prefix_caching_args`
    writes True, and a model's config hook runs after that. There a user's flag and vLLM's default look the same, so a
    hook can only overrule both.
    Upstream: none known. Goes when a model can say that it supports neither, or when its hook sees what was set.
    """
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs._set_default_chunked_prefill_and_prefix_caching_args
    if getattr(original, _MARK, False):
        return

    def set_defaults(self: EngineArgs, model_config: ModelConfig) -> None:
        check(self, model_config)
        original(self, model_config)

    setattr(set_defaults, _MARK, True)
    EngineArgs._set_default_chunked_prefill_and_prefix_caching_args = set_defaults  # type: ignore[method-assign]


def install_request_check() -> None:
    """Wrap the platform's `validate_request` so that it runs the check under CHECK in a rendered prompt.

    Observed: it is the only place before the engine where vLLM has a prompt and its sampling parameters together; a
    logits processor's `validate_params` sees the parameters alone. Prompts of other models carry no check.
    Upstream: the hook is vllm-project/vllm#16291 and #16680, for platforms only. Goes when a renderer or processor may
    validate the two together.
    """
    from vllm.platforms import current_platform
    from vllm.sampling_params import SamplingParams

    platform = type(current_platform)
    original: Callable[..., None] = platform.validate_request
    if getattr(original, _MARK, False):
        return

    def validate_request(cls: type, processed_inputs: Any, params: Any) -> None:
        original(processed_inputs, params)
        check = processed_inputs.get(CHECK)
        if check is not None and isinstance(params, SamplingParams):
            check(params)

    setattr(validate_request, _MARK, True)
    platform.validate_request = classmethod(validate_request)  # type: ignore[method-assign, assignment]


@contextmanager
def media_errors_as_refusals() -> Iterator[None]:
    """Within it, an error while an image is fetched or read becomes a refusal of the request.

    Observed: vLLM answers a ValueError with 4xx, but with 500 or 501 a `file://` URL (RuntimeError), a data URL without
    base64 (NotImplementedError), an unreachable host, a decompression bomb and other errors of PIL on broken files. A
    500 also closes the connection that other requests of the client use. The traceback shows whether an error came from
    reading media, so that a bug elsewhere stays a 500.
    Upstream: vllm-project/vllm#21254 (open); #47163 and #47165 mend a part of it. Goes when vLLM answers all of these
    with 4xx.
    """
    from PIL.Image import DecompressionBombError
    from vllm.exceptions import VLLMError, VLLMUnprocessableEntityError, VLLMValidationError

    try:
        yield
    except (VLLMError, ValueError, TypeError, OverflowError, MemoryError):
        # vLLM answers these itself; MemoryError is the server's.
        raise
    except DecompressionBombError as error:
        raise VLLMValidationError(f"image refused: {error}") from error
    except Exception as error:
        if not any(frame.f_globals.get("__name__", "").startswith(_MEDIA) for frame, _ in walk_tb(error.__traceback__)):
            raise
        reason = str(error) or type(error).__name__
        if _is_of_the_network(error):
            raise VLLMUnprocessableEntityError(f"image could not be fetched: {reason}") from error
        raise VLLMValidationError(f"image refused: {reason}") from error


def _is_of_the_network(error: Exception) -> bool:
    import aiohttp
    import requests

    return isinstance(error, aiohttp.ClientError | requests.RequestException | ConnectionError | TimeoutError)


def install_metrics(prometheus: type[Any]) -> None:
    """Let this process's front-end export counters through `prometheus`, a KVConnectorProm. Safe to call again.

    Observed: `SchedulerStats.kv_connector_stats` is the only field that carries a dictionary from scheduler to
    front-end. `_kv_connector_cls` is the class attribute by which vLLM's Ray metrics replace the same part. vLLM's log
    assumes that statistics in the field mean a connector class and fails without one; where there is a connector, the
    instance sets its class.
    Upstream: the field came with vllm-project/vllm#22188 and #26811, for connectors; none known for plugins. Goes when
    a scheduler can add statistics of its model.
    """
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging, KVConnectorStats
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    PrometheusStatLogger._kv_connector_cls = prometheus
    if hasattr(KVConnectorLogging, "connector_cls"):
        return

    class Unlogged(KVConnectorStats):
        """Suppresses vLLM's line about KV transfers in the log."""

        def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
            return self

        def is_empty(self) -> bool:
            return True

    class Unconnected:
        """Stands where vLLM's log expects the class of a KV connector."""

        @classmethod
        def build_kv_connector_stats(cls, data: dict[str, Any]) -> KVConnectorStats:
            return Unlogged(data)

    KVConnectorLogging.connector_cls = Unconnected  # type: ignore[assignment]
