"""Attention over our own keys and values, inside the Hugging Face model's own code.

A forward pass is one line of packed tokens, [1, N]: no padding, each token with its position. `AttentionInterface` is
transformers' extension point; layers call `_attend` with the new queries, keys and values, and everything else (grouped
heads, windows, caps, sinks, scales) comes with the call.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from server.attention.kv_pool import SCRATCH_BYTES, KVOps, KVPool, KVShape
from server.attention.layout import BlockCopy, ChunkLayout, independent_copies
from server.attention.metadata import AttentionMetadata, AttentionParams
from server.attention.static import ForwardMetadata
from steer_ops import PAGED_ATTENTION_DECODE
from steer_ops.layers import takes_rotary
from steering.bank import upload

NAME = "matsteer"


class Attention:
    """Keys and values of all layers, and the attention of the passes inside `forward_context`."""

    def __init__(self, device: torch.device, *, native: bool = True) -> None:
        """`native`: kernels write and attend, where they can be had."""
        self.device = device
        self.shapes: dict[int, KVShape] = {}  # of each layer, as the first pass showed them
        self.windowed: set[int] = set()  # layers that look back a limited way
        self.pools: dict[int, KVPool] = {}
        self.block_size = 1
        self.native = native
        self.by_length = False  # whether a kernel attends to single tokens, each row to its own length
        self.scratch_bytes = SCRATCH_BYTES  # of `AttentionMetadata`
        self._metadata: ForwardMetadata | None = None

    @property
    def token_bytes(self) -> int:
        """Memory that one token's keys and values take in all layers together."""
        return sum(shape.bytes for shape in self.shapes.values())

    @property
    def can_read_blocks(self) -> bool:
        """Whether there is a kernel that reads keys and values where they lie."""
        shapes = self.shapes.values()
        return self.native and all(PAGED_ATTENTION_DECODE.has_kernel(one.device, one.dtype) for one in shapes)

    @property
    def prefills_in_blocks(self) -> bool:
        """Whether all layers attend to chunks where their keys and values lie, however those are divided."""
        return all(pool.ops.prefill is not None for pool in self.pools.values())

    @property
    def gathered_tokens(self) -> int:
        """How many tokens' keys and values are gathered at a time, or those of one text, for chunks of many that are
        attended to in one call; 0: each chunk is attended to alone."""
        sizes = [shape.bytes for layer, shape in self.shapes.items() if self.pools[layer].ops.varlen]
        return self.scratch_bytes // min(sizes) if sizes else 0

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Makes room for so many blocks in every layer that a pass has shown."""
        self.block_size = block_size
        self.pools = {}
        for layer, shape in self.shapes.items():
            ops = KVOps.of(shape, block_size) if self.native else KVOps()
            self.pools[layer] = KVPool.of(shape, num_blocks, block_size, ops)
        self.by_length = all(pool.ops.by_length for pool in self.pools.values())

    def metadata(self, chunks: Sequence[ChunkLayout]) -> AttentionMetadata:
        """Of a pass of these chunks, in the order of their tokens."""
        return AttentionMetadata.of(
            chunks, self.device, self.block_size, by_length=self.by_length, scratch_bytes=self.scratch_bytes
        )

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """In order: of all layers, those at once that may be."""
        if not copies:
            return
        caches: dict[tuple[torch.device, Any], list[Tensor]] = {}
        for pool in self.pools.values():
            caches.setdefault((pool.keys.device, pool.ops.copy), []).extend((pool.keys, pool.values))
        for part in independent_copies(copies):
            blocks = np.array([(copy.source, copy.target) for copy in part], dtype=np.int64)
            for (device, copy_kv), there in caches.items():
                copy_kv(there, upload(blocks, device))

    @contextmanager
    def forward_context(self, metadata: ForwardMetadata) -> Iterator[None]:
        """The model's forward passes inside follow this."""
        self._metadata = metadata
        _context.attention = self
        try:
            yield
        finally:
            _context.attention = self._metadata = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams) -> Tensor:
        """query [1, heads, N, width], key and value [1, key heads, N, width] -> [1, N, heads, value width]."""
        metadata, pool = self._metadata, self.pools.get(layer)
        assert metadata is not None, "a pass has its metadata"
        if pool is None:
            heads, groups = key.shape[1], query.shape[1] // key.shape[1]
            self.shapes[layer] = KVShape(heads, key.shape[-1], value.shape[-1], key.dtype, key.device, groups)
            if params.window:
                self.windowed.add(layer)
        return metadata.attend(pool, query[0].transpose(0, 1), key, value, params)[None]


@takes_rotary
def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers calls. It does not know that sequences share the line: its `attention_mask` is ignored."""
    attention: Attention | None = getattr(_context, "attention", None)
    if attention is None:
        raise RuntimeError("this model's attention is the engine's: run it through the engine")
    layer: Any = module.layer_idx
    params = AttentionParams(
        scale=options.get("scaling"),
        window=options.get("sliding_window"),
        softcap=options.get("softcap"),
        sinks=options.get("s_aux"),
        rotary=options.get("rotary"),
    )
    return attention.attend(layer, query, key, value, params), None


_context = threading.local()
AttentionInterface.register(NAME, _attend)
