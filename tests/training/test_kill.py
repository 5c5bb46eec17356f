"""kill -9 costs a fit nothing but the epoch it was in, and an extraction the shard."""

import os
import signal
import subprocess
import sys
from itertools import count
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
CONFIG = MatConfig(epochs=20, batch=24)
SITE = Site(1, SiteKind.ATTN_OUTPUT)
SCRIPT = """
import sys
from pathlib import Path
import training.methods.mat_training as mat
from training.methods import state
from tests.training.test_kill import CONFIG, SITE, stand_still
from tests.training.clouds import make_clouds
state.SECONDS = 0.0
stand_still("state.safetensors", 11)
mat.torch.set_num_threads(1)
mat.fit_mat(make_clouds(count=24, width=16).train, SITE, CONFIG, folder=Path(sys.argv[1]))
"""


PREFERENCE = """
import sys
from pathlib import Path
import torch
from tests.training.helpers import make_llama, make_tokenizer
from tests.training.test_kill import preferred, stand_still
from training.methods import state
from training.models import Base
state.SECONDS = 0.0
stand_still("reps-*.safetensors", 7)
torch.set_num_threads(1)
preferred(Base(make_llama(), make_tokenizer(), "tiny", None), Path(sys.argv[1]))
"""


EXTRACTION = """
import sys
from pathlib import Path
from tests.training.helpers import make_llama, make_tokenizer
from tests.training.test_kill import SITE, stand_still, texts
from training.activations.extraction import extract_to
stand_still("shard-*.safetensors", 7)
extract_to(Path(sys.argv[1]), make_llama(), make_tokenizer(), texts(), [SITE], shard_size=4)
"""


def texts() -> list[Sample]:
    return [Sample("truthfulness", f"Q: What is {n}? A:", f" It is {n}.", n % 2 == 0, f"g{n}") for n in range(60)]


def preferred(base: Base, folder: Path | None) -> Tensor:
    """A vector that is trained by preference."""
    activations = extract(base.model, base.tokenizer, pairs(), [SITE])
    (column,) = fit(activations, [SITE], Recipe(RepsConfig(steps=20)), folder=folder, base=base, samples=pairs())
    return column.vector


def stand_still(pattern: str, number: int) -> None:
    """In a script, until it is killed: before the `number`th file of such a name, which is written, gets its place."""
    replace, seen = os.replace, count(1)

    def hold(partial: Path, path: Path) -> None:
        if path.match(pattern) and next(seen) == number:
            print("written", flush=True)
            sys.stdin.read()
        replace(partial, path)

    os.replace = hold  # type: ignore[assignment]


def kill(script: str, folder: Path) -> None:
    """Run the script with the folder as its argument, and kill it where it stands still."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True) as child:
        assert child.stdout is not None
        said = child.stdout.readline()
        child.kill()
        assert (said, child.wait()) == ("written\n", -signal.SIGKILL)


def test_a_killed_fit_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    kill(SCRIPT, tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 12, "an epoch more than the state has"

    train = make_clouds(count=24, width=16).train
    resumed = fit_mat(train, SITE, CONFIG, folder=tmp_path)
    whole = fit_mat(train, SITE, CONFIG)
    assert resumed.history == whole.history
    assert all(
        torch.equal(ours.vector, theirs.vector) for ours, theirs in zip(resumed.columns, whole.columns, strict=True)
    )


def test_a_killed_extraction_ends_as_if_it_had_not_been(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    kill(EXTRACTION, tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    assert len(written) == 6
    extract_to(tmp_path, llama, tokenizer, texts(), [SITE], shard_size=4)
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    found, whole = load_activations(tmp_path), extract(llama, tokenizer, texts(), [SITE])
    torch.testing.assert_close(found.values[SITE], whole.values[SITE], rtol=1e-3, atol=1e-4)
    assert torch.equal(found.labels, whole.labels)


def test_a_killed_training_by_preference_ends_as_if_it_had_not_been(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    log, base = tmp_path / "reps.jsonl", Base(llama, tokenizer, "tiny", None)
    kill(PREFERENCE, tmp_path)
    told = log.read_text().splitlines()
    assert len(told) == 4
    resumed, whole = preferred(base, tmp_path), preferred(base, tmp_path / "whole")
    assert torch.equal(resumed, whole)
    assert log.read_text() == (tmp_path / "whole/reps.jsonl").read_text()
    assert log.read_text().splitlines()[: len(told)] == told
