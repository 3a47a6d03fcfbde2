"""What runs in vLLM's worker processes: the model, its KV cache and the denoising steps."""
