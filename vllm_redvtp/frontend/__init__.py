"""What runs in vLLM's API server process: prompts, images, request checks."""
