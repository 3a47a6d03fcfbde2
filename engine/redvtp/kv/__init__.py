"""Paged keys and values: the block arithmetic, the tensors, and how the survivors of a pruning move together."""
