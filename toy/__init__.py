"""The embedded default: a tiny model, the scenes that it sees, and what only their maker knows."""
