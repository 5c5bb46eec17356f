"""Which kernels there are for CUDA, and what the log says where Triton has none."""

import sys
from typing import Any

import pytest
import torch

import steer_ops.cuda
from steer_ops.cuda import flash, library

CPU = torch.device("cpu")


def test_without_triton_pytorch_computes_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(steer_ops.cuda, "layers", raising=False)
    monkeypatch.setitem(sys.modules, "steer_ops.cuda.layers", None)
    assert library.triton_kernels(CPU) == {}
    assert "Triton compiles no kernels here" in caplog.text
    assert "gcc" in caplog.text


def test_without_a_compiler_pytorch_computes_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layers = pytest.importorskip("steer_ops.cuda.layers", reason="triton is not installed", exc_type=ImportError)

    def broken(*args: Any) -> Any:
        raise RuntimeError("compiling:\nFailed to find C compiler.")

    monkeypatch.setattr(layers, "rms_norm", broken)
    assert library.triton_kernels(CPU) == {}
    assert "Triton compiles no kernels here (Failed to find C compiler.)" in caplog.text


@pytest.mark.parametrize(
    ("width", "value_width", "dtype", "expected"),
    [
        (128, 128, torch.bfloat16, True),
        (256, 256, torch.float16, True),
        (264, 264, torch.bfloat16, False),
        (20, 20, torch.bfloat16, False),
        (192, 128, torch.bfloat16, False),
        (128, 128, torch.float32, False),
    ],
)
def test_flash_attention_is_asked_for_what_it_computes(
    width: int, value_width: int, dtype: torch.dtype, expected: bool
) -> None:
    assert flash.takes(width, value_width, dtype) is expected


@pytest.mark.parametrize(("capabilities", "expected"), [([(9, 0), (8, 0)], True), ([(8, 6), (7, 5)], False)])
def test_flash_attention_needs_ampere(
    capabilities: list[tuple[int, int]], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    assert flash.runs_here() is expected


def test_pytorch_has_the_flash_attention_that_is_called() -> None:
    arguments = {argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments}
    assert {"cum_seq_q", "cum_seq_k", "seqused_k", "window_size_left", "window_size_right", "scale"} <= arguments
