"""Norms and gates of layers, each in one pass: computed in float32, and rounded where transformers rounds."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from steer_ops.cuda.launch import check, dense_rows, on_device_of

GATES = 1024  # that a program computes
GELU_SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
WARP_NUMBERS = 512  # of a row, for each warp
MOST_WARPS = 16


@triton.jit
def _scaled(wide, weight, d, epsilon, dtype: tl.constexpr, WIDTH: tl.constexpr):
    """The norm of the numbers d of a row, which is of `dtype`: rounded before the product, too, where the weight is."""
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + epsilon)
    if weight.dtype.element_ty == dtype:
        normed = normed.to(dtype).to(tl.float32)
    return (tl.load(weight + d, mask=d < WIDTH, other=0.0).to(tl.float32) * normed).to(dtype)


@triton.jit
def _rms_norm(x, weight, out, epsilon, heads, x_row, x_head, WIDTH: tl.constexpr, PAD: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, PAD)
    there = d < WIDTH
    wide = tl.load(x + row // heads * x_row + row % heads * x_head + d, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + d, _scaled(wide, weight, d, epsilon, x.dtype.element_ty, WIDTH), mask=there)


@triton.jit
def _add_rms_norm(x, y, weight, total, out, epsilon, x_row, y_row, WIDTH: tl.constexpr, PAD: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, PAD)
    there = d < WIDTH
    one, other = (
        tl.load(x + row * x_row + d, mask=there, other=0.0),
        tl.load(y + row * y_row + d, mask=there, other=0.0),
    )
    added = (one.to(tl.float32) + other.to(tl.float32)).to(one.dtype)
    tl.store(total + row * WIDTH + d, added, mask=there)
    scaled = _scaled(added.to(tl.float32), weight, d, epsilon, x.dtype.element_ty, WIDTH)
    tl.store(out + row * WIDTH + d, scaled, mask=there)


@triton.jit
def _gate_mul(gate_up, out, row_stride, WIDTH: tl.constexpr, GATES: tl.constexpr, GELU: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * GATES + tl.arange(0, GATES)
    there = d < WIDTH
    gate = tl.load(gate_up + row * row_stride + d, mask=there, other=0.0)
    up = tl.load(gate_up + row * row_stride + WIDTH + d, mask=there, other=0.0)
    wide = gate.to(tl.float32)
    steep = wide
    if GELU:  # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z))
        steep = GELU_SLOPE * (wide + 0.044715 * wide * wide * wide)
    opened = (wide / (1 + tl.exp(-steep))).to(gate.dtype)
    tl.store(out + row * WIDTH + d, (opened.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=there)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """See `steer_ops.rms_norm`."""
    width = len(weight)
    _check_norm("rms_norm", x, weight)
    x, heads, *strides = _heads(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        pad, warps = _padded(width)
        with on_device_of(x):
            _rms_norm[out.numel() // width,](x, weight, out, epsilon, heads, *strides, width, pad, num_warps=warps)
    return out


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """See `steer_ops.add_rms_norm`."""
    width = len(weight)
    _check_norm("add_rms_norm", x, weight)
    check(x.shape == y.shape and x.dtype == y.dtype, "add_rms_norm", "x and y have one shape and dtype")
    rows, more = _rows(x), _rows(y)
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if len(rows):
        pad, warps = _padded(width)
        strides = rows.stride(0), more.stride(0)
        with on_device_of(x):
            _add_rms_norm[len(rows),](rows, more, weight, total, out, epsilon, *strides, width, pad, num_warps=warps)
    return total, out


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `steer_ops.silu_mul`."""
    return _gated("silu_mul", gate_up, gelu=False)


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    """See `steer_ops.gelu_tanh_mul`."""
    return _gated("gelu_tanh_mul", gate_up, gelu=True)


def _gated(op: str, gate_up: Tensor, *, gelu: bool) -> Tensor:
    check(gate_up.shape[-1] % 2 == 0, op, "gates and ups are side by side")
    rows, width = _rows(gate_up), gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
    if len(rows):
        with on_device_of(gate_up):
            _gate_mul[len(rows), -(-width // GATES)](rows, out, rows.stride(0), width, GATES, gelu)
    return out


def _check_norm(op: str, x: Tensor, weight: Tensor) -> None:
    right = weight.dim() == 1 and weight.is_contiguous() and x.shape[-1] == len(weight)
    right = right and weight.dtype in (x.dtype, torch.float32)
    check(right, op, "x [..., D] and weight [D] have one dtype, or the weight is float32")


def _rows(x: Tensor) -> Tensor:
    """[rows, D]"""
    return dense_rows(x.reshape(-1, x.shape[-1]))


def _heads(x: Tensor) -> tuple[Tensor, int, int, int]:
    """A tensor as rows of heads, of which all lie equally far from each other: itself, how many heads a row has, and
    the strides of rows and heads. A copy only where it is no such thing."""
    x = dense_rows(x)
    sizes, strides = [1, 1], [0, 0]  # of heads, then of rows
    at = 0
    for size, stride in zip(x.shape[-2::-1], x.stride()[-2::-1], strict=True):
        if size == 1:
            continue
        if sizes[at] > 1 and stride != sizes[at] * strides[at]:
            at += 1
        if at > 1:
            return _heads(x.contiguous())
        if sizes[at] == 1:
            strides[at] = stride
        sizes[at] *= size
    return x, sizes[0], strides[1], strides[0]


def _padded(width: int) -> tuple[int, int]:
    """The next power of two, and how many warps share a row."""
    pad = triton.next_power_of_2(width)
    return pad, max(1, min(MOST_WARPS, pad // WARP_NUMBERS))
