"""Gated steering of language models (MAT-Steer, arXiv 2502.12446, and its relatives) as columns, math and hooks.

What is listed here is imported when it is first asked for: a command that only shows its help needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steering.bank import ColumnBank
    from steering.checkpoint import (
        BaseModelInfo,
        Checkpoint,
        CheckpointConfig,
        ColumnConfig,
        base_model_info,
        find,
        list_checkpoints,
        load,
        save,
        verify_against,
        verify_sites,
    )
    from steering.column import Column
    from steering.errors import (
        CheckpointError,
        CheckpointMismatch,
        ColumnError,
        HookError,
        NotFound,
        SteeringError,
        UnsupportedArchitecture,
    )
    from steering.hook import Steering, steered
    from steering.operators import Trace, gate_codes, gate_values, steer, trace
    from steering.sites import layers, site_module, site_width
    from steering.types import UNSTEERED, Clamp, Gate, Handle, Positions, Reading, SequenceSteering, Site, SiteKind

__all__ = [
    "UNSTEERED",
    "BaseModelInfo",
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointMismatch",
    "Clamp",
    "Column",
    "ColumnBank",
    "ColumnConfig",
    "ColumnError",
    "Gate",
    "Handle",
    "HookError",
    "NotFound",
    "Positions",
    "Reading",
    "SequenceSteering",
    "Site",
    "SiteKind",
    "Steering",
    "SteeringError",
    "Trace",
    "UnsupportedArchitecture",
    "base_model_info",
    "find",
    "gate_codes",
    "gate_values",
    "layers",
    "list_checkpoints",
    "load",
    "save",
    "site_module",
    "site_width",
    "steer",
    "steered",
    "trace",
    "verify_against",
    "verify_sites",
]

# Each name is in one of them; those without PyTorch first.
_MODULES = ("errors", "types", "column", "sites", "operators", "checkpoint", "bank", "hook")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in map(import_module, (f"steering.{one}" for one in _MODULES)):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
