"""Attention over our own keys and values, inside the Hugging Face model's own code.

A forward pass is one line of packed tokens, [1, N]: no padding, each token with its position. `AttentionInterface` is
transformers' extension point; layers call `_attend` with the new queries, keys and values, and everything else (grouped
heads, windows, caps, sinks, scales) comes with the call.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from server.attention.decode_attention import DecodeAttention, decode_attention
from server.attention.places import Move
from server.attention.store import Shape, Store
from server.attention.torch_attention import Rules
from steer_ops import DTYPES

NAME = "matsteer"
# What is read from memory in the time that a call takes: tens of microseconds, on a CPU and on a GPU.
CALL_BYTES = (800_000, 50_000_000)


class PassPlan(Protocol):
    """Where the tokens of a pass belong: `Plan`, or `StaticPlan`."""

    def attend(self, store: Store | None, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor: ...


class Attention:
    """Keys and values of all layers, and the attention of the passes inside `using`."""

    def __init__(self, device: torch.device, *, native: bool = True) -> None:
        """`native`: on a CPU a compiled kernel attends to single tokens, where that can be had."""
        self.shapes: dict[int, Shape] = {}  # of each layer, as the first pass showed them
        self.windowed: set[int] = set()  # layers that look back a limited way
        self.stores: dict[int, Store] = {}
        self.decode: DecodeAttention | None = None
        self._device = device
        self._native = native
        self._plan: PassPlan | None = None

    @property
    def token_bytes(self) -> int:
        """Memory that one token's keys and values take in all layers together."""
        return sum(shape.bytes for shape in self.shapes.values())

    @property
    def call(self) -> int:
        """How many tokens' keys and values a layer reads in the time that one call of attention more takes."""
        return CALL_BYTES[self._device.type == "cuda"] // max(
            (shape.bytes for shape in self.shapes.values()), default=1
        )

    def allocate(self, tokens: int) -> None:
        """Makes room for so many tokens in every layer that a pass has shown."""
        fits = all(shape.device.type == "cpu" and shape.dtype in DTYPES for shape in self.shapes.values())
        self.decode = decode_attention() if self._native and fits else None
        self.stores = {layer: Store.of(shape, tokens) for layer, shape in self.shapes.items()}

    def move(self, moves: Sequence[Move]) -> None:
        for move in moves:
            for store in self.stores.values():
                store.move(move)

    @contextmanager
    def using(self, plan: PassPlan) -> Iterator[None]:
        """The model's forward passes inside follow this plan."""
        self._plan = plan
        _here.attention = self
        try:
            yield
        finally:
            _here.attention = self._plan = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        """query [1, heads, N, width], key and value [1, key heads, N, width] -> [1, N, heads, value width]."""
        plan, store = self._plan, self.stores.get(layer)
        assert plan is not None, "a pass follows a plan"
        if store is None:
            self.shapes[layer] = Shape(key.shape[1], key.shape[-1], value.shape[-1], key.dtype, key.device)
            if rules.window:
                self.windowed.add(layer)
        return plan.attend(store, query[0].transpose(0, 1), key, value, rules)[None]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """What transformers calls. The mask is ours to make: it knows nothing of packed texts."""
    attention: Attention | None = getattr(_here, "attention", None)
    if attention is None:
        raise RuntimeError("this model's attention is the engine's: run it through the engine")
    layer: Any = module.layer_idx
    rules = Rules(
        scale=options.get("scaling"),
        window=options.get("sliding_window"),
        cap=options.get("softcap"),
        sinks=options.get("s_aux"),
    )
    return attention.attend(layer, query, key, value, rules), None


_here = threading.local()
AttentionInterface.register(NAME, _attend)
