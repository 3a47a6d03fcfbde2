"""The answer being written: how a canvas is laid out, how many tokens a step commits, and which ones."""
