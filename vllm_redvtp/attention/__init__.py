"""Attention backends that need vLLM, and the choice of one."""
