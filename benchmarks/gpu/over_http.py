"""A server in a process of its own, and its clients in others."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.gpu.clients import Clients
from benchmarks.gpu.drive import streamed
from benchmarks.gpu.figures import Figure
from benchmarks.gpu.world import World
from benchmarks.processes import running
from benchmarks.serving import write_folder
from benchmarks.workload import SHAPES, Request
from server.bench import Workload
from server.config import PREFIX

SEQUENTIAL = 10  # requests, one after the other
NOT_SLOWER = 1.1  # times, and still no slower: what two equal requests differ by
START_S = 120  # for the server to be ready


def http(world: World) -> Iterator[Figure]:
    """The same requests to the server and to an engine of this process, one after the other."""
    sizes = world.sizes
    vocab = SHAPES[sizes.shape]["vocab_size"]
    folder = served_folder(world)
    world.release("plain", "model")
    ignoring = {"ignore_eos": True}
    command = [sys.executable, "-m", "server.cli", "serve"]
    environment = {f"{PREFIX}{name.upper()}": str(value) for name, value in settings(world, folder).items()}
    most = max(count for count, _ in sizes.clients)
    with running(command, timeout=START_S, environment=environment) as server, Clients(server.url, most) as clients:
        short = Workload("steered", SEQUENTIAL, prompt=(32, 32), new=(16, 16), vocab=vocab, extra=ignoring)
        each = [clients.closed_loop([body], 1).latency_ms["p50"] for body in short.bodies()]
        note = f"{each[0]:.0f} ms, then {', '.join(f'{one:.0f}' for one in each[1:])}"
        ratio = each[0] / each[-1]
        yield Figure("the first request against the tenth", ratio, "x", note, at_most=NOT_SLOWER)
        for count, wanted in sizes.clients:
            longest = min(128, sizes.context // 4)
            asked = Workload(
                "steered",
                max(8, sizes.requests * count),
                prompt=(longest // 8, longest),
                new=(longest // 8, longest),
                vocab=vocab,
                extra=ignoring,
                seed=count,
            ).bodies()
            work = [Request(tuple(body["prompt"]), body["max_tokens"]) for body in asked]
            streamed(world.steered, work, clients=count)  # warms up
            alone = streamed(world.steered, work, clients=count)
            clients.closed_loop(asked[: 2 * count], count)  # warms up
            seen = clients.closed_loop(asked, count)
            rate = alone.tokens / alone.seconds
            note = (
                f"{seen.new_tokens_per_s:,.0f} tokens/s against {rate:,.0f}; first token p50 / p99 "
                f"{seen.ttft_ms['p50']:.0f} / {seen.ttft_ms['p99']:.0f} ms, between tokens "
                f"{seen.inter_token_ms['p50']:.1f} / {seen.inter_token_ms['p99']:.1f} ms"
            )
            share = 100 * seen.new_tokens_per_s / rate
            yield Figure(f"{count} clients, of the engine alone", share, "%", note, at_least=wanted)


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
