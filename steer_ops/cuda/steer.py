"""Gated steering (`steer` in plain.py): all columns of a site in one pass over each token.

A program has one token, whose numbers it keeps in registers: they are read once and written once, however many columns
there are. Only columns that act on the token are read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from steer_ops import plain
from steer_ops.cuda.launch import check, dense_rows, on_device_of

SIGMOID, CONSTANT = tl.constexpr(plain.SIGMOID), tl.constexpr(plain.CONSTANT)
COSINE, READ = tl.constexpr(plain.COSINE), tl.constexpr(plain.READ)
SMALLEST_NORM = tl.constexpr(plain.SMALLEST_NORM)
WARP_NUMBERS = 512  # of a token, for each warp
MOST_WARPS = 32
TOGETHER = 32  # columns whose multipliers are looked at together: one for each thread of a warp


@triton.jit
def _next_acting(multipliers, start, columns, TOGETHER: tl.constexpr):
    """The first column from `start` on whose multiplier is not 0; `columns`: there is none."""
    found = columns
    for first in range(start, columns, TOGETHER):
        if found == columns:
            column = first + tl.arange(0, TOGETHER)
            asked = tl.load(multipliers + column, mask=column < columns, other=0.0)
            found = tl.min(tl.where(asked != 0, column, columns), 0)
    return found


# One program serves any number of columns and any site: nothing is compiled while requests wait.
@triton.jit(
    do_not_specialize=["columns", "multiplier_row", "opened_row", "owner"],
    do_not_specialize_on_alignment=["multipliers", "opened", "kinds", "keep_norm", "clamps"],
)
def _steer(
    activations,
    out,
    vectors,
    weights,
    biases,
    kinds,
    keep_norm,
    clamps,
    multipliers,
    opened,
    owners,
    counts,
    columns,
    activation_row,
    multiplier_row,
    opened_row,
    owner,
    WIDTH: tl.constexpr,
    PAD: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, PAD)
    there = d < WIDTH
    counted = tl.load(counts + token) + (tl.load(owners + token) == owner).to(tl.int64)
    tl.store(counts + token, counted)
    given = tl.load(activations + token * activation_row + d, mask=there, other=0.0)
    a = given.to(tl.float32)
    kept = a  # with the deltas after which the norm is restored
    free = tl.full([PAD], 0.0, tl.float32)  # the other deltas
    acting = 0
    before = tl.sqrt(tl.sum(a * a, 0))
    multipliers += token * multiplier_row
    column = _next_acting(multipliers, 0, columns, TOGETHER)
    while column < columns:
        multiplier = tl.load(multipliers + column)
        vector = tl.load(vectors + column * WIDTH + d, mask=there, other=0.0)
        value = tl.load(clamps + 2 * column)
        strength = multiplier
        if value == value:  # NaN is not: the column adds
            strength = tl.load(clamps + 2 * column + 1) + multiplier * value - tl.sum(a * vector, 0)
        kind = tl.load(kinds + column)
        if kind == READ:
            strength *= tl.load(opened + token * opened_row + column)
        elif kind != CONSTANT:
            weight = tl.load(weights + column * WIDTH + d, mask=there, other=0.0)
            bias, overlap = tl.load(biases + column), tl.sum(a * weight, 0)
            linear = bias + overlap
            above = (overlap / tl.maximum(before, SMALLEST_NORM) + bias > 0).to(tl.float32)
            gate = tl.where(kind == SIGMOID, 1 / (1 + tl.exp(-linear)), linear)
            strength *= tl.where(kind == COSINE, above, gate)
        acting += (strength != 0).to(tl.int32)
        delta = strength * vector
        if tl.load(keep_norm + column) != 0:
            kept += delta
        else:
            free += delta
        column = _next_acting(multipliers, column + 1, columns, TOGETHER)
    after = tl.sqrt(tl.sum(kept * kept, 0))
    finite = (before < float("inf")) & (after < float("inf"))
    rescale = tl.where(finite, before / tl.maximum(after, SMALLEST_NORM), 1.0)
    moved = (kept * rescale + free).to(given.dtype)
    tl.store(out + token * WIDTH + d, tl.where(acting != 0, moved, given), mask=there)


def steer_and_count(
    activations: Tensor,
    vectors: Tensor,
    weights: Tensor,
    biases: Tensor,
    kinds: Tensor,
    keep_norm: Tensor,
    clamps: Tensor,
    multipliers: Tensor,
    opened: Tensor,
    owners: Tensor,
    counts: Tensor,
    owner: int,
) -> Tensor:
    """See `steer_ops.steer_and_count`."""
    op = "steer_and_count"
    tokens, width = activations.shape
    columns = len(vectors)
    check(
        vectors.shape == weights.shape == (columns, width)
        and biases.shape == kinds.shape == keep_norm.shape == (columns,)
        and clamps.shape == (columns, 2)
        and min(len(multipliers), len(opened)) >= tokens
        and multipliers.shape[1] == opened.shape[1] == columns
        and min(len(owners), len(counts)) >= tokens,
        op,
        "shapes do not fit each other",
    )
    dtypes = {part.dtype for part in (vectors, weights, biases, clamps, multipliers, opened)}
    named = kinds.dtype, keep_norm.dtype, owners.dtype, counts.dtype
    parts = (vectors, weights, biases, kinds, keep_norm, clamps, owners, counts)
    check(
        dtypes == {torch.float32}
        and named == (torch.int8, torch.bool, torch.int32, torch.int64)
        and all(part.is_contiguous() for part in parts)
        and (columns <= 1 or multipliers.stride(1) == opened.stride(1) == 1),
        op,
        "columns and multipliers are float32 (kinds int8, keep_norm bool), owners int32, counts int64, and all are "
        "contiguous",
    )
    activations = dense_rows(activations)
    out = torch.empty(tokens, width, dtype=activations.dtype, device=activations.device)
    if tokens:
        pad = triton.next_power_of_2(width)
        with on_device_of(activations):
            _steer[tokens,](
                activations,
                out,
                vectors,
                weights,
                biases,
                kinds,
                keep_norm,
                clamps,
                multipliers,
                opened,
                owners,
                counts,
                columns,
                activations.stride(0),
                multipliers.stride(0),
                opened.stride(0),
                owner,
                width,
                pad,
                TOGETHER,
                num_warps=max(1, min(MOST_WARPS, pad // WARP_NUMBERS)),
            )
    return out
