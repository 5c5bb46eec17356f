"""What the parts of one process share: engines, a model, and what the device reaches."""

import gc
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Ours
from benchmarks.gpu.plan import SIZES, Sizes
from benchmarks.gpu.worker import Options
from benchmarks.machine import described
from benchmarks.workload import llama

TIMED, AT_ONCE = 5, 10  # what is timed so often is called so many times in a row: launching and waiting take time, too


class World:
    """Its properties are made when they are first asked for, and kept until `release`."""

    def __init__(self, options: Options) -> None:
        """Raises RuntimeError where there is no such device."""
        self.device = torch.device(options.device)
        if self.cuda and not torch.cuda.is_available():
            raise RuntimeError(f"torch {torch.__version__} finds no GPU; --device cpu --shape tiny needs none")
        self.sizes: Sizes = SIZES[options.shape]
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.scratch: Path = options.scratch
        self.log: Path = options.log

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def described(self) -> dict[str, Any]:
        """The machine, versions and command."""
        found: dict[str, Any] = {"device": "cpu"}
        if self.cuda:
            found = {
                "device": torch.cuda.get_device_name(self.device),
                "CUDA": torch.version.cuda,
                "driver": _driver(),
            }
        shape = f"a random Llama of the {self.sizes.shape} shape, {str(self.dtype)[6:]}"
        return {**found, "model": shape, **described(), **{name: _version(name) for name in ("accelerate", "triton")}}

    @cached_property
    def copy_rate(self) -> float:
        """Bytes a second that a large copy reads and writes."""
        size = self.sizes.copy
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self.seconds(lambda: target.copy_(source))

    @cached_property
    def matrix_rate(self) -> float:
        """Operations a second of a large product of random numbers."""
        n = self.sizes.matrix
        one, other = (torch.randn(n, n, device=self.device).to(self.dtype) for _ in range(2))
        return 2 * n**3 / self.seconds(lambda: one @ other)

    @cached_property
    def steered(self) -> Ours:
        """An engine with columns in its bank, which its requests ask for."""
        return self._engine(loaded=True)

    @cached_property
    def plain(self) -> Ours:
        """An engine whose bank is empty."""
        return self._engine(loaded=False)

    @cached_property
    def model(self) -> Any:
        """As transformers makes it."""
        return llama(self.sizes.shape, self.dtype, self.device)

    def release(self, *names: str) -> None:
        """Gives back the memory of what is not needed any more."""
        for name in names:
            made = self.__dict__.pop(name, None)
            if isinstance(made, Ours):
                made.close()
            del made
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """For all that the device has been asked for."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """What a piece of work takes on the device when it follows itself, a median."""
        times = []
        for _ in range(1 + TIMED):  # the first one warms up
            self.wait()
            start = time.perf_counter()
            for _ in range(AT_ONCE):
                work()
            self.wait()
            times.append((time.perf_counter() - start) / AT_ONCE)
        return statistics.median(times[1:])

    def _engine(self, *, loaded: bool) -> Ours:
        sizes = self.sizes
        return Ours(
            sizes.shape,
            self.dtype,
            sizes.rows,
            max_num_batched_tokens=sizes.step,
            context=sizes.context,
            cache_tokens=sizes.cache,
            loaded=loaded,
            device=self.device,
        )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
