"""An epoch of MAT-Steer's training: `python -m benchmarks.mat_training --help`.

The vectorised step of `training.methods.mat_training` against a loop over the attributes (`benchmarks.mat_loop`), on
the same data in the same batches, with `objective="reference"`; autograd makes both gradients. Before anything is
timed, both train side by side: the losses of every step have to agree to 1e-5. The loop has its batches made before its
time starts, ours makes its own. "With the log" adds what is measured after each epoch. The published code computes the
MMD on all rows at each step instead of on the batch; that is timed too, but has other losses.
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.alone import alone
from benchmarks.machine import described
from benchmarks.mat_loop import Batch, Loop
from server.threads import usable_cores
from training.activations.store import Contrast
from training.methods.mat import Kernel, MatConfig, Objective
from training.methods.mat_model import GatedVectors, Loss, Scaler, TrainingSet, all_bandwidths
from training.methods.mat_training import WatchedSplit, mean_losses, measure_all, train_step

ATTRIBUTES, ROWS, SIDE = 3, 512, 16  # 512 positives and 512 negatives of each; 16 + 16 of each in a batch of 96
OURS, LOGGED, LOOP, PUBLISHED = "ours", "ours, with the log", "loop", "loop, MMD over all rows"


@dataclass(frozen=True)
class Job:
    contender: str
    width: int
    epochs: int
    threads: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5, help="in a round, after one to warm up")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mat-training-cpu.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, Any] = {
        "machine": described(),
        "attributes": ATTRIBUTES,
        "rows_of_a_side": ROWS,
        "batch": 2 * SIDE * ATTRIBUTES,
        "steps_an_epoch": ROWS // SIDE,
        "widths": {},
    }
    for width in args.widths:
        apart = alone(largest_difference, width, args.threads)
        assert apart <= 1e-5, f"the losses differ by {apart}"
        times: dict[str, list[float]] = {OURS: [], LOGGED: [], LOOP: []}
        for _ in range(args.rounds):
            for name, seen in times.items():
                seen.append(statistics.median(alone(measure, Job(name, width, args.epochs, args.threads))))
        times[PUBLISHED] = alone(measure, Job(PUBLISHED, width, 1, args.threads))
        results["widths"][str(width)] = {"losses_differ_by_at_most": apart, **summary(times)}
        print(f"{width}: {results['widths'][str(width)]}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(results))
    print(markdown(results))


class World:
    """The data and, from the same start, both contenders."""

    def __init__(self, width: int) -> None:
        number = torch.Generator().manual_seed(0)
        self.data = {
            f"attribute {t}": Contrast(
                torch.randn(ROWS, width, generator=number) + 0.1 * torch.randn(width, generator=number),
                torch.randn(ROWS, width, generator=number),
            )
            for t in range(ATTRIBUTES)
        }
        self.config = MatConfig(
            objective=Objective.REFERENCE,
            kernel=Kernel.FIXED,
            sigma=(2 * width) ** 0.5,
            joint=True,
            standardize=False,
            batch=SIDE,
            l_pos=0.9,
            l_sparse=0.9,
            l_ortho=0.1,
        )
        c, scaler = self.config, Scaler.of(self.data, self.config.standardize)
        scaled = scaler.apply(self.data)
        self.table = TrainingSet.of(scaled, scaler.origin)
        sigmas = all_bandwidths(scaled, scaler, c)
        self.watched = WatchedSplit.all_of(scaled, scaler, sigmas, c.joint)
        self.loss = Loss.of(c, sigmas, torch.stack([one.unsteered for one in self.watched.values()]))
        self.model = GatedVectors.start(scaled, scaler, c)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=c.lr, fused=True)
        self.loop = Loop(self.model.vectors.detach(), c.sigma, c.l_pos, c.l_sparse, c.l_ortho, c.lr)

    def ours(self, epoch: int) -> list[torch.Tensor]:
        batches = self.table.batches(SIDE, self.config.seed, epoch)
        return [train_step(self.model, self.table.batch(index), self.loss, self.optimizer) for index in batches]

    def logged(self, epoch: int) -> None:
        mean_losses(self.ours(epoch), self.config)
        measure_all(self.model, self.watched)

    def ready(self, epoch: int) -> list[Batch]:
        """The epoch's batches as the loop takes them."""
        rows = torch.cat([side for one in self.data.values() for side in (one.positive, one.negative)])
        batches = self.table.batches(SIDE, self.config.seed, epoch)
        return [[(rows[own[:SIDE]], rows[own[SIDE:]]) for own in batch] for batch in batches]


def largest_difference(width: int, threads: int) -> float:
    """Between the losses of the two, in any step of two epochs."""
    torch.set_num_threads(threads)
    world, c = World(width), World(width).config
    weights, apart = torch.tensor([1, c.l_pos, c.l_sparse, c.l_ortho]), 0.0
    for epoch in (1, 2):
        found = (torch.stack(world.ours(epoch)) @ weights).tolist()
        expected = [world.loop.step(batch) for batch in world.ready(epoch)]
        apart = max(apart, *(abs(a - b) for a, b in zip(found, expected, strict=True)))
    return apart


def measure(job: Job) -> list[float]:
    """Seconds of each epoch, in a process of its own."""
    torch.set_num_threads(job.threads)
    world, seconds = World(job.width), []
    everything = [(one.positive, one.negative) for one in world.data.values()]
    for epoch in range(job.epochs + (job.contender != PUBLISHED)):
        batches = world.ready(epoch) if job.contender in (LOOP, PUBLISHED) else []
        begin = time.perf_counter()
        if job.contender == OURS:
            world.ours(epoch)
        elif job.contender == LOGGED:
            world.logged(epoch)
        for batch in batches:
            world.loop.step(batch, everything if job.contender == PUBLISHED else None)
        seconds.append(time.perf_counter() - begin)
    return seconds[-job.epochs :]


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "epoch_ms": {name: _spread([1000 * one for one in seen]) for name, seen in times.items()},
        "speedup": {
            name: _spread([slow / fast for slow, fast in zip(times[LOOP], times[name], strict=True)])
            for name in (OURS, LOGGED)
        },
    }


def markdown(results: dict[str, Any]) -> str:
    lines = [
        f"{ATTRIBUTES} attributes, {ROWS} + {ROWS} rows of each, batches of {results['batch']}. Milliseconds of an",
        "epoch, median of the rounds (lowest to highest); in brackets how many times faster than the loop.",
        "",
        f"| width | {OURS} | {LOGGED} | {LOOP} | {PUBLISHED} | losses differ by |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for width, one in results["widths"].items():
        cells = {name: _told(spread) for name, spread in one["epoch_ms"].items()}
        for name, spread in one["speedup"].items():
            cells[name] += f" [{_told(spread)}]"
        lines.append(f"| {width} | {' | '.join(cells.values())} | {one['losses_differ_by_at_most']:.1e} |")
    return "\n".join([*lines, ""])


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 1),
        "lowest": round(min(values), 1),
        "highest": round(max(values), 1),
    }


def _told(spread: dict[str, float]) -> str:
    if spread["lowest"] == spread["highest"]:
        return f"{spread['median']:g}"
    return f"{spread['median']:g} ({spread['lowest']:g} to {spread['highest']:g})"


if __name__ == "__main__":
    main()
