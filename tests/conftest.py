"""Every test begins with the same random numbers, and computes with one thread: `make test` runs several at a time.
`--hypothesis-profile=default` looks for examples that nobody has seen yet."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch reads it; also for the processes that tests start

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton reads it: its kernels run interpreted on the CPU

settings.register_profile("same", derandomize=True)
settings.load_profile("same")

pytest_plugins = ["tests.broken_models"]


@pytest.fixture(autouse=True)
def same_start() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture(params=[1, 3])
def threads(same_start: None, request: pytest.FixtureRequest) -> int:
    """How many threads compute."""
    count: int = request.param
    torch.set_num_threads(count)
    return count
