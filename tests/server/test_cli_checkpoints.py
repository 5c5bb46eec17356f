"""`matsteer checkpoints import` and `export`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from typer.testing import CliRunner, Result

from server.app import create_app
from server.cli import app
from server.config import Settings
from steering.checkpoint import base_model_info, load, save
from steering.column import Column
from steering.hook import steered
from steering.types import Clamp, Gate, Positions, Site

runner = CliRunner(env={"COLUMNS": "240", "NO_COLOR": "1", "MATSTEER_THREADS": "1"})
WIDTH = 32


@pytest.fixture
def honest(model: Any, model_folder: Path, tmp_path: Path) -> Path:
    """A folder of checkpoints with constant columns for two attributes at two blocks."""
    torch.manual_seed(0)
    columns = [
        Column(name, Site.parse(site), Gate.CONSTANT, torch.randn(WIDTH), torch.zeros(WIDTH), 0.0, False)
        for name in ("honesty", "calm")
        for site in ("1.residual", "2.residual")
    ]
    save(
        tmp_path / "checkpoints" / "honest" / "v1", name="honest", version="v1", method="caa",
        base_model=base_model_info(model, str(model_folder), None), columns=columns, normalize=False,
        positions=Positions.GENERATED, training={}, evaluation={}, card="",
    )  # fmt: skip
    return tmp_path / "checkpoints"


def export(root: Path, *arguments: str, name: str = "honest") -> Result:
    return runner.invoke(app, ["checkpoints", "export", name, "--checkpoints", str(root), *arguments])


def take(source: Path, model: Path, root: Path, *arguments: str) -> Result:
    place = ["--model", str(model), "--out", str(root / "mine")]
    return runner.invoke(app, ["checkpoints", "import", str(source), *place, *arguments])


@pytest.mark.parametrize("format", ["gguf", "pyvene", "safetensors"])
def test_what_is_exported_is_imported_and_verified(
    honest: Path, model_folder: Path, tmp_path: Path, format: str
) -> None:
    file = tmp_path / ("wider than a line " * 5) / f"honesty.{format}"
    file.parent.mkdir()
    exported = export(honest, "--format", format, "--set", "honesty=2", "--out", str(file))
    assert (exported.exit_code, exported.output) == (0, f"wrote {file}\n")
    again = export(honest, "--format", format, "--set", "honesty=2", "--out", str(file))
    assert again.exit_code != 0
    assert "exists already" in again.output
    taken = take(file, model_folder, honest)
    assert taken.exit_code == 0, taken.output
    assert f"wrote {honest / 'mine' / 'v1'}: " in taken.output
    was, now = load(honest / "honest" / "v1"), load(honest / "mine" / "v1")
    assert now.config.base_model == was.config.base_model
    assert now.config.training["imported"]["format"] == format
    assert "honesty" in now.attributes
    assert torch.equal(now.columns[0].vector, was.columns[0].vector * (1 if format == "safetensors" else 2))
    assert "Imported from" in (honest / "mine" / "v1" / "README.md").read_text()
    found = runner.invoke(
        app, ["checkpoints", "verify", "mine", "--checkpoints", str(honest), "--model", str(model_folder)]
    )
    assert found.exit_code == 0
    assert "mine@v1: sound" in found.output


def test_a_file_of_mat_steer_becomes_a_gated_checkpoint(model_folder: Path, tmp_path: Path) -> None:
    state = {
        "steering_vectors.0": torch.ones(WIDTH),
        "gating_weights.0.weight": torch.ones(1, WIDTH),
        "gating_weights.0.bias": torch.ones(1),
    }
    torch.save({"model_state_dict": state, "task_names": ["truthfulqa"]}, tmp_path / "m.pt")
    (tmp_path / "m_metadata.json").write_text(json.dumps({"layer": 1, "model_name": "tiny"}))
    asked = take(tmp_path / "m.pt", model_folder, tmp_path)
    assert asked.exit_code == 1
    assert "does not say its site: name it with --site" in asked.output
    for version in ("v1", "v2"):
        assert take(tmp_path / "m.pt", model_folder, tmp_path, "--site", "attn_output").exit_code == 0
        made = load(tmp_path / "mine" / version)
    assert (made.config.method, made.config.normalize, made.attributes) == ("mat", True, {"truthfulqa": 1.0})
    place = ["--site", "attn_output", "--version", "v1"]
    taken = take(tmp_path / "m.pt", model_folder, tmp_path, *place)
    assert (taken.exit_code, "exists: choose another or --overwrite it" in taken.output) == (1, True)
    again = take(
        tmp_path / "m.pt", model_folder, tmp_path, *place, "--overwrite", "--attribute", "truth", "--positions", "all"
    )
    assert again.exit_code == 0, again.output
    made = load(tmp_path / "mine" / "v1")
    assert (made.attributes, made.config.positions) == ({"truth": 1.0}, Positions.ALL)


@pytest.mark.parametrize(
    ("file", "arguments", "message"),
    [
        ({1: torch.ones(WIDTH + 1)}, [], "holds vectors of 33 numbers, but 1.residual of "),
        ({7: torch.ones(WIDTH)}, [], "there is no layer 7"),
        ({1: torch.ones(WIDTH)}, ["--model", "/no/model"], "There is no model folder '/no/model'"),
        ({1: torch.ones(WIDTH)}, ["--out", "bad name"], "The name of a checkpoint is letters"),
        ({1: torch.ones(WIDTH)}, ["--format", "gguf"], "is not a sound GGUF file"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    model_folder: Path, tmp_path: Path, file: Any, arguments: list[str], message: str
) -> None:
    torch.save(file, tmp_path / "x.pt")
    place = [] if "--format" in arguments else ["--site", "residual"]
    result = take(tmp_path / "x.pt", model_folder, tmp_path, *place, *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.splitlines()) == 1
    assert not (tmp_path / "mine").exists()


def test_a_control_vector_for_another_architecture_is_remarked_upon(
    honest: Path, model_folder: Path, tmp_path: Path
) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_tensor("direction.1", torch.ones(WIDTH).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    result = take(tmp_path / "x.gguf", model_folder, honest)
    assert result.exit_code == 0
    assert "was made for mistral, says its model_hint" in result.output


def test_an_export_that_is_not_possible_is_one_sentence(honest: Path, checkpoints: Path, tmp_path: Path) -> None:
    out = ["--format", "gguf", "--out", str(tmp_path / "x.gguf")]
    for result, message in (
        (export(checkpoints, *out, name="demo"), "demo cannot be exported: a control vector adds one vector"),
        (export(honest, *out, "--set", "funny=1"), "there is no attribute 'funny'; there are honesty, calm"),
        (export(honest, *out, name="nowhere"), "There is no checkpoint 'nowhere'"),
    ):
        assert result.exit_code == 1
        assert message in result.output
        assert len(result.output.splitlines()) == 1
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize("command", ["import", "export"])
def test_every_command_shows_an_example(command: str) -> None:
    result = runner.invoke(app, ["checkpoints", command, "--help"])
    assert result.exit_code == 0
    assert f"Example: matsteer checkpoints {command}" in result.output


VECTOR = torch.randn(WIDTH, generator=torch.Generator().manual_seed(4)) * 2


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompt: str, count: int, block: int | None) -> list[int]:
    """Greedy tokens; with `block`, a plain hook adds VECTOR to its output, from the last prompt token on."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1] - 1

    def add(_: object, __: object, out: Any) -> Any:
        hidden = out[0] if isinstance(out, tuple) else out
        hidden[:, start:] += VECTOR
        return out

    handle = None if block is None else model.model.layers[block].register_forward_hook(add)
    try:
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    finally:
        if handle is not None:
            handle.remove()
    return ids[0, start + 1 :].tolist()


@pytest.mark.parametrize(
    ("content", "arguments"),
    [
        (VECTOR, ["--layer", "1", "--site", "residual"]),
        ({"blocks.2.hook_resid_pre": VECTOR}, []),
        ({2: VECTOR}, ["--site", "residual", "--counting", "hidden_states"]),
        ({"vector": VECTOR, "layer": 1}, ["--site", "residual"]),
        (torch.stack([VECTOR * 9, VECTOR, VECTOR * 9]), ["--layer", "1", "--site", "residual"]),
    ],
)
def test_an_imported_vector_is_served_as_plain_hooks_add_it(
    model: Any, spelling: Any, model_folder: Path, tmp_path: Path, content: Any, arguments: list[str]
) -> None:
    torch.save(content, tmp_path / "v.pt")
    root = tmp_path / "checkpoints"
    taken = take(tmp_path / "v.pt", model_folder, root, "--attribute", "honesty", *arguments)
    assert taken.exit_code == 0, taken.output
    settings = Settings(model=str(model_folder), checkpoints=root, device="cpu", threads=1, remember=False)
    body = {"prompt": "Q: What colour", "max_new_tokens": 12, "temperature": 0, "ignore_eos": True, "baseline": True}
    with TestClient(create_app(settings)) as client:
        answer = client.post("/generate", json=body).json()
    steered, plain = answer["results"][0], answer["baseline"][0]
    assert steered["steering"]["attributes"] == {"honesty": 1.0}
    assert steered["token_ids"] == greedy(model, spelling, body["prompt"], 12, block=1)
    assert plain["token_ids"] == greedy(model, spelling, body["prompt"], 12, block=None)
    assert steered["token_ids"] != plain["token_ids"]


def test_an_imported_vector_clamps_where_that_is_asked_for(model: Any, model_folder: Path, tmp_path: Path) -> None:
    torch.save(VECTOR, tmp_path / "v.pt")
    arguments = ["--layer", "1", "--site", "residual", "--attribute", "honesty", "--clamp", "40"]
    taken = take(tmp_path / "v.pt", model_folder, tmp_path / "checkpoints", *arguments)
    assert taken.exit_code == 0, taken.output
    (column,) = load(tmp_path / "checkpoints" / "mine" / "v1").columns
    assert column.clamp == Clamp(40.0)
    ids = torch.tensor([[5, 7, 9]])
    seen = []
    with torch.no_grad(), steered(model, [column], [2.0], positions=Positions.ALL):
        watch = model.model.layers[1].register_forward_hook(
            lambda _, __, output: seen.append(output if isinstance(output, torch.Tensor) else output[0])
        )
        model(ids)
        watch.remove()
    torch.testing.assert_close(seen[0][0] @ (VECTOR / VECTOR.norm()), torch.full((3,), 80.0), rtol=1e-4, atol=1e-3)


def test_what_was_left_out_and_not_applied_is_told(model_folder: Path, tmp_path: Path) -> None:
    stack = torch.stack([torch.zeros(WIDTH), VECTOR, VECTOR])
    torch.save({"vectors": stack, "coeff": 4.0, "mean": VECTOR}, tmp_path / "v.pt")
    taken = take(tmp_path / "v.pt", model_folder, tmp_path, "--site", "residual", "--attribute", "honesty")
    assert taken.exit_code == 0, taken.output
    assert "note: left out: mean" in taken.output
    assert "note: kept in config.json, and not applied: coeff 4.0" in taken.output
    assert "note: left out, because the vector is zero: honesty at 0.residual" in taken.output
    made = load(tmp_path / "mine" / "v1")
    assert [str(column.site) for column in made.columns] == ["1.residual", "2.residual"]
    assert made.config.training["said"] == {"coeff": 4.0}


@pytest.mark.parametrize("layers", ["1-x", "-1", "2-1", "", "1,,2", "0-99999999"])
def test_layers_that_are_none_are_refused(model_folder: Path, tmp_path: Path, layers: str) -> None:
    torch.save(VECTOR, tmp_path / "v.pt")
    result = take(tmp_path / "v.pt", model_folder, tmp_path, "--layer", layers, "--site", "residual")
    assert result.exit_code == 2
    assert "--layer takes" in " ".join(result.output.replace("│", " ").split())
