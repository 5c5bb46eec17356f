"""Checkpoints swapped under load: `python -m benchmarks.hot_swap --help`.

Clients stream from a server over HTTP for a while, as checkpoints are activated in turn; then the same without swaps.
Every text is computed again afterwards, greedily, by the version that the response names: a response that was made by
two versions would differ.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx

from benchmarks.machine import described
from benchmarks.processes import Running, running
from server.client import ApiError, AsyncClient, Client
from server.schemas import GenerateResponse, TokenBody
from steering import checkpoint as folders

PROMPTS = ("What colour is the sky?", "What is the capital of Japan?", "Where does a bear live?", "Is grass green?")


@dataclass
class Seen:
    """What the clients saw. Seconds."""

    requests: int = 0
    failed: list[str] = field(default_factory=list)
    longest_gap: float = 0.0  # between two tokens of one text
    gaps: list[float] = field(default_factory=list)
    swaps: list[float] = field(default_factory=list)  # how long each took
    texts: dict[tuple[str, str], set[str]] = field(default_factory=dict)  # by prompt and version


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two swaps")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/hot-swap-cpu.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root, served(versions(Path(root))) as server:
        url = server.url
        asyncio.run(load(url, args.clients, 3.0, every=None))  # warm
        still = asyncio.run(load(url, args.clients, args.seconds, every=None))
        swapped = asyncio.run(load(url, args.clients, args.seconds, every=args.every))
        wrong = recomputed(url, swapped) + recomputed(url, still)
    results = {
        "machine": described(),
        "clients": args.clients,
        "seconds": args.seconds,
        "swaps": len(swapped.swaps),
        "swap_ms": spread(swapped.swaps),
        "requests": {"with swaps": swapped.requests, "without": still.requests},
        "failed": len(swapped.failed) + len(still.failed),
        "first_failure": next(iter(swapped.failed + still.failed), None),
        "texts_that_differ_from_their_version": wrong,
        "versions_seen": len({version for _, version in swapped.texts}),
        "longest_gap_ms": {
            "with swaps": round(1000 * max(swapped.gaps), 1),
            "without": round(1000 * max(still.gaps), 1),
        },
        "gap_ms": {"with swaps": spread(swapped.gaps), "without": spread(still.gaps)},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def versions(root: Path) -> Path:
    """Three versions of the demo checkpoint, their vectors ever longer."""
    shipped = folders.load(Path(__file__).parents[1] / "checkpoints" / "demo" / "v1")
    config = shipped.config
    for number, factor in enumerate((1.0, 0.7, 0.4), start=1):
        columns = [replace(column, vector=factor * column.vector) for column in shipped.columns]
        folders.save(
            root / "demo" / f"v{number}",
            name="demo",
            version=f"v{number}",
            method=config.method,
            base_model=config.base_model,
            columns=columns,
            normalize=config.normalize,
            positions=config.positions,
            training={},
            evaluation={},
            card="",
        )
    return root


def served(checkpoints: Path) -> AbstractContextManager[Running]:
    """A demo server in a process of its own."""
    command = [sys.executable, "-m", "server.cli", "serve", "--checkpoints", str(checkpoints)]
    return running([*command, "--log-level", "warning"])


async def load(url: str, clients: int, seconds: float, *, every: float | None) -> Seen:
    seen = Seen()
    end = time.perf_counter() + seconds
    async with AsyncClient(url) as client:
        jobs = [stream(client, seen, index, end) for index in range(clients)]
        if every is not None:
            jobs.append(swap(client, seen, every, end))
        await asyncio.gather(*jobs)
    return seen


async def stream(client: AsyncClient, seen: Seen, index: int, end: float) -> None:
    number = random.Random(index)
    while time.perf_counter() < end:
        prompt = f"Q: {number.choice(PROMPTS)} A:"
        seen.requests += 1
        last: float | None = None
        try:
            async for one in client.stream(prompt, temperature=0, max_new_tokens=48, ignore_eos=True):
                now = time.perf_counter()
                if isinstance(one, TokenBody):
                    if last is not None:
                        seen.gaps.append(now - last)
                    last = now
                elif isinstance(one, GenerateResponse):
                    result = one.results[0]
                    seen.texts.setdefault((prompt, str(result.steering.version)), set()).add(result.text)
        except (ApiError, httpx.HTTPError) as error:
            seen.failed.append(repr(error))


async def swap(client: AsyncClient, seen: Seen, every: float, end: float) -> None:
    number = 0
    while time.perf_counter() < end:
        await asyncio.sleep(every)
        number += 1
        start = time.perf_counter()
        version = f"v{number % 3 + 1}"
        await client.activate("demo", version)
        seen.swaps.append(time.perf_counter() - start)
        for other in ("v1", "v2", "v3"):  # so that every swap loads anew
            if other != version:
                await client.unload("demo", other)


def recomputed(url: str, seen: Seen) -> int:
    """How many texts differ from what their version alone makes of the prompt."""
    wrong = 0
    with Client(url) as client:
        for (prompt, version), texts in seen.texts.items():
            answer = client.generate(
                prompt, checkpoint=f"demo@{version}", temperature=0, max_new_tokens=48, ignore_eos=True
            )
            wrong += len(texts - {answer.results[0].text})
    return wrong


def spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        f"p{share}": round(1000 * ordered[min(len(ordered) - 1, len(ordered) * share // 100)], 2)
        for share in (50, 90, 99)
    }


if __name__ == "__main__":
    main()
