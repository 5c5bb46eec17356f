"""The ops: what each computes, its schema, and the numbers that its kernels are tried on."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steer_ops import plain
from steer_ops.registry import Example, Op


class Heads(NamedTuple):
    """Of attention: what its kernels are compiled for."""

    key_heads: int = 2
    groups: int = 2  # query heads that share a key head
    width: int = 64
    value_width: int = 64
    block_size: int = 4  # tokens

    @property
    def scale(self) -> float:
        """With which scores of random numbers are as far apart at any width."""
        return 1.6 / math.sqrt(self.width)


LONG = 250  # tokens that kernels read in parts
USUAL, ODD = Heads(), Heads(width=24, value_width=8)


def paged_attention_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> None:
    """Decode attention: one new token in each of R rows, over the keys and values of its own row, in blocks.

    Turns queries and new keys (`rotary`) where `cos` and `sin` are given. Writes each new key and value into the
    caches, at position `context_lens - 1` of its row, then attends over the positions 0 to `context_lens - 1`, or the
    last `window` of them. Computed in float32. With a kernel no row is read further than its length; on a CPU what a
    row gets is then the same in every bit beside any other rows.

    query [R, heads, width], key [R, kv_heads, width], value [R, kv_heads, value_width]: of the new tokens; `heads /
    kv_heads` query heads share a key head. key_cache [num_blocks, kv_heads, block_size, width], value_cache
    [num_blocks, kv_heads, block_size, value_width]: contiguous, written to. block_tables [R, max_blocks] int32: the
    blocks of each row; entries beyond them are not read. context_lens [R] int32: tokens of each row, the new one
    included, at least 1. out [R, heads, value_width]: contiguous, written to. scale: of scores. softcap: scores become
    softcap * tanh(score / softcap). sinks [heads], of any dtype: a score that takes its share and gives nothing. cos
    and sin [R, turned]: both or none.

    All tensors but the tables, lengths and sinks have one dtype. Kernels raise RuntimeError where shapes or dtypes do
    not fit, on a CPU also where lengths or blocks do not.
    """
    PAGED_ATTENTION_DECODE.for_tensor(query)(
        query,
        key,
        value,
        key_cache,
        value_cache,
        block_tables,
        context_lens,
        out,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        cos=cos,
        sin=sin,
    )


def _paged_attention_examples(dtype: torch.dtype, heads: Heads | None = None) -> Iterator[Example]:
    random = torch.Generator().manual_seed(0)
    for sizes in (heads,) if heads else (USUAL, ODD):
        key_heads, groups, width, value_width, block = sizes
        lengths = torch.tensor([2 * block + 1, 1, block], dtype=torch.int32)
        tables = torch.tensor([[3, 0, 2], [5, -1, -1], [1, -1, -1]], dtype=torch.int32)
        shapes = (
            (3, key_heads * groups, width), (3, key_heads, width), (3, key_heads, value_width),
            (6, key_heads, block, width), (6, key_heads, block, value_width),
        )  # fmt: skip
        tensors = [torch.randn(*shape, generator=random).to(dtype) for shape in shapes]
        args = *tensors, tables, lengths, tensors[0].new_zeros(3, key_heads * groups, value_width)
        some, whole = (
            dict(zip(("cos", "sin"), torch.randn(2, 3, turned, generator=random).to(dtype), strict=True))
            for turned in (width // 4 * 2, width // 2 * 2)
        )
        rules = _rules(sizes, random)
        if heads is None:
            yield args, {"scale": sizes.scale}
            yield args, {"scale": sizes.scale, **whole}
        yield args, {"scale": sizes.scale, **rules, **(some if heads is None else whole)}
        blocks = -(-LONG // block)
        caches = (torch.randn(blocks, *cache.shape[1:], generator=random).to(dtype) for cache in tensors[3:])
        table = torch.randperm(blocks, generator=random, dtype=torch.int32)[None]
        length = torch.tensor([LONG], dtype=torch.int32)
        yield (
            (*(part[:1] for part in tensors[:3]), *caches, table, length, args[-1][:1].clone()),
            {"scale": sizes.scale},
        )


def _rules(heads: Heads, random: torch.Generator) -> dict[str, Any]:
    sinks = torch.randn(heads.key_heads * heads.groups, generator=random)
    return {"window": max(1, heads.block_size - 1), "softcap": 2.0, "sinks": sinks}


PAGED_ATTENTION_DECODE = Op(
    "paged_attention_decode(Tensor query, Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor block_tables, Tensor context_lens, Tensor(c!) out, *, float scale, int? window=None, float? softcap=None, "
    "Tensor? sinks=None, Tensor? cos=None, Tensor? sin=None) -> ()",
    plain.paged_attention_decode,
    _paged_attention_examples,
)


def paged_attention_prefill(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    out: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Attention of chunks of C texts, each over all keys of its own text up to itself, which are in the caches.

    query [N, heads, width]: the tokens of the chunks, one chunk after the other; query_starts [C + 1] int32: where each
    begins, then where the last one ends. What lies before and behind has no chunk, and its answers stay as they are. A
    chunk may have no tokens. context_lens [C] int32: the tokens of each text up to the last of its chunk. Caches,
    block_tables [C, blocks], window, softcap and sinks as for `paged_attention_decode`. Writes to out [N, heads,
    value_width].
    """
    PAGED_ATTENTION_PREFILL.for_tensor(query)(
        query,
        key_cache,
        value_cache,
        block_tables,
        query_starts,
        context_lens,
        out,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )


def _prefill_examples(dtype: torch.dtype, heads: Heads | None = None) -> Iterator[Example]:
    """Chunks that begin their texts and that do not, of one token and none; with tiles of keys that all of a program's
    tokens see, some do and none does, and more tokens than a program has."""
    random = torch.Generator().manual_seed(0)
    for sizes in (heads,) if heads else (USUAL, ODD):
        key_heads, groups, width, value_width, block = sizes
        counts, lengths = (150, 1, 0, 3, 7), (LONG, 1, 0, LONG - 50, 7)
        used = [-(-length // block) for length in lengths]
        tables = torch.full((len(used), max(used)), -1, dtype=torch.int32)
        free = torch.randperm(sum(used), generator=random, dtype=torch.int32)
        for row, own in enumerate(torch.split(free, used)):
            tables[row, : len(own)] = own
        starts = torch.tensor([0, *counts]).cumsum(0).int()
        shapes = (
            (sum(counts) + 2, key_heads * groups, width),
            (sum(used), key_heads, block, width), (sum(used), key_heads, block, value_width),
        )  # fmt: skip
        query, key_cache, value_cache = (torch.randn(*shape, generator=random).to(dtype) for shape in shapes)
        out = query.new_zeros(*query.shape[:2], value_width)
        args = query, key_cache, value_cache, tables, starts, torch.tensor(lengths, dtype=torch.int32), out
        yield args, {"scale": sizes.scale}
        yield args, {"scale": sizes.scale, **_rules(sizes, random), "window": LONG - 100}


PAGED_ATTENTION_PREFILL = Op(
    "paged_attention_prefill(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_tables, "
    "Tensor query_starts, Tensor context_lens, Tensor(a!) out, *, float scale, int? window=None, "
    "float? softcap=None, Tensor? sinks=None) -> ()",
    plain.paged_attention_prefill,
    _prefill_examples,
)


def varlen_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    key_lens: Tensor,
    most_queries: int,
    most_keys: int,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Causal attention of several texts of which the last tokens are new, in one call.

    query [Q, heads, width]: the new tokens of S texts, one text after the other; query_starts [S + 1] int32: where each
    begins, then Q. keys [K, kv_heads, width], values [K, kv_heads, value_width]: those of text i are the `key_lens[i]`
    tokens from `key_starts[i]` on; the rest may be anything. key_starts [S + 1] int32 (the last entry says nothing),
    key_lens [S] int32. most_queries and most_keys: of one text. The last new token of a text sees all its keys, or the
    last `window` of them; each one before it, one fewer. -> [Q, heads, value_width]
    """
    found: Tensor = VARLEN_ATTENTION.for_tensor(query)(
        query,
        keys,
        values,
        query_starts,
        key_starts,
        key_lens,
        most_queries,
        most_keys,
        scale=scale,
        window=window,
    )
    return found


def _varlen_examples(dtype: torch.dtype, heads: Heads | None = None) -> Iterator[Example]:
    random = torch.Generator().manual_seed(0)
    query_starts, key_starts, key_lens = (
        torch.tensor(numbers, dtype=torch.int32) for numbers in ((0, 5, 6, 9), (20, 0, 40, 60), (17, 6, 3))
    )
    for sizes in (heads,) if heads else (USUAL, Heads(width=24)):
        query, keys, values = (
            torch.randn(n, h, sizes.width, generator=random).to(dtype)
            for n, h in ((9, sizes.key_heads * sizes.groups), *[(60, sizes.key_heads)] * 2)
        )
        for start, stop in ((6, 20), (37, 40), (43, 60)):  # what is no text's is no number
            keys[start:stop] = values[start:stop] = torch.nan
        args = query, keys, values, query_starts, key_starts, key_lens, 5, 17
        yield args, {"scale": sizes.scale}
        yield args, {"scale": sizes.scale, "window": 4}


VARLEN_ATTENTION = Op(
    "varlen_attention(Tensor query, Tensor keys, Tensor values, Tensor query_starts, Tensor key_starts, "
    "Tensor key_lens, SymInt most_queries, SymInt most_keys, *, float scale, int? window=None) -> Tensor",
    plain.varlen_attention,
    _varlen_examples,
    fake=lambda query, keys, values, *rest, **named: query.new_empty(*query.shape[:2], values.shape[-1]),
)


def write_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, places: Tensor) -> None:
    """Writes the keys and values of N tokens into blocks: key [N, kv_heads, width], value [N, kv_heads, value_width],
    places [N, 2] int64: the block of each token and its place in there. Caches as for `paged_attention_decode`."""
    WRITE_KV.for_tensor(key)(key, value, key_cache, value_cache, places)


def gather_kv(key_cache: Tensor, value_cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [n * block_size, kv_heads, width] and values of blocks [n] int64, side by side. Copies."""
    gathered: tuple[Tensor, Tensor] = GATHER_KV.for_tensor(key_cache)(key_cache, value_cache, blocks)
    return gathered


def copy_kv(caches: list[Tensor], blocks: Tensor) -> None:
    """Copies blocks to others in each of several caches, as they are for `write_kv`: blocks [n, 2] int64, from and to.
    None that is written to is read, or written to twice."""
    COPY_KV.for_tensor(caches[0])(caches, blocks)


def _caches(dtype: torch.dtype, heads: Heads) -> list[Tensor]:
    random, (key_heads, _, width, value_width, block) = torch.Generator().manual_seed(0), heads
    return [torch.randn(5, key_heads, block, wide, generator=random).to(dtype) for wide in (width, value_width)]


def _write_kv_examples(dtype: torch.dtype, heads: Heads | None = None) -> Iterator[Example]:
    sizes, random = heads or ODD._replace(key_heads=3), torch.Generator().manual_seed(1)
    key, value = (
        torch.randn(sizes.key_heads, 4, width, generator=random).to(dtype).transpose(0, 1)
        for width in (sizes.width, sizes.value_width)
    )
    last = sizes.block_size - 1
    yield (key, value, *_caches(dtype, sizes), torch.tensor([[4, last], [0, 0], [1, last // 2], [2, last]])), {}


def _gather_kv_examples(dtype: torch.dtype, heads: Heads | None = None) -> Iterator[Example]:
    yield (*_caches(dtype, heads or ODD._replace(key_heads=3)), torch.tensor([3, 0, 4])), {}


def _copy_kv_examples(dtype: torch.dtype) -> Iterator[Example]:
    blocks = torch.tensor([[4, 0], [2, 3], [4, 1]])
    yield ([*_caches(dtype, ODD), *_caches(dtype, USUAL)], blocks), {}
    yield ([torch.arange(15.0).reshape(5, 1, 1, 3).to(dtype)], blocks), {}


WRITE_KV = Op(
    "write_kv(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor places) -> ()",
    plain.write_kv,
    _write_kv_examples,
)
GATHER_KV = Op(
    "gather_kv(Tensor key_cache, Tensor value_cache, Tensor blocks) -> (Tensor, Tensor)",
    plain.gather_kv,
    _gather_kv_examples,
    fake=lambda key_cache, value_cache, blocks: tuple(
        cache.new_empty(len(blocks) * cache.shape[2], cache.shape[1], cache.shape[3])
        for cache in (key_cache, value_cache)
    ),
)
COPY_KV = Op("copy_kv(Tensor(a!)[] caches, Tensor blocks) -> ()", plain.copy_kv, _copy_kv_examples)


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
    """Gated steering (`steer_ops.plain.steer` has the formula), and how many times each token was steered.

    activations [N, D] float32, bfloat16 or, on CUDA, float16, vectors and weights [C, D], biases [C] float32, kinds [C]
    int8, keep_norm [C] bool, clamps [C, 2] float32 (NaN: none), multipliers and opened [M, C] float32, owners [M]
    int32, counts [M] int64 with M >= N -> [N, D]. `counts` of the first N tokens go up where `owners` is `owner`.
    """
    moved: Tensor = STEER_AND_COUNT.for_tensor(activations)(
        activations, vectors, weights, biases, kinds, keep_norm, clamps, multipliers, opened, owners, counts, owner
    )
    return moved


def _steer_examples(dtype: torch.dtype) -> Iterator[Example]:
    random = torch.Generator().manual_seed(0)
    gates = (
        plain.SIGMOID, plain.CONSTANT, plain.LINEAR, plain.SIGMOID, plain.CONSTANT, plain.SIGMOID, plain.COSINE,
        plain.READ, plain.READ,
    )  # fmt: skip
    kinds = torch.tensor(gates, dtype=torch.int8)
    keep = torch.tensor([True, True, False, False, False, True, False, True, False])
    vectors, weights = torch.randn(2, 9, 37, generator=random)
    clamps = torch.tensor([*[[torch.nan] * 2] * 4, [3.0, 0.0], [-2.0, 1.5], *[[torch.nan] * 2] * 2, [1.0, 0.0]])
    vectors[4:] /= vectors[4:].norm(dim=1, keepdim=True)
    multipliers = torch.randn(6, 9, generator=random) * torch.tensor([[1.0], [0.0], [1.0], [0.5], [1.0], [1.0]])
    owners, counts = torch.tensor([3, 3, -1, 0, 3, 3], dtype=torch.int32), torch.zeros(6, dtype=torch.int64)
    x = torch.randn(5, 37, generator=random).to(dtype)
    biases = torch.randn(9, generator=random)
    opened = torch.rand(6, 10, generator=random)[:, :9]  # rows of another length than those of the multipliers
    opened[0, 7] = 0
    yield (x, vectors, weights, biases, kinds, keep, clamps, multipliers, opened, owners, counts, 3), {}


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + epsilon)) of x [..., D] -> [..., D]

    weight [D] of the dtype of x: rounded to it before and after the product, as Llama's in transformers; or float32:
    rounded after the product alone, as Gemma's, whose weight is one more than the model says.
    """
    normed: Tensor = RMS_NORM.for_tensor(x)(x, weight, epsilon)
    return normed


def _rms_norm_examples(dtype: torch.dtype) -> Iterator[Example]:
    random = torch.Generator().manual_seed(0)
    x, weight = 3 * torch.randn(5, 4, 77, generator=random).to(dtype), torch.randn(77, generator=random)
    for part in (x, x[:, 1:3], x[1], x[:, :1], x.transpose(0, 1), x.mT.contiguous().mT, x[None, :, None, 1:]):
        yield (part, weight.to(dtype), 1e-3), {}
    yield (x, weight, 1e-3), {}


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x + y [..., D], of one dtype, rounded to it, and the `rms_norm` of that."""
    both: tuple[Tensor, Tensor] = ADD_RMS_NORM.for_tensor(x)(x, y, weight, epsilon)
    return both


def _add_rms_norm_examples(dtype: torch.dtype) -> Iterator[Example]:
    random = torch.Generator().manual_seed(0)
    x, y = 3 * torch.randn(2, 5, 77, generator=random).to(dtype)
    weight = torch.randn(77, generator=random)
    yield (x, y, weight.to(dtype), 1e-3), {}
    yield (x, y, weight, 1e-3), {}


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, rounded to the dtype before and after the product. gate_up [..., 2 * width], gates before
    ups -> [..., width]"""
    gated: Tensor = SILU_MUL.for_tensor(gate_up)(gate_up)
    return gated


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, with tanh's approximation of GELU, as `silu_mul`."""
    gated: Tensor = GELU_TANH_MUL.for_tensor(gate_up)(gate_up)
    return gated


def _gate_examples(dtype: torch.dtype) -> Iterator[Example]:
    random = torch.Generator().manual_seed(0)
    yield (30 * torch.randn(5, 2 * 77, generator=random).to(dtype),), {}


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x * cos + rotate_half(x) * sin for queries and keys, each product rounded to the dtype.

    query [N, heads, width], key [N, kv_heads, width], cos and sin [N, turned], all of one dtype -> both, the first
    `turned` numbers of each head turned. `turned` is even and at most the width.
    """
    turned: tuple[Tensor, Tensor] = ROTARY.for_tensor(query)(query, key, cos, sin)
    return turned


def _rotary_examples(dtype: torch.dtype) -> Iterator[Example]:
    random = torch.Generator().manual_seed(0)
    whole = torch.randn(5, 7, 18, generator=random).to(dtype)
    for turned in (18, 8):
        cos, sin = torch.randn(2, 5, turned, generator=random).to(dtype).unbind()
        yield (whole[:, :4], whole[:, 4:6], cos, sin), {}


OUTPUTS = 32  # of a tile
UNIT_BYTES = 4  # of an input's unit: a float, or two bfloat16


def tiled(weight: Tensor) -> Tensor:
    """weight [out, in], in * itemsize a multiple of 4 bytes -> tiles [ceil(out / 32), units, 32, numbers of a unit]"""
    out, inputs = weight.shape
    tiles = -(-out // OUTPUTS)
    padded = weight.new_zeros(tiles * OUTPUTS, inputs)
    padded[:out] = weight
    return padded.view(tiles, OUTPUTS, -1, UNIT_BYTES // weight.itemsize).transpose(1, 2).contiguous()


def tiled_linear(x: Tensor, tiles: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """x [..., in], tiles of a weight [out, in] (`tiled`), bias [out] -> [..., out], all of one dtype. With a kernel a
    token gets the same in every bit whatever is computed beside it."""
    product: Tensor = TILED_LINEAR.for_tensor(x)(x, tiles, bias, out_features)
    return product


def _tiled_linear_examples(dtype: torch.dtype) -> Iterator[Example]:
    random = torch.Generator().manual_seed(0)
    for tokens, inputs, outputs in ((1, 8, 5), (13, 70, 70)):
        weight, x = (torch.randn(n, inputs, generator=random).to(dtype) for n in (outputs, tokens))
        bias = torch.randn(outputs, generator=random).to(dtype)
        yield (x, tiled(weight), bias, outputs), {}
        yield (x, tiled(weight), None, outputs), {}


STEER_AND_COUNT = Op(
    "steer_and_count(Tensor activations, Tensor vectors, Tensor weights, Tensor biases, Tensor kinds, "
    "Tensor keep_norm, Tensor clamps, Tensor multipliers, Tensor opened, Tensor owners, Tensor(a!) counts, "
    "int owner) -> Tensor",
    plain.steer_and_count,
    _steer_examples,
    fake=lambda activations, *rest: torch.empty_like(activations, memory_format=torch.contiguous_format),
)
RMS_NORM = Op(
    "rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor",
    plain.rms_norm,
    _rms_norm_examples,
    fake=lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
)
ADD_RMS_NORM = Op(
    "add_rms_norm(Tensor x, Tensor y, Tensor weight, float epsilon) -> (Tensor, Tensor)",
    plain.add_rms_norm,
    _add_rms_norm_examples,
    fake=lambda x, *rest: (x.new_empty(x.shape), x.new_empty(x.shape)),
)
ROTARY = Op(
    "rotary(Tensor query, Tensor key, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    plain.rotary,
    _rotary_examples,
    fake=lambda query, key, *rest: (query.new_empty(query.shape), key.new_empty(key.shape)),
)
SILU_MUL = Op(
    "silu_mul(Tensor gate_up) -> Tensor",
    plain.silu_mul,
    _gate_examples,
    fake=lambda gate_up: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
)
GELU_TANH_MUL = Op(
    "gelu_tanh_mul(Tensor gate_up) -> Tensor",
    plain.gelu_tanh_mul,
    _gate_examples,
    fake=lambda gate_up: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
)
TILED_LINEAR = Op(
    "tiled_linear(Tensor x, Tensor tiles, Tensor? bias, int out_features) -> Tensor",
    plain.tiled_linear,
    _tiled_linear_examples,
    fake=lambda x, tiles, bias, out_features: x.new_empty(*x.shape[:-1], out_features),
)
