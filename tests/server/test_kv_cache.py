"""Who may use whose keys and values, and that no memory is lost."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.attention.interface import Attention
from server.attention.places import Extent, Move
from server.attention.store import Shape
from server.engine.extents import Extents
from server.engine.kv_cache import KVCache
from server.engine.tape import Tape
from server.engine.types import PositionsName, Row, Sampling, Steer
from steering.columns import ColumnBank, RowSteering
from tests.server.conftest import columns

PROMPT = list(range(100, 120))


def steer(multiplier: float, positions: PositionsName = "generated", *, bank: ColumnBank | None = None) -> Steer:
    handle = (bank or BANK).add(columns(8, seed=1)) if bank or not HANDLES else HANDLES[0]
    return Steer(RowSteering.of([(handle, (multiplier, 0.0, 0.0))]), positions)


BANK = ColumnBank(device="cpu", max_tokens=1)
HANDLES = [BANK.add(columns(8, seed=1))]


def shared(first: Tape, second: Tape) -> int:
    """How many tokens of the second are taken over from the first, which was computed whole."""
    cache = KVCache(64, 4)
    assert cache.open(first, len(first.tokens))
    first.cached, first.steered = len(first.tokens), [0] * len(first.tokens)
    cache.close(first)
    assert cache.open(second, len(second.tokens))
    cache.check()
    return second.cached


def test_what_may_be_no_number_is_wiped_from_all_that_nobody_has() -> None:
    cache = KVCache(64, 2)
    held, left = text(PROMPT, Steer()), text(PROMPT[::-1], Steer())
    for tape in (held, left):
        assert cache.open(tape, len(tape.tokens))
        tape.cached, tape.steered = len(tape.tokens), [0] * len(tape.tokens)
    cache.close(left)
    cache.moves.clear()
    cache.wipe()
    cache.check()
    assert held.extent is not None
    assert all(move.source is None and move.count == move.target.size for move in cache.moves)
    wiped = sorted((move.target.start, move.target.size) for move in cache.moves)
    assert sum(size for _, size in wiped) == cache.extents.total - held.extent.size
    assert not any(
        start < held.extent.start + held.extent.size and held.extent.start < start + size for start, size in wiped
    )
    assert cache.shareable(text([*PROMPT[::-1], 1], Steer())) == 0


def text(tokens: list[int], steering: Steer, prompt: int = len(PROMPT)) -> Tape:
    return Tape(tokens, prompt, steering, Row("r", 0, tuple(tokens[:prompt]), Sampling(), steering))


def test_a_prompt_is_shared_under_any_steering_but_for_its_last_token() -> None:
    for one, other in ((Steer(), steer(1.0)), (steer(1.0), Steer()), (steer(1.0), steer(-2.0))):
        assert shared(text(PROMPT, one), text(PROMPT, other)) == len(PROMPT) - 1


def test_a_prompt_steered_itself_is_shared_under_the_same_steering_only() -> None:
    for positions in ("prompt", "all"):
        same = steer(1.0, positions), steer(1.0, positions)
        assert shared(*(text(PROMPT, one) for one in same)) == len(PROMPT) - 1
        for other in (Steer(), steer(2.0, positions), steer(1.0)):
            assert shared(text(PROMPT, steer(1.0, positions)), text(PROMPT, other)) == 0
            assert shared(text(PROMPT, other), text(PROMPT, steer(1.0, positions))) == 0


def test_generated_tokens_serve_a_longer_prompt_only_where_nothing_steered_them() -> None:
    whole = [*PROMPT, *range(10)]
    longer = [*whole, 1, 2, 3]
    assert shared(text(whole, Steer()), text(longer, Steer(), prompt=33)) == 30
    assert shared(text(whole, Steer()), text(longer, steer(1.0), prompt=33)) == 30
    assert shared(text(whole, steer(1.0)), text(longer, Steer(), prompt=33)) == len(PROMPT) - 1


def test_equal_names_and_numbers_of_another_checkpoint_are_not_the_same_steering() -> None:
    """The same slots and multipliers, but the columns were removed and loaded again."""
    bank = ColumnBank(device="cpu", max_tokens=1)
    before = steer(1.0, "all", bank=bank)
    bank.remove(before.columns.handles[0])
    after = steer(1.0, "all", bank=bank)
    assert before.columns.slots == after.columns.slots
    assert shared(text(PROMPT, before), text(PROMPT, after)) == 0


def test_what_nobody_uses_gives_way_to_what_is_needed_the_longest_unused_first() -> None:
    cache = KVCache(32, 2)
    for start in (0, 1):
        old = text([start] * 20, Steer(), prompt=20)
        cache.open(old, 32)
        old.cached, old.steered = 20, [0] * 20
        cache.close(old)
    assert cache.shareable(text([0] * 20, Steer(), prompt=20)) == 19  # a look is a use
    assert cache.open(text([5] * 20, Steer(), prompt=20), 32)
    assert cache.shareable(text([0] * 20, Steer(), prompt=20)) == 19
    assert cache.shareable(text([1] * 20, Steer(), prompt=20)) == 0
    cache.check()


def test_what_is_not_sound_is_wiped_and_never_shared() -> None:
    cache = KVCache(32, 1)
    broken = text(PROMPT, Steer())
    cache.open(broken, 20)
    broken.cached, broken.steered = 20, [0] * 20
    extent = broken.extent
    cache.close(broken, keep=False)
    assert cache.shareable(text(PROMPT, Steer())) == 0
    assert [(move.source, move.target) for move in cache.moves] == [(None, extent)]


def test_moves_are_made_in_order_and_may_overlap() -> None:
    attention = Attention(torch.device("cpu"))
    attention.shapes[0] = Shape(2, 3, 5, torch.float32, torch.device("cpu"))
    attention.allocate(64)
    store = attention.stores[0]
    keys, values = store.read(Extent(16, 16), 1, 0, 10)
    keys.copy_(torch.randn(keys.shape))
    values.copy_(torch.randn(values.shape))
    expected = keys.clone(), values.clone()
    attention.move([Move(Extent(16, 16), Extent(0, 32), 10), Move(Extent(0, 32), Extent(48, 16), 10)])
    for part, wanted in zip(store.read(Extent(48, 16), 1, 0, 10), expected, strict=True):
        assert torch.equal(part, wanted)
    attention.move([Move(None, Extent(48, 16), 16)])
    assert not any(part.any() for part in store.read(Extent(48, 16), 1, 0, 16))
    assert attention.token_bytes == 2 * (3 + 5) * 4


@settings(deadline=None)
@given(st.sampled_from([20, 32, 48, 96]), st.integers(1, 3), st.data())
def test_pieces_never_overlap_and_all_memory_comes_back(largest: int, roots: int, data: st.DataObject) -> None:
    memory = Extents(largest, roots)
    held: list[Extent] = []
    for _ in range(40):
        if held and data.draw(st.booleans()):
            memory.give(held.pop(data.draw(st.integers(0, len(held) - 1))))
        else:
            size = memory.size_for(data.draw(st.integers(1, largest)))
            assert size is not None
            if piece := memory.take(size):
                held.append(piece)
        taken = sorted(token for piece in held for token in range(piece.start, piece.start + piece.size))
        assert len(taken) == len(set(taken))
        assert len(taken) + memory.free_tokens == memory.total
    for piece in held:
        memory.give(piece)
    assert [memory.take(largest) for _ in range(roots)] == [Extent(i * largest, largest) for i in range(roots)]
    assert memory.size_for(largest + 1) is None
