"""kill -9 costs a fit nothing but the epoch it was in, and an extraction the shard."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering import Site, SiteKind
from tests.training.clouds import make_clouds
from tests.training.test_methods_reps import texts as pairs
from training.activations.extraction import extract, extract_to
from training.activations.store import load_activations
from training.data import Sample
from training.methods.fit import Recipe, fit
from training.methods.mat import MatConfig
from training.methods.mat_training import fit_mat
from training.methods.reps import RepsConfig
from training.models import Base

ROOT = Path(__file__).parents[2]
CONFIG = MatConfig(epochs=120, batch=24)
SITE = Site(1, SiteKind.ATTN_OUTPUT)
SCRIPT = """
import sys
from pathlib import Path
import training.methods.mat_training as mat
from training.methods import state
from tests.training.test_kill import CONFIG, SITE
from tests.training.clouds import make_clouds
state.SECONDS = 0.0
mat.torch.set_num_threads(1)
mat.fit_mat(make_clouds(count=24, width=16).train, SITE, CONFIG, folder=Path(sys.argv[1]))
"""


PREFERENCE = """
import sys
from pathlib import Path
import torch
from tests.training.helpers import make_llama, make_tokenizer
from tests.training.test_kill import preferred
from training.methods import state
from training.models import Base
state.SECONDS = 0.0
torch.set_num_threads(1)
preferred(Base(make_llama(), make_tokenizer(), "tiny", None), Path(sys.argv[1]))
"""


EXTRACTION = """
import sys
from pathlib import Path
from tests.training.helpers import make_llama, make_tokenizer
from tests.training.test_kill import SITE, texts
from training.activations.extraction import extract_to
extract_to(Path(sys.argv[1]), make_llama(), make_tokenizer(), texts(), [SITE], shard_size=4)
"""


def texts() -> list[Sample]:
    return [Sample("truthfulness", f"Q: What is {n}? A:", f" It is {n}.", n % 2 == 0, f"g{n}") for n in range(1200)]


def preferred(base: Base, folder: Path | None) -> Tensor:
    """A vector that is trained by preference."""
    activations = extract(base.model, base.tokenizer, pairs(), [SITE])
    (column,) = fit(activations, [SITE], Recipe(RepsConfig(steps=60)), folder=folder, base=base, samples=pairs())
    return column.vector


def kill(script: str, folder: Path, when: Callable[[], bool]) -> None:
    """Run the script with the folder as its argument, and kill it as soon as `when` says so."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", script, str(folder)], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and child.poll() is None and not when():
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL


def test_a_killed_fit_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    kill(SCRIPT, tmp_path, lambda: log.exists() and len(log.read_text().splitlines()) > 10)
    epochs = len(log.read_text().splitlines())
    assert 10 < epochs < 120

    train = make_clouds(count=24, width=16).train
    resumed = fit_mat(train, SITE, CONFIG, folder=tmp_path)
    whole = fit_mat(train, SITE, CONFIG)
    assert resumed.history == whole.history
    assert all(
        torch.equal(ours.vector, theirs.vector) for ours, theirs in zip(resumed.columns, whole.columns, strict=True)
    )


def test_a_killed_extraction_ends_as_if_it_had_not_been(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    kill(EXTRACTION, tmp_path, lambda: len(list(tmp_path.glob("shard-*"))) > 5)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    assert 5 < len(written) < 300
    extract_to(tmp_path, llama, tokenizer, texts(), [SITE], shard_size=4)
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    found, whole = load_activations(tmp_path), extract(llama, tokenizer, texts(), [SITE])
    torch.testing.assert_close(found.values[SITE], whole.values[SITE], rtol=1e-3, atol=1e-4)
    assert torch.equal(found.labels, whole.labels)


def test_a_killed_training_by_preference_ends_as_if_it_had_not_been(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    log, base = tmp_path / "reps.jsonl", Base(llama, tokenizer, "tiny", None)
    kill(PREFERENCE, tmp_path, lambda: log.exists() and len(log.read_text().splitlines()) > 3)
    told = log.read_text().splitlines()
    assert 3 < len(told) < 11
    resumed, whole = preferred(base, tmp_path), preferred(base, tmp_path / "whole")
    assert torch.equal(resumed, whole)
    assert log.read_text() == (tmp_path / "whole/reps.jsonl").read_text()
    assert log.read_text().splitlines()[: len(told)] == told
