"""All that is exchanged, in its order."""

from typing import Any

from server.layers.gated_mlp import fuse_mlps
from server.layers.linears import pack
from server.layers.rms_norm import fuse_norms
from server.layers.rotary import fuse_rotary
from server.layers.rotary_table import tabulate_rotary


def exchange_layers(model: Any, *, native: bool = True) -> None:
    """In place; does nothing to what is not on a CPU. `native`: also by kernels that are compiled for it, where they
    can be had. Everything but the linear layers is tried on random numbers first, and left alone where that shows a
    difference."""
    pack(model, native=native)
    tabulate_rotary(model)
    if native:
        fuse_norms(model)
        fuse_mlps(model)
        fuse_rotary(model)
