"""The engine on a GPU, in one table: `make bench-gpu`, or `python -m benchmarks.gpu --help`.

A random Llama of the 8B shape in bfloat16. Decoding only: from the moment when every row has its first token. The floor
is the time to read weights, keys and values once a step, at the bandwidth that a large copy has on this device.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Generate, Ours, Pyvene
from benchmarks.machine import described
from benchmarks.workload import SHAPES, Request, columns, requests
from steering.operators import steer

PROMPT, NEW = 64, 128  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8B", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rows", default="1,8,32,128,256")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--slow", action="store_true", help="also transformers.generate and pyvene")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engine-gpu"), help=".json and .md")
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16
    result: dict[str, Any] = {
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            **described(),
        },
        "operators, largest error beside float64": operators(args.model, device),
        "copy, GB/s": round(bandwidth(device) / 1e9),
        "rows": [],
    }
    for rows in map(int, args.rows.split(",")):
        result["rows"].append(measure(args.model, dtype, device, rows, args.rounds, bandwidth(device), args.slow))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(markdown(result))
    print(markdown(result))


def measure(
    shape: str, dtype: torch.dtype, device: torch.device, rows: int, rounds: int, speed: float, slow: bool
) -> dict[str, Any]:
    """Steered and unsteered in turn, on one model."""
    ours = Ours(shape, dtype, rows, device=device, max_num_batched_tokens=max(2048, rows))
    work = [
        Request(one.prompt, NEW) for one in requests(rows, SHAPES[shape]["vocab_size"], shortest=PROMPT, longest=PROMPT)
    ]
    steered, unsteered = ours.steering, ours.unsteered
    rates: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds + 1):  # the first one warms up and captures
        for on in (True, False):
            ours.steering = steered if on else unsteered
            rate = decode_rate(ours, work)
            if number:
                rates[on].append(rate)
    step = (ours.weight_bytes + rows * (PROMPT + NEW / 2) * ours.token_bytes) / speed
    ours.close()
    found: dict[str, Any] = {
        "rows": rows,
        "steered, tokens/s": round(statistics.median(rates[True]), 1),
        "unsteered, tokens/s": round(statistics.median(rates[False]), 1),
        "steering costs": round(1 - statistics.median(rates[True]) / statistics.median(rates[False]), 4),
        "share of the floor": round(statistics.median(rates[True]) * step / rows, 3),
    }
    del ours
    _empty(device)
    if slow:
        for contender in (Generate, Pyvene):
            other: Any = contender(shape, dtype, rows, device=device)
            asked = work[: other.subset]
            other(asked)
            start = time.perf_counter()
            other(asked)
            found[f"{other.name}, tokens/s"] = round(sum(one.new for one in asked) / (time.perf_counter() - start), 1)
            del other
            _empty(device)
    return found


def decode_rate(ours: Ours, work: Sequence[Request]) -> float:
    """Tokens a second once every row has begun."""
    answers = ours.answers(work)
    begun = max(one.timing.ttft_ms for one in answers)
    ended = max(one.timing.total_ms for one in answers)
    return sum(one.new - 1 for one in work) / ((ended - begun) / 1000)


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        times.append(time.perf_counter() - start)
    return 2 * size / statistics.median(times)


def operators(shape: str, device: torch.device) -> dict[str, float]:
    """The steering operator on the device beside float64 on the CPU: the largest error as a share of the norm."""
    made = columns(shape)
    width = SHAPES[shape]["hidden_size"]
    activations = torch.randn(64, width, generator=torch.Generator().manual_seed(2))
    multipliers = torch.randn(64, len(made), generator=torch.Generator().manual_seed(3))
    parts = (
        torch.stack([column.vector for column in made]),
        torch.stack([column.gate_weight for column in made]),
        torch.tensor([column.gate_bias for column in made]),
    )
    kinds = torch.tensor([column.gate.code for column in made], dtype=torch.int8)
    keep = torch.tensor([column.keep_norm for column in made])
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        given = activations.to(dtype)
        vectors, weights, biases = (part.double() for part in parts)
        exact = steer(given.double(), vectors, weights, biases, kinds, keep, multipliers.double())
        moved = (part.to(device) for part in (given, *parts, kinds, keep, multipliers))
        error = (steer(*moved).cpu().double() - exact).norm(dim=1) / exact.norm(dim=1)
        errors[str(dtype)[6:]] = float(error.max())
    return errors


def markdown(result: dict[str, Any]) -> str:
    rows = result["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [
        "# The engine on a GPU",
        "",
        *(f"- {key}: {value}" for key, value in result["machine"].items()),
        *(f"- {key}: {value}" for key, value in result.items() if key not in ("machine", "rows")),
        "",
        f"| {' | '.join(names)} |",
        f"|{' ---: |' * len(names)}",
        *(f"| {' | '.join(str(row.get(name, '')) for name in names)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _empty(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
