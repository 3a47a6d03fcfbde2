"""Attention over a packed batch: its layout, what a backend is, the reference backend, and scores.

Backends that a server can choose are in `vllm_redvtp.attention`.
"""
