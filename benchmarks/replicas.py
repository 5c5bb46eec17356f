"""Replicas behind Ray Serve beside one server, on the demo: `python -m benchmarks.replicas` (extra `ray`).

All share the cores of this machine, so this shows what Ray costs and how evenly it spreads requests; what replicas gain
on cores and GPUs of their own it cannot show.
"""

import argparse
import asyncio
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import described
from benchmarks.processes import ready_replicas, running
from server.bench import Summary, Workload, closed_loop

SERVERS = {  # one thread for each, so that the engines are the same
    "one server": ["--threads", "1"],
    "Ray, 1 replica": ["--ray", "--replicas", "1"],
    "Ray, 2 replicas": ["--ray", "--replicas", "2"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=192, help="of a run")
    parser.add_argument("--runs", type=int, default=3, help="on each server, each time it is started")
    parser.add_argument("--rounds", type=int, default=2, help="how often each server is started, in turn")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/replicas-cpu.json"))
    args = parser.parse_args()
    runs: dict[str, list[Summary]] = {name: [] for name in SERVERS}
    for _ in range(args.rounds):
        for name, options in SERVERS.items():
            runs[name] += asyncio.run(measured(options, args.clients, args.requests, args.runs))
    found = {name: told(summaries) for name, summaries in runs.items()}
    results = {"machine": described(), "model": "demo", "clients": args.clients, "servers": found}
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


async def measured(options: list[str], clients: int, requests: int, runs: int) -> list[Summary]:
    command = [sys.executable, "-m", "server.cli", "serve", "--log-level", "warning", *options]
    with running(command) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=httpx.Limits()) as http:
            model = (await http.get("/v1/models")).json()["data"][0]["id"]
            while "--ray" in options and len(ready_replicas()) < int(options[-1]):
                await asyncio.sleep(0.2)
            bodies = Workload(model, requests, extra={"ignore_eos": True}).bodies()
            await closed_loop(http, bodies[:clients], clients)
            return [await closed_loop(http, bodies, clients) for _ in range(runs)]


def told(summaries: list[Summary]) -> dict[str, Any]:
    """Medians and extremes of the runs."""
    seconds = sorted(one.new_tokens_per_s for one in summaries)
    return {
        "new_tokens_per_s": {"median": round(statistics.median(seconds)), "least": seconds[0], "most": seconds[-1]},
        "ttft_ms_p50": round(statistics.median(one.ttft_ms["p50"] for one in summaries), 1),
        "inter_token_ms_p50": round(statistics.median(one.inter_token_ms["p50"] for one in summaries), 1),
        "failed": sum(one.failed for one in summaries),
    }


if __name__ == "__main__":
    main()
