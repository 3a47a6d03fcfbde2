"""The option `--plugin NAME` of `vllm serve`: start only if that plugin is installed, and let every process load it.

vLLM loads installed plugins without being asked, so the option is a check, not a switch: `vllm serve MODEL --plugin
redvtp` fails at once where a typing error or a missing installation would otherwise show up as an unknown model.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Any

OPTION = "--plugin"
_PLUGIN_GROUP = "vllm.general_plugins"
_MARK = "_redvtp_plugin_option"


class PluginAction(argparse.Action):
    """Checks comma-separated plugin names; adds them to VLLM_PLUGINS where that allow-list is in use."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        wanted = [name for name in str(values).split(",") if name]
        installed = sorted({entry.name for entry in entry_points(group=_PLUGIN_GROUP)})
        for name in wanted or [str(values)]:
            if name not in installed:
                parser.error(
                    f"{OPTION} {name}: no such vLLM plugin is installed (installed: {', '.join(installed) or 'none'})"
                )
        # Unset means "load all"; setting it then would shut every other plugin out.
        allowed = os.environ.get("VLLM_PLUGINS")
        if allowed is not None:
            names = [name for name in allowed.split(",") if name]
            os.environ["VLLM_PLUGINS"] = ",".join(names + [name for name in wanted if name not in names])
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest, None) or []), *wanted])


def install_plugin_option() -> None:
    """Wrap `EngineArgs.add_cli_args` so that its parser knows `--plugin`.

    vLLM 0.32 has no hook for options of plugins. `AsyncEngineArgs.add_cli_args` loads the plugins first and calls the
    wrapped function next, so the wrap is in time. Goes when vLLM has a `--plugin` of its own: an option that is there
    is left alone.
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
