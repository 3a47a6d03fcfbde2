"""The attention backends that a server can choose, and the choice."""
