"""Decode attention over block tables: the kernel and its reference beside the same in float64, row by row."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from steer_ops import plain
from steer_ops.ops import PAGED_ATTENTION_DECODE as OP

CPU = torch.device("cpu")
LENGTHS = (1, 16, 7, 30, 17)
BLOCKS = 12  # of 8 tokens; one is no row's
COMPILED = OP.has_kernel(CPU, torch.float32)
needs_kernel = pytest.mark.skipif(not COMPILED, reason="nothing can be compiled here")
WAYS = [
    pytest.param(OP.overload, id="kernel", marks=needs_kernel),
    pytest.param(plain.paged_attention_decode, id="plain"),
]
Way = Callable[..., None]


class Rows:
    """Rows of these lengths, a new token of each, and blocks in no order. Where a cache holds no row's token it is not
    a number; what a table says beyond a row's blocks is no block."""

    def __init__(
        self,
        heads: int = 4,
        kv_heads: int = 2,
        width: int = 64,
        value_width: int = 64,
        dtype: torch.dtype = torch.float32,
        block_size: int = 8,
    ) -> None:
        random = torch.Generator().manual_seed(0)
        rows = len(LENGTHS)
        # As models give them: views of what their linear layers put out.
        whole = torch.randn(rows, heads * width + kv_heads * (width + value_width), generator=random).to(dtype)
        query, key, value = whole.split([heads * width, kv_heads * width, kv_heads * value_width], dim=1)
        self.query, self.key = query.view(rows, heads, width), key.view(rows, kv_heads, width)
        self.value = value.view(rows, kv_heads, value_width)
        used = sum(-(-length // block_size) for length in LENGTHS)
        free = torch.randperm(used + 1, generator=random).tolist()
        self.caches = [
            torch.full((used + 1, kv_heads, block_size, wide), torch.nan).to(dtype) for wide in (width, value_width)
        ]
        self.lengths = torch.tensor(LENGTHS, dtype=torch.int32)
        self.tables = torch.full((rows, 40 // block_size), -(10**9), dtype=torch.int32)
        for row, length in enumerate(LENGTHS):
            for i in range(-(-length // block_size)):
                self.tables[row, i] = block = free.pop()
                for cache in self.caches:
                    tokens = cache[block, :, : min(block_size, length - 1 - i * block_size)]
                    tokens.copy_(torch.randn(tokens.shape, generator=random))

    def attend(self, way: Way, only: slice = slice(None), **rules: Any) -> Tensor:
        """[R, heads, value_width]"""
        out = self.query.new_full((*self.query.shape[:2], self.value.shape[2]), torch.nan)[only].contiguous()
        new = (part[only] for part in (self.query, self.key, self.value))
        way(*new, *self.caches, self.tables[only], self.lengths[only], out, **{"scale": 0.2, **rules})
        return out

    def expected(
        self, scale: float = 0.2, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        """The same in float64."""
        _, heads, _ = self.query.shape
        kv_heads, block_size = self.caches[0].shape[1:3]
        answers = []
        for row, length in enumerate(LENGTHS):
            places = [(self.tables[row, i // block_size], i % block_size) for i in range(length - 1)]
            for head in range(heads):
                shared = head * kv_heads // heads
                keys, values = (
                    torch.stack([*(cache[block, shared, i] for block, i in places), new[row, shared]]).double()
                    for cache, new in zip(self.caches, (self.key, self.value), strict=True)
                )
                scores = keys @ self.query[row, head].double() * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                if window:
                    scores[: max(0, length - window)] = -torch.inf
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head, None].double()])
                answers.append(torch.softmax(scores, 0)[:length] @ values)
        return torch.stack(answers).view(len(LENGTHS), heads, -1)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"scale": 0.5, "window": 7},
        {"window": 16},
        {"softcap": 2.0},
        {"window": 1, "sinks": torch.tensor([0.5, -40.0, 40.0, 0.0]).bfloat16()},
    ],
    ids=["plain", "window and scale", "window of whole blocks", "cap", "sinks"],
)
@pytest.mark.parametrize(
    ("kv_heads", "width", "value_width", "block_size"),
    [(4, 64, 64, 8), (2, 128, 128, 4), (2, 80, 24, 8), (4, 64, 32, 1), (1, 5, 7, 40)],
)
def test_it_is_attention(
    way: Way,
    kv_heads: int,
    width: int,
    value_width: int,
    block_size: int,
    rules: dict[str, Any],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    rows = Rows(4, kv_heads, width, value_width, dtype, block_size)
    expected = rows.expected(**rules)
    found = rows.attend(way, **rules).double()
    assert (found - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("numbers", [1, 200])
def test_many_long_rows_are_copied_a_few_at_a_time(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(width=16, value_width=8)
    expected = rows.attend(plain.paged_attention_decode)
    monkeypatch.setattr(plain, "GATHERED", numbers)
    assert (rows.attend(plain.paged_attention_decode) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_the_new_keys_and_values_are_in_the_caches_afterwards_and_nothing_else_has_changed(way: Way) -> None:
    rows = Rows(width=16, value_width=8)
    before = [cache.clone() for cache in rows.caches]
    rows.attend(way)
    for cache, expected, new in zip(rows.caches, before, (rows.key, rows.value), strict=True):
        for row, length in enumerate(LENGTHS):
            expected[rows.tables[row, (length - 1) // 8], :, (length - 1) % 8] = new[row]
        assert torch.equal(cache.nan_to_num(7.0), expected.nan_to_num(7.0))


@needs_kernel
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_bits_whoever_its_neighbours_are(dtype: torch.dtype) -> None:
    rows = Rows(heads=9, kv_heads=3, dtype=dtype)
    together = rows.attend(OP.overload)
    for index in range(len(LENGTHS)):
        assert torch.equal(rows.attend(OP.overload, slice(index, index + 1))[0], together[index])


@pytest.mark.parametrize("way", WAYS)
def test_rows_share_blocks(way: Way) -> None:
    rows = Rows()
    rows.tables[4, :2] = rows.tables[3, :2]  # 17 tokens: two blocks in common, then one of its own
    expected = rows.expected()
    assert torch.allclose(rows.attend(way).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_numbers_in_any_layout_are_read(way: Way) -> None:
    rows = Rows()
    expected = rows.attend(way)
    rows.query, rows.key, rows.value = (
        part.permute(2, 0, 1).contiguous().permute(1, 2, 0) for part in (rows.query, rows.key, rows.value)
    )
    assert torch.allclose(rows.attend(way), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_a_number_stays_with_its_row(way: Way) -> None:
    rows = Rows(dtype=torch.bfloat16)
    rows.query[2, 1, 3] = torch.nan
    found = rows.attend(way)
    assert found[2, 1].isnan().all()
    assert found.isnan().sum() == 64


@pytest.mark.parametrize("way", WAYS)
def test_scores_of_any_size_have_shares(way: Way) -> None:
    rows = Rows()
    expected = rows.expected(scale=1e4)
    assert torch.allclose(rows.attend(way, scale=1e4).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_no_rows_are_no_rows(way: Way) -> None:
    assert Rows().attend(way, slice(0, 0)).shape == (0, 4, 64)


@needs_kernel
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: setattr(rows, "value", rows.value.bfloat16()), "one dtype"),
        (lambda rows: setattr(rows, "key", rows.key[:, :1]), "shapes"),
        (lambda rows: rows.lengths.__setitem__(1, 0), "row 1 has 0 tokens"),
        (lambda rows: rows.lengths.__setitem__(1, 41), "row 1 has 41 tokens"),
        (lambda rows: rows.tables.__setitem__((3, 2), BLOCKS), "row 3 names block 12 of 12"),
        (lambda rows: setattr(rows, "tables", rows.tables.long()), "int32"),
        (lambda rows: setattr(rows, "caches", [cache.mT for cache in rows.caches]), "shapes|contiguous"),
    ],
    ids=["dtype", "heads", "empty row", "row beyond its table", "no such block", "long table", "strided cache"],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(change: Callable[[Rows], Any], message: str) -> None:
    rows = Rows()
    change(rows)
    before = [cache.clone() for cache in rows.caches]
    with pytest.raises(RuntimeError, match=message):
        rows.attend(OP.overload)
    for cache, expected in zip(rows.caches, before, strict=True):
        assert torch.equal(cache.nan_to_num(7.0), expected.nan_to_num(7.0))
