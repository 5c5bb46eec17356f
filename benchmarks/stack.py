"""What the stack costs beside the model: `python -m benchmarks.stack --help`.

The same texts, steered, from the same demo model, in turn: by the engine alone; through the service, which tokenizes
and hands every token to an event loop; and over HTTP, as server-sent events, to a client on the same machine. Then the
pieces of the way, each by itself.
"""

import argparse
import asyncio
import itertools
import json
import os
import queue
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import described
from benchmarks.processes import Running, running
from server.assembly import open_service
from server.client import AsyncClient
from server.config import Settings
from server.engine.sequence import Event, Finished, SampledToken, SamplingParams, Sequence, SteeringParams, TokenEvent
from server.formatting import Formatter
from server.schemas import TOKEN_BODY, GenerateRequest, TokenBody
from server.service import Service
from server.types import TokenChunk
from steering.types import SequenceSteering

PROMPTS = ("What colour is the sky?", "What is the capital of Japan?", "Where does a bear live?", "Is grass green?")
NEW = 64  # tokens a text
TOGETHER = 8  # that are streamed at a time, by a second server
RULES: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 0, "ignore_eos": True}
NUMBERS = itertools.count()  # of requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10, help="of a run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stack-cpu.json"))
    args = parser.parse_args()
    service = open_service(Settings(log_level="warning"))
    command = [sys.executable, "-m", "server.cli", "serve", "--log-level", "warning"]
    seen: dict[str, list[dict[str, float]]] = {}
    try:
        together = {"MATSTEER_STREAM_INTERVAL": str(TOGETHER)}
        with running(command) as server, running(command, environment=together) as other:
            ways: dict[str, Callable[[float], dict[str, float]]] = {
                "engine": partial(by_engine, service, args.streams),
                "service": lambda seconds: asyncio.run(by_service(service, args.streams, seconds)),
                "http": lambda seconds: asyncio.run(by_http(server, args.streams, seconds)),
                f"http, {TOGETHER} tokens together": lambda seconds: asyncio.run(by_http(other, args.streams, seconds)),
            }
            for number in range(args.rounds + 1):  # the first one warms up
                for name, way in ways.items():
                    run = way(args.seconds if number else 2.0)
                    if number:
                        seen.setdefault(name, []).append(run)
                print(f"round {number} of {args.rounds}", file=sys.stderr)
        pieces = asyncio.run(by_piece(service))
    finally:
        service.engine.stop()
    results = {"machine": described(), "streams": args.streams, "new_tokens": NEW, "rounds": args.rounds}
    results |= {"runs": {name: middle(runs) for name, runs in seen.items()}, "microseconds": pieces}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    """Medians, and the range of the rates."""
    rates = [run["tokens_per_s"] for run in runs]
    medians = {name: round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}
    return medians | {"lowest": round(min(rates), 1), "highest": round(max(rates), 1)}


def by_engine(service: Service, streams: int, seconds: float) -> dict[str, float]:
    """Rows of tokens, events into a queue."""
    active = service.registry.active
    assert active is not None
    steering = SteeringParams(SequenceSteering.of([(active.handle, active.multipliers(None, ""))]), active.positions)
    prompts = [service.codec.encode(f"Q: {prompt} A:", "prompt") for prompt in PROMPTS]
    told: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def submit() -> None:
        index = next(NUMBERS)
        rules = SamplingParams(max_new_tokens=NEW, temperature=0, ignore_eos=True)
        sequence = Sequence(f"stack-{index}", 0, prompts[index % 4], rules, steering, stream=True)
        service.engine.submit([sequence], told.put)

    start, steps = time.perf_counter(), service.engine.stats.steps
    running_, tokens = streams, 0
    for _ in range(streams):
        submit()
    while running_:
        if isinstance(event := told.get(), Finished):
            tokens += len(event.token_ids)
            if time.perf_counter() - start < seconds:
                submit()
            else:
                running_ -= 1
    taken = time.perf_counter() - start
    steps = service.engine.stats.steps - steps
    return {"tokens_per_s": tokens / taken, "step_ms": 1000 * taken / steps}


async def by_service(service: Service, streams: int, seconds: float) -> dict[str, float]:
    """Texts, tokens one by one in an event loop."""
    start, steps, before = time.perf_counter(), service.engine.stats.steps, time.thread_time()
    tokens = 0

    async def stream(index: int) -> None:
        nonlocal tokens
        number = random.Random(index)
        while time.perf_counter() - start < seconds:
            body = GenerateRequest.model_validate({"prompt": f"Q: {number.choice(PROMPTS)} A:", "stream": True} | RULES)
            async for some in await service.stream(body.to_params()):
                tokens += sum(isinstance(one, TokenChunk) for one in some)

    await asyncio.gather(*map(stream, range(streams)))
    taken, steps = time.perf_counter() - start, service.engine.stats.steps - steps
    return {
        "tokens_per_s": tokens / taken,
        "step_ms": 1000 * taken / steps,
        "loop_cpu_ms_a_step": 1000 * (time.thread_time() - before) / steps,
    }


async def by_http(server: Running, streams: int, seconds: float) -> dict[str, float]:
    """Server-sent events. The server's event loop is its main thread; the client has a core's time of its own."""
    start, client_before = time.perf_counter(), time.process_time()
    tokens = 0
    async with AsyncClient(server.url) as client:
        steps, before = _steps(server.url), _main_thread_seconds(server.pid)

        async def stream(index: int) -> None:
            nonlocal tokens
            number = random.Random(index)
            while time.perf_counter() - start < seconds:
                async for one in client.stream(f"Q: {number.choice(PROMPTS)} A:", **RULES):
                    tokens += isinstance(one, TokenBody)

        await asyncio.gather(*map(stream, range(streams)))
        taken = time.perf_counter() - start
        steps = _steps(server.url) - steps
    return {
        "tokens_per_s": tokens / taken,
        "step_ms": 1000 * taken / steps,
        "loop_cpu_ms_a_step": 1000 * (_main_thread_seconds(server.pid) - before) / steps,
        "client_cpu_ms_a_step": 1000 * (time.process_time() - client_before) / steps,
    }


async def by_piece(service: Service) -> dict[str, float]:
    """Microseconds that each piece of the way takes by itself."""
    body = json.dumps({"prompt": f"Q: {PROMPTS[0]} A:", "attributes": {"truthfulness": 1.0}, "stream": True})
    formatter = Formatter(service.codec)
    chunk = TokenChunk(
        "steered", 0, TokenEvent(Sequence("a", 0, (1,), SamplingParams(), stream=True), 0, SampledToken(17), " sky")
    )
    ids = service.codec.encode(PROMPTS[0], "prompt")
    loop, hops = asyncio.get_running_loop(), asyncio.Queue[float]()
    waits = []
    for _ in range(200):
        sent = time.perf_counter()
        loop.call_soon_threadsafe(hops.put_nowait, sent)
        waits.append(time.perf_counter() - await hops.get())
    return {
        "a request: JSON to a checked body": _timed(lambda: GenerateRequest.model_validate_json(body)),
        "a request: tokenizing 7 words": _timed(lambda: service.codec.encode(PROMPTS[0], "prompt")),
        "a token: decoding a few ids": _timed(lambda: service.codec.decode(ids[:4])),
        "a token: through the event loop": round(1e6 * statistics.median(waits), 1),
        "a token: an event as JSON": _timed(lambda: TOKEN_BODY.dump_json(formatter.token(chunk))),
    }


def _timed(piece: Callable[[], Any], repeat: int = 2000) -> float:
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        piece()
        times.append(time.perf_counter() - start)
    return round(1e6 * statistics.median(times), 1)


def _steps(url: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    line = next(line for line in text.splitlines() if line.startswith("matsteer_steps_total "))
    return float(line.split()[1])


def _main_thread_seconds(pid: int) -> float:
    """Processor time of a process' first thread (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
