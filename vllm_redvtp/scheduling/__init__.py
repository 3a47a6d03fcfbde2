"""What runs in vLLM's engine-core process: who steps, which blocks are freed, how requests end."""
