"""`matsteer train --activations`: a fit from what `extract` or `import-features` wrote, checked against the model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from steering import checkpoint as checkpoints
from tests.training.helpers import make_llama, make_tokenizer
from training.cli import app

LAYERS, WIDTH, ROWS = 3, 16, 40
DATA = ["--data", "truthfulness=truthfulness.jsonl", "--data", "civility=civility.jsonl"]
CAA = ["--layer", "1", "--method", "caa"]
STORED = ["--activations", "stored"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models, two attributes, their activations in the first one, features of it, prompts and a judge."""
    folder = tmp_path_factory.mktemp("world")
    for name, model in {
        "model": make_llama(), "sibling": make_llama(seed=1), "wide": make_llama(hidden_size=32, num_hidden_layers=2)
    }.items():  # fmt: skip
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    for attribute in ("truthfulness", "civility"):
        rows = [
            {"prompt": f"Q: What is {n}? A:", "completion": f" {word} {n}", "label": label, "group": f"{attribute} {n}"}
            for n in range(20)
            for label, word in ((True, attribute), (False, "bad"))
        ]
        (folder / f"{attribute}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text('{"prompt": "Q: Where? A:"}\n')
    (folder / "oracle_of_stored.py").write_text("def judge(prompt, text):\n    return {'short': len(text) < 10}\n")
    np.save(folder / "tiny_labels.npy", np.array([1, 1, 0, 0] * (ROWS // 4)))
    np.save(folder / "tiny_head_wise.npy", np.random.default_rng(0).normal(size=(ROWS, LAYERS, WIDTH)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done("extract", *DATA, "--layer", "0,1", "--pool", "last", "--seed", "7", "--out", "stored")
        features = ["--attribute", "truth", "--layer", "0-2", "--out", "features"]
        assert CliRunner().invoke(app, ["import-features", "tiny", "--model", "model", *features]).exit_code == 0
    return folder


def run(command: str, *arguments: str, model: str = "model") -> Result:
    return CliRunner().invoke(app, [command, "--model", model, *arguments])


def done(command: str, *arguments: str, model: str = "model") -> Result:
    result = run(command, *arguments, model=model)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: str, model: str = "model") -> str:
    """The one sentence."""
    result = run("train", "--out", "checkpoints/x", *arguments, model=model)
    assert result.exit_code == 2, result.output
    (error,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    return error


def test_the_fit_is_the_one_from_the_data_and_no_text_is_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done("train", *DATA, *CAA, "--pool", "last", "--seed", "7", "--out", "checkpoints/direct", "--no-evaluate")

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("training.activations.extraction.ExtractionJob.run", forbidden)
    result = done("train", *STORED, *CAA, "--out", "checkpoints/stored")
    assert "not evaluated: activations hold no texts to choose from" in result.output
    ours, theirs = (checkpoints.load(here / "checkpoints" / name / "v1") for name in ("stored", "direct"))
    assert [column.attribute for column in ours.columns] == ["truthfulness", "civility"]
    for column, other in zip(ours.columns, theirs.columns, strict=True):
        assert torch.equal(column.vector, other.vector)
    training = ours.config.training
    assert training["hyperparameters"]["pool"] == "last"
    assert training["splits"] == {"counts": theirs.config.training["splits"]["counts"]}
    (source,) = training["data"]
    assert (source["path"], source["plan"]["sites"]) == ("stored", ["0.attn_output", "1.attn_output"])
    assert "| activations | `stored` |" in (here / "checkpoints/stored/v1/README.md").read_text()


def test_data_beside_them_are_evaluated_on_in_the_splits_of_the_activations(here: Path) -> None:
    undamaged = ["--damage", "0"]  # the texts that show it are sampled by the seed
    done("train", *DATA, *CAA, *undamaged, "--pool", "last", "--seed", "7", "--out", "checkpoints/direct")
    result = done("train", *STORED, *DATA, *CAA, *undamaged, "--seed", "1", "--out", "checkpoints/stored")
    assert "split by seed" not in result.output
    ours, theirs = (checkpoints.load(here / "checkpoints" / name / "v1").config for name in ("stored", "direct"))
    assert ours.evaluation == theirs.evaluation
    assert [source["name"] for source in ours.training["data"]] == ["activations", "truthfulness", "civility"]
    again = done("evaluate", "--checkpoint", "checkpoints/stored", *DATA, *undamaged, "--seed", "2", "--alone")
    stored = json.loads((here / "checkpoints/stored/v1/evaluation/evaluation.json").read_text())
    assert stored["arms"] == theirs.evaluation["arms"], again.output


def test_groups_that_have_no_activations_are_counted(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = (here / "civility.jsonl").read_text() + (here / "civility.jsonl").read_text().replace("civility ", "other ")
    (here / "more.jsonl").write_text(rows.replace("What", "Who"))
    done("train", *STORED, "--data", "civility=more.jsonl", *CAA, "--out", "checkpoints/x", "--limit", "2")
    assert "20 groups of the data have no stored activations: they are split by seed 0" in caplog.text


def test_a_judge_needs_no_data(here: Path) -> None:
    judge = ["--judge", "oracle_of_stored:judge", "--prompts", "prompts.jsonl", "--max-new-tokens", "4"]
    assert "short" in done("train", *STORED, *CAA, *judge, "--out", "checkpoints/x").output
    arms = checkpoints.load(here / "checkpoints/x/v1").config.evaluation["arms"]
    assert [arm["arm"] for arm in arms] == ["unsteered", "steered", "truthfulness alone", "civility alone"]


def test_imported_features_become_a_checkpoint(here: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit = ["--activations", "features", "--layer", "0-2", "--method", "iti", "--top", "3", "--out", "checkpoints/iti"]
    assert "not evaluated" in done("train", *fit).output
    checkpoint = checkpoints.load(here / "checkpoints/iti/v1")
    assert checkpoint.attributes == {"truth": 15.0}
    assert {column.site.kind.value for column in checkpoint.columns} == {"attn_heads"}
    assert checkpoint.config.training["data"][0]["plan"]["features"] == "tiny"
    assert [count["groups"] for count in checkpoint.config.training["splits"]["counts"]] == [4, 1, 5]
    assert not caplog.text
    done("train", *fit, model="sibling")
    assert "features holds features of model; the checkpoint will be one for sibling" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "model", "complaint"),
    [
        ([*STORED, "--layer", "2"], "model", "stored has no activations at 2.attn_output; it has 0.attn_output, 1"),
        ([*STORED, *CAA, "--site", "residual"], "model", "stored has no activations at 1.residual"),
        ([*STORED, *CAA], "sibling", "stored was extracted from another model than sibling"),
        ([*STORED, *CAA, "--dtype", "bfloat16"], "model", "or in another dtype"),
        (["--activations", "features", "--layer", "1", "--method", "iti"], "wide",
         "features holds 16 numbers a row at 1.attn_heads, but wide has 32 there"),
        (["--activations", "features", "--layer", "2", "--method", "iti"], "wide", "there is no layer 2 for site"),
        (["--activations", "gone", *CAA], "model", "gone holds no complete activations: manifest.json is missing"),
        ([*STORED, *CAA, "--data", "civility=gone.jsonl"], "model", "gone.jsonl cannot be read"),
        ([*STORED, *CAA, "--set", "beauty=2"], "model", "no attribute 'beauty'"),
        ([*STORED, *CAA, "--pool", "last"], "model", "--pool is for an extraction"),
        ([*STORED, *CAA, *DATA, "--no-evaluate"], "model", "--data beside --activations is to be evaluated on"),
        ([*STORED, "--layer", "1", "--method", "actadd", "--pair", "a", "b"], "model", "give no --activations"),
        ([*STORED, "--layer", "1", "--method", "ablation", "--site", "attn_output", "--source", "2.residual"], "model",
         "stored has no activations at 2.residual"),
        ([*STORED], "model", "--layer is missing, and on dev there is nothing to find a place by"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_sentence(here: Path, arguments: list[str], model: str, complaint: str) -> None:
    assert complaint in refused(*arguments, model=model)
    assert not (here / "checkpoints/x/v1").exists()


def test_a_limit_holds_for_what_is_stored_as_for_what_is_extracted(here: Path) -> None:
    limit, seed = ["--limit", "3"], ["--pool", "last", "--seed", "7"]
    done("train", *DATA, *CAA, *limit, *seed, "--out", "checkpoints/direct", "--no-evaluate")
    done("train", *STORED, *CAA, *limit, "--out", "checkpoints/stored", "--no-evaluate")
    ours, theirs = (checkpoints.load(here / "checkpoints" / name / "v1") for name in ("stored", "direct"))
    for column, other in zip(ours.columns, theirs.columns, strict=True):
        torch.testing.assert_close(column.vector, other.vector)
    counts = ours.config.training["splits"]["counts"]
    assert counts == theirs.config.training["splits"]["counts"]
    assert {(one["split"], one["positive"], one["negative"]) for one in counts} == {
        ("train", 3, 3), ("dev", 2, 2), ("test", 10, 10),
    }  # fmt: skip
    done("train", *STORED, *CAA, "--out", "checkpoints/whole", "--no-evaluate")
    whole = checkpoints.load(here / "checkpoints/whole/v1")
    assert not torch.allclose(whole.columns[0].vector, ours.columns[0].vector)


def test_a_limit_holds_for_a_sweep_of_what_is_stored(here: Path) -> None:
    limited = [*DATA, *CAA, "--limit", "1", "--seed", "7", "--multipliers", "1", "--damage", "0"]
    done("sweep", *limited, "--pool", "last", "--out", "direct")
    done("sweep", *STORED, *limited, "--out", "swept")
    points = [json.loads((here / name / "sweep.json").read_text()) for name in ("direct", "swept")]
    assert points[0] == points[1]
