"""The attention that is compiled for the CPU, beside the same in float64; and where it cannot be compiled."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.engine.decode_attention import DecodeAttention, compiled
from server.engine.store import Shape, Store
from server.engine.torch_attention import Rules
from server.engine.types import Steer
from tests.server.desk import Desk
from tests.server.reference import plain
from tests.server.test_architectures import rows, tiny

CPU = torch.device("cpu")
SIZE, LENGTHS = 64, (1, 64, 7, 30)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


@pytest.fixture
def kernel() -> DecodeAttention:
    found = compiled()
    assert found is not None
    return found


@pytest.fixture
def afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is compiled yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.cache_clear()
    yield tmp_path / "mat-steer"
    compiled.cache_clear()


class World:
    """Rows in a store, and a new token of each, in a line with gaps."""

    def __init__(self, heads: int, key_heads: int, width: int, value_width: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.store = Store.of(Shape(key_heads, width, value_width, dtype, CPU), SIZE * len(LENGTHS))
        self.store.keys.normal_()
        self.store.values.normal_()
        tokens = 2 * len(LENGTHS)
        # As models give them: views of what their linear layers put out.
        self.query = torch.randn(tokens, heads * width).to(dtype).view(tokens, heads, width)
        self.key, self.value = (
            torch.randn(1, tokens, key_heads * wide).to(dtype).view(1, tokens, key_heads, wide).transpose(1, 2)
            for wide in (width, value_width)
        )
        self.rows = torch.tensor([(2 * i, i * SIZE, SIZE, length) for i, length in enumerate(LENGTHS)])

    def attend(self, kernel: DecodeAttention, rules: Rules, rows: Tensor | None = None) -> Tensor:
        """[R, heads, value width]"""
        rows = self.rows if rows is None else rows
        out = torch.full((*self.query.shape[:2], self.value.shape[-1]), torch.nan).to(self.query.dtype)
        kernel(rows, self.query, self.key, self.value, self.store, out, rules)
        assert out[1::2].isnan().all(), "tokens that it was not given are left alone"
        return out[rows[:, 0]]

    def expected(self, rules: Rules) -> Tensor:
        """The same in float64, row by row and head by head."""
        answers = []
        heads, key_heads = self.query.shape[1], self.key.shape[1]
        for token, start, size, length in self.rows.tolist():
            for head in range(heads):
                shared = head * key_heads // heads
                line = start * key_heads + shared * size
                keys = self.store.keys[line : line + length].double()
                values = self.store.values[line : line + length].double()
                keys[-1], values[-1] = self.key[0, shared, token], self.value[0, shared, token]
                scale = keys.shape[1] ** -0.5 if rules.scale is None else rules.scale
                scores = keys @ self.query[token, head].double() * scale
                if rules.cap:
                    scores = rules.cap * torch.tanh(scores / rules.cap)
                if rules.window:
                    scores[: max(0, length - rules.window)] = -torch.inf
                if rules.sinks is not None:
                    scores = torch.cat([scores, rules.sinks[head, None].double()])
                answers.append(torch.softmax(scores, 0)[:length] @ values)
        return torch.stack(answers).view(len(LENGTHS), heads, -1)


@needs_compiler
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize(
    "rules",
    [
        Rules(None, None, None, None),
        Rules(0.5, 7, None, None),
        Rules(None, None, 2.0, None),
        Rules(None, 1, None, torch.tensor([0.5, -40.0, 40.0, 0.0])),
    ],
    ids=["plain", "window and scale", "cap", "sinks"],
)
@pytest.mark.parametrize(("key_heads", "width", "value_width"), [(4, 64, 64), (2, 80, 24), (1, 5, 7)])
def test_it_is_attention(
    kernel: DecodeAttention,
    key_heads: int,
    width: int,
    value_width: int,
    rules: Rules,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    world = World(4, key_heads, width, value_width, dtype)
    expected = world.expected(rules)
    found = world.attend(kernel, rules).double()
    assert (found - expected).norm() / expected.norm() < tolerance


@needs_compiler
def test_the_new_keys_and_values_are_in_the_store_afterwards(kernel: DecodeAttention) -> None:
    world = World(4, 2, 16, 8, torch.float32)
    keys, values = world.store.keys.clone(), world.store.values.clone()
    world.attend(kernel, Rules(None, None, None, None))
    for token, start, size, length in world.rows.tolist():
        for head in range(2):
            line = start * 2 + head * size + length - 1
            keys[line], values[line] = world.key[0, head, token], world.value[0, head, token]
    assert torch.equal(world.store.keys, keys)
    assert torch.equal(world.store.values, values)


@needs_compiler
def test_a_row_gets_the_same_bits_whoever_its_neighbours_are(kernel: DecodeAttention) -> None:
    world, rules = World(4, 2, 64, 64, torch.float32), Rules(None, None, None, None)
    together = world.attend(kernel, rules)
    for index in range(len(LENGTHS)):
        assert torch.equal(world.attend(kernel, rules, world.rows[index : index + 1])[0], together[index])


@needs_compiler
def test_what_is_not_a_number_stays_with_its_row(kernel: DecodeAttention) -> None:
    world, rules = World(2, 1, 64, 64, torch.bfloat16), Rules(None, None, None, None)
    world.query[2, 1, 3] = torch.nan
    found = world.attend(kernel, rules)
    assert found[1, 1].isnan().all()
    assert found.isnan().sum() == 64


@needs_compiler
def test_scores_of_any_size_have_shares(kernel: DecodeAttention) -> None:
    world, rules = World(2, 1, 64, 64, torch.float32), Rules(1e4, None, None, None)
    expected = world.expected(rules)
    assert torch.allclose(world.attend(kernel, rules).double(), expected, rtol=1e-4, atol=1e-4)


@needs_compiler
def test_it_computes_with_the_threads_of_pytorch(kernel: DecodeAttention) -> None:
    World(4, 4, 64, 64, torch.float32).attend(kernel, Rules(None, None, None, None))
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "gomp" in line}
    assert len(mapped) <= 1, "a second runtime would have threads of its own"


@needs_compiler
def test_it_is_compiled_once_for_a_user(afresh: Path) -> None:
    assert compiled() is not None
    (library,) = afresh.iterdir()
    written = library.stat().st_mtime_ns
    compiled.cache_clear()
    assert compiled() is not None
    assert library.stat().st_mtime_ns == written


@needs_compiler
def test_a_cache_that_cannot_be_written_to_is_done_without(afresh: Path) -> None:
    afresh.parent.mkdir(exist_ok=True)
    afresh.write_text("a file in its place")
    assert compiled() is not None


def test_without_a_compiler_pytorch_attends(afresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiled() is None
    reference, desk = tiny("llama"), Desk(tiny("llama"), largest=64, roots=4)

    for row, text in desk.run(rows(random.Random(1), [Steer()])).items():
        assert text == plain(reference, row.tokens, new=row.sampling.max_new_tokens)


def test_a_compiler_that_fails_is_told_of(
    afresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert compiled() is None
    assert "PyTorch attends" in caplog.text
