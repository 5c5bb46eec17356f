"""EleutherAI's evaluation harness scores a task of ours through /v1/completions, base and steered by model name."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from steering.hook import steered
from tests.server.conftest import columns

TASK = Path(__file__).parent / "lm_eval"
DOCS = [
    {"question": "What colour is the sky?", "choices": ["The sky is blue.", "The sky is green."], "answer": 0},
    {"question": "What colour is grass?", "choices": ["Grass is blue.", "Grass is green, of course."], "answer": 1},
    {"question": "Where does a bear live?", "choices": ["in the forest", "in the sky", "of course"], "answer": 0},
]


MIXES = {"tiny": (0.0, 0.0, 0.0), "demo@1": (1.0, 1.0, 1.0)}  # what each model name stands for


@pytest.mark.timeout(400)  # two harnesses start
def test_a_task_is_scored_as_plain_passes_score_it(
    address: str, model_folder: Path, model: Any, spelling: Any, tmp_path: Path
) -> None:
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    yaml = (TASK / "colours.yaml").read_text() + f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(yaml)
    with ThreadPoolExecutor() as pool:  # nearly all of the time is the harness's start
        found = pool.map(lambda name: run(address, name, model_folder, tmp_path), MIXES)

    for mix, one in zip(MIXES.values(), found, strict=True):
        assert len(one["samples"]) == len(DOCS)
        for doc in one["samples"]:
            check(doc, model, spelling, mix)


def check(sample: dict[str, Any], model: Any, spelling: Any, mix: tuple[float, ...]) -> None:
    """The harness's answers about one of its documents, beside a plain steered pass."""
    given = sample["doc"]
    begin = f"Q: {given['question']} A:"
    for choice, (response,) in zip(given["choices"], sample["resps"], strict=True):
        ids = spelling(f"{begin} {choice}")["input_ids"]
        before = len(spelling(begin)["input_ids"])
        with (
            torch.inference_mode(),
            steered(model, columns(32, seed=1), mix, mask=torch.ones(1, len(ids), dtype=torch.bool)),
        ):
            logs = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
        expected = sum(float(logs[place, ids[place + 1]]) for place in range(before - 1, len(ids) - 1))
        greedy = all(int(logs[place].argmax()) == ids[place + 1] for place in range(before - 1, len(ids) - 1))
        assert float(response[0]) == pytest.approx(expected, rel=1e-4)
        assert str(response[1]) == str(greedy)


def run(address: str, name: str, tokenizer: Path, folder: Path) -> dict[str, Any]:
    """The harness in a process of its own, as its users call it."""
    arguments = f"model={name},base_url={address}/v1/completions,tokenizer={tokenizer},tokenizer_backend=huggingface"
    arguments += ",num_concurrent=2,max_length=95,max_retries=1"
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments),
        *("--tasks", "colours", "--include_path", str(folder / "tasks")),
        *("--output_path", str(folder / "out" / name), "--log_samples"),
    ]
    offline = {
        "HF_HOME": str(folder / "hub" / name),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = (folder / "out" / name).rglob("results_*.json")
    (samples,) = (folder / "out" / name).rglob("samples_*.jsonl")
    return {
        "results": json.loads(results.read_text()),
        "samples": [json.loads(line) for line in samples.read_text().splitlines()],
    }
