"""MAT-Steer trains: it moves what is negative, leaves the rest alone, shows what it does, and can be interrupted."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import training.methods.mat_training as mat_module
from steering import Column, Gate, Site, SiteKind, gate_codes, gate_values, steer
from tests.training.clouds import Clouds, make_clouds
from training.activations.store import Contrast
from training.errors import FitError
from training.methods.mat import PAPER, PAPER_SCALED, GateInit, Init, Kernel, MatConfig, Objective
from training.methods.mat_model import Scaler, TrainingSet, median_distance, mmd2
from training.methods.mat_training import CLOSED_GATE, MatFit, fit_mat
from training.methods.probe import fit_logistic

SITE = Site(1, SiteKind.ATTN_OUTPUT)
QUICK = MatConfig(epochs=4, batch=32)


def apply(columns: Sequence[Column], rows: Tensor, multipliers: Sequence[float]) -> Tensor:
    return steer(
        rows,
        torch.stack([c.vector for c in columns]),
        torch.stack([c.gate_weight for c in columns]),
        torch.tensor([c.gate_bias for c in columns]),
        gate_codes([c.gate for c in columns]),
        torch.tensor([c.keep_norm for c in columns]),
        torch.tensor(multipliers).expand(len(rows), -1),
    )


def gate_mean(column: Column, rows: Tensor) -> float:
    bias = torch.tensor([column.gate_bias])
    return float(gate_values(rows, column.gate_weight[None], bias, gate_codes([column.gate])).mean())


def share_positive(contrast: Contrast, rows: Tensor) -> float:
    """What an independent probe, fitted on the contrast, says of the rows."""
    both = torch.cat([contrast.positive, contrast.negative])
    centre, scale = both.mean(0), (both - both.mean(0)).std()
    targets = torch.cat([torch.ones(len(contrast.positive)), torch.zeros(len(contrast.negative))])
    weights, bias = fit_logistic((both - centre) / scale, targets, penalty=10.0)
    return float((((rows - centre) / scale) @ weights + bias > 0).float().mean())


@pytest.fixture(scope="module")
def clouds() -> Clouds:
    return make_clouds()


@pytest.fixture(scope="module", params=[(64, 5.0), (256, 30.0)], ids=["narrow", "wide"])
def trained(request: pytest.FixtureRequest) -> tuple[Clouds, MatFit]:
    width, norm = request.param
    clouds = make_clouds(width, norm)
    return clouds, fit_mat(clouds.train, SITE, MatConfig(epochs=30), dev=clouds.dev)


def test_the_defaults_move_negatives_to_the_positive_side(trained: tuple[Clouds, MatFit]) -> None:
    clouds, fit = trained
    for index, (name, contrast) in enumerate(clouds.dev.items()):
        alone = [float(i == index) for i in range(3)]
        assert share_positive(clouds.train[name], contrast.negative) < 0.1
        assert share_positive(clouds.train[name], apply(fit.columns, contrast.negative, [1.0] * 3)) > 0.9
        assert share_positive(clouds.train[name], apply(fit.columns, contrast.negative, alone)) > 0.9
        assert share_positive(clouds.train[name], apply(fit.columns, contrast.positive, [1.0] * 3)) > 0.95


def test_an_attribute_moves_no_other(trained: tuple[Clouds, MatFit]) -> None:
    clouds, fit = trained
    for index, name in enumerate(clouds.dev):
        moved = apply(fit.columns, clouds.dev[name].negative, [float(i == index) for i in range(3)])
        for other in clouds.dev.keys() - {name}:
            before = share_positive(clouds.train[other], clouds.dev[name].negative)
            assert abs(share_positive(clouds.train[other], moved) - before) < 0.08


def test_gates_open_on_negatives(trained: tuple[Clouds, MatFit]) -> None:
    clouds, fit = trained
    for column in fit.columns:
        contrast = clouds.dev[column.attribute]
        on_negative, on_positive = gate_mean(column, contrast.negative), gate_mean(column, contrast.positive)
        assert on_negative > 0.5
        assert on_negative >= 2 * on_positive
        assert on_positive < gate_mean(column, clouds.neutral[column.attribute]) < on_negative


def test_vectors_of_orthogonal_attributes_are_nearly_orthogonal(trained: tuple[Clouds, MatFit]) -> None:
    clouds, fit = trained
    assert max(abs(value) for value in fit.history[-1].cosines.values()) < 0.2
    for column, direction in zip(fit.columns, clouds.directions, strict=True):
        assert float(torch.cosine_similarity(column.vector, direction, dim=0)) > 0.85


def test_the_log_tells_every_term_of_every_epoch(clouds: Clouds, tmp_path: Path) -> None:
    fit = fit_mat(clouds.train, SITE, QUICK, dev=clouds.dev, folder=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4]
    assert set(rows[0]["losses"]) == {"loss", "mmd", "positive", "sparse", "orthogonal"}
    assert set(rows[0]["cosines"]) == {"a0/a1", "a0/a2", "a1/a2"}
    for row in rows:
        losses = row["losses"]
        weighted = 0.9 * losses["positive"] + 0.1 * losses["sparse"] + 1.0 * losses["orthogonal"]
        assert losses["loss"] == pytest.approx(losses["mmd"] + weighted, rel=1e-4)
    last = fit.history[-1]
    for column in fit.columns:
        contrast = clouds.dev[column.attribute]
        assert last.norms[column.attribute] == pytest.approx(float(column.vector.norm()), rel=1e-4)
        assert last.dev is not None
        assert last.dev[column.attribute].gate_negative == pytest.approx(gate_mean(column, contrast.negative), abs=1e-4)
        assert last.train[column.attribute].mmd < fit.history[0].train[column.attribute].mmd


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("joint", [True, False])
def test_the_log_is_of_what_the_columns_do(clouds: Clouds, standardize: bool, normalize: bool, joint: bool) -> None:
    """The units of the training are folded back exactly: a deployed column does what was measured in the training."""
    config = replace(QUICK, epochs=1, standardize=standardize, normalize=normalize, joint=joint, init=Init.NORMAL)
    fit = fit_mat(clouds.train, SITE, replace(config, gate_init=GateInit.PROBE, lr=0.05), dev=clouds.dev)
    assert all(column.keep_norm is normalize and column.gate is Gate.SIGMOID for column in fit.columns)
    dev = fit.history[-1].dev or {}
    for index, (name, contrast) in enumerate(clouds.dev.items()):
        acting = [1.0 if joint else float(other == index) for other in range(3)]
        steered = apply(fit.columns, contrast.negative, acting)
        width = median_distance(torch.cat([clouds.train[name].positive, clouds.train[name].negative]))[None, None]
        mmds = [float(mmd2(contrast.positive[None], rows[None], width)) for rows in (contrast.negative, steered)]
        assert dev[name].mmd == pytest.approx(mmds[1] / mmds[0], rel=1e-3)
        assert dev[name].gate_positive == pytest.approx(gate_mean(fit.columns[index], contrast.positive), rel=1e-3)
        assert dev[name].gate_negative == pytest.approx(gate_mean(fit.columns[index], contrast.negative), rel=1e-3)


def test_a_seed_gives_the_same_columns_again(clouds: Clouds) -> None:
    fits = [fit_mat(clouds.train, SITE, replace(QUICK, seed=seed)) for seed in (1, 1, 2)]
    assert torch.equal(fits[0].columns[0].vector, fits[1].columns[0].vector)
    assert not torch.equal(fits[0].columns[0].vector, fits[2].columns[0].vector)


@pytest.mark.parametrize("epochs_before", [1, 3])
def test_an_interrupted_fit_ends_as_if_it_had_not_been(
    clouds: Clouds, tmp_path: Path, epochs_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(QUICK, keep_best=True)
    whole = fit_mat(clouds.train, SITE, config, dev=clouds.dev)
    monkeypatch.setattr("training.methods.state.SECONDS", 0.0)
    steps = 0
    original = mat_module.train_step

    def interrupted(*args: object) -> object:
        nonlocal steps
        steps += 1
        if steps > 7 * epochs_before + 3:  # seven steps an epoch
            raise KeyboardInterrupt
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(mat_module, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit_mat(clouds.train, SITE, config, dev=clouds.dev, folder=tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == epochs_before + 1
    monkeypatch.setattr(mat_module, "train_step", original)
    resumed = fit_mat(clouds.train, SITE, config, dev=clouds.dev, folder=tmp_path)
    assert resumed.history == whole.history
    for ours, theirs in zip(resumed.columns, whole.columns, strict=True):
        assert torch.equal(ours.vector, theirs.vector)
        assert torch.equal(ours.gate_weight, theirs.gate_weight)
        assert ours.gate_bias == theirs.gate_bias


def test_a_finished_fit_is_read_not_run(clouds: Clouds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fit_mat(clouds.train, SITE, QUICK, folder=tmp_path)

    def forbidden(*_: object) -> object:
        raise AssertionError

    monkeypatch.setattr(mat_module, "train_step", forbidden)
    again = fit_mat(clouds.train, SITE, QUICK, folder=tmp_path)
    assert torch.equal(again.columns[2].vector, first.columns[2].vector)


def test_a_folder_of_another_fit_is_refused(clouds: Clouds, tmp_path: Path) -> None:
    fit_mat(clouds.train, SITE, QUICK, folder=tmp_path)
    with pytest.raises(FitError, match="other settings or data"):
        fit_mat(clouds.train, SITE, replace(QUICK, l_pos=0.5), folder=tmp_path)
    (tmp_path / "state.safetensors").write_bytes(b"x")
    with pytest.raises(FitError, match="cannot be read"):
        fit_mat(clouds.train, SITE, QUICK, folder=tmp_path)


def test_closed_gates_are_reported(clouds: Clouds, caplog: pytest.LogCaptureFixture) -> None:
    config = replace(QUICK, l_sparse=50.0, lr=0.05)
    with caplog.at_level(logging.WARNING):
        fit = fit_mat(clouds.train, SITE, config)
    assert fit.history[-1].closed == ["a0", "a1", "a2"]
    assert "The gate of 'a0' is closed" in caplog.text
    assert "Lower l_sparse (it is 50)" in caplog.text


def far(clouds: Clouds, times: float) -> dict[str, Contrast]:
    """As a model's activations are: with distances far above the paper's sigma."""
    return {name: Contrast(times * c.positive, times * c.negative) for name, c in clouds.train.items()}


def test_what_the_warning_advises_opens_the_gates_of_the_papers_settings(
    clouds: Clouds, caplog: pytest.LogCaptureFixture
) -> None:
    """Each time something else than what is set, until they are open."""
    config, data, advised = (
        replace(PAPER, init=Init.DIFFERENCE, standardize=True, epochs=40, lr=0.02),
        far(clouds, 10.0),
        [],
    )
    for _ in range(4):
        caplog.clear()
        fit = fit_mat(data, SITE, config)
        found = re.search(r"Use (\w+)=(\w+)", caplog.text)
        if found is None:
            break
        name, value = found.groups()
        advised.append(name)
        assert str(getattr(config, name)) != value
        config = replace(config, **{name: value})
    assert advised == ["objective", "kernel"]
    assert not caplog.text
    assert not fit.history[-1].closed


def test_the_papers_settings_in_units_of_the_data_keep_gates_open(clouds: Clouds) -> None:
    data = far(clouds, 10.0)
    written = fit_mat(data, SITE, replace(PAPER, epochs=40, lr=0.02))
    scaled = fit_mat(data, SITE, replace(PAPER_SCALED, epochs=40, lr=0.02))
    assert written.history[-1].closed == ["a0", "a1", "a2"]
    for side in scaled.history[-1].train.values():
        assert side.gate_negative > max(CLOSED_GATE, 4 * side.gate_positive)
        assert side.mmd < 0.5
    for name in ("l_pos", "l_sparse", "l_ortho", "batch", "lr", "epochs", "joint"):
        assert getattr(PAPER_SCALED, name) == getattr(PAPER, name)


def test_the_best_epoch_is_not_that_of_untrained_gates(clouds: Clouds) -> None:
    """The alignment alone would be best where every gate is open on everything."""
    config = MatConfig(epochs=20, batch=32, init=Init.DIFFERENCE, l_pos=3.0)
    fit = fit_mat(clouds.train, SITE, config, dev=clouds.dev)
    losses = [epoch.dev_losses(config) for epoch in fit.history]
    for name, chosen in fit.chosen.items():
        assert chosen > 0
        assert losses[chosen][name] == min(each[name] for each in losses)


def test_a_fit_that_no_epoch_has_made_better_says_so(clouds: Clouds, caplog: pytest.LogCaptureFixture) -> None:
    """On dev both sides are alike: the less is moved the better, and gates that open more on negatives move more."""
    dev = {name: Contrast(one.negative, one.negative) for name, one in clouds.dev.items()}
    config = replace(QUICK, keep_best=True, init=Init.DIFFERENCE, l_pos=0.0, l_sparse=0.0)
    fit = fit_mat(clouds.train, SITE, config, dev=dev)
    assert set(fit.chosen.values()) == {0}
    assert "No epoch was better on dev than the start for 'a0' and 'a1' and 'a2'" in caplog.text
    assert not any(column.gate_weight.any() for column in fit.columns)


def test_an_attribute_that_no_epoch_makes_better_does_not_keep_the_others_from_training(
    clouds: Clouds, caplog: pytest.LogCaptureFixture
) -> None:
    dev = clouds.dev | {"a1": Contrast(clouds.dev["a1"].negative, clouds.dev["a1"].negative)}
    config = replace(QUICK, keep_best=True, init=Init.DIFFERENCE, l_pos=0.0, l_sparse=0.0)
    fit = fit_mat(clouds.train, SITE, config, dev=dev)
    assert [bool(column.gate_weight.any()) for column in fit.columns] == [True, False, True]
    assert "for 'a1', which is kept" in caplog.text
    for column in fit.columns:
        norm = fit.history[fit.chosen[column.attribute]].norms[column.attribute]
        assert float(column.vector.norm()) == pytest.approx(norm, rel=1e-4)
    assert len(set(fit_mat(clouds.train, SITE, replace(config, joint=True), dev=dev).chosen.values())) == 1


def test_the_best_epoch_is_kept_and_patience_ends_the_fit(clouds: Clouds) -> None:
    wild = replace(QUICK, epochs=30, lr=0.5)
    best = fit_mat(clouds.train, SITE, replace(wild, keep_best=True, patience=2), dev=clouds.dev)
    losses = [epoch.dev_losses(wild) for epoch in best.history]
    for column in best.columns:
        own, chosen = [each[column.attribute] for each in losses], best.chosen[column.attribute]
        assert chosen == own.index(min(own))
        norm = best.history[chosen].norms[column.attribute]
        assert float(column.vector.norm()) == pytest.approx(norm, rel=1e-4)
    assert len(best.history) - 1 == max(best.chosen.values()) + 2 < 30


@pytest.mark.parametrize("config", [
    PAPER,
    MatConfig(objective=Objective.REFERENCE),
    MatConfig(joint=True, kernel=Kernel.MULTI, init=Init.SCALED_NORMAL),
    MatConfig(l_pos=0, l_sparse=0, l_ortho=0, normalize=False, kernel=Kernel.FIXED),
])  # fmt: skip
def test_every_variant_trains_without_a_nan(clouds: Clouds, config: MatConfig) -> None:
    fit = fit_mat(clouds.train, SITE, replace(config, epochs=2, batch=64))
    assert fit.history[-1].losses["loss"] < fit.history[0].losses["loss"]


def test_sides_of_different_sizes_are_balanced() -> None:
    full = make_clouds(count=30).train
    uneven = {"a0": Contrast(full["a0"].positive[:3], full["a0"].negative), "a1": full["a1"]}
    scaler = Scaler.of(uneven, standardize=True)
    table = TrainingSet.of(scaler.apply(uneven), scaler.origin)
    batches = list(table.batches(8, seed=0, epoch=1))
    assert len(batches) == 4
    assert all(batch.shape == (2, 16) for batch in batches)
    assert {int(row) for batch in batches for row in batch[0, 8:]} == set(range(3, 33))
    for batch in batches:
        for own, sides in zip(batch, table.sides.values(), strict=True):
            assert all(row in sides[column // 8] for column, row in enumerate(own.tolist()))


def bad(clouds: Clouds, **sides: Mapping[str, Contrast]) -> None:
    fit_mat(sides.get("train", clouds.train), SITE, QUICK, dev=sides.get("dev"))


def test_activations_that_cannot_be_fitted_are_refused(clouds: Clouds) -> None:
    a0 = clouds.train["a0"]
    with pytest.raises(FitError, match="no attribute"):
        bad(clouds, train={})
    with pytest.raises(FitError, match="needs positive and negative"):
        bad(clouds, train={"a0": Contrast(a0.positive[:0], a0.negative)})
    with pytest.raises(FitError, match="not all finite"):
        bad(clouds, train={"a0": Contrast(a0.positive * float("nan"), a0.negative)})
    with pytest.raises(FitError, match="one width"):
        bad(clouds, train={"a0": Contrast(a0.positive[:, :3], a0.negative)})
    with pytest.raises(FitError, match="must be the same"):
        bad(clouds, dev={"a0": a0})
    with pytest.raises(FitError, match="patience needs dev activations"):
        fit_mat(clouds.train, SITE, replace(QUICK, patience=2))


@pytest.mark.parametrize("change", [
    {"lr": 0}, {"lr": float("nan")}, {"sigma": -1.0}, {"l_pos": -0.1}, {"l_sparse": float("inf")}, {"batch": 0},
    {"epochs": 0}, {"patience": 0},
])  # fmt: skip
def test_settings_out_of_range_are_named(change: dict[str, float]) -> None:
    with pytest.raises(FitError, match=next(iter(change))):
        MatConfig(**change)  # type: ignore[arg-type]


def test_stored_settings_come_back_as_they_were() -> None:
    config = MatConfig(gate_init=GateInit.PROBE, objective=Objective.REFERENCE)
    stored = config.as_dict()
    again = MatConfig(**stored)  # type: ignore[arg-type]
    assert again == config
    assert again.gate_init is GateInit.PROBE
    assert again.objective is Objective.REFERENCE
