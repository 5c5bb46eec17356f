"""Several processes divide an extraction, and go on with what an interrupted one has left."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import training.activations.extraction as extraction
from steering import Site, SiteKind
from tests.training.helpers import make_llama, make_tokenizer
from training.activations.extraction import extract, extract_to
from training.activations.store import load_activations, write_shard
from training.data import Sample, load_data, split_samples
from training.distributed import Processes, joined
from training.errors import ActivationError, TrainingError
from training.models import load_base

ROOT = Path(__file__).parents[2]
SITE = Site(1, SiteKind.ATTN_OUTPUT)
MATSTEER = Path(sys.executable).with_name("matsteer")
LAUNCH = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def write_world(folder: Path) -> str:
    """A model, and texts for three shards; their name as after --data."""
    make_llama().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    rows = [
        {"prompt": f"Q: What is {n}? A:", "completion": " it is" + " good" * (n % 7) + f" {n}.", "label": n % 2 == 0}
        for n in range(1100)
    ]
    (folder / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"truthfulness={folder / 'facts.jsonl'}"


def run_beside_another_training(folder: Path, command: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs the command in a folder that has a package called training, which is not ours."""
    (folder / "training").mkdir()
    (folder / "training/__init__.py").write_text("raise SystemExit('the training of somebody else')")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def interrupt_after_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    def writes_once(*arguments: Any) -> None:
        write_shard(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(extraction, "write_shard", writes_once)


@pytest.mark.timeout(400)  # several processes start
def test_two_processes_finish_what_one_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = write_world(tmp_path), tmp_path / "activations"
    base = load_base(str(tmp_path / "model"), device="cpu")
    samples = split_samples(load_data([data]), seed=0)
    interrupt_after_a_shard(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        extract_to(out, base.model, base.tokenizer, samples, [SITE])
    (shard,) = out.glob("shard-*.safetensors")
    written = shard.stat().st_mtime_ns

    command = [sys.executable, *LAUNCH, "--no_python", str(MATSTEER), "extract", "--model", str(tmp_path / "model")]
    result = run_beside_another_training(
        tmp_path,
        [*command, "--data", data, "--layer", "1", "--site", "attn_output", "--device", "cpu", "--out", str(out)],
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("1100 activations at 1.attn_output") == 1
    assert len(list(out.glob("shard-*.safetensors"))) == 3
    assert shard.stat().st_mtime_ns == written

    found, expected = load_activations(out), extract(base.model, base.tokenizer, samples, [SITE])
    torch.testing.assert_close(found.values[SITE], expected.values[SITE], rtol=1e-3, atol=1e-4)
    assert torch.equal(found.samples, expected.samples)
    assert torch.equal(found.labels, expected.labels)
    assert (found.splits, found.groups, found.source) == (expected.splits, expected.groups, expected.source)


@pytest.mark.timeout(400)  # several processes start
def test_torchrun_goes_through_the_command_too(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", str(MATSTEER)]
    result = run_beside_another_training(tmp_path, [*launch, "extract", "--help"])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("--no-python matsteer extract") == 2


def test_a_folder_that_not_every_process_sees_is_an_error(
    llama: Any, tokenizer: Any, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "joined", lambda **_: Processes(index=1))
    with pytest.raises(ActivationError, match=r"plan\.json is missing in process 1: all must see the same folder"):
        extract_to(tmp_path, llama, tokenizer, samples, [SITE])


def test_a_process_by_itself_does_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert joined() == Processes(index=0, count=1)
    assert joined().main


def test_several_processes_cannot_share_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(TrainingError, match="must be auto, cpu or cuda where several processes run, got 'cuda:1'"):
        load_base("model", device="cuda:1")
