"""A server in a process of its own, and its clients in others."""

import importlib.util
import statistics
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.gpu.clients import Clients
from benchmarks.gpu.drive import streamed
from benchmarks.gpu.figures import Figure
from benchmarks.gpu.worker import Skipped
from benchmarks.gpu.world import World
from benchmarks.processes import running
from benchmarks.serving import write_folder
from benchmarks.workload import SHAPES, Request
from server.bench import Workload
from server.config import PREFIX

SEQUENTIAL = 10  # requests, one after the other
NOT_SLOWER = 1.1  # times, and still no slower: what two equal requests differ by
START_S = 120  # for the server to be ready
WARM_UP = 10**6  # beside the seeds of what is measured, that of what warms up: the prefix cache knows none of it
FRONTS = 2  # processes, where one may be too few
# That a server needs, beside what an engine does.
PACKAGES = ("fastapi", "fastapi_offline", "httptools", "msgspec", "prometheus_client", "pydantic_settings", "uvicorn")


def http(world: World) -> Iterator[Figure]:
    """The same requests to the server and to an engine of this process, one after the other. Raises Skipped."""
    need_server()
    sizes = world.sizes
    given = settings(world, served_folder(world))
    world.release("plain", "model")
    most = max(count for count, _ in sizes.clients)
    with serving(given, most) as clients:
        each = clients.one_by_one(work(world, SEQUENTIAL, (32, 32), (16, 16)))
        note = f"{1000 * each[0]:.0f} ms, then {', '.join(f'{1000 * one:.0f}' for one in each[1:])}"
        ratio = each[0] / statistics.median(each[1:])
        yield Figure("the first request against the next nine", ratio, "x", note, at_most=NOT_SLOWER)
        for count, wanted in sizes.clients:
            yield share(world, clients, count, f"{count} clients", wanted)
    with serving({**given, "front_workers": FRONTS}, most) as clients:
        yield share(world, clients, most, f"{most} clients, {FRONTS} fronts", None)


def share(world: World, clients: Clients, count: int, name: str, wanted: float | None) -> Figure:
    """Tokens a second of `count` clients, of those of the engine alone. What warms up is not asked again."""
    span = world.sizes.longest // 8, world.sizes.longest
    asked = work(world, world.sizes.requests * max(2, count), span, span, seed=count)
    requests = [Request(tuple(body["prompt"]), body["max_tokens"]) for body in asked]
    streamed(world.steered, requests, clients=count)  # warms up
    alone = streamed(world.steered, requests, clients=count)
    clients.closed_loop(work(world, 2 * count, span, span, seed=WARM_UP + count), count)
    seen = clients.closed_loop(asked, count)
    rate = alone.tokens / alone.seconds
    note = (
        f"{seen.new_tokens_per_s:,.0f} tokens/s against {rate:,.0f}; first token p50 / p99 "
        f"{seen.ttft_ms['p50']:.0f} / {seen.ttft_ms['p99']:.0f} ms, between tokens "
        f"{seen.inter_token_ms['p50']:.1f} / {seen.inter_token_ms['p99']:.1f} ms"
    )
    return Figure(f"{name}, of the engine alone", 100 * seen.new_tokens_per_s / rate, "%", note, at_least=wanted)


def need_server() -> None:
    """Raises Skipped where the server could not start for want of a package."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise Skipped(f"{package.replace('_', '-')} is not installed")


@contextmanager
def serving(given: Mapping[str, Any], most: int) -> Iterator[Clients]:
    """Clients of a server with these settings, at most so many."""
    environment = {f"{PREFIX}{name.upper()}": str(value) for name, value in given.items()}
    command = [sys.executable, "-m", "server.cli", "serve"]
    with running(command, timeout=START_S, environment=environment) as server, Clients(server.url, most) as clients:
        yield clients


def work(
    world: World, count: int, prompt: tuple[int, int], new: tuple[int, int], seed: int = 0
) -> list[dict[str, Any]]:
    """Bodies of requests, with at least and at most so many tokens."""
    vocab = SHAPES[world.sizes.shape]["vocab_size"]
    return Workload("steered", count, prompt, new, vocab, seed, extra={"ignore_eos": True}).bodies()


def served_folder(world: World) -> Path:
    """Written when it is first asked for."""
    folder = world.scratch / "served"
    if not folder.exists():
        write_folder(folder, world.model, tokenizer(SHAPES[world.sizes.shape]["vocab_size"]), world.sizes.shape)
    return folder


def settings(world: World, folder: Path) -> dict[str, Any]:
    """Of a server like the engine of this process."""
    sizes = world.sizes
    return {
        "model": folder / "model",
        "checkpoints": folder / "checkpoints",
        "checkpoint": "steered",
        "device": world.device,
        "dtype": str(world.dtype)[6:],
        "max_num_seqs": sizes.rows,
        "max_num_batched_tokens": sizes.step,
        "max_model_len": sizes.context,
        "kv_cache_mib": -(-sizes.cache * world.steered.token_bytes // 2**20),
        "queue_limit": 4096,
        "log_level": "warning",
    }


def tokenizer(vocab: int) -> Any:
    """Byte-level, of `vocab` tokens: bytes, and words that no text becomes but that ids may."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"Ġword{index}" for index in range(vocab - len(alphabet)))]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=core)
