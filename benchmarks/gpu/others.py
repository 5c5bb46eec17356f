"""Other ways to generate, beside the engine and asked for the same."""

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from benchmarks.contenders import Generate, Pyvene
from benchmarks.gpu.drive import prompts
from benchmarks.gpu.figures import Figure
from benchmarks.gpu.worker import Skipped
from benchmarks.gpu.world import World
from benchmarks.workload import Request

FASTER_THAN_GENERATE, FASTER_THAN_PYVENE = 5, 6  # times


def generate(world: World) -> Iterator[Figure]:
    """Static batches, steered by the hooks that training and evaluation use."""
    for rows in world.sizes.beside:
        other = Generate(world.sizes.shape, world.dtype, rows, device=world.device, model=world.model)
        yield _beside(world, rows, f"transformers.generate, {rows} rows", other, FASTER_THAN_GENERATE)


def by_pyvene(world: World) -> Iterator[Figure]:
    if importlib.util.find_spec("pyvene") is None:
        raise Skipped("pyvene is not installed")
    other = Pyvene(world.sizes.shape, world.dtype, 1, device=world.device, model=world.model)
    yield _beside(world, 1, "pyvene, one row", other, FASTER_THAN_PYVENE)


def _beside(world: World, rows: int, name: str, other: Callable[[Sequence[Request]], None], wanted: float) -> Figure:
    """How many times faster the engine is."""
    work = prompts(world.sizes.shape, rows, 64, world.sizes.new)
    rates = []
    for contender in (world.steered, other):
        contender([replace(one, new=2) for one in work])  # warms up
        world.wait()
        start = time.perf_counter()
        contender(work)
        world.wait()
        rates.append(rows * world.sizes.new / (time.perf_counter() - start))
    note = f"{rates[0]:,.0f} tokens/s against {rates[1]:,.0f}"
    return Figure(f"{name}: the engine is faster", rates[0] / rates[1], "x", note, at_least=wanted)
