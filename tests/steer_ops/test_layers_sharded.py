"""Processes that hold a model together exchange the same layers: a process that refuses one speaks for all."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from steer_ops import ADD_RMS_NORM, GELU_TANH_MUL, RMS_NORM, ROTARY, SILU_MUL, linears
from steer_ops.layers import exchange_layers
from steer_ops.linears import DenseLinear
from tests.server.test_architectures import tiny

CPU = ("cpu", torch.float32)


def exchange(rank: int, folder: str) -> None:
    """In one of two processes; the second has no kernel for norms, and one for rotary embeddings that is wrong."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for op in (ADD_RMS_NORM, GELU_TANH_MUL, RMS_NORM, ROTARY, SILU_MUL):
        op._chosen[CPU] = partial(op.reference)
    if rank == 1:
        RMS_NORM._chosen[CPU] = RMS_NORM.reference
        ROTARY._chosen[CPU] = lambda query, key, cos, sin: ROTARY.reference(query, 1.01 * key, cos, sin)
    linears._packed = lambda weight, bias, native: DenseLinear(weight, bias)
    model: Any = tiny("llama")
    exchange_layers(model)
    Path(folder, str(rank)).write_text(" ".join(type(module).__name__ for module in model.modules()))
    dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch has no gloo here")
def test_a_layer_that_one_process_refuses_stays_in_all(tmp_path: Path) -> None:
    mp.spawn(exchange, (str(tmp_path),), nprocs=2)
    first, second = (Path(tmp_path, str(rank)).read_text() for rank in range(2))
    assert first == second
    assert {"LlamaRMSNorm", "GatedMLP", "LlamaAttention"} <= set(first.split())
