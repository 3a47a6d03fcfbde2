"""The denoising loop: one step for a batch of sequences."""
