"""Labelled texts: from what `--data` names to samples with their splits."""

from training.data.loaders import LOADERS
from training.data.samples import Form, Sample, Split, Turn
from training.data.sources import load_data
from training.data.splits import check_leaks, split_samples

__all__ = ["LOADERS", "Form", "Sample", "Split", "Turn", "check_leaks", "load_data", "split_samples"]
