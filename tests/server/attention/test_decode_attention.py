"""The attention that is compiled for the CPU, beside the same in float64."""

import pytest
import torch
from torch import Tensor

from server.attention.decode_attention import DecodeAttention, decode_attention
from server.attention.store import Shape, Store
from server.attention.torch_attention import Rules

CPU = torch.device("cpu")
SIZE, LENGTHS = 64, (1, 64, 7, 30)
needs_compiler = pytest.mark.skipif(decode_attention() is None, reason="nothing can be compiled here")


@pytest.fixture
def kernel() -> DecodeAttention:
    found = decode_attention()
    assert found is not None
    return found


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
@pytest.mark.usefixtures("threads")
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
@pytest.mark.parametrize(
    ("key_heads", "width", "value_width"), [(4, 64, 64), (2, 128, 128), (2, 80, 24), (4, 64, 32), (1, 5, 7)]
)
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
@pytest.mark.usefixtures("threads")
def test_a_row_gets_the_same_bits_whoever_its_neighbours_are(kernel: DecodeAttention) -> None:
    world, rules = World(4, 2, 64, 64, torch.float32), Rules(None, None, None, None)
    together = world.attend(kernel, rules)
    for index in range(len(LENGTHS)):
        assert torch.equal(world.attend(kernel, rules, world.rows[index : index + 1])[0], together[index])


@needs_compiler
def test_numbers_of_another_kind_are_refused(kernel: DecodeAttention) -> None:
    world = World(2, 1, 64, 64, torch.float32)
    world.value = world.value.bfloat16()
    with pytest.raises(ValueError, match="one dtype"):
        world.attend(kernel, Rules(None, None, None, None))


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
