"""Copies of blocks: those that do not depend on each other at once, in all layers, and the others in order."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from server.attention.backend import Attention
from server.attention.kv_pool import KVOps, KVPool, KVShape
from server.attention.layout import BlockCopy, independent_copies
from steer_ops import COPY_KV, plain

CPU = torch.device("cpu")
NUM_BLOCKS = 6


def attention(**ops: Any) -> Attention:
    """Of two layers, whose heads have different widths; of whatever numbers, some of them none."""
    made = Attention(CPU)
    for layer, width in ((0, 3), (1, 5)):
        pool = KVPool.of(KVShape(2, width, 4, torch.float32, CPU), NUM_BLOCKS, 4, KVOps(**ops))
        for cache in (pool.keys, pool.values):
            cache.normal_()[3] = torch.nan
        made.pools[layer] = pool
    return made


def caches(attention: Attention) -> list[Tensor]:
    return [cache for pool in attention.pools.values() for cache in (pool.keys, pool.values)]


@given(st.lists(st.builds(BlockCopy, *[st.integers(0, NUM_BLOCKS - 1)] * 2), max_size=8))
def test_copies_leave_what_they_leave_one_after_the_other(copies: list[BlockCopy]) -> None:
    made = attention()
    expected = [cache.clone() for cache in caches(made)]
    for cache in expected:
        for copy in copies:
            cache[copy.target] = cache[copy.source].clone()
    made.copy(copies)
    for found, wanted in zip(caches(made), expected, strict=True):
        assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("copies", "calls"),
    [
        ([], 0),
        ([BlockCopy(1, 1)], 0),
        ([BlockCopy(0, 1)], 1),
        ([BlockCopy(0, target) for target in range(1, NUM_BLOCKS)], 1),
        ([BlockCopy(0, 1), BlockCopy(1, 2)], 2),
        ([BlockCopy(0, 1), BlockCopy(2, 0)], 2),
        ([BlockCopy(0, 1), BlockCopy(2, 1), BlockCopy(3, 4)], 2),
    ],
    ids=["none", "itself", "one", "many of one", "a copy of a copy", "what was copied is written to", "twice to one"],
)
def test_all_that_can_be_made_at_once_are_one_call_for_all_layers(copies: list[BlockCopy], calls: int) -> None:
    seen = []

    def counted(caches: list[Tensor], blocks: Tensor) -> None:
        seen.append(len(caches))
        plain.copy_kv(caches, blocks)

    attention(copy=counted).copy(copies)
    assert seen == [4] * calls
    assert [copy for part in independent_copies(copies) for copy in part] == [
        copy for copy in copies if copy.source != copy.target
    ]


def test_pools_copy_with_the_kernel_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = partial(plain.copy_kv)
    monkeypatch.setitem(COPY_KV._chosen, ("cpu", torch.float32), kernel)
    assert KVOps.of(KVShape(2, 3, 4, torch.float32, CPU), 4).copy is kernel
