"""Every method ends in the same checkpoint and the same bank, and one batch may ask each row for another of them."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steering import Column, ColumnBank, SequenceSteering, Site, Steering, site_module
from steering import checkpoint as checkpoints
from tests.training.every_method import (
    ATTENTION,
    COEFFICIENTS,
    HEADS,
    MEANED,
    NAME,
    PAIR,
    RECIPES,
    RESIDUAL,
    SOURCE,
    TOP,
    ZEROED,
    read_everywhere,
    store_all,
)
from training.activations.store import Activations
from training.methods.base import Direction
from training.methods.fit import Recipe, fit
from training.methods.heads import Head
from training.methods.iti import ItiConfig, fit_iti

WIDTH = 4  # of a head
ROWS: list[dict[str, float]] = [
    {},
    *({name: 1.0} for name in RECIPES),
    {"iti": 15.0},
    {"ablation": -0.5},
    {"clamp": -2.0, "caa": 0.5},
    {"cast": -2.0, "mat": 1.0, "probe": 0.5},
    {"held": -2.0, "mat": 1.0, "clamp": 1.0, "reps": 0.5},
    {"held": 1.5, "cast": 1.0, "reps": -1.0},
    {"mat": 2.0, "caa": -0.7, "iti": 3.0, "ablation": 1.0, "zeroed": 1.0, "control": 0.4},
    {"meaned": 0.5, "zeroed": 0.5, "actadd": 2.0, "probe": 1.5, "control": -1.0, "clamp": 0.5},
]
TOKENS = torch.randint(3, 320, (len(ROWS), 5), generator=torch.Generator().manual_seed(5))
FIRST = [row % 3 for row in range(len(ROWS))]  # the token that each row is steered from, where its condition latches

Change = Callable[[Site, Tensor], Tensor]  # the change of activations [T, D] at a site, by multiplier 1
Scaled = Callable[[Site, Tensor, float], Tensor]  # by any multiplier


@pytest.fixture(scope="module")
def activations(llama: Any, tokenizer: Any) -> Activations:
    return read_everywhere(llama, tokenizer)


@pytest.fixture(scope="module")
def stored(
    llama: Any, tokenizer: Any, activations: Activations, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, checkpoints.Checkpoint]:
    return store_all(llama, tokenizer, activations, tmp_path_factory.mktemp("checkpoints"))


@torch.no_grad()
def test_a_mixed_batch_is_what_the_formulas_say(
    llama: Any, tokenizer: Any, activations: Activations, stored: dict[str, checkpoints.Checkpoint]
) -> None:
    bank = ColumnBank(device="cpu", max_tokens=TOKENS.numel())
    handles = {name: bank.add(checkpoint.columns) for name, checkpoint in stored.items()}
    rows = [SequenceSteering.of([(handles[n], [m] * len(handles[n])) for n, m in row.items()]) for row in ROWS]
    plain = llama(TOKENS).logits
    places, numbers = np.arange(TOKENS.shape[1]), np.arange(len(rows))[:, None]
    lines = np.where([[bank.latches(row)] for row in rows], numbers + 1, 0)
    acting, begins = places >= np.array(FIRST)[:, None], places == np.array(FIRST)[:, None]
    with Steering(llama, bank):
        bank.fill(
            rows,
            np.where(acting, numbers, -1).ravel(),
            np.stack([(lines * acting).ravel(), (lines * begins).ravel()]),
        )
        bank.check()
        found = llama(TOKENS).logits
    pair = [last_states(llama, tokenizer, text) for text in PAIR.prompts]
    changes = formulas(activations, stored, pair[0] - pair[1])
    model = copy.deepcopy(llama).double()
    with by_hand(model, changes, *(stored[name].columns[0] for name in ("mat", "cast", "held"))):
        expected = model(TOKENS).logits
    assert torch.equal(found[0], plain[0])
    for row, asked in enumerate(ROWS[1:], start=1):
        torch.testing.assert_close(found[row].double(), expected[row], rtol=1e-3, atol=1e-3)
        moved = float((found[row] - plain[row]).abs().max())
        assert moved > 0.05, f"{asked} does next to nothing"


def formulas(activations: Activations, stored: Mapping[str, checkpoints.Checkpoint], pair: Tensor) -> dict[str, Scaled]:
    """Each method's own formula in float64, from the activations; of MAT-Steer, the probe and RePS what was learned.
    Without CAST's, which are by what each row has read."""
    values = {site: rows.double() for site, rows in activations.values.items()}
    sides = activations.labels

    def difference(site: Site) -> Tensor:
        return values[site][sides].mean(0) - values[site][~sides].mean(0)

    def iti(site: Site, a: Tensor) -> Tensor:
        best = fit_iti(activations, NAME, HEADS, ItiConfig(top=TOP)).probes[:TOP]
        change = torch.zeros_like(a)
        for span in [probe.head.span(WIDTH) for probe in best if probe.head.site == site]:
            along = difference(site)[span] / difference(site)[span].norm()
            change[:, span] = (values[site][:, span] @ along).std(correction=0) * along
        return change

    def ablation(site: Site, a: Tensor) -> Tensor:
        r = difference(SOURCE) / difference(SOURCE).norm()
        return -(a @ r)[:, None] * r

    def clamp(site: Site, a: Tensor, multiplier: float) -> Tensor:
        r = difference(site) / difference(site).norm()
        high, low = (values[site][side].mean(0) @ r for side in (sides, ~sides))
        target = (high + low) / 2 + multiplier * (high - low) / 2
        return (target - a @ r)[:, None] * r

    def replaced(heads: tuple[Head, ...], fill: Callable[[Tensor], Tensor]) -> Change:
        def change(site: Site, a: Tensor) -> Tensor:
            target = a.clone()
            for span in [head.span(WIDTH) for head in heads if head.site == site]:
                target[:, span] = fill(values[site][:, span])
            return target - a

        return change

    def only_at(sites: list[Site], change: Scaled) -> Scaled:
        return lambda site, a, m: change(site, a, m) if site in sites else torch.zeros_like(a)

    def scaled(change: Change) -> Scaled:
        return lambda site, a, m: m * change(site, a)

    changes: dict[str, Change] = {
        "mat": sigmoid(stored["mat"].columns[0]),
        "caa": lambda site, a: difference(site).expand_as(a),
        "actadd": lambda site, a: pair.double().expand_as(a),
        "probe": lambda site, a: stored["probe"].columns[0].vector.double().expand_as(a),
        "iti": iti,
        "ablation": ablation,
        "zeroed": replaced(ZEROED, lambda rows: torch.zeros(rows.shape[1], dtype=rows.dtype)),
        "meaned": replaced(MEANED, lambda rows: rows.mean(0)),
        "reps": lambda site, a: stored["reps"].columns[0].vector.double().expand_as(a),
        "control": lambda site, a: COEFFICIENTS[site.layer] * difference(site).expand_as(a),
    }
    scale = {name: scaled(change) for name, change in changes.items()} | {"clamp": clamp}
    return {name: only_at(RECIPES[name][1], change) for name, change in scale.items()}


def conditional(column: Column, read: Tensor) -> Scaled:
    """The change of a row that has activations `read` [T, D] at the site that the gate reads; what is held is read at
    the first of them."""
    w, v = column.gate_weight.double(), column.vector.double()
    opens = ((read @ w) / read.norm(dim=1) + column.gate_bias > 0).double()
    assert column.reads is not None
    opens = opens[:1].expand_as(opens) if column.reads.latched else opens
    return lambda site, a, m: m * opens[:, None] * v if site == column.site else torch.zeros_like(a)


def nothing(site: Site, a: Tensor, multiplier: float) -> Tensor:
    return torch.zeros_like(a)


def sigmoid(column: Column) -> Change:
    w, b, v = column.gate_weight.double(), column.gate_bias, column.vector.double()
    return lambda site, a: torch.sigmoid(a @ w + b)[:, None] * v


@contextmanager
def by_hand(model: Any, changes: Mapping[str, Scaled], mat: Column, cast: Column, held: Column) -> Iterator[None]:
    """A float64 model whose activations change as ROWS ask for, without anything of `steering` but where sites are."""
    assert mat.keep_norm
    changes, read = dict(changes), dict[Site, Tensor]()

    def moved(site: Site, batch: Tensor) -> Tensor:
        rows = []
        read[site] = batch
        for row, (asked, begin, whole) in enumerate(zip(ROWS, FIRST, batch, strict=True)):
            new = a = whole[begin:]
            for name, column in (("cast", cast), ("held", held)):
                changes[name] = conditional(column, read[RESIDUAL[0]][row, begin:]) if site == column.site else nothing
            if "mat" in asked and site == mat.site:
                new = a + changes["mat"](site, a, asked["mat"])
                new = new * (a.norm(dim=1) / new.norm(dim=1))[:, None]
            new = new + sum(changes[name](site, a, m) for name, m in asked.items() if name != "mat")
            rows.append(torch.cat([whole[:begin], new]))
        return torch.stack(rows)

    handles = []
    for site in [*RESIDUAL, *HEADS, *ATTENTION]:
        module, side = site_module(model, site)
        if side == "input":
            handles.append(module.register_forward_pre_hook(lambda m, args, s=site: (moved(s, args[0]), *args[1:])))
        else:
            handles.append(module.register_forward_hook(lambda m, args, out, s=site: first(out, lambda a: moved(s, a))))
    yield
    for handle in handles:
        handle.remove()


def first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])


def last_states(llama: Any, tokenizer: Any, text: str) -> Tensor:
    """After block 0, at the last token."""
    with torch.no_grad():
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        states: Tensor = llama(ids, output_hidden_states=True).hidden_states[1][0, -1]
    return states


def test_itis_default_is_the_papers_alpha(stored: dict[str, checkpoints.Checkpoint]) -> None:
    assert stored["iti"].attributes == {NAME: 15.0}
    assert all(column.range == (-30.0, 30.0) for column in stored["iti"].columns)
    assert {name: c.attributes[NAME] for name, c in stored.items() if name != "iti"} == dict.fromkeys(
        [name for name in RECIPES if name != "iti"], 1.0
    )


def test_a_recipe_is_told_in_the_checkpoint(stored: dict[str, checkpoints.Checkpoint]) -> None:
    told = {name: c.config.training["hyperparameters"] for name, c in stored.items()}
    assert told["iti"]["top"] == TOP
    assert told["ablation"]["source"] == "1.residual"
    assert told["zeroed"]["heads"] == "0.1, 2.3"
    assert told["meaned"]["fill"] == "mean"
    assert told["control"]["coefficient 1"] == -0.25
    assert told["actadd"]["positive"] == "good bees"


def test_attributes_with_places_of_their_own_are_fitted_there(activations: Activations, tmp_path: Path) -> None:
    recipe = Recipe(ItiConfig(top=2, direction=Direction.PROBE), places={NAME: tuple(HEADS[1:])})
    columns = fit(activations, HEADS[:1], recipe, folder=tmp_path)
    assert {column.site for column in columns} <= set(HEADS[1:])
    assert (tmp_path / "heads.json").read_text().count("1.") >= 4
    halved = fit(activations, [], replace(recipe, strengths={NAME: 0.5}, defaults={NAME: 4.0}))
    for one, other in zip(columns, halved, strict=True):
        torch.testing.assert_close(other.vector, 0.5 * one.vector)
        assert other.default_multiplier == 4.0
