"""The tests that a GPU is needed for, and whether what is fast is what runs."""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.gpu.figures import Figure
from benchmarks.gpu.worker import Skipped
from benchmarks.gpu.world import World
from server.attention.kv_pool import KVOps
from server.engine.cuda_graphs import MIXED_SIZES, capture_sizes
from steer_ops import ops
from steer_ops.registry import Op

ROOT = Path(__file__).parents[2]
# The project's own options of pytest name plugins that need not be here.
PYTEST = [sys.executable, "-m", "pytest", "-v", "-o", "addopts=", "-o", "filterwarnings=", "--import-mode=importlib"]
PYTEST += ["-p", "no:cacheprovider", "--tb=short"]
KERNELS = ("tests/steer_ops/test_triton.py", "tests/steer_ops/test_paged_prefill.py")  # those of Triton's
NO_TESTS = 5  # pytest's status where it has found none
OPS = [op for op in vars(ops).values() if isinstance(op, Op) and op is not ops.TILED_LINEAR]  # that is for CPUs alone
EXCHANGED = ("Attention", "MLP", "RMSNorm")  # layers of transformers that are exchanged: how their names end


def tests(world: World) -> Iterator[Figure]:
    """At the same time: they are not timed. What pytest says comes to files beside the log, test by test."""
    if importlib.util.find_spec("pytest") is None:
        raise Skipped("pytest is not installed")
    marked = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    runs = {
        "pytest -m gpu": [*marked, "-m", "gpu"],
        **{file: [file, *world.sizes.test_options] for file in KERNELS},
    }
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # none is needed
    logs = {name: world.log.with_name(f"{world.log.stem}-tests-{index}.log") for index, name in enumerate(runs)}
    with ExitStack() as stack:
        processes = {
            name: subprocess.Popen(
                [*PYTEST, *rest],
                cwd=ROOT,
                env=environment,
                stdout=stack.enter_context(logs[name].open("w")),
                stderr=subprocess.STDOUT,
            )
            for name, rest in runs.items()
        }
    troubles = []
    for name, process in processes.items():
        try:
            yield told(name, process.wait(), logs[name].read_text(), skips=not world.cuda)
        except RuntimeError as error:
            troubles.append(str(error))
    if troubles:
        raise RuntimeError("; ".join(troubles))


def told(name: str, status: int, said: str, *, skips: bool = False) -> Figure:
    """How many tests fail, from what pytest says. `skips`: all may be skipped. Raises RuntimeError where none ran."""
    last = (said.strip().splitlines() or [""])[-1]
    if status not in (0, 1, NO_TESTS):
        missing = re.search(r"No module named '[^']*'", said)
        raise RuntimeError(f"{name}: pytest ended with status {status}: {missing.group() if missing else last}")
    if not (skips or re.search(r"\d+ (?:passed|failed|error)", last)):
        raise RuntimeError(f"{name}: no test ran: {last}")
    failed = sum(map(int, re.findall(r"(\d+) (?:failed|errors?)", last)))
    return Figure(f"{name}: failed", failed, note=last.strip("= "), at_most=0)


def engine(world: World) -> Iterator[Figure]:
    """Whatever fails at its trial is computed in another way, and the engine starts all the same."""
    ours, rows = world.steered, world.sizes.rows
    plain = [op.name for op in OPS if not op.has_kernel(world.device, world.dtype)]
    yield Figure("operations with a kernel", len(OPS) - len(plain), "", without(plain), at_least=len(OPS))
    parts = [part.name for part in fields(KVOps)]
    plain = [
        name
        for name in parts
        if any(getattr(pool.ops, name) == getattr(KVOps(), name) for pool in ours.runner.attention.pools.values())
    ]
    name = "of the attention, in the model's own sizes"
    yield Figure(name, len(parts) - len(plain), "", without(plain), at_least=len(parts))
    left = kept(ours.model)
    note = ", ".join(f"{count} {name}" for name, count in left.items())
    yield Figure("layers left as they were", left.total(), "", note, at_most=0)
    graphs = len(capture_sizes(rows)) + len(MIXED_SIZES)
    yield Figure("CUDA graphs", ours.runner.num_graphs, "", f"for up to {rows} rows", at_least=graphs)
    yield Figure("captures and first steps", ours.warm_up_seconds, "s")


def without(plain: list[str]) -> str:
    return f"without: {', '.join(plain)}" if plain else ""


def kept(model: Any) -> Counter[str]:
    """By class, the layers of transformers that something faster could have been put in the place of."""
    found = Counter[str]()
    for module in model.modules():
        name = type(module).__name__
        own = type(module).__module__.startswith("transformers.")
        slow = name.endswith(EXCHANGED) or (name.endswith("DecoderLayer") and "forward" not in vars(module))
        found[name] += own and slow
    return +found
