"""The engine: one thread that owns the model and generates many rows in one batch."""
