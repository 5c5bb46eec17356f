"""Gates that read another site than their columns steer, beside hooks that are written by hand."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steering import (
    UNSTEERED,
    Column,
    ColumnBank,
    ColumnError,
    Gate,
    HookError,
    Positions,
    Reading,
    SequenceSteering,
    Site,
    SiteKind,
    Steering,
    steered,
)
from steering.operators import Trace
from tests.steering.families import HIDDEN, VOCABULARY, column, tiny

HERE, THERE = Site(0, SiteKind.RESIDUAL), Site(2, SiteKind.RESIDUAL)
TOKENS = torch.randint(3, VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(2))
GATES = [Gate.SIGMOID, Gate.LINEAR, Gate.COSINE]
FIRST = [1, 2, 4]  # the token that latches, in each row


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


def reading(gate: Gate, *, latched: bool, seed: int = 0, **changes: Any) -> Column:
    given = {"gate_bias": 0.0, "keep_norm": False, "scale": 2.0, "attribute": f"a{seed}"} | changes
    return column(THERE, seed=seed, gate=gate, reads=Reading(HERE, latched), **given)


@torch.no_grad()
def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    found: Tensor = model(tokens).logits
    return found


def opened(one: Column, a: Tensor) -> Tensor:
    w, b = one.gate_weight.double(), one.gate_bias
    overlap = a.double() @ w
    if one.gate is Gate.COSINE:
        return (overlap / a.double().norm(dim=-1) + b > 0).double()
    return torch.sigmoid(overlap + b) if one.gate is Gate.SIGMOID else overlap + b


@contextmanager
def by_hand(model: Any, columns: list[Column], multipliers: list[list[float]], first: list[int]) -> Iterator[None]:
    """Row r is steered from token first[r] on, and what is latched is latched there."""
    seen: list[Tensor] = []

    def move(module: Any, args: Any, output: Any) -> Any:
        moved = (output if isinstance(output, Tensor) else output[0]).clone()
        for row, start in enumerate(first):
            for one, multiplier in zip(columns, multipliers[row], strict=True):
                gates = opened(one, seen[-1][row])
                if one.reads and one.reads.latched:
                    gates = gates[start].expand_as(gates)
                moved[row, start:] += (multiplier * gates[start:, None] * one.vector.double()).to(moved.dtype)
        return moved if isinstance(output, Tensor) else (moved, *output[1:])

    def keep(module: Any, args: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    handles = [model.model.layers[0].register_forward_hook(keep), model.model.layers[2].register_forward_hook(move)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("latched", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_each_row_is_steered_by_what_its_own_gate_reads(model: Any, gate: Gate, latched: bool, native: bool) -> None:
    columns = [reading(gate, latched=latched, seed=seed, gate_bias=0.05) for seed in (3, 2)]
    multipliers = [[1.5, 0.0], [0.0, 0.0], [-1.0, 2.0]]
    bank = ColumnBank(device="cpu", max_tokens=15)
    handle = bank.add(columns)
    rows = [SequenceSteering.of([(handle, one)]) for one in multipliers]
    assert [bank.latches(row) for row in rows] == [latched, False, latched]
    acting = np.arange(5) >= np.array(FIRST)[:, None]
    lines = np.where(acting, np.array([[7], [0], [3]]), 0)
    latching = np.where(np.arange(5) == np.array(FIRST)[:, None], lines, 0)
    with by_hand(model, columns, multipliers, FIRST):
        expected = logits(model)
    plain = logits(model)
    with Steering(model, bank, native=native):
        bank.fill(rows, np.where(acting, np.arange(3)[:, None], -1), np.stack([lines.ravel(), latching.ravel()]))
        bank.check()
        found = logits(model)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found[1], plain[1])
    assert not all(torch.allclose(found[row], plain[row], atol=1e-2) for row in (0, 2))


def test_a_latched_gate_is_held_in_later_passes_and_beside_others(model: Any) -> None:
    """Token by token, with the keys and values of the tokens before; rows come and go around it."""
    one = reading(Gate.LINEAR, latched=True, seed=1)
    bank = ColumnBank(device="cpu", max_tokens=6, spare=1)
    row = SequenceSteering.of([(bank.add([one]), [1.0])])
    with by_hand(model, [one], [[1.0]], [2]):
        expected = logits(model, TOKENS[:1])
    found = []
    with torch.no_grad(), Steering(model, bank):
        bank.fill([row], [-1, -1, 0], np.array([[0, 0, 5], [0, 0, 5]]))
        output = model(TOKENS[:1, :3], use_cache=True)
        found.append(output.logits)
        other = SequenceSteering.of([(bank.add([reading(Gate.SIGMOID, latched=True, seed=9)]), [3.0])])
        bank.reserve_lines(600)
        for at in (3, 4):
            bank.fill([other], [0], np.array([[9], [9]]))
            model(TOKENS[1:2, :1])
            bank.fill([row], [0], np.array([[5], [0]]))
            bank.check()
            output = model(TOKENS[:1, at : at + 1], past_key_values=output.past_key_values, use_cache=True)
            found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_a_gate_that_is_closed_leaves_every_bit(model: Any) -> None:
    shut = [reading(Gate.COSINE, latched=latched, seed=1, gate_bias=-1e6) for latched in (False, True)]
    for one in shut:
        with steered(model, [one], [4.0], mask=torch.ones(3, 5)):
            found = logits(model)
        assert torch.equal(found, logits(model))


def test_a_gate_reads_what_is_there_before_the_site_is_steered(model: Any) -> None:
    """As every gate does: on the original activation."""
    one, here = reading(Gate.LINEAR, latched=False, seed=1), column(HERE, seed=4, gate=Gate.CONSTANT, keep_norm=False)
    with steered(model, [one, here], [0.0, 1.0], mask=torch.ones(3, 5)):
        moved = logits(model)
    gates = []
    with steered(model, [one, here], [1.0, 1.0], mask=torch.ones(3, 5)) as steering:
        steering.record(True)
        assert not torch.allclose(logits(model), moved)
        measures = list(Trace.__dataclass_fields__)
        gates = steering.traces[THERE][:15, 0, measures.index("gates")].reshape(3, 5)
    with torch.no_grad():
        plain = model(TOKENS, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(gates.double(), opened(one, plain), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("latched", [False, True])
def test_generation_goes_on_by_the_gate_of_each_prompt(model: Any, latched: bool) -> None:
    one = reading(Gate.LINEAR, latched=latched, seed=3, scale=6.0)
    ids, new = TOKENS, 6
    for _ in range(new):
        with by_hand(model, [one], [[1.0]] * 3, [4] * 3):
            ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    with torch.no_grad(), steered(model, [one], [1.0]):
        found = model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), do_sample=False, max_new_tokens=new,
                               min_new_tokens=new, eos_token_id=None)  # fmt: skip
    assert found.tolist() == ids.tolist()


def test_rows_that_end_are_taken_out_of_a_block(model: Any) -> None:
    one = reading(Gate.LINEAR, latched=True, seed=3)
    with torch.no_grad():
        whole = []
        with steered(model, [one], [[1.0], [0.5], [2.0]]):
            output = model(TOKENS, use_cache=True)
            whole = model(TOKENS[:, :1], past_key_values=output.past_key_values, use_cache=True).logits
        with steered(model, [one], [[1.0], [0.5], [2.0]]) as steering:
            output = model(TOKENS, use_cache=True)
            output.past_key_values.batch_select_indices(torch.tensor([0, 2]))
            steering.keep([0, 2])
            kept = model(TOKENS[[0, 2], :1], past_key_values=output.past_key_values, use_cache=True).logits
    torch.testing.assert_close(kept, whole[[0, 2]], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_latched_is_refused(model: Any) -> None:
    one = reading(Gate.SIGMOID, latched=True)
    for positions in (Positions.ALL, Positions.PROMPT):
        with (
            pytest.raises(HookError, match="positions must be 'generated'"),
            steered(model, [one], [1.0], positions=positions),
        ):
            pass
    with torch.no_grad():
        past = model(TOKENS, use_cache=True).past_key_values
        block = steered(model, [one], [1.0], mask=torch.ones(3, 6))
        with block, pytest.raises(HookError, match="set by a token that is cached"):
            model(TOKENS[:, :1], past_key_values=past)


def test_hooks_are_where_gates_read_and_go_with_them(model: Any) -> None:
    bank = ColumnBank(device="cpu", max_tokens=4)
    with Steering(model, bank) as steering:
        first, second = (bank.add([reading(Gate.SIGMOID, latched=False, seed=seed)]) for seed in (1, 2))
        version = bank.version
        assert (bank.sites, bank.read_sites) == ((THERE,), (HERE,))
        assert set(steering._hooks) == {HERE, THERE}
        bank.remove(first)
        assert bank.read_sites == (HERE,)
        bank.remove(second)
        assert bank.read_sites == ()
        assert not steering._hooks
        assert bank.version == version


def test_a_gate_is_as_wide_as_the_site_that_it_reads(model: Any) -> None:
    bank = ColumnBank(device="cpu", max_tokens=4)
    bank.add([column(HERE, HIDDEN + 1)])
    with pytest.raises(ColumnError, match=r"site 0\.residual has width 33"):
        bank.add([reading(Gate.SIGMOID, latched=False)])
    assert UNSTEERED.sites == frozenset()
