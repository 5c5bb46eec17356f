"""The methods of training, and `METHODS`, their one registry.

A new method is one file here, which makes a `Method` (`base.py` says what that is), and one entry of `METHODS`.
"""

from training.methods.ablation import ABLATION
from training.methods.actadd import ACTADD
from training.methods.base import Method, MethodConfig
from training.methods.caa import CAA
from training.methods.cast import CAST
from training.methods.clamp import CLAMP
from training.methods.control import CONTROL
from training.methods.head_ablation import HEAD_ABLATION
from training.methods.iti import ITI
from training.methods.mat import MAT
from training.methods.probe import PROBE
from training.methods.reps import REPS

METHODS: dict[str, Method] = {
    method.name: method
    for method in (MAT, CAA, ACTADD, PROBE, ITI, ABLATION, CLAMP, CAST, HEAD_ABLATION, CONTROL, REPS)
}


def method_of(config: MethodConfig) -> Method:
    """The method that a config belongs to."""
    return next(method for method in METHODS.values() if method.config is type(config))


__all__ = ["METHODS", "Method", "MethodConfig", "method_of"]
