"""Ops are known to PyTorch, and a kernel that computes something else than its reference is found out and not used."""

from typing import Any

import pytest
import torch

import steer_ops
from steer_ops import plain, registry
from steer_ops.ops import (
    ADD_RMS_NORM,
    COPY_KV,
    GATHER_KV,
    GELU_TANH_MUL,
    PAGED_ATTENTION_DECODE,
    PAGED_ATTENTION_PREFILL,
    RMS_NORM,
    ROTARY,
    SILU_MUL,
    STEER_AND_COUNT,
    TILED_LINEAR,
    VARLEN_ATTENTION,
    WRITE_KV,
)
from steer_ops.registry import DTYPES, NAMESPACE, Op, _run, _same

CPU = torch.device("cpu")
# With kernels for CPUs.
OPS = [PAGED_ATTENTION_DECODE, STEER_AND_COUNT, RMS_NORM, ROTARY, SILU_MUL, GELU_TANH_MUL, TILED_LINEAR]
CUDA_OPS = [ADD_RMS_NORM, COPY_KV, GATHER_KV, PAGED_ATTENTION_PREFILL, VARLEN_ATTENTION, WRITE_KV]
needs_kernels = pytest.mark.skipif(not RMS_NORM.has_kernel(CPU, torch.float32), reason="nothing can be compiled here")


@pytest.mark.parametrize("op", [*OPS, *CUDA_OPS], ids=lambda op: op.name)
def test_pytorch_knows_its_schema_and_what_it_writes_to(op: Op) -> None:
    for args, named in op._examples(torch.float32):
        torch.library.opcheck(op.overload, args, named, test_utils=("test_schema", "test_faketensor"))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_kernel_that_computes_what_its_twin_computes_is_used(op: Op, dtype: torch.dtype) -> None:
    if op is TILED_LINEAR and not op.has_kernel(CPU, dtype):
        pytest.skip("this CPU has no AVX2")
    assert op.choose(CPU, dtype) is op.overload


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_kernel_that_computes_something_else_is_not_used(
    op: Op, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def other(*args: Any, **named: Any) -> Any:
        result = reference(*args, **named)
        written = args[7] if result is None else result[1] if isinstance(result, tuple) else result
        written.mul_(1.2)
        return result

    reference = op.reference
    monkeypatch.setattr(op, "_chosen", {})
    monkeypatch.setattr(op, "overload", other)
    assert op.choose(CPU, dtype) is reference
    assert f"the kernel of {op.name} for {dtype} computes something else" in caplog.text


def test_numbers_that_are_none_agree_with_each_other_alone() -> None:
    numbers, none = torch.tensor([1.0, -2.0]), torch.tensor([1.0, torch.nan])
    assert _same([none], [none.clone()], torch.float32)
    assert not _same([none], [numbers], torch.float32)
    assert not _same([numbers], [none], torch.float32)
    assert not _same([torch.tensor([1.0, torch.inf])], [numbers], torch.float32)


@needs_kernels
def test_a_kernel_that_fails_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(RMS_NORM, "_chosen", {})
    monkeypatch.setattr(RMS_NORM, "overload", broken)
    assert RMS_NORM.choose(CPU, torch.float32) is plain.rms_norm
    assert "fails (no such instruction)" in caplog.text


@pytest.mark.parametrize("op", CUDA_OPS, ids=lambda op: op.name)
def test_what_has_a_kernel_for_cuda_alone_the_twin_computes_on_a_cpu(op: Op) -> None:
    assert op.choose(CPU, torch.float32) is op.reference


def test_a_kernel_is_tried_beside_its_twin_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a GPU computes products of float32 in TF32, its twin there would be the one that is wrong."""
    seen: list[tuple[bool, str]] = []

    def run(implementation: Any, args: Any, named: Any, device: torch.device) -> list[torch.Tensor]:
        seen.append((implementation is RMS_NORM.reference, device.type))
        coarse = 1 + 1e-4 * (device.type == "cuda" and implementation is RMS_NORM.reference)
        return [part * coarse for part in _run(RMS_NORM.reference, args, named, CPU)]

    monkeypatch.setattr(registry, "_run", run)
    assert RMS_NORM._passes_trial(RMS_NORM.overload, torch.device("cuda"), torch.float32)
    assert set(seen) == {(False, "cuda"), (True, "cpu")}


def test_a_kernel_is_tried_on_its_own_device() -> None:
    seen: list[str] = []

    def kernel(x: torch.Tensor, *, sinks: torch.Tensor, scale: float) -> torch.Tensor:
        seen.extend([x.device.type, sinks.device.type])
        return x

    _run(kernel, (torch.ones(2),), {"sinks": torch.ones(2), "scale": 1.0}, torch.device("meta"))
    assert seen == ["meta", "meta"]


def test_what_no_kernel_computes_the_twin_does() -> None:
    assert RMS_NORM.choose(CPU, torch.float64) is plain.rms_norm
    assert RMS_NORM.choose(torch.device("meta"), torch.float32) is plain.rms_norm
    x, weight = torch.randn(3, 8).half(), torch.ones(8).half()
    assert torch.equal(steer_ops.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5))


def test_a_compiled_graph_has_the_op_in_it() -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return 2 * getattr(torch.ops, NAMESPACE).rms_norm(x, weight, 1e-5)

    x, weight = torch.randn(3, 8), torch.ones(8)
    compiled: Any = torch.compile(layer, backend=backend, fullgraph=True)
    assert torch.allclose(compiled(x, weight), layer(x, weight))
    assert any("rms_norm" in target for target in seen)


def test_kinds_of_gates_are_called_the_same() -> None:
    from steering.types import Gate

    assert [gate.code for gate in (Gate.SIGMOID, Gate.CONSTANT, Gate.LINEAR)] == [
        plain.SIGMOID,
        plain.CONSTANT,
        plain.LINEAR,
    ]
