"""Labelled texts: from what `--data` names to samples with their splits."""

from training.data.loaders import LOADERS
from training.data.samples import Sample, Split
from training.data.sources import load_data
from training.data.splits import check_leaks, split_samples

__all__ = ["LOADERS", "Sample", "Split", "check_leaks", "load_data", "split_samples"]
