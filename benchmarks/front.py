"""What the front costs: `python -m benchmarks.front`, and with `--model demo` or `--model smollm2` on a model.

A fake engine gives 256 streams 30,000 tokens a second together; one or more front processes make texts, JSON and events
of them for 256 clients, over sockets. What is counted is processor time, which other work on the machine changes
little. `--model`: that model in one process, and with the engine in a process of its own, in turn, round by round.
"""

import argparse
import asyncio
import itertools
import json
import logging
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import httpx
import psutil
from transformers import AutoTokenizer

from benchmarks.machine import described
from benchmarks.processes import Running, running
from benchmarks.turns import in_turn
from server.bench import Summary, Workload, closed_loop
from server.config import Settings
from server.engine.sequence import (
    EngineStats,
    EngineStatus,
    Finished,
    SampledToken,
    SteeringParams,
    Timing,
    TokenEvent,
)
from server.engine.sequence import (
    Sequence as EngineSequence,
)
from server.engine_client import AppliedSteering, EngineFacts, EngineRequest, EngineSnapshot, OnEvent, Submitted
from server.process import supervisor
from server.process.workers import host
from server.sockets import listen

MODEL = Path(__file__).parents[1] / "demo" / "model"
TEXT = " The sky is blue, and grass is green; a bear lives in the forest. Water boils at a hundred degrees."
IDLE = EngineStatus(0, 0, 0, 0, 1, 1, 0, 0, 0, 1)
HERE = [sys.executable, "-m", "benchmarks.front"]


class FakeEngine:
    """Gives every text that runs a token a step; steps are as far apart as `rate` tokens a second need."""

    def __init__(self, rate: float, tokens: Sequence[int]) -> None:
        self.facts = EngineFacts(max_pair_tokens=2**20, context=2**20, vocab=2**20, eos=frozenset(), created=0)
        self._rate = rate
        self._tokens = tokens  # of every text, over and over
        self._running: list[tuple[EngineSequence, OnEvent, list[int]]] = []
        self._stepping: asyncio.Task[None] | None = None

    @property
    def failure(self) -> None:
        return None

    async def submit(self, request: EngineRequest, on_event: OnEvent) -> Submitted:
        sequences = request.sequences([SteeringParams()] * len(request.arms))
        self._running += [(one, on_event, []) for one in sequences]
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._steps())
        return Submitted(sequences, (AppliedSteering((), "generated"),) * len(request.arms))

    async def _steps(self) -> None:
        due = time.monotonic()
        while self._running:
            due += len(self._running) / self._rate
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            for sequence, on_event, made in self._running:
                made.append(self._tokens[len(made) % len(self._tokens)])
                on_event(TokenEvent(sequence, len(made) - 1, SampledToken(made[-1]), ""))
                if len(made) == sequence.sampling_params.max_new_tokens:
                    on_event(Finished(sequence, tuple(made), "", "length", 0, Timing(0, 0, 0)))
            self._running = [one for one in self._running if len(one[2]) < one[0].sampling_params.max_new_tokens]

    async def snapshot(self) -> EngineSnapshot:
        return EngineSnapshot(None, EngineStats(), IDLE, len(self._running), 0, [], None)

    async def find_checkpoint(self, name: str) -> None:
        return None

    def cancel(self, request_id: str) -> None:
        self._running = [one for one in self._running if one[0].request_id != request_id]

    def close(self, request_id: str) -> None:
        pass

    def stop_sequence(self, request_id: str, index: int) -> None:
        pass

    def drain(self) -> None:
        pass

    def stop(self) -> None:
        pass

    async def _no_model(self, *arguments: object) -> NoReturn:
        raise NotImplementedError("there is no model")

    prompt_logprobs = compare = score = checkpoints = reload = unload = _no_model


def run_fake_engine(parent: Connection, settings: Settings, path: Path, configure: supervisor.Configure) -> None:
    """In place of `server.process.workers.run_engine`."""
    configure(settings)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rate = float(settings.model_name.removeprefix("fake-"))
    host(FakeEngine(rate, tokenizer(TEXT, add_special_tokens=False)["input_ids"]), path, parent)


def quiet(settings: Settings) -> None:
    logging.basicConfig(level=logging.WARNING)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=30000, help="tokens a second of the fake engine")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--workers", default="1,2", help="front processes")
    parser.add_argument("--clients", default="1,8,32", help="of the model")
    parser.add_argument("--requests", type=int, default=32, help="of a run on the model; at most 8 for each client")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="a model in place of the fake engine: demo, smollm2, or a folder")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/front-cpu.json, or front-MODEL-cpu.json")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)  # the fake engine and its fronts
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        settings = Settings(
            model=str(MODEL), model_name=f"fake-{args.rate:g}", port=args.port, front_workers=int(args.workers),
            max_model_len=2**20, log_level="warning",
        )  # fmt: skip
        with listen(settings) as bound:
            sys.exit(supervisor.serve(settings, bound, quiet, run_engine=run_fake_engine))
    out = args.out or Path(f"benchmarks/results/front-{f'{Path(args.model).name}-' if args.model else ''}cpu.json")
    found: dict[str, Any] = {"machine": described(), "runs": []}
    for run in on_model(args) if args.model else on_fake_engine(args):
        print(run, file=sys.stderr)
        found["runs"].append(run)
        out.write_text(json.dumps(found, indent=2) + "\n")


def on_fake_engine(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for workers in map(int, args.workers.split(",")):
        for interval in (1, 8):
            yield delivered(args.rate, args.streams, args.tokens, workers, interval)


def on_model(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    model = str(MODEL) if args.model == "demo" else args.model
    with ExitStack() as stack:
        contenders = {
            name: stack.enter_context(running([*SERVE, model], environment=QUIET | {"MATSTEER_ENGINE_PROCESS": own}))
            for name, own in (("one process", "false"), ("the engine in its own", "true"))
        }
        for clients in map(int, args.clients.split(",")):
            yield side_by_side(contenders, clients, min(args.requests, 8 * clients), args.rounds)


SERVE = [sys.executable, "-m", "server.cli", "serve", "--log-level", "warning", "--model"]
QUIET = {"MATSTEER_REMEMBER": "false"}


# --- a fake engine --------------------------------------------------------------------------------


def delivered(rate: float, streams: int, tokens: int, workers: int, interval: int) -> dict[str, Any]:
    """One run. Raises RuntimeError where a client did not get its whole text."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = itertools.islice(itertools.cycle(tokenizer(TEXT, add_special_tokens=False)["input_ids"]), tokens)
    whole = tokenizer.decode(list(ids))
    command = [*HERE, "--serve", "--rate", str(rate), "--workers", str(workers)]
    with running(command, environment={"MATSTEER_STREAM_INTERVAL": str(interval)}) as server:
        asyncio.run(clients(server, streams, tokens // 10))  # warms up
        before, started, mine = processor_time(server), time.perf_counter(), time.process_time()
        answers = asyncio.run(clients(server, streams, tokens))
        seconds, mine = time.perf_counter() - started, time.process_time() - mine
        spent = {pid: after - before[pid] for pid, after in processor_time(server).items()}
        fronts = {pid for pid in spent if psutil.Process(pid).net_connections("tcp")}
    for answer in answers:
        if text_of(answer) != whole:
            raise RuntimeError("a client did not get its whole text")
    all_tokens, of_fronts = streams * tokens, sum(spent[pid] for pid in fronts)
    return {
        "workers": workers,
        "stream_interval": interval,
        "offered_tokens_per_s": rate,
        "delivered_tokens": all_tokens,
        "delivered_tokens_per_s": round(all_tokens / seconds),
        "front_us_per_token": round(of_fronts / all_tokens * 1e6, 1),
        "tokens_per_s_of_a_worker's_core": round(all_tokens / of_fronts),
        "engine_process_us_per_token": round((sum(spent.values()) - of_fronts) / all_tokens * 1e6, 1),
        "clients_us_per_token": round(mine / all_tokens * 1e6, 1),
    }


def processor_time(server: Running) -> dict[int, float]:
    """Seconds, of each of its processes."""
    children = psutil.Process(server.pid).children()
    return {one.pid: sum(one.cpu_times()[:2]) for one in children if "resource_tracker" not in " ".join(one.cmdline())}


async def clients(server: Running, streams: int, tokens: int) -> list[bytes]:
    """All at once; what each of them has received."""
    body = {"model": "fake", "prompt": "a", "max_tokens": tokens, "stream": True}
    model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
    return await asyncio.gather(*(client(server.url, json.dumps(body | {"model": model})) for _ in range(streams)))


async def client(url: str, body: str) -> bytes:
    """As little as can be done for a stream, so that the clients are not what is measured."""
    address, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(address, int(port))
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-type: application/json\r\n"
    )
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
    received = await reader.read()
    writer.close()
    return received


def text_of(answer: bytes) -> str:
    """Of the events of a stream, whatever the chunks that it came in."""
    data, rest = b"", answer.partition(b"\r\n\r\n")[2]
    while rest:
        length, _, rest = rest.partition(b"\r\n")
        data, rest = data + rest[: int(length, 16)], rest[int(length, 16) + 2 :]
    chunks = [line.removeprefix(b"data: ") for line in data.split(b"\n\n") if line and not line.endswith(b"[DONE]")]
    return "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)


# --- a model --------------------------------------------------------------------------------------


def side_by_side(contenders: Mapping[str, Running], clients: int, requests: int, rounds: int) -> dict[str, Any]:
    model = httpx.get(next(iter(contenders.values())).url + "/v1/models").json()["data"][0]["id"]
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    first: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):  # the first one warms up
        for name in in_turn(list(contenders), number):
            work = Workload(model, requests, (16, 32), (64, 128), seed=number, extra={"ignore_eos": True})
            summary = asyncio.run(load(contenders[name], clients, work))
            if summary.failed:
                raise RuntimeError(f"{name}: {summary.first_error}")
            if number:
                rates[name].append(summary.new_tokens_per_s)
                first[name].append(summary.ttft_ms["p50"])
    one, own = (rates[name] for name in contenders)
    ratios = [mine / theirs for mine, theirs in zip(own, one, strict=True)]
    return {
        "clients": clients,
        "tokens_per_s": {name: [round(min(each)), round(statistics.median(each)), round(max(each))]
                         for name, each in rates.items()},
        "ttft_p50_ms": {name: round(statistics.median(each), 1) for name, each in first.items()},
        "own_process_against_one": [round(value, 3) for value in (min(ratios), statistics.median(ratios), max(ratios))],
    }  # fmt: skip


async def load(server: Running, clients: int, work: Workload) -> Summary:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as http:
        return await closed_loop(http, work.bodies(), clients)


if __name__ == "__main__":
    main()
