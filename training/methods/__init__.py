"""Methods: each a function from labelled activations to steering columns."""

from training.choices import GateInit, Init
from training.methods.difference import fit_difference
from training.methods.mat import MatFit, fit_mat
from training.methods.mat_config import PAPER, MatConfig
from training.methods.probe import fit_probe

__all__ = ["PAPER", "GateInit", "Init", "MatConfig", "MatFit", "fit_difference", "fit_mat", "fit_probe"]
