"""kill -9 in the middle of a fit costs nothing but the epoch it was in."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from steering import Site, SiteKind
from tests.training.clouds import make_clouds
from training.methods import MatConfig, fit_mat

ROOT = Path(__file__).parents[2]
CONFIG = MatConfig(epochs=120, batch=24)
SITE = Site(1, SiteKind.ATTN_OUTPUT)
SCRIPT = """
import sys
from pathlib import Path
import training.methods.mat as mat
from tests.training.test_kill import CONFIG, SITE
from tests.training.clouds import make_clouds
mat._SAVE_SECONDS = 0.0
mat.torch.set_num_threads(1)
mat.fit_mat(make_clouds(count=24, width=16).train, SITE, CONFIG, folder=Path(sys.argv[1]))
"""


def test_a_killed_fit_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, env=environment)
    log = tmp_path / "log.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and child.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) > 10:
            break
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    epochs = len(log.read_text().splitlines())
    assert 10 < epochs < 120

    train = make_clouds(count=24, width=16).train
    resumed = fit_mat(train, SITE, CONFIG, folder=tmp_path)
    whole = fit_mat(train, SITE, CONFIG)
    assert resumed.history == whole.history
    assert all(
        torch.equal(ours.vector, theirs.vector) for ours, theirs in zip(resumed.columns, whole.columns, strict=True)
    )
