"""Which rows are attended to in one call, and that it makes no difference to what they get."""

import pytest
import torch

from server.attention.places import Chunk, Extent
from server.attention.plan import Plan
from server.attention.store import Shape, Store
from server.attention.torch_attention import Rules

SIZE, HEADS, WIDTH = 64, 2, 8
CPU = torch.device("cpu")


def steps(lengths: list[int]) -> list[Chunk]:
    """The next token of each of some texts, whose extents are neighbours."""
    return [Chunk(Extent(index * SIZE, SIZE), length - 1, length) for index, length in enumerate(lengths)]


@pytest.mark.parametrize(
    ("lengths", "call", "rows"),
    [
        ([9, 9, 9], 0, [3]),
        ([9, 10, 9], 0, [1, 1, 1]),
        ([9, 10, 9], 2, [3]),
        ([5, 6, 60, 5, 6], 50, [2, 1, 2]),
        ([5, 6, 60, 5, 6], 1000, [5]),
        ([60, 5], 54, [1, 1]),
        ([60, 5], 55, [2]),
    ],
)
def test_a_row_joins_its_neighbours_unless_that_reads_more_than_a_call_takes(
    lengths: list[int], call: int, rows: list[int]
) -> None:
    pieces = Plan.of(steps(lengths), CPU, call).pieces
    assert [piece.rows for piece in pieces] == rows
    assert [length for piece in pieces for length in piece.lengths] == lengths


@pytest.mark.parametrize("window", [None, 7])
def test_what_a_row_gets_does_not_depend_on_its_neighbours(window: int | None) -> None:
    lengths = [5, 6, 60, 5, 33]
    store = Store.of(Shape(HEADS, WIDTH, WIDTH, torch.float64, CPU), SIZE * len(lengths))
    rules = Rules(None, window, None, None)
    query = torch.randn(len(lengths), 2 * HEADS, WIDTH, dtype=torch.float64)
    fresh = torch.randn(1, HEADS, len(lengths), WIDTH, dtype=torch.float64)
    every = torch.arange(SIZE * len(lengths) * HEADS)
    noise = torch.randn(HEADS, SIZE * len(lengths), WIDTH, dtype=torch.float64)
    store.write(every, noise, noise.flip(0))
    found = [Plan.of(steps(lengths), CPU, call).attend(store, query, fresh, fresh, rules) for call in (0, 50, 10**6)]
    assert torch.allclose(found[0], found[1])
    assert torch.allclose(found[0], found[2])
    alone = Plan.of(steps(lengths)[2:3], CPU).attend(store, query[2:3], fresh[:, :, 2:3], fresh[:, :, 2:3], rules)
    assert torch.allclose(found[2][2:3], alone)
