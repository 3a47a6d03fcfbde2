"""The model families the engine runs, one file each."""
