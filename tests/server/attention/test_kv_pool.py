"""Which kernels write and attend to keys and values: those that compute heads of the model's own sizes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from server.attention.kv_pool import KVOps, KVShape
from server.engine.sequence import SteeringParams
from steer_ops import GATHER_KV, PAGED_ATTENTION_DECODE, PAGED_ATTENTION_PREFILL, WRITE_KV, Op, plain
from tests.server.desk import Desk
from tests.server.reference import plain as plain_text
from tests.server.test_architectures import greedy_sequence, tiny

CPU = torch.device("cpu")


class OutOfResources(Exception):
    """As Triton's: none of PyTorch's classes."""


class Kernel:
    """The op's reference, which does not fit where keys are of a width."""

    def __init__(self, op: Op, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.op, self.width, self.calls = op, width, 0
        monkeypatch.setattr(op, "_chosen", {("cpu", torch.float32): self})

    def __call__(self, *args: Any, **named: Any) -> Any:
        self.calls += 1
        if any(
            arg.shape[-1] == self.width for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point()
        ):
            raise OutOfResources("out of resource: shared memory, Required: 131072, Hardware limit: 101376")
        return self.op.reference(*args, **named)


@pytest.mark.parametrize(
    ("op", "of"),
    [
        (PAGED_ATTENTION_DECODE, lambda ops: ops.decode),
        (WRITE_KV, lambda ops: ops.write),
        (GATHER_KV, lambda ops: ops.gather),
        (PAGED_ATTENTION_PREFILL, lambda ops: ops.prefill or PAGED_ATTENTION_PREFILL.reference),
    ],
)  # fmt: skip
def test_a_kernel_that_does_not_fit_is_replaced_and_told_of(
    op: Op, of: Callable[[KVOps], Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = Kernel(op, 48, monkeypatch)
    assert of(KVOps.of(KVShape(2, 40, 40, torch.float32, CPU, 4), 16)) is kernel
    assert not caplog.text
    calls = kernel.calls
    assert of(KVOps.of(KVShape(2, 40, 40, torch.float32, CPU, 4), 16)) is kernel
    assert kernel.calls == calls, "it is tried once"
    assert of(KVOps.of(KVShape(2, 48, 48, torch.float32, CPU, 4), 16)) is op.reference
    assert f"kernel of {op.name} for torch.float32 Heads(key_heads=2, groups=4, width=48" in caplog.text
    assert "out of resource: shared memory" in caplog.text


def test_a_kernel_that_computes_something_else_in_these_sizes_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*args: Any, **named: Any) -> None:
        plain.paged_attention_decode(*args, **named)
        if args[4].shape[1] == 3:  # key heads
            args[7][..., -1] += 1

    monkeypatch.setattr(PAGED_ATTENTION_DECODE, "_chosen", {("cpu", torch.float32): other})
    kept, replaced = (KVOps.of(KVShape(heads, 16, 16, torch.float32, CPU), 4) for heads in (2, 3))
    assert (kept.decode, replaced.decode) == (other, plain.paged_attention_decode)
    assert (kept.by_length, replaced.by_length) == (True, False)


def test_a_model_for_which_no_kernel_fits_is_served_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its static steps are those in which blocks are gathered."""
    model = tiny("llama")
    Kernel(PAGED_ATTENTION_DECODE, model.config.head_dim, monkeypatch)
    desk = Desk(model, graphs=True)
    assert not desk.runner.attention.by_length
    asked = greedy_sequence((5, 6, 7), 6, SteeringParams())
    assert desk.run([asked])[asked] == plain_text(tiny("llama"), asked.prompt_token_ids, new=6)
