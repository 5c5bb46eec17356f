"""Activations of TruthfulQA-sized data at one layer: `python -m benchmarks.extraction --help`.

`training.activations` against the way of the published scripts: one text at a time, the hidden states of all layers,
every position of them moved to the CPU as numpy, and the last one kept. Both give the same numbers, which is checked.
A random Llama in float32 on a CPU. The scripts' way is timed on a seeded sample of the rows, ours on the same sample
and on all.
"""

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.alone import alone, reset_peak, resident
from benchmarks.machine import described
from benchmarks.questions import synthetic, truthfulqa
from benchmarks.workload import llama
from server.threads import usable_cores
from steering.types import Site, SiteKind
from training.activations import Pool
from training.activations.extraction import extract
from training.data import Sample

WARM = 16  # texts


@dataclass(frozen=True)
class Job:
    """What one process does. `count` is how many rows it runs, a seeded sample; None: all."""

    contender: str
    model: str
    layer: int
    truthfulqa: Path | None
    count: int | None
    threads: int


@dataclass(frozen=True)
class Measured:
    rows: int
    seconds: float
    loaded: int  # bytes in memory before the work
    peak: int  # bytes, during the work
    last: NDArray[np.float32]  # [rows, D], the last token's hidden states at the layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truthfulqa", type=Path, help="TruthfulQA.csv or mc_task.json; default: seeded random words")
    parser.add_argument("--model", default="100M")
    parser.add_argument("--layer", type=int, default=5, help="the block after which states are read")
    parser.add_argument("--sample", type=int, default=400, help="rows that the scripts' way is timed on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/extraction-cpu.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def job(contender: str, count: int | None) -> Job:
        return Job(contender, args.model, args.layer, args.truthfulqa, count, args.threads)

    jobs = {
        "ours, the sample": job("ours", args.sample),
        "one at a time, the sample": job("one at a time", args.sample),
        "ours, all rows": job("ours", None),
    }
    seen: dict[str, list[Measured]] = {name: [] for name in jobs}
    for number in range(args.rounds):
        for name, one in jobs.items():
            seen[name].append(alone(measure, one))
            print(f"round {number + 1}: {name}: {seen[name][-1].seconds:.1f} s", flush=True)
    results = {"machine": described(), **summary(args, seen)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(results))
    print(markdown(results))


def measure(job: Job) -> Measured:
    """In a process of its own."""
    torch.set_num_threads(job.threads)
    samples, tokenizer = truthfulqa(job.truthfulqa) if job.truthfulqa else synthetic()
    if job.count is not None:
        samples = random.Random(0).sample(samples, job.count)
    model = llama(job.model, torch.float32)
    run = {"ours": ours, "one at a time": one_at_a_time}[job.contender]
    run(model, tokenizer, samples[:WARM], job.layer)
    loaded = resident()
    reset_peak()
    start = time.perf_counter()
    last = run(model, tokenizer, samples, job.layer)
    return Measured(len(samples), time.perf_counter() - start, loaded, resident(peak=True), last)


def ours(model: Any, tokenizer: Any, samples: list[Sample], layer: int) -> NDArray[np.float32]:
    site = Site(layer, SiteKind.RESIDUAL)
    found = extract(model, tokenizer, samples, [site], pool=Pool.LAST)
    states: NDArray[np.float32] = found.values[site].numpy()
    return states


@torch.no_grad()
def one_at_a_time(model: Any, tokenizer: Any, samples: list[Sample], layer: int) -> NDArray[np.float32]:
    kept = []
    for sample in samples:
        ids = tokenizer(sample.text, return_tensors="pt")["input_ids"]
        states = torch.stack(model(ids, output_hidden_states=True).hidden_states).squeeze(1)
        kept.append(states.detach().cpu().numpy()[:, -1, :].copy())
    every: NDArray[np.float32] = np.stack(kept)  # [rows, layers + 1, D], as the scripts save it
    return every[:, layer + 1]


def summary(args: argparse.Namespace, seen: dict[str, list[Measured]]) -> dict[str, Any]:
    fast, slow, whole = seen.values()
    apart = max(float(np.abs(a.last - b.last).max()) for a, b in zip(fast, slow, strict=True))
    assert apart < 1e-3 * float(np.abs(slow[0].last).max()), f"the activations differ by {apart}"
    speedups = [_rate(b) / _rate(a) for a, b in zip(slow, whole, strict=True)]
    same = [_rate(b) / _rate(a) for a, b in zip(slow, fast, strict=True)]
    return {
        "model": f"random Llama, {args.model}, float32",
        "layer": args.layer,
        "texts": str(args.truthfulqa.name) if args.truthfulqa else "random words with TruthfulQA's lengths",
        "activations_differ_by_at_most": apart,
        "speedup, all rows": _spread(speedups),
        "speedup, the sample": _spread(same),
        "contenders": {
            name: {
                "rows": rounds[0].rows,
                "seconds": _spread([one.seconds for one in rounds]),
                "rows_per_second": _spread([_rate(one) for one in rounds]),
                "loaded_mb": round(statistics.median(one.loaded for one in rounds) / 1e6),
                "peak_mb": round(statistics.median(one.peak for one in rounds) / 1e6),
            }
            for name, rounds in seen.items()
        },
    }


def markdown(results: dict[str, Any]) -> str:
    lines = [
        f"{results['model']}, layer {results['layer']}; {results['texts']}. Median of the rounds (lowest to highest).",
        "",
        "| | rows | seconds | rows/s | memory before, MB | at most, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, one in results["contenders"].items():
        cells = [_told(one["seconds"]), _told(one["rows_per_second"]), one["loaded_mb"], one["peak_mb"]]
        lines.append(f"| {name} | {one['rows']:,} | {' | '.join(map(str, cells))} |")
    speedup = _told(results["speedup, all rows"])
    return "\n".join([*lines, "", f"Rows a second, ours on all rows against one at a time: {speedup} times.", ""])


def _rate(measured: Measured) -> float:
    return measured.rows / measured.seconds


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 2),
        "lowest": round(min(values), 2),
        "highest": round(max(values), 2),
    }


def _told(spread: dict[str, float]) -> str:
    return f"{spread['median']:g} ({spread['lowest']:g} to {spread['highest']:g})"


if __name__ == "__main__":
    main()
