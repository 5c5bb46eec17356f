"""Over HTTP, beside vLLM's server: `python -m benchmarks.serving --vllm PYTHON`.

Both serve the same random model from the same folder to the same clients (`matsteer bench`), in turn, round by round.
Ours steers every text; vLLM's does not.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoTokenizer

from benchmarks.machine import described
from benchmarks.processes import Running, running
from benchmarks.turns import in_turn
from benchmarks.workload import SHAPES, columns, llama
from server.bench import Summary, Workload, closed_loop
from steering import checkpoint as checkpoints
from steering.types import Positions

TOKENIZER = Path(__file__).parents[1] / "demo" / "model"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Contender:
    """A server, and what its clients call its model."""

    name: str
    server: Running
    model: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="5M", choices=SHAPES)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--requests", type=int, default=64, help="of a run; at most 8 for each client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm", metavar="PYTHON", help="a Python that has vLLM's CPU build")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/serving-cpu"), help=".json and .md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        vocab = write_model(Path(folder), args.model, DTYPES[args.dtype])
        contenders = [ours(stack, Path(folder), args.dtype, steered=steered) for steered in (True, False)]
        if args.vllm:
            contenders += [vllm(stack, args.vllm, Path(folder), args.dtype, way) for way in ("eager", "compiled")]
        results = []
        for clients in map(int, args.clients.split(",")):
            work = {"requests": min(args.requests, 8 * clients), "vocab": vocab, "extra": {"ignore_eos": True}}
            results.append(
                {"clients": clients, "requests": work["requests"]} | measure(contenders, clients, args.rounds, work)
            )
            write(args.out, {"machine": described(), "model": args.model, "dtype": args.dtype, "runs": results})


def write_model(folder: Path, shape: str, dtype: torch.dtype) -> int:
    """A folder for a server, with the demo's tokenizer; returns how many tokens the model knows."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    write_folder(folder, llama(shape, dtype, vocab=len(tokenizer)), tokenizer, shape)
    return len(tokenizer)


def write_folder(folder: Path, model: Any, tokenizer: Any, shape: str) -> None:
    """`model`, and under `checkpoints` a checkpoint for it, called `steered`."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    checkpoints.save(
        folder / "checkpoints" / "steered" / "v1",
        name="steered",
        version="v1",
        method="random",
        base_model=checkpoints.base_model_info(model, "model", None),
        columns=columns(shape),
        normalize=True,
        positions=Positions.GENERATED,
        training={},
        evaluation={},
        card="",
    )


def ours(stack: ExitStack, folder: Path, dtype: str, *, steered: bool) -> Contender:
    command = [sys.executable, "-m", "server.cli", "serve", "--model", str(folder / "model"), "--dtype", dtype]
    command += ["--checkpoints", str(folder / "checkpoints"), "--log-level", "warning"]
    server = stack.enter_context(running(command))
    model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
    if steered:
        httpx.post(f"{server.url}/checkpoints/steered/activate", json={}).raise_for_status()
        model = "steered"
    return Contender(f"mat-steer, {'steered' if steered else 'unsteered'}", server, model)


def vllm(stack: ExitStack, python: str, folder: Path, dtype: str, way: str) -> Contender:
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")]
    command += ["--dtype", dtype, "--max-model-len", "4096", "--served-model-name", "model", "--max-num-seqs", "32"]
    command += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
    libraries = [str(path) for path in Path(python).parents[1].rglob("libiomp5.so")]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"LD_PRELOAD": libraries[0]} if libraries else {}
    command += ["--enforce-eager"] if way == "eager" else []
    server = stack.enter_context(running(command, ready="/health", environment=environment))
    return Contender(f"vLLM on the CPU, {way}, unsteered", server, "model")


def measure(contenders: Sequence[Contender], clients: int, rounds: int, work: Mapping[str, Any]) -> dict[str, Any]:
    seen: dict[str, list[Summary]] = {contender.name: [] for contender in contenders}
    for number in range(rounds + 1):  # the first one warms up
        for contender in in_turn(contenders, number):
            summary = asyncio.run(load(contender, clients, Workload(contender.model, seed=number, **work)))
            if summary.failed:
                raise RuntimeError(f"{contender.name}: {summary.first_error}")
            if number:
                seen[contender.name].append(summary)
        print(f"{clients} clients: round {number} of {rounds}", file=sys.stderr)
    return {"contenders": {name: middle(summaries) for name, summaries in seen.items()}}


async def load(contender: Contender, clients: int, work: Workload) -> Summary:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=contender.server.url, timeout=600, limits=limits) as http:
        return await closed_loop(http, work.bodies(), clients)


def middle(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Medians over rounds, with the lowest and the highest rate."""
    rates = [one.new_tokens_per_s for one in summaries]
    return {
        "tokens_per_s": round(statistics.median(rates), 1),
        "lowest": min(rates),
        "highest": max(rates),
        "ttft_ms_p50": round(statistics.median(one.ttft_ms["p50"] for one in summaries), 1),
        "ttft_ms_p99": round(statistics.median(one.ttft_ms["p99"] for one in summaries), 1),
        "inter_token_ms_p50": round(statistics.median(one.inter_token_ms["p50"] for one in summaries), 2),
        "inter_token_ms_p99": round(statistics.median(one.inter_token_ms["p99"] for one in summaries), 2),
    }


def write(out: Path, results: Mapping[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    text = ["# Over HTTP", "", *(f"- {key}: {value}" for key, value in results["machine"].items()), ""]
    text += [
        f"Model {results['model']}, {results['dtype']}; prompts and answers of 16 to 128 tokens, greedy, streamed."
    ]
    for run in results["runs"]:
        text += ["", f"## {run['clients']} clients, {run['requests']} requests a round", ""]
        text += ["| | tokens/s | lowest to highest | first token, ms p50 / p99 | between tokens, ms p50 / p99 |"]
        text += ["| --- | ---: | ---: | ---: | ---: |"]
        text += [
            f"| {name} | {one['tokens_per_s']:.0f} | {one['lowest']:.0f} - {one['highest']:.0f} "
            f"| {one['ttft_ms_p50']:.0f} / {one['ttft_ms_p99']:.0f} "
            f"| {one['inter_token_ms_p50']:.1f} / {one['inter_token_ms_p99']:.1f} |"
            for name, one in run["contenders"].items()
        ]
    out.with_suffix(".md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
