"""What a token attends to: its own sequence, wherever its blocks lie, no further than it may see, beside any others."""

import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from server.attention import metadata as module
from server.attention.kv_pool import SCRATCH_BYTES, KVOps, KVPool, KVShape
from server.attention.layout import ChunkLayout
from server.attention.metadata import SCORE_BYTES, AttentionMetadata, AttentionParams, Prefill
from server.attention.static import DecodeMetadata, MixedMetadata, StaticMetadata
from steer_ops import plain

CPU = torch.device("cpu")
HEADS, KEY_HEADS, WIDTH, VALUE_WIDTH, BLOCKS, SIZE = 4, 2, 8, 6, 40, 4
PARAMS = [
    AttentionParams(),
    AttentionParams(window=5),
    AttentionParams(scale=0.3, softcap=2.0),
    AttentionParams(window=3, sinks=torch.tensor([0.5, -2.0, 1.0, 0.0], dtype=torch.float64)),
]


class World:
    """Sequences whose keys and values are known, in blocks of a pool that is otherwise full of NaN."""

    def __init__(
        self, chunks: list[tuple[int, int]], seed: int = 0, *, ops: KVOps | None = None, turned: int = 0
    ) -> None:
        """chunks: start and stop of each sequence's new tokens. turned: how many numbers of each head of queries and
        new keys are left to the attention to turn."""
        torch.manual_seed(seed)
        shape = KVShape(KEY_HEADS, WIDTH, VALUE_WIDTH, torch.float64, CPU)
        self.pool = KVPool.of(shape, BLOCKS, SIZE, ops or KVOps())
        self.pool.keys.fill_(torch.nan)
        self.pool.values.fill_(torch.nan)
        free = list(range(BLOCKS))
        random.Random(seed).shuffle(free)
        self.layouts, self.keys, self.values = [], [], []
        for start, stop in chunks:
            table = [free.pop() for _ in range(-(-stop // SIZE))]
            keys = torch.randn(stop, KEY_HEADS, WIDTH, dtype=torch.float64)
            values = torch.randn(stop, KEY_HEADS, VALUE_WIDTH, dtype=torch.float64)
            for at in range(start):
                self.pool.keys[table[at // SIZE], :, at % SIZE] = keys[at]
                self.pool.values[table[at // SIZE], :, at % SIZE] = values[at]
            self.layouts.append(ChunkLayout(table, start, stop))
            self.keys.append(keys)
            self.values.append(values)
        tokens = sum(map(len, self.layouts))
        self.query = torch.randn(tokens, HEADS, WIDTH, dtype=torch.float64)
        spans = [slice(layout.start, layout.end) for layout in self.layouts]
        new = [
            torch.cat([one[span] for one, span in zip(all_, spans, strict=True)]) for all_ in (self.keys, self.values)
        ]
        self.key, self.value = (part.transpose(0, 1)[None] for part in new)
        self.rotary: tuple[Tensor, Tensor] | None = None
        self.asked = self.query
        if turned:
            cos, sin = torch.randn(2, tokens, turned, dtype=torch.float64)
            self.rotary = cos, sin
            self.asked, keys = plain.rotary(self.query, new[0], cos, sin)
            for one, span, part in zip(self.keys, spans, keys.split(list(map(len, self.layouts))), strict=True):
                one[span] = part

    def expected(self, params: AttentionParams) -> Tensor:
        """Token by token, head by head."""
        answers, row = [], 0
        for layout, keys, values in zip(self.layouts, self.keys, self.values, strict=True):
            for at in range(layout.start, layout.end):
                for head in range(HEADS):
                    shared = head * KEY_HEADS // HEADS
                    scale = WIDTH**-0.5 if params.scale is None else params.scale
                    scores = keys[: at + 1, shared] @ self.asked[row, head] * scale
                    if params.softcap:
                        scores = params.softcap * torch.tanh(scores / params.softcap)
                    if params.window:
                        scores[: max(0, at + 1 - params.window)] = -torch.inf
                    if params.sinks is not None:
                        scores = torch.cat([scores, params.sinks[head, None]])
                    answers.append(torch.softmax(scores, 0)[: at + 1] @ values[: at + 1, shared])
                row += 1
        return torch.stack(answers).view(row, HEADS, VALUE_WIDTH)

    def written(self) -> None:
        """The new keys and values lie where they belong."""
        for layout, keys, values in zip(self.layouts, self.keys, self.values, strict=True):
            assert layout.block_table is not None
            for at in range(layout.end):
                block, offset = layout.block_table[at // SIZE], at % SIZE
                assert torch.equal(self.pool.keys[block, :, offset], keys[at])
                assert torch.equal(self.pool.values[block, :, offset], values[at])


@pytest.mark.parametrize(
    ("by_length", "kernels"),
    [(True, ()), (False, ()), (True, ("varlen",)), (True, ("prefill",)), (True, ("varlen", "prefill"))],
    ids=["each row to its length", "by blocks", "all chunks in one call", "in blocks in one call", "by either"],
)
@pytest.mark.parametrize("params", PARAMS, ids=["plain", "window", "softcap", "sinks"])
@pytest.mark.parametrize(
    "chunks",
    [
        [(0, 7)],
        [(0, 9), (5, 6), (0, 4)],
        [(6, 7), (0, 1), (12, 13)],
        [(3, 11), (8, 9)],
        [(0, 5), (9, 10), (4, 17), (2, 3), (0, 1)],
    ],
    ids=["a prompt", "prompts and a decode", "decodes", "a chunk beside a decode", "all kinds in any order"],
)
def test_every_token_gets_its_own_attention(
    chunks: list[tuple[int, int]], params: AttentionParams, by_length: bool, kernels: tuple[str, ...]
) -> None:
    calls: list[tuple[str, int]] = []
    references = {"varlen": plain.varlen_attention, "prefill": plain.paged_attention_prefill}

    def counted(kernel: str) -> Callable[..., Any]:
        def attend(query: Tensor, *rest: Any, **options: Any) -> Any:
            calls.append((kernel, len(query)))
            return references[kernel](query, *rest, **options)

        return attend

    world = World(chunks, ops=KVOps(**{kernel: counted(kernel) for kernel in kernels}))
    metadata = AttentionMetadata.of(world.layouts, CPU, SIZE, by_length=by_length)
    found = metadata.attend(world.pool, world.query, world.key, world.value, params)
    assert torch.allclose(found, world.expected(params), atol=1e-6)
    world.written()
    prompts = sum(stop - start for start, stop in chunks if stop - start > 1)
    able = [kernel for kernel in kernels if kernel == "prefill" or not params.rules]
    assert calls == [(kernel, prompts) for kernel in able[:1] if prompts]


@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_any_chunks_get_their_attention_turned_or_not(seed: int, by_length: bool) -> None:
    number = random.Random(seed)
    chunks = []
    for _ in range(number.randint(1, 5)):
        start = number.choice((0, number.randint(0, 3 * SIZE)))
        chunks.append((start, start + number.choice((1, 1, number.randint(1, 3 * SIZE)))))
    ops = KVOps(
        varlen=number.choice((None, plain.varlen_attention)),
        prefill=number.choice((None, plain.paged_attention_prefill)),
    )
    world = World(chunks, seed, ops=ops, turned=number.choice((WIDTH, WIDTH // 2, 0)))
    params = replace(number.choice(PARAMS), rotary=world.rotary)
    scratch_bytes = number.choice((SCRATCH_BYTES, 3000, 1))
    metadata = AttentionMetadata.of(world.layouts, CPU, SIZE, by_length=by_length, scratch_bytes=scratch_bytes)
    found = metadata.attend(world.pool, world.query, world.key, world.value, params)
    assert torch.allclose(found, world.expected(params), atol=1e-6)
    world.written()


class Gathers:
    """How many blocks each gathers, of which nothing is left when the next one is made."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self._left: list[weakref.ref[Tensor]] = []

    def of(self, gather: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def counted(*args: Any) -> tuple[Tensor, Tensor]:
            assert all(left() is None for left in self._left), "the keys and values of a call before are still there"
            gathered = gather(*args)
            self.blocks.append(len(args[-1]))
            self._left = [weakref.ref(part) for part in gathered]
            return gathered

        return counted


MANY = [(6, 9), (0, 7), (40, 43), (5, 6), (20, 31), (13, 18)]  # in blocks: 3, 2, 11, a decode, 8, 5


@pytest.mark.parametrize(
    ("window", "most", "calls"),
    [
        (None, 100, [29]),
        (None, 16, [16, 13]),
        (None, 5, [5, 11, 8, 5]),
        (None, 2, [3, 11, 8, 5]),
        (5, 100, [14]),
        (5, 5, [5, 2, 4, 3]),
    ],
)
def test_calls_for_all_chunks_gather_no_more_than_they_may_or_one_texts_keys(
    window: int | None, most: int, calls: list[int]
) -> None:
    gathers = Gathers()
    world = World(MANY, ops=KVOps(gather=gathers.of(plain.gather_kv), varlen=plain.varlen_attention))
    block = world.pool.keys[0].nbytes + world.pool.values[0].nbytes
    metadata = AttentionMetadata.of(world.layouts, CPU, SIZE, by_length=True, scratch_bytes=most * block)
    params = AttentionParams(window=window)
    for _ in range(2):  # layers
        found = metadata.attend(world.pool, world.query, world.key, world.value, params)
        assert torch.allclose(found, world.expected(params), atol=1e-6)
    assert gathers.blocks == 2 * calls
    world.written()


@pytest.mark.parametrize("params", PARAMS, ids=["plain", "window", "softcap", "sinks"])
@pytest.mark.parametrize("pairs", [60, 7, 1])
def test_without_a_kernel_chunks_are_read_in_pieces_of_so_many_scores(
    params: AttentionParams, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathers, pieces = Gathers(), []
    gather, attend = KVPool.gather, module.attend

    def counted(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *rest: Any) -> Tensor:
        tokens = query.shape[2] * KEY_HEADS // HEADS
        pieces.append((tokens, keys.shape[2]))
        held = sum(one.nbytes for one in metadata._masks.values())
        assert held <= metadata.scratch_bytes
        if mask is not None:
            assert mask.nbytes <= pairs * HEADS * SCORE_BYTES
        return attend(query, keys, values, mask, *rest)

    monkeypatch.setattr(KVPool, "gather", gathers.of(gather))
    monkeypatch.setattr(module, "attend", counted)
    world = World(MANY)
    metadata = AttentionMetadata.of(world.layouts, CPU, SIZE, by_length=True, scratch_bytes=pairs * HEADS * SCORE_BYTES)
    for _ in range(2):
        found = metadata.attend(world.pool, world.query, world.key, world.value, params)
        assert torch.allclose(found, world.expected(params), atol=1e-6)
    assert all(tokens * keys <= pairs or tokens == 1 for tokens, keys in pieces)
    assert sum(tokens for tokens, _ in pieces) == 2 * sum(stop - start for start, stop in MANY if stop - start > 1)
    few = 2 * len([chunk for chunk in MANY if chunk[1] - chunk[0] > 1])
    assert len(pieces) > few, "some are cut"
    if params.window:
        assert max(keys for _, keys in pieces) <= pairs + params.window, "no piece reads what none of its tokens sees"
    assert len(gathers.blocks) == 2 * 4, "once for each chunk that follows a prefix, whatever the pieces"


@pytest.mark.parametrize(
    ("window", "counts"), [(None, [1] * 11), (3, [6, 5]), (30, [1] * 11), (2, [6, 5]), (1, [7, 4])]
)
def test_pieces_are_as_large_as_what_their_tokens_see_allows(window: int | None, counts: list[int]) -> None:
    """Of 11 new tokens after 20, 60 scores at a time."""
    pieces = list(Prefill(5, 16, 31, None).pieces(window, 60))
    assert [piece.count for piece in pieces] == counts
    assert [piece.lo for piece in pieces] == [5 + sum(counts[:index]) for index in range(len(counts))]
    assert [piece.context_len for piece in pieces] == [15 + piece.hi for piece in pieces]


@pytest.mark.parametrize(("chunks", "calls"), [([(6, 7), (0, 1)], 0), ([(6, 7), (0, 4)], 1)], ids=["decodes", "mixed"])
def test_single_tokens_are_turned_where_they_are_attended_to(
    chunks: list[tuple[int, int]], calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    turned: list[int] = []

    def counted(query: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        turned.append(len(query))
        return plain.rotary(query, *rest)

    monkeypatch.setattr("server.attention.metadata.rotary", counted)
    world = World(chunks, turned=WIDTH)
    params = AttentionParams(rotary=world.rotary)
    found = AttentionMetadata.of(world.layouts, CPU, SIZE, by_length=True).attend(
        world.pool, world.query, world.key, world.value, params
    )
    assert torch.allclose(found, world.expected(params), atol=1e-6)
    assert turned == [len(world.query)] * calls


@pytest.mark.parametrize("turned", [0, WIDTH])
@pytest.mark.parametrize("params", PARAMS, ids=["plain", "window", "softcap", "sinks"])
@pytest.mark.parametrize(
    ("chunks", "metadata"),
    [
        ([(6, 7), (0, 1), (12, 13)], DecodeMetadata.empty(8, 4, CPU)),
        ([(6, 7), (0, 1), (12, 13)], MixedMetadata.empty(5, 4, 8, SIZE, CPU)),
        ([(6, 7), (12, 13), (0, 7), (3, 13), (9, 10)], MixedMetadata.empty(5, 4, 24, SIZE, CPU)),
        ([(2, 5), (0, 5)], MixedMetadata.empty(2, 3, 8, SIZE, CPU)),
    ],
    ids=["decodes", "decodes in a larger pass", "decodes and chunks", "no room is left"],
)
def test_in_static_shapes_tokens_get_the_same_and_idle_ones_write_where_nobody_reads(
    chunks: list[tuple[int, int]], metadata: StaticMetadata, params: AttentionParams, turned: int
) -> None:
    world = World(chunks, turned=turned, ops=KVOps(prefill=plain.paged_attention_prefill))
    free = set(range(BLOCKS)).difference(*(layout.block_table or () for layout in world.layouts))
    idle, count = free.pop(), len(world.query)
    metadata.fill(world.layouts, torch.arange(count), idle)
    assert metadata.ids[0, :count].tolist() == list(range(count))
    assert metadata.positions[0, :count].tolist() == [at for start, stop in chunks for at in range(start, stop)]
    if metadata.keep is not None:
        assert metadata.keep[: len(chunks)].tolist() == [
            sum(b - a for a, b in chunks[: i + 1]) - 1 for i in range(len(chunks))
        ]
    more = metadata.ids.shape[1] - count
    query = torch.cat([world.query, torch.randn(more, HEADS, WIDTH, dtype=torch.float64)])
    key, value = (
        torch.cat([part, torch.randn(1, KEY_HEADS, more, part.shape[-1], dtype=torch.float64)], dim=2)
        for part in (world.key, world.value)
    )
    if world.rotary:
        cos, sin = (torch.cat([part, torch.randn(more, turned, dtype=torch.float64)]) for part in world.rotary)
        params = replace(params, rotary=(cos, sin))
    metadata.begin()
    found = metadata.attend(world.pool, query, key, value, params)
    assert torch.allclose(found[:count], world.expected(params), atol=1e-6)
    assert found.isfinite().all()
    world.written()
    written = [block for block in free if not world.pool.keys[block].isnan().all()]
    assert not written


def test_texts_that_are_not_kept_are_computed_from_what_they_bring() -> None:
    world = World([(0, 5), (0, 3)])
    layouts = [ChunkLayout(None, 0, 5), ChunkLayout(None, 0, 3)]
    metadata = AttentionMetadata.of(layouts, CPU, 1, by_length=True)
    for params in PARAMS:
        found = metadata.attend(None, world.query, world.key, world.value, params)
        assert torch.allclose(found, world.expected(params), atol=1e-6)
