"""The commands of docs/formats.md, run one after the other on files as the page describes them."""

import re
import shlex
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import server.cli
import training.cli
from steering.checkpoint import list_checkpoints
from tests.training.helpers import make_llama, make_tokenizer

PAGE = Path(__file__).parents[1] / "docs/formats.md"
LAYERS, WIDTH = 16, 16


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[list[str]]:
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the page takes for granted, for a tiny model in the place of every one that it names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MATSTEER_CHECKPOINTS", str(tmp_path / "checkpoints"))
    make_llama(num_hidden_layers=LAYERS).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    state = {
        "steering_vectors.0": torch.ones(WIDTH),
        "gating_weights.0.weight": torch.ones(1, WIDTH),
        "gating_weights.0.bias": torch.ones(1),
    }
    torch.save({"model_state_dict": state, "task_names": ["truthfulqa"]}, tmp_path / "llama3.1_8B_L14_mat_steer.pt")
    (tmp_path / "llama3.1_8B_L14_mat_steer_metadata.json").write_text('{"layer": 14}')
    writer = gguf.GGUFWriter(tmp_path / "honesty.gguf", "controlvector")
    for layer in range(1, LAYERS):
        writer.add_tensor(f"direction.{layer}", np.random.default_rng(layer).normal(size=WIDTH).astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    torch.save(torch.ones(WIDTH), tmp_path / "refusal.pt")
    (tmp_path / "iti-folder").mkdir()
    (tmp_path / "iti-folder/config.json").write_text(
        '{"representations": [[14, "attention_output", "pos", 1]], "intervention_types": '
        "[\"<class 'pyvene.models.interventions.AdditionIntervention'>\"]}"
    )
    key = "intkey_layer.14.comp.attention_output.unit.pos.nunit.1#0.bin"
    torch.save({"source_representation": torch.ones(WIDTH)}, tmp_path / "iti-folder" / key)
    features = np.random.default_rng(0).normal(size=(40, LAYERS, WIDTH)).astype("float16")
    (tmp_path / "features").mkdir()
    np.save(tmp_path / "features/llama_7B_tqa_mc2_labels.npy", [1, 0] * 20)
    np.save(tmp_path / "features/llama_7B_tqa_mc2_head_wise.npy", features)
    return tmp_path


def test_every_command_and_the_python_example_work_as_they_stand(here: Path) -> None:
    for words in commands():
        if "--model" in words:
            words[words.index("--model") + 1] = "model"
        app = server.cli.app if words[0] == "checkpoints" else training.cli.app
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (words, result.output)
    made = [(name, version) for name, version, _ in list_checkpoints(here / "checkpoints")]
    assert made == [("honesty", "v1"), ("iti", "v1"), ("mat", "v1"), ("refusal", "v1")]
    for name in ("stronger.gguf", "iti-copy/config.json", "mat.safetensors", "models/honest-llama/config.json"):
        assert (here / name).is_file()
    (code,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(code, "formats.md", "exec"), names)
    assert names["columns"]
