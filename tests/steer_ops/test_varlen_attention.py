"""Attention of new tokens of several texts: Triton's kernel, interpreted where there is no CUDA device, and its
reference beside the same in float64, token by token."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from steer_ops import plain
from tests.steer_ops.interpreted import mend_interpreter

# The interpreter's NumPy tells of overflows and of what is not a number.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning:triton")
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Way = Callable[..., Tensor]


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            mend_interpreter(patch)
        yield pytest.importorskip("steer_ops.cuda.varlen_attention", reason="no triton", exc_type=ImportError)


@pytest.fixture
def kernel(module: Any, monkeypatch: pytest.MonkeyPatch) -> Way:
    """With small tiles, so that texts of tens of tokens have some that are seen whole, in part and not at all."""
    monkeypatch.setattr(module, "tile_sizes", lambda *args: (16, 16))
    return module.varlen_attention  # type: ignore[no-any-return]


@pytest.fixture(params=["kernel", "plain"])
def way(request: pytest.FixtureRequest) -> Way:
    return request.getfixturevalue("kernel") if request.param == "kernel" else plain.varlen_attention  # type: ignore[no-any-return]


class Texts:
    """Texts of so many new tokens and so many keys each; where no text has its keys is what is no number."""

    def __init__(
        self,
        texts: Sequence[tuple[int, int]] = ((40, 40), (3, 70), (17, 33), (1, 1)),
        heads: int = 4,
        kv_heads: int = 2,
        width: int = 16,
        value_width: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        number = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        counts, lens = zip(*texts, strict=True)
        whole = torch.randn(sum(counts), heads + 1, width, generator=generator).to(dtype)
        self.query = whole[:, :heads]  # a view of what a linear layer puts out
        starts, at = [], 0
        for i in number.sample(range(len(texts)), len(texts)):
            starts.append((i, at := at + number.randint(0, 9)))
            at += lens[i]
        self.starts = [start for _, start in sorted(starts)]
        self.keys, self.values = (
            torch.full((at + 5, kv_heads, wide), torch.nan, dtype=dtype) for wide in (width, value_width)
        )
        for start, length in zip(self.starts, lens, strict=True):
            for part in (self.keys, self.values):
                part[start : start + length] = torch.randn(length, kv_heads, part.shape[2], generator=generator)
        self.counts, self.lens = counts, lens

    def attend(self, way: Way, **rules: Any) -> Tensor:
        ends = [sum(self.counts[:i]) for i in range(len(self.counts) + 1)]
        places = (torch.tensor(one, dtype=torch.int32) for one in (ends, [*self.starts, 0], self.lens))
        args = (part.to(DEVICE) for part in (self.query, self.keys, self.values, *places))
        there = {name: rule.to(DEVICE) if isinstance(rule, Tensor) else rule for name, rule in rules.items()}
        return way(*args, max(self.counts), max(self.lens), **{"scale": 0.2, **there}).cpu()

    def expected(
        self, scale: float = 0.2, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        heads, kv_heads = self.query.shape[1], self.keys.shape[1]
        line = iter(self.query.double())
        answers = []
        for start, count, length in zip(self.starts, self.counts, self.lens, strict=True):
            for end in range(start + length - count + 1, start + length + 1):
                query = next(line)
                for head in range(heads):
                    seen = slice(max(start, end - window) if window else start, end)
                    keys, values = (part[seen, head * kv_heads // heads].double() for part in (self.keys, self.values))
                    scores = keys @ query[head] * scale
                    if softcap:
                        scores = softcap * torch.tanh(scores / softcap)
                    if sinks is not None:
                        scores = torch.cat([scores, sinks[head, None].double()])
                    answers.append(torch.softmax(scores, 0)[: len(keys)] @ values)
        return torch.stack(answers).view(len(self.query), heads, -1)


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
        {"kv_heads": 4, "dtype": torch.bfloat16, "width": 20, "value_width": 7},
        {"heads": 6, "width": 5, "value_width": 24, "dtype": torch.float16},
        {"kv_heads": 1, "width": 80, "value_width": 80},
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
    lens = [number.randint(1, number.choice((4, 90))) for _ in range(number.randint(1, 4))]
    texts = Texts(
        [(number.choice((length, number.randint(1, length))), length) for length in lens],
        groups * kv_heads,
        kv_heads,
        number.choice((16, 24)),
        number.choice((16, 8)),
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


def test_texts_share_keys(way: Way) -> None:
    texts = Texts([(5, 30), (9, 30)])
    texts.starts[1] = texts.starts[0]
    assert away(texts.attend(way), texts.expected()) < TOLERANCES[torch.float32]


def test_what_is_not_a_number_stays_with_its_head(way: Way) -> None:
    texts = Texts()
    texts.query[41, 1, 3] = torch.nan
    found = texts.attend(way)
    assert found[41, 1].isnan().all()
    assert found.isnan().sum() == 16


def test_scores_of_any_size_have_shares(way: Way) -> None:
    texts = Texts()
    for rules in {}, {"window": 20}:
        assert torch.allclose(texts.attend(way, scale=1e4, **rules).double(), texts.expected(1e4, **rules), atol=1e-4)


def test_no_texts_have_no_answers(way: Way) -> None:
    none = torch.zeros(1, dtype=torch.int32)
    found = way(torch.ones(0, 4, 16), *[torch.ones(0, 2, 16)] * 2, none, none, none[:0], 0, 0, scale=1.0)
    assert found.shape == (0, 4, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.ones(9, 2, 16).half()}, "one dtype"),
        ({"keys": torch.ones(9, 3, 16)}, "shapes"),
        ({"keys": torch.ones(9, 2, 8)}, "shapes"),
        ({"key_lens": torch.ones(2, dtype=torch.int32)}, "shapes"),
        ({"key_starts": torch.zeros(2, dtype=torch.int64)}, "int32"),
        ({"window": 0}, "at least 1"),
        ({"sinks": torch.ones(2)}, "one number for each head"),
    ],
    ids=["dtype", "key heads", "width", "lengths", "long starts", "window", "sinks"],
)
def test_what_does_not_fit_is_refused(kernel: Way, change: dict[str, Any], message: str) -> None:
    named = {
        "query": torch.ones(2, 4, 16),
        "keys": torch.ones(9, 2, 16),
        "values": torch.ones(9, 2, 16),
        "query_starts": torch.tensor([0, 2], dtype=torch.int32),
        "key_starts": torch.zeros(2, dtype=torch.int32),
        "key_lens": torch.tensor([9], dtype=torch.int32),
        "most_queries": 2,
        "most_keys": 9,
        "scale": 1.0,
    }
    kernel(**named)
    with pytest.raises(RuntimeError, match=message):
        kernel(**named | change)


def test_a_program_takes_as_much_as_it_has_memory_for(module: Any) -> None:
    h200, a10, t4 = 113 * 1024, 99 * 1024, 64 * 1024  # bytes for a program
    assert module.tile_sizes(128, 128, 2, h200) == module.tile_sizes(128, 128, 2, a10) == (128, 64)
    assert module.tile_sizes(256, 256, 2, h200) == (64, 32)
    assert module.tile_sizes(128, 128, 2, t4) == (64, 32)
    assert module.tile_sizes(128, 128, 4, h200) == (32, 32)
    assert module.tile_sizes(256, 256, 4, h200) == (32, 16)
    assert module.tile_sizes(4096, 4096, 4, t4) == (16, 16), "the least that there is"
