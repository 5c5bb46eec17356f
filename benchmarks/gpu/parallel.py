"""The server with the model in one process, then in two that have a shard of it on a GPU each (tensor parallel)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import torch

from benchmarks.gpu.figures import Figure
from benchmarks.gpu.over_http import WARM_UP, need_server, served_folder, serving, settings, work
from benchmarks.gpu.worker import Skipped
from benchmarks.gpu.world import World
from server.bench import Summary
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
    need_server()
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
    each = {**given, "kv_cache_mib": -(-given["kv_cache_mib"] // given["tensor_parallel_size"])}
    longest = world.sizes.longest
    spans = (longest // 8, longest), (longest // 2, longest)
    runs = []
    with serving(each, max(count for count, _ in _clients(world))) as clients:
        for count, _ in _clients(world):
            clients.closed_loop(work(world, 2 * count, *spans, seed=WARM_UP + count), count)  # warms up
            asked = work(world, world.sizes.requests * max(2, count), *spans, seed=count)
            runs.append(clients.closed_loop(asked, count))
        return _Seen(runs, _texts(world, clients.url))


def _clients(world: World) -> tuple[tuple[int, float | None], ...]:
    return world.sizes.clients[:2]


def _texts(world: World, url: str) -> list[list[int]]:
    """Greedy ones, all in one batch."""
    prompts = [f"Question {number}:" for number in range(TEXTS)]
    body = {"prompt": prompts, "temperature": 0, "max_new_tokens": world.sizes.longest, "ignore_eos": True}
    answer = httpx.post(f"{url}/generate", json=body, timeout=600)
    answer.raise_for_status()
    return [result["token_ids"] for result in answer.json()["results"]]
