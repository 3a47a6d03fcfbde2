"""The models the engine runs: their weights, their forward and the cache of visual tokens."""
