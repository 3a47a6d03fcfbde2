"""The `redvtp` command."""
