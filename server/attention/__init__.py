"""The attention of the engine's passes: over keys and values that lie in memory of our own, on packed tokens."""
