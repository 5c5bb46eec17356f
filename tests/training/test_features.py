"""Features of honest_llama become activations that every method can be fitted on."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from steering import Site, SiteKind
from tests.training.helpers import make_llama
from training.activations import Pool
from training.activations.store import load_activations
from training.cli import app
from training.data.samples import Split
from training.methods import METHODS
from training.methods.fit import Recipe, fit

LAYERS, WIDTH, ROWS = 3, 16, 40
LABELS = np.array([1, 1, 0, 0] * (ROWS // 4))
HEADS, STREAM = Site(1, SiteKind.ATTN_HEADS), Site(1, SiteKind.RESIDUAL)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model; its features as honest_llama's script takes them; what block 1 puts out at the last token, by a hook."""
    folder, model = tmp_path_factory.mktemp("features"), make_llama()
    model.save_pretrained(folder / "model")
    seen: dict[Any, torch.Tensor] = {}
    for layer, block in enumerate(model.model.layers):
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, args, n=layer: seen.update({n: args[0][0, -1]}))
    model.model.layers[1].register_forward_hook(lambda _, __, output: seen.update(stream=output[0, -1]))
    heads, states, stream = [], [], []
    with torch.no_grad():
        for row in range(ROWS):
            output = model(torch.tensor([[5, 7 + row, 40 + 9 * int(LABELS[row])]]), output_hidden_states=True)
            states.append(torch.stack(output.hidden_states)[:, 0, -1].half().numpy())
            heads.append(torch.stack([seen[layer] for layer in range(LAYERS)]).half().numpy())
            stream.append(seen["stream"].numpy())
    np.save(folder / "tiny_tqa_head_wise.npy", heads)
    np.save(folder / "tiny_tqa_layer_wise.npy", states)
    np.save(folder / "tiny_tqa_labels.npy", LABELS)
    np.save(folder / "stream.npy", stream)
    return folder


def run(here: Path, *arguments: str, layer: str = "1", site: str = "attn_heads,residual") -> Any:
    given = ["import-features", str(here / "tiny_tqa"), "--model", str(here / "model"), "--attribute", "truth"]
    place = ["--layer", layer, "--site", site, "--out", str(here / "out")]
    return CliRunner().invoke(app, [*given, *place, *arguments])


def replaced(here: Path, name: str, array: Any) -> None:
    (here / name).unlink(missing_ok=True)
    np.save(here / name, array)


def test_rows_are_the_activations_at_the_sites(here: Path) -> None:
    result = run(here)
    assert result.exit_code == 0, result.output
    assert "40 activations of 10 groups at 1.attn_heads, 1.residual" in " ".join(result.output.split())
    found = load_activations(here / "out")
    assert torch.equal(found.values[HEADS], torch.from_numpy(np.load(here / "tiny_tqa_head_wise.npy")[:, 1]).float())
    assert torch.allclose(found.values[STREAM], torch.from_numpy(np.load(here / "stream.npy")), rtol=2e-3)
    assert found.labels.tolist() == LABELS.astype(bool).tolist()
    assert found.pool is Pool.LAST
    assert found.names == ("truth",)


def test_answers_to_one_question_share_its_split(here: Path) -> None:
    assert run(here).exit_code == 0
    found = load_activations(here / "out")
    assert found.groups == tuple(str(1 + row // 4) for row in range(ROWS))
    assert {split: found.splits.count(split) for split in Split} == {Split.TRAIN: 16, Split.DEV: 4, Split.TEST: 20}
    assert len(set(zip(found.groups, found.splits, strict=True))) == 10


@pytest.mark.parametrize("method", ["caa", "probe", "mat", "iti"])
def test_every_method_is_fitted_on_them(here: Path, method: str) -> None:
    assert run(here).exit_code == 0
    columns = fit(load_activations(here / "out"), [HEADS], Recipe(METHODS[method].config()))
    assert [(column.attribute, column.site) for column in columns] == [("truth", HEADS)]
    assert float(columns[0].vector.norm()) > 0


def test_groups_may_be_given_or_be_the_rows(here: Path) -> None:
    assert run(here, "--groups", "rows").exit_code == 0
    assert len(set(load_activations(here / "out").groups)) == ROWS
    np.save(here / "questions.npy", np.arange(ROWS) // 8)
    assert run(here, "--groups", str(here / "questions.npy")).exit_code == 0
    assert len(set(load_activations(here / "out").groups)) == 5
    np.save(here / "short.npy", np.arange(3))
    short = run(here, "--groups", str(here / "short.npy"))
    assert short.exit_code == 2
    assert "must hold a group for each of 40 rows" in words(short.output)


def words(output: str) -> str:
    return re.sub(r"\s+", " ", output)


def test_the_last_hidden_state_is_refused_because_it_is_normed(here: Path) -> None:
    result = run(here, layer="2", site="residual")
    assert result.exit_code == 2
    assert "has passed the model's final norm: it is not the residual stream at 2.residual" in words(result.output)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("labels", np.array([[1, 0]]), "must hold a 0 or 1 for each row"),
        ("labels", np.array([0, 2]), "must hold a 0 or 1 for each row"),
        (
            "labels",
            np.array([0, None]),
            "tiny_tqa_labels.npy cannot be read: Array can't be memory-mapped: Python objects",
        ),
        ("head_wise", np.zeros((ROWS, LAYERS, WIDTH + 1)), "ask for floats of shape [40, 3, 16]"),
        ("head_wise", np.zeros((ROWS - 1, LAYERS, WIDTH)), "holds float64 of shape [39, 3, 16]"),
        ("head_wise", np.zeros((ROWS, LAYERS, WIDTH), int), "holds int64 of shape"),
        ("head_wise", np.full((ROWS, LAYERS, WIDTH), np.inf), "holds values at 1.attn_heads that are not finite"),
        ("layer_wise", np.zeros((ROWS, LAYERS, WIDTH)), "ask for floats of shape [40, 4, 16]"),
    ],
)
def test_files_that_do_not_fit_are_refused(here: Path, name: str, array: Any, message: str) -> None:
    replaced(here, f"tiny_tqa_{name}.npy", array)
    result = run(here)
    assert result.exit_code == 2
    assert message in words(result.output)
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ({"layer": "3"}, "has layers 0 to 2: there is no layer 3"),
        ({"site": "mlp_output"}, "Features hold attn_heads and residual, not 1.mlp_output"),
    ],
)
def test_places_that_features_lack_are_refused(here: Path, place: dict[str, str], message: str) -> None:
    result = run(here, **place)
    assert result.exit_code == 2
    assert message in words(result.output)


def test_a_file_that_is_not_there_is_named(here: Path) -> None:
    (here / "tiny_tqa_head_wise.npy").unlink()
    assert "tiny_tqa_head_wise.npy cannot be read" in words(run(here).output)
