"""What the parts of one process share: engines, a model, and what the device reaches."""

import gc
import statistics
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Ours
from benchmarks.gpu.plan import SIZES, Sizes
from benchmarks.gpu.worker import Options
from benchmarks.machine import described
from benchmarks.workload import llama
from steer_ops.cuda import library

TIMED, WARM = 10, 3  # copies and products


class World:
    """Its properties are made when they are first asked for, and kept until `release`."""

    def __init__(self, options: Options) -> None:
        self.device = torch.device(options.device)
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
            torch.cuda.get_device_properties(self.device)  # raises where there is none
            found = {
                "device": torch.cuda.get_device_name(self.device),
                "CUDA": torch.version.cuda,
                "kernels": ", ".join(sorted(library.kernels())),
            }
        shape = f"a random Llama of the {self.sizes.shape} shape, {str(self.dtype)[6:]}"
        return {**found, "model": shape, **described()}

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
        """What a piece of work takes on the device, a median."""
        times = []
        for _ in range(WARM + TIMED):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[WARM:])

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
