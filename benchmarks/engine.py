"""Tokens a second of the engine beside the alternatives: `python -m benchmarks.engine --help`.

Contenders answer the same requests in turn, round by round, so that a slow minute of the machine hits all of them.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.apart import Apart
from benchmarks.contenders import Contender, ContinuousBatching, Generate, Ours, Pyvene, Vllm, product_seconds
from benchmarks.machine import described
from benchmarks.turns import in_turn
from benchmarks.workload import SHAPES, llama, requests
from server.threads import usable_cores
from steer_ops.linears import pack_linears

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIXES = tuple((1.0 + i / 256, 0.5 - i / 512, -0.5) for i in range(256))
PAUSE_S = 1.0  # before each turn: threads of the contender before it wait actively, Intel's for 0.2 s
Maker = Callable[[str, torch.dtype, int], Contender]
CONTENDERS: dict[str, Maker] = {
    "steered": Ours,
    "unsteered": partial(Ours, mixes=(), name="mat-steer, unsteered"),
    "distinct": partial(Ours, mixes=MIXES, name="mat-steer, every row steered differently"),
    "plain": partial(Ours, native=False, name="mat-steer, steered, without compiled kernels"),
    "generate": Generate,
    "continuous": ContinuousBatching,
    "pyvene": Pyvene,
}


@dataclass(frozen=True)
class Line:
    """One contender's tokens a second: the median over rounds, the lowest and the highest."""

    contender: str
    median: float
    low: float
    high: float
    times: float  # how much slower than the engine, steered: medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="5M,100M", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rows", default="8,32", help="rows that run together")
    parser.add_argument("--contenders", default="steered,unsteered,distinct,plain,generate,continuous,pyvene")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--vllm", metavar="PYTHON", help="a Python that has vLLM's CPU build, to be measured, too")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engine-cpu"), help=".json and .md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.vllm:
        for way in ("eager", "compiled"):
            CONTENDERS[f"vllm-{way}"] = partial(Vllm, args.vllm, compiled=way == "compiled")
    names = args.contenders.split(",") + [name for name in CONTENDERS if name.startswith("vllm")]
    if names[0] != "steered" or set(names) - set(CONTENDERS):
        parser.error(f"--contenders starts with steered and has names of {', '.join(CONTENDERS)}")

    tables: list[dict[str, Any]] = []
    for shape in args.models.split(","):
        for dtype in args.dtypes.split(","):
            for rows in map(int, args.rows.split(",")):
                tables.append(measure(shape, dtype, rows, names, count=args.requests, rounds=args.rounds))
                write(args.out, tables)


def measure(shape: str, dtype: str, rows: int, names: Sequence[str], *, count: int, rounds: int) -> dict[str, Any]:
    """All contenders on one model and number of rows."""
    work = requests(count, SHAPES[shape]["vocab_size"])
    contenders: list[Contender] = []
    for name in names:
        try:
            make = partial(CONTENDERS[name], shape, DTYPES[dtype], rows)
            contenders.append(make() if name.startswith("vllm") else Apart(make))
        except RuntimeError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in range(rounds + 1):  # the first one warms up
        for contender in in_turn(contenders, number):
            asked = work[: contender.subset]
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            contender(asked)
            taken = time.perf_counter() - start
            if number:
                rates[contender.name].append(sum(one.new for one in asked) / taken)
        print(f"{shape} {dtype} {rows} rows: round {number} of {rounds}", file=sys.stderr)
    best = statistics.median(rates[contenders[0].name])
    tokens = sum(one.new for one in work)
    floor = floor_seconds(shape, DTYPES[dtype], rows, tokens)
    lines = [
        Line(name, statistics.median(seen), min(seen), max(seen), best / statistics.median(seen))
        for name, seen in rates.items()
    ]
    for contender in contenders:
        contender.close()
    return {
        "model": shape,
        "dtype": dtype,
        "rows": rows,
        "requests": count,
        "rounds": rounds,
        "lines": [asdict(line) for line in lines],
        "floor_share": round(floor * best / tokens, 3),
    }


def floor_seconds(shape: str, dtype: torch.dtype, rows: int, tokens: int) -> float:
    """What the matrix products for so many tokens take, in steps of `rows` tokens."""
    model = llama(shape, dtype)
    pack_linears(model)
    return product_seconds(model, rows, dtype) * tokens / rows


def write(out: Path, tables: Sequence[dict[str, Any]]) -> None:
    machine = described()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({"machine": machine, "tables": list(tables)}, indent=1) + "\n")
    text = ["# The engine beside the alternatives", "", *(f"- {key}: {value}" for key, value in machine.items()), ""]
    for table in tables:
        text += [
            f"## {table['model']}, {table['dtype']}, {table['rows']} rows",
            "",
            f"{table['requests']} requests, prompts and answers of 16 to 128 tokens, greedy; medians of "
            f"{table['rounds']} interleaved rounds. The matrix products of the linear layers, in steps of "
            f"{table['rows']} tokens, would alone take "
            f"{table['floor_share']:.0%} of the time.",
            "",
            "| | tokens/s | lowest to highest | the engine is faster by |",
            "| --- | ---: | ---: | ---: |",
        ]
        for line in table["lines"]:
            spread = f"{line['low']:.0f} - {line['high']:.0f}"
            text.append(f"| {line['contender']} | {line['median']:.0f} | {spread} | {line['times']:.2f} |")
        text.append("")
    out.with_suffix(".md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
