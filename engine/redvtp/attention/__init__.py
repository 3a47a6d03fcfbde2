"""Attention over a packed batch: one layout (`batch.py`), one signature, one file for each backend."""
