"""Methods: each a function from labelled activations to steering columns."""

from training.choices import GateInit, Init
from training.methods.ablation import AblationConfig, fit_ablation
from training.methods.actadd import Pair
from training.methods.control import ControlConfig, fit_control
from training.methods.difference import fit_difference
from training.methods.head_ablation import HeadAblationConfig, fit_head_ablation
from training.methods.heads import HeadFit, HeadProbe, Probing, probe_heads
from training.methods.iti import ItiConfig, fit_iti
from training.methods.mat import MatFit, fit_mat
from training.methods.mat_config import PAPER, MatConfig
from training.methods.probe import fit_probe

__all__ = [
    "PAPER",
    "AblationConfig",
    "ControlConfig",
    "GateInit",
    "HeadAblationConfig",
    "HeadFit",
    "HeadProbe",
    "Init",
    "ItiConfig",
    "MatConfig",
    "MatFit",
    "Pair",
    "Probing",
    "fit_ablation",
    "fit_control",
    "fit_difference",
    "fit_head_ablation",
    "fit_iti",
    "fit_mat",
    "fit_probe",
    "probe_heads",
]
