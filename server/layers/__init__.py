"""Layers of a model on a CPU, exchanged for layers that say the same in fewer and faster operations."""
