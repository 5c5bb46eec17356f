"""Activations of labelled samples: computed, stored, imported, read."""

from training.activations.artifact import Activations, Contrast, load_activations, save_activations
from training.activations.extraction import extract

__all__ = ["Activations", "Contrast", "extract", "load_activations", "save_activations"]
