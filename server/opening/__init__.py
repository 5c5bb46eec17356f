"""From a model on disk to one that the engine can run: loaded, tried, and with memory for its keys and values."""
