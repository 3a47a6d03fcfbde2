"""The models the engine runs: their configuration, their weights and their forward."""
