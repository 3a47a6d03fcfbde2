"""The canvas of a response: how it is laid out, how many tokens a step commits, and which ones."""
