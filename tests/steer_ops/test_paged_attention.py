"""Decode attention over block tables: the kernel and its reference beside the same in float64, row by row."""

import random
from collections.abc import Callable, Sequence
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
        lengths: Sequence[int] = LENGTHS,
        turned: int = 0,
        seed: int = 0,
    ) -> None:
        """turned: how many numbers of each head of queries and new keys are still to be turned."""
        random = torch.Generator().manual_seed(seed)
        rows = len(lengths)
        # As models give them: views of what their linear layers put out.
        whole = torch.randn(rows, heads * width + kv_heads * (width + value_width), generator=random).to(dtype)
        query, key, value = whole.split([heads * width, kv_heads * width, kv_heads * value_width], dim=1)
        self.query, self.key = query.view(rows, heads, width), key.view(rows, kv_heads, width)
        self.value = value.view(rows, kv_heads, value_width)
        self.turns: dict[str, Tensor] = {}
        if turned:
            cos, sin = torch.randn(2, rows, turned, generator=random).to(dtype)
            self.turns = {"cos": cos, "sin": sin}
        used = sum(-(-length // block_size) for length in lengths)
        free = torch.randperm(used + 1, generator=random).tolist()
        self.caches = [
            torch.full((used + 1, kv_heads, block_size, wide), torch.nan).to(dtype) for wide in (width, value_width)
        ]
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.tables = torch.full((rows, -(-max(40, *lengths) // block_size)), -(10**9), dtype=torch.int32)
        for row, length in enumerate(lengths):
            for i in range(-(-length // block_size)):
                self.tables[row, i] = block = free.pop()
                for cache in self.caches:
                    tokens = cache[block, :, : min(block_size, length - 1 - i * block_size)]
                    tokens.copy_(torch.randn(tokens.shape, generator=random))

    def attend(self, way: Way, only: slice = slice(None), **rules: Any) -> Tensor:
        """[R, heads, value_width]"""
        out = self.query.new_full((*self.query.shape[:2], self.value.shape[2]), torch.nan)[only].contiguous()
        new = (part[only] for part in (self.query, self.key, self.value))
        turns = {name: part[only] for name, part in self.turns.items()}
        way(*new, *self.caches, self.tables[only], self.lengths[only], out, **{"scale": 0.2, **turns, **rules})
        return out

    def turned(self) -> tuple[Tensor, Tensor]:
        """Queries and new keys as they are attended to, in float64."""
        query, key = self.query.double(), self.key.double()
        if not self.turns:
            return query, key
        return plain.rotary(query, key, self.turns["cos"].double(), self.turns["sin"].double())

    def written(self, before: list[Tensor]) -> list[Tensor]:
        """Caches that were so `before`, with the new keys and values."""
        key = plain.rotary(self.query, self.key, **self.turns)[1] if self.turns else self.key
        after = [cache.clone() for cache in before]
        for cache, new in zip(after, (key, self.value), strict=True):
            for row, length in enumerate(self.lengths.tolist()):
                block, place = divmod(length - 1, cache.shape[2])
                cache[self.tables[row, block], :, place] = new[row]
        return after

    def expected(
        self, scale: float = 0.2, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        """The same in float64."""
        _, heads, _ = self.query.shape
        kv_heads, block_size = self.caches[0].shape[1:3]
        query, key = self.turned()
        answers = []
        for row, length in enumerate(self.lengths.tolist()):
            places = [(self.tables[row, i // block_size], i % block_size) for i in range(length - 1)]
            for head in range(heads):
                shared = head * kv_heads // heads
                keys, values = (
                    torch.stack([*(cache[block, shared, i] for block, i in places), new[row, shared]]).double()
                    for cache, new in zip(self.caches, (key, self.value), strict=True)
                )
                scores = keys @ query[row, head] * scale
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                if window:
                    scores[: max(0, length - window)] = -torch.inf
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head, None].double()])
                answers.append(torch.softmax(scores, 0)[:length] @ values)
        return torch.stack(answers).view(len(self.lengths), heads, -1)


def any_rows(seed: int) -> tuple[Rows, dict[str, Any], list[int]]:
    """Rows of 1 to five blocks, of any shape and rules, turned or not; two of them share their first blocks, and the
    last ones are idle: of one token, all in one block. Also: the rules, and which rows are not idle."""
    number = random.Random(seed)
    kv_heads, groups = number.choice((1, 2, 3)), number.choice((1, 2, 5))
    width, block_size = number.choice((16, 20, 64)), number.choice((1, 4, 8, 16))
    busy, idle = number.randint(1, 5), number.randint(0, 3)
    lengths = [*(number.randint(1, 5 * block_size) for _ in range(busy)), *[1] * idle]
    rows = Rows(
        groups * kv_heads,
        kv_heads,
        width,
        number.choice((width, 24)),
        block_size=block_size,
        lengths=lengths,
        turned=number.choice((0, width, width // 4 * 2)),
        seed=seed,
    )
    one, other = number.choices(range(busy), k=2)
    shared = (min(lengths[one], lengths[other]) - 1) // block_size  # full ones, without the new token of either
    rows.tables[other, :shared] = rows.tables[one, :shared]
    rows.tables[busy:, 0] = rows.tables[-1, 0]
    rules = {
        "window": number.choice((None, number.randint(1, 4 * block_size))),
        "softcap": number.choice((None, 3.0)),
        "sinks": number.choice((None, torch.randn(groups * kv_heads))),
    }
    return rows, rules, list(range(busy))


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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(12))
def test_any_rows_get_their_attention_and_nothing_else_is_touched(seed: int, way: Way) -> None:
    rows, rules, busy = any_rows(seed)
    before = [cache.clone() for cache in rows.caches]
    expected = rows.expected(**rules)[busy]
    found = rows.attend(way, **rules).double()
    assert (found[busy] - expected).norm() / expected.norm() < 2e-6
    for cache, written in zip(rows.caches, rows.written(before), strict=True):
        idle = set(rows.tables[len(busy) :, 0].tolist())
        others = [block for block in range(len(cache)) if block not in idle]
        assert torch.allclose(cache[others], written[others], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("turned", [64, 16])
def test_queries_and_new_keys_are_turned(turned: int, dtype: torch.dtype, tolerance: float, way: Way) -> None:
    rows = Rows(dtype=dtype, turned=turned)
    before = [cache.clone() for cache in rows.caches]
    found, expected = rows.attend(way).double(), rows.expected()
    assert (found - expected).norm() / expected.norm() < tolerance
    for cache, written in zip(rows.caches, rows.written(before), strict=True):
        assert torch.allclose(cache, written, rtol=tolerance * 10, atol=tolerance * 10, equal_nan=True)
    rows.turns = {}
    assert (rows.attend(way).double() - expected).norm() / expected.norm() > 0.1, "it would be noticed"


@needs_kernel
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda turns: turns.pop("sin"), "come together"),
        (lambda turns: turns.update(sin=turns["sin"][:, :8]), "fit each other"),
        (lambda turns: turns.update({name: part[:, :7].contiguous() for name, part in turns.items()}), "even"),
        (lambda turns: turns.update({name: part.repeat(1, 2) for name, part in turns.items()}), "no wider"),
        (lambda turns: turns.update({name: part.bfloat16() for name, part in turns.items()}), "dtypes"),
    ],
    ids=["no sines", "fewer sines", "odd", "wider than a head", "dtype"],
)
def test_turns_that_do_not_fit_are_refused(change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    rows = Rows(turned=64)
    change(rows.turns)
    with pytest.raises(RuntimeError, match=message):
        rows.attend(OP.overload)


@pytest.mark.parametrize("numbers", [1, 200])
def test_many_long_rows_are_copied_a_few_at_a_time(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(width=16, value_width=8, turned=16)
    expected = rows.attend(plain.paged_attention_decode)
    monkeypatch.setattr(plain, "GATHERED", numbers)
    assert (rows.attend(plain.paged_attention_decode) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_the_new_keys_and_values_are_in_the_caches_afterwards_and_nothing_else_has_changed(way: Way) -> None:
    rows = Rows(width=16, value_width=8)
    before = [cache.clone() for cache in rows.caches]
    rows.attend(way)
    for cache, expected in zip(rows.caches, rows.written(before), strict=True):
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
