"""redvtp: denoising, visual-token pruning and paged KV for diffusion vision-language models.

The engine knows torch, transformers and PIL, never vLLM; `vllm_redvtp` adapts it to vLLM. `redvtp.local.LocalEngine`
runs it without a server, `redvtp generate` from the shell.
"""

__version__ = "0.2.0"
