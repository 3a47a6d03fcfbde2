"""The engine's model as vLLM's loader sees it, its linears replaced where they are split or quantised.

vLLM instantiates the class and streams weights into `load_weights`. The forward pass belongs to
`redvtp.denoising.step`, driven by `vllm_redvtp.worker.runner`. One class serves every architecture.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.transformers.utils import replace_linear_class
from vllm.multimodal import MULTIMODAL_REGISTRY

from redvtp.models.dvlm import Dvlm
from redvtp.models.loading import load_weights
from redvtp.prompt import IMAGE_MARK
from vllm_redvtp.engine_config import engine_config
from vllm_redvtp.frontend.processing import DvlmDummyInputs, DvlmProcessingInfo, DvlmProcessor
from vllm_redvtp.fused import chosen_operations

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@MULTIMODAL_REGISTRY.register_processor(DvlmProcessor, info=DvlmProcessingInfo, dummy_inputs=DvlmDummyInputs)
class ServedDvlm(Dvlm, SupportsMultiModal):
    """The engine's model under the name vLLM knows."""

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality != "image":
            raise ValueError(f"this model takes images only, got {modality}")
        return IMAGE_MARK

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(engine_config(vllm_config.model_config), chosen_operations())
        if get_tensor_model_parallel_world_size() > 1 or vllm_config.quant_config is not None:
            self._swap_linears(vllm_config.quant_config)

    def _swap_linears(self, quant_config: Any) -> None:
        """vLLM's parallel linears in the language model; they split, quantise and all-reduce by themselves.

        A checkpoint's quantisation names its layers as the checkpoint does, so each linear goes under that name.
        """
        names = self.config.family.weights
        for index, layer in enumerate(self.language_model.layers):
            for part in ("self_attn", "mlp"):
                module = layer.get_submodule(part)
                for name, child in list(module.named_children()):
                    if isinstance(child, nn.Linear):
                        weight = names.theirs(f"language_model.layers.{index}.{part}.{name}.weight")
                        path = weight.removesuffix(".weight")
                        swapped = replace_linear_class(child, cast(Any, self.TP_PLAN[name]), quant_config, prefix=path)
                        setattr(module, name, swapped)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Names of the loaded parameters. Raises ValueError naming tensors that are missing, unknown or misshapen."""
        return load_weights(self, weights, _load_param)

    # vLLM takes a class for a text-generation model by these three; diffusion decoding does not go through them.
    def embed_input_ids(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.embed(input_ids)

    def forward(self, input_ids: Tensor, positions: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("diffusion models decode step by step: vllm_redvtp.worker.runner drives it")

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.language_model.logits(hidden_states, self.config.vocab_size)


def _load_param(parameter: nn.Parameter, tensor: Tensor) -> None:
    loader = getattr(parameter, "weight_loader", None)
    if loader is None and parameter.shape != tensor.shape:
        raise ValueError(f"expected shape {list(parameter.shape)}")
    with torch.no_grad():
        (loader or default_weight_loader)(parameter, tensor)
