"""The server with the model in one process, then in two that have a shard of it on a GPU each (tensor parallel)."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import torch

from benchmarks.gpu.clients import Clients
from benchmarks.gpu.figures import Figure
from benchmarks.gpu.over_http import START_S, served_folder, settings
from benchmarks.gpu.worker import Skipped
from benchmarks.gpu.world import World
from benchmarks.processes import running
from benchmarks.workload import SHAPES
from server.bench import Summary, Workload
from server.config import PREFIX
from training.evaluation.answer_tree import shared_length

PROCESSES = 2
TEXTS = 8  # that are compared, token by token


@dataclass(frozen=True)
class _Seen:
    runs: list[Summary]  # one for each number of clients
    texts: list[list[int]]  # tokens


def parallel(world: World) -> Iterator[Figure]:
    """Tokens a second of the same requests, and whether greedy texts are the same. Raises Skipped."""
    if world.cuda and torch.cuda.device_count() < PROCESSES:
        raise Skipped(f"there are fewer than {PROCESSES} GPUs")
    given = settings(world, served_folder(world))
    world.release("steered", "plain", "model")  # both servers use the first GPU, too
    alone, together = (_served(world, {**given, "tensor_parallel_size": size}) for size in (1, PROCESSES))
    for (count, _), one, two in zip(_clients(world), alone.runs, together.runs, strict=True):
        ratio = two.new_tokens_per_s / one.new_tokens_per_s
        note = (
            f"{two.new_tokens_per_s:,.0f} tokens/s against {one.new_tokens_per_s:,.0f}; between tokens p50 "
            f"{two.inter_token_ms['p50']:.1f} against {one.inter_token_ms['p50']:.1f} ms"
        )
        yield Figure(f"{count} clients, {PROCESSES} processes against 1", ratio, "x", note)
    equal = [shared_length(one, two) for one, two in zip(alone.texts, together.texts, strict=True)]
    whole = sum(same == len(text) for same, text in zip(equal, alone.texts, strict=True))
    note = f"{sum(equal):,} of {sum(map(len, alone.texts)):,} tokens before the first that differs by rounding"
    yield Figure(f"greedy texts of {PROCESSES} processes like those of 1", 100 * whole / TEXTS, "%", note)


def _served(world: World, given: dict[str, Any]) -> _Seen:
    sizes = world.sizes
    each = {**given, "kv_cache_mib": -(-given["kv_cache_mib"] // given["tensor_parallel_size"])}
    environment = {f"{PREFIX}{name.upper()}": str(value) for name, value in each.items()}
    command = [sys.executable, "-m", "server.cli", "serve"]
    most = max(count for count, _ in _clients(world))
    runs = []
    with (
        running(command, timeout=START_S, environment=environment) as server,
        Clients(server.url, most) as clients,
    ):
        for count, _ in _clients(world):
            bodies = _work(world, max(8, sizes.requests * count), seed=count)
            clients.closed_loop(bodies[: 2 * count], count)  # warms up
            runs.append(clients.closed_loop(bodies, count))
        return _Seen(runs, _texts(world, server.url))


def _clients(world: World) -> tuple[tuple[int, float | None], ...]:
    return world.sizes.clients[:2]


def _longest(world: World) -> int:
    """Of prompts and of answers, in tokens."""
    return min(128, world.sizes.context // 4)


def _work(world: World, count: int, seed: int) -> list[dict[str, Any]]:
    longest = _longest(world)
    return Workload(
        "steered",
        count,
        prompt=(longest // 8, longest),
        new=(longest // 2, longest),
        vocab=SHAPES[world.sizes.shape]["vocab_size"],
        extra={"ignore_eos": True},
        seed=seed,
    ).bodies()


def _texts(world: World, url: str) -> list[list[int]]:
    """Greedy ones, all in one batch."""
    prompts = [f"Question {number}:" for number in range(TEXTS)]
    body = {"prompt": prompts, "temperature": 0, "max_new_tokens": _longest(world), "ignore_eos": True}
    answer = httpx.post(f"{url}/generate", json=body, timeout=600)
    answer.raise_for_status()
    return [result["token_ids"] for result in answer.json()["results"]]
