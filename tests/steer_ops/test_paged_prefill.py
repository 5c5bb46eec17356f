"""Attention of chunks over block tables: Triton's kernel, interpreted where there is no CUDA device, and its reference
beside the same in float64, token by token."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from steer_ops import PAGED_ATTENTION_PREFILL as OP
from steer_ops import Heads, plain
from tests.steer_ops.interpreted import mend_interpreter

# The interpreter's NumPy tells of overflows and of what is not a number.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning:triton")
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Way = Callable[..., None]


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            mend_interpreter(patch)
        yield pytest.importorskip("steer_ops.cuda.paged_prefill", reason="no triton", exc_type=ImportError)


@pytest.fixture
def kernel(module: Any, monkeypatch: pytest.MonkeyPatch) -> Way:
    """With small tiles, so that texts of tens of tokens have some that are seen whole, in part and not at all."""
    monkeypatch.setattr(module, "tile_sizes", lambda *args: (16, 16))
    return module.paged_attention_prefill  # type: ignore[no-any-return]


@pytest.fixture(params=["kernel", "plain"])
def way(request: pytest.FixtureRequest) -> Way:
    return request.getfixturevalue("kernel") if request.param == "kernel" else plain.paged_attention_prefill  # type: ignore[no-any-return]


class Texts:
    """Texts of so many new tokens and so many keys each, in blocks in no order; where no text has its keys is what is
    no number. Before and behind the tokens of the chunks are some of no chunk."""

    before = 20

    def __init__(
        self,
        texts: Sequence[tuple[int, int]] = ((40, 40), (3, 70), (17, 33), (1, 1)),
        heads: int = 4,
        kv_heads: int = 2,
        width: int = 16,
        value_width: int = 16,
        dtype: torch.dtype = torch.float32,
        block_size: int = 8,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.counts, self.lens = zip(*texts, strict=True)
        whole = torch.randn(self.before + sum(self.counts) + 3, heads + 1, width, generator=generator).to(dtype)
        self.query = whole[:, :heads]  # a view of what a linear layer puts out
        self.keys, self.values = (
            [torch.randn(length, kv_heads, wide, generator=generator).to(dtype) for length in self.lens]
            for wide in (width, value_width)
        )
        used = [-(-length // block_size) for length in self.lens]
        free = torch.randperm(sum(used) + 1, generator=generator).tolist()
        self.caches = [
            torch.full((sum(used) + 1, kv_heads, block_size, wide), torch.nan).to(dtype)
            for wide in (width, value_width)
        ]
        self.tables = torch.full((len(texts), max(used) + 2), -(10**9), dtype=torch.int32)
        for row, count in enumerate(used):
            for i in range(count):
                self.tables[row, i] = block = free.pop()
                for cache, own in zip(self.caches, (self.keys[row], self.values[row]), strict=True):
                    part = own[i * block_size : (i + 1) * block_size].transpose(0, 1)
                    cache[block, :, : part.shape[1]] = part

    def attend(self, way: Way, **rules: Any) -> Tensor:
        """[tokens of the chunks, heads, value_width]"""
        ends = torch.tensor([0, *self.counts]).cumsum(0, dtype=torch.int32) + self.before
        lens = torch.tensor(self.lens, dtype=torch.int32)
        out = self.query.new_full((*self.query.shape[:2], self.caches[1].shape[3]), -77.0).to(DEVICE)
        args = (part.to(DEVICE) for part in (self.query, *self.caches, self.tables, ends, lens))
        there = {name: rule.to(DEVICE) if isinstance(rule, Tensor) else rule for name, rule in rules.items()}
        way(*args, out, **{"scale": 0.2, **there})
        others = torch.cat([out[: self.before], out[ends[-1] :]])
        assert (others == -77.0).all(), "what belongs to no chunk stays as it was"
        return out[self.before : ends[-1]].cpu()

    def expected(
        self, scale: float = 0.2, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        heads = self.query.shape[1]
        line = iter(self.query[self.before :].double())
        answers = []
        for row, (count, length) in enumerate(zip(self.counts, self.lens, strict=True)):
            for end in range(length - count + 1, length + 1):
                query = next(line)
                for head in range(heads):
                    seen = slice(max(0, end - window) if window else 0, end)
                    keys, values = (
                        part[row][seen, head * part[row].shape[1] // heads].double()
                        for part in (self.keys, self.values)
                    )
                    scores = keys @ query[head] * scale
                    if softcap:
                        scores = softcap * torch.tanh(scores / softcap)
                    if sinks is not None:
                        scores = torch.cat([scores, sinks[head, None].double()])
                    answers.append(torch.softmax(scores, 0)[: len(keys)] @ values)
        return torch.stack(answers).view(sum(self.counts), heads, -1)


def away(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


RULES: dict[str, dict[str, Any]] = {
    "none": {},
    "window": {"window": 7},
    "wide window": {"window": 37, "scale": 0.5},
    "cap": {"softcap": 2.0},
    "sinks": {"window": 1, "sinks": torch.tensor([0.5, -40.0, 40.0, 0.0, 1.0, 2.0]).bfloat16()},
    "all": {"window": 20, "softcap": 5.0, "sinks": torch.tensor([0.5, -40.0, 40.0, 0.0, 1.0, 2.0])},
}


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"kv_heads": 4, "dtype": torch.bfloat16, "width": 20, "value_width": 7, "block_size": 16},
        {"heads": 6, "width": 5, "value_width": 24, "dtype": torch.float16, "block_size": 1},
        {"kv_heads": 1, "width": 80, "value_width": 80, "block_size": 32},
    ],
    ids=["grouped", "odd widths", "three to a key head", "one key head"],
)
def test_every_token_gets_its_own_attention(way: Way, shape: dict[str, Any], rules: dict[str, Any]) -> None:
    texts = Texts(**shape)
    if "sinks" in rules:
        rules = rules | {"sinks": rules["sinks"][: texts.query.shape[1]]}
    found = texts.attend(way, **rules)
    assert found.dtype == texts.query.dtype
    assert away(found, texts.expected(**rules)) < TOLERANCES[found.dtype]


@pytest.mark.parametrize("seed", range(12))
def test_any_texts_get_their_attention_and_what_is_no_number_spreads_nowhere(way: Way, seed: int) -> None:
    number = random.Random(seed)
    kv_heads, groups = number.choice((1, 2, 3)), number.choice((1, 2, 5))
    lens = [number.randint(0, number.choice((4, 90))) for _ in range(number.randint(1, 5))]
    lens += [number.randint(1, 9)]
    texts = Texts(
        [(number.choice((length, number.randint(0, length), min(length, 1))), length) for length in lens[:-1]]
        + [(lens[-1], lens[-1])],
        groups * kv_heads,
        kv_heads,
        number.choice((16, 24)),
        number.choice((16, 8)),
        block_size=number.choice((1, 8, 16, 64)),
        seed=seed,
    )
    rules = {
        "window": number.choice((None, number.randint(1, 60))),
        "softcap": number.choice((None, 3.0)),
        "sinks": number.choice((None, torch.randn(groups * kv_heads))),
    }
    assert away(texts.attend(way, **rules), texts.expected(**rules)) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("sizes", [(128, 64), (16, 32), (32, 16)])
def test_tiles_of_any_size_do(
    kernel: Way, module: Any, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "tile_sizes", lambda *args: sizes)
    texts = Texts([(150, 200), (2, 130)])
    for rules in RULES["none"], RULES["wide window"]:
        assert away(texts.attend(kernel, **rules), texts.expected(**rules)) < TOLERANCES[torch.float32]


def test_texts_share_blocks(way: Way) -> None:
    texts = Texts([(5, 30), (9, 30)])
    texts.tables[1] = texts.tables[0]
    texts.keys[1], texts.values[1] = texts.keys[0], texts.values[0]
    assert away(texts.attend(way), texts.expected()) < TOLERANCES[torch.float32]


def test_what_is_not_a_number_stays_with_its_head(way: Way) -> None:
    texts = Texts()
    texts.query[texts.before + 41, 1, 3] = torch.nan
    found = texts.attend(way)
    assert found[41, 1].isnan().all()
    assert found.isnan().sum() == 16


def test_scores_of_any_size_have_shares(way: Way) -> None:
    texts = Texts()
    for rules in {}, {"window": 20}:
        assert torch.allclose(texts.attend(way, scale=1e4, **rules).double(), texts.expected(1e4, **rules), atol=1e-4)


def test_no_chunks_have_no_answers(way: Way) -> None:
    texts = Texts([(0, 0), (0, 5), (0, 0)])
    assert texts.attend(way).shape == (0, 4, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value_cache": torch.ones(3, 2, 8, 16).half()}, "one dtype"),
        ({"key_cache": torch.ones(3, 3, 8, 16)}, "shapes"),
        ({"key_cache": torch.ones(3, 2, 8, 8)}, "shapes"),
        ({"context_lens": torch.ones(2, dtype=torch.int32)}, "shapes"),
        ({"out": torch.ones(2, 4, 8)}, "shapes"),
        ({"query_starts": torch.tensor([0, 2])}, "int32"),
        ({"key_cache": torch.ones(3, 8, 2, 16).transpose(1, 2)}, "contiguous"),
        ({"window": 0}, "at least 1"),
        ({"sinks": torch.ones(2)}, "one number for each head"),
    ],
    ids=["dtype", "key heads", "width", "lengths", "out", "long starts", "layout", "window", "sinks"],
)
def test_what_does_not_fit_is_refused(kernel: Way, change: dict[str, Any], message: str) -> None:
    named = {
        "query": torch.ones(2, 4, 16),
        "key_cache": torch.ones(3, 2, 8, 16),
        "value_cache": torch.ones(3, 2, 8, 16),
        "block_tables": torch.tensor([[2, 0]], dtype=torch.int32),
        "query_starts": torch.tensor([0, 2], dtype=torch.int32),
        "context_lens": torch.tensor([9], dtype=torch.int32),
        "out": torch.empty(2, 4, 16),
        "scale": 1.0,
    }
    kernel(**named)
    with pytest.raises(RuntimeError, match=message):
        kernel(**named | change)


@pytest.mark.parametrize("fault", ["whole tiles", "tiles in part"])
def test_a_kernel_that_is_wrong_anywhere_is_found_out(
    module: Any, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the sizes in which a model is served."""
    if DEVICE.type == "cuda":
        pytest.skip("compiled kernels call what they were compiled with")
    heads = Heads(key_heads=1, groups=4, width=16, value_width=16, block_size=64)
    kernel = module.paged_attention_prefill
    assert OP._passes_trial(kernel, DEVICE, torch.float32, heads)
    read = module._read.fn

    def wrong(*args: Any, **named: Any) -> Any:
        highest, total, sums = read(*args, **named)
        return highest, total, sums * (1.1 if named["WHOLE"] is (fault == "whole tiles") else 1.0)

    monkeypatch.setattr(module, "_read", wrong)
    assert not OP._passes_trial(kernel, DEVICE, torch.float32, heads)
    assert "paged_attention_prefill" in caplog.text


def test_a_program_takes_as_much_as_it_has_memory_for(module: Any) -> None:
    h200, a10, t4 = 113 * 1024, 99 * 1024, 64 * 1024  # bytes for a program
    assert module.tile_sizes(128, 128, 2, h200) == module.tile_sizes(128, 128, 2, a10) == (128, 64)
    assert module.tile_sizes(256, 256, 2, h200) == (64, 32)
    assert module.tile_sizes(128, 128, 2, t4) == (64, 32)
    assert module.tile_sizes(128, 128, 4, h200) == (32, 32)
    assert module.tile_sizes(256, 256, 4, h200) == (32, 16)
    assert module.tile_sizes(4096, 4096, 4, t4) == (16, 16), "the least that there is"
