"""A server, or replicas of it, under mixed traffic for a while: `python -m benchmarks.soak --help`, `make soak`.

Clients ask for everything that the API has, swap checkpoints, send what is wrong, read slowly and leave at any moment.
What they send is the same for the same seed. At the end a table says what was answered, how fast, and whether memory
grew; the exit status is 1 where a criterion is not met. Of replicas (`--replicas`, extra `ray`) each is looked at; what
is no HTTP is left out there, since Ray's proxy answers it.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from scipy import stats

from benchmarks.hot_swap import PROMPTS, versions
from benchmarks.machine import described
from benchmarks.processes import ready_replicas, running
from server.threads import usable_cores

KEY, ADMIN_KEY = "soak-client", "soak-admin"
VERSIONS = ("v1", "v2", "v3")
ENDS = ("event: done\n", "[DONE]", "event: response.completed\n")  # of a stream that has come to its end
GAUGES = (
    "kv_cache_blocks_used",
    "num_requests_open",
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_scored",
    "checkpoint_leases",
)
FIRST_S = 60.0  # latencies of the first minute beside those of the rest
WARM_S = 300.0  # caches fill: memory is judged after that
SAMPLE_S = 2.0
ASKS = 40  # how often replicas are asked until each has been met once
BIN_S = 30.0  # memory is judged by the medians of so many seconds: neighbouring samples are not independent
SETTLED_S = 30.0  # until when blocks, rows and leases have to be free after the last request
TOLERANCE = 0.1  # MiB a minute that memory may grow by and count as level


@dataclass(frozen=True)
class Seen:
    """A request and what came of it."""

    kind: str
    status: str  # of HTTP, or `left` where the client has, or `cut` where a stream or connection has ended early
    at: float  # seconds since the beginning
    seconds: float
    as_expected: bool


@dataclass
class Soak:
    """What the clients share."""

    address: tuple[str, int]
    client: httpx.AsyncClient
    began: float
    end: float
    servers: list[psutil.Process]
    by_ray: bool
    seen: list[Seen] = field(default_factory=list)
    texts: dict[tuple[str, str], set[str]] = field(default_factory=dict)  # greedy ones, by prompt and version
    samples: dict[str, list[dict[str, float]]] = field(default_factory=dict)  # by the start of a server's process

    async def post(self, path: str, body: Any, key: str = KEY) -> httpx.Response:
        return await self.client.post(path, json=body, headers={"authorization": f"Bearer {key}"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-cache-mib", type=int, default=32, help="so small that texts are preempted")
    parser.add_argument("--replicas", type=int, default=0, help="so many on a Ray cluster of this machine")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/soak-cpu.json, soak-replicas-cpu.json")
    args = parser.parse_args()
    out = args.out or Path(f"benchmarks/results/soak-{'replicas-' if args.replicas else ''}cpu.json")
    settings = {"API_KEY": KEY, "ADMIN_KEY": ADMIN_KEY, "KV_CACHE_MIB": args.kv_cache_mib, "LOG_LEVEL": "error"}
    environment = {f"MATSTEER_{name}": str(value) for name, value in settings.items()}
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, "-m", "server.cli", "serve", "--checkpoints", str(versions(Path(root)))]
        if args.replicas:
            command += ["--ray", "--replicas", str(args.replicas)]
            environment["MATSTEER_REPLICA_CPUS"] = str(min(1.0, usable_cores() / args.replicas))
        with running(command, environment=environment) as server:
            while args.replicas and len(ready_replicas()) < args.replicas:
                time.sleep(0.2)
            servers = [psutil.Process(pid) for pid in (ready_replicas() if args.replicas else {server.pid})]
            seconds, by_ray = args.minutes * 60, args.replicas > 0
            soak = asyncio.run(traffic(server.url, servers, seconds, args.clients, args.seed, by_ray=by_ray))
    results = {"machine": described(), "minutes": args.minutes, "clients": args.clients, "seed": args.seed}
    results |= {"replicas": args.replicas} | report(soak)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    sys.exit(0 if all(results["criteria"].values()) else 1)


async def traffic(
    url: str, servers: list[psutil.Process], seconds: float, clients: int, seed: int, *, by_ray: bool
) -> Soak:
    """Clients for so long, then a look until nothing is left of their requests."""
    host, _, port = url.removeprefix("http://").partition(":")
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits, trust_env=False) as client:
        began = time.monotonic()
        soak = Soak((host, int(port)), client, began, began + seconds, servers, by_ray)
        async with asyncio.TaskGroup() as group:
            for index in range(clients):
                group.create_task(one_client(soak, random.Random(f"{seed}/{index}")))
            while time.monotonic() < soak.end:
                await sample(soak)
                await asyncio.sleep(SAMPLE_S)
        settled = time.monotonic() + SETTLED_S
        await sample(soak)
        while any(left(soak).values()) and time.monotonic() < settled:
            await asyncio.sleep(0.5)
            await sample(soak)
    return soak


async def one_client(soak: Soak, number: random.Random) -> None:
    asked = {kind: of for kind, of in KINDS.items() if not (soak.by_ray and kind == NO_HTTP)}
    kinds, weights = zip(*((kind, weight) for kind, (weight, _, _) in asked.items()), strict=True)
    while (now := time.monotonic()) < soak.end:
        kind = number.choices(kinds, weights)[0]
        _, expected, ask = asked[kind]
        try:
            status = await ask(soak, number)
        except (httpx.TransportError, OSError, asyncio.IncompleteReadError) as error:
            status = f"cut ({type(error).__name__})"
        seconds = time.monotonic() - now
        soak.seen.append(Seen(kind, status, now - soak.began, seconds, status in expected.split()))


async def sample(soak: Soak) -> None:
    """What each server says of itself. Replicas are asked, whichever answers, until all have been met."""
    met: set[str] = set()
    for _ in range(ASKS):
        asked = time.monotonic()
        answer = await soak.client.get("/metrics")
        answered = time.monotonic() - asked
        said = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if line[:1] != "#")
        started = said["process_start_time_seconds"]
        if started not in met:
            met.add(started)
            taken = {name: float(said[f"matsteer_{name}"]) for name in GAUGES}
            taken |= {"metrics_s": answered, "preemptions": float(said["matsteer_num_preemptions_total"])}
            taken |= {"at": time.monotonic() - soak.began, "files": float(said["process_open_fds"])}
            taken["rss_mib"] = float(said["process_resident_memory_bytes"]) / 2**20
            server = min(soak.servers, key=lambda one: abs(one.create_time() - float(started)))
            with suppress(psutil.NoSuchProcess):
                taken["threads"] = server.num_threads()
            soak.samples.setdefault(started, []).append(taken)
        if len(met) == len(soak.servers):
            return


def left(soak: Soak) -> dict[str, float]:
    """What is held at the last sample, by all servers together."""
    return {name: sum(samples[-1][name] for samples in soak.samples.values()) for name in GAUGES}


# --- what is asked ---

Ask = Callable[[Soak, random.Random], Awaitable[str]]
Made = Callable[[random.Random], tuple[str, dict[str, Any]]]  # path and body


def prompt(number: random.Random) -> str:
    return f"Q: {number.choice(PROMPTS)} A:" if number.random() < 0.5 else f"{number.randrange(10**6)}. A bear lives"


def generate(**fields: Any) -> Made:
    def made(number: random.Random) -> tuple[str, dict[str, Any]]:
        attributes = {name: round(number.uniform(-1, 1), 2) for name in ("truthfulness", "civility", "fairness")}
        body = {"prompt": prompt(number), "attributes": attributes, "max_new_tokens": number.randint(1, 40)}
        if number.random() < 0.3:
            body["checkpoint"] = f"demo@{number.choice(VERSIONS)}"
        return "/generate", body | fields

    return made


def compare(**fields: Any) -> Made:
    def made(number: random.Random) -> tuple[str, dict[str, Any]]:
        arms = [{"name": str(arm), "attributes": {"civility": arm / 4}} for arm in range(number.randint(2, 5))]
        return "/compare", {"prompt": prompt(number), "arms": arms, "max_new_tokens": number.randint(1, 24)} | fields

    return made


def score(number: random.Random) -> tuple[str, dict[str, Any]]:
    texts = [f" {number.choice(('blue', 'in a forest', 'Tokyo', 'slow'))} {n}." for n in range(number.randint(1, 24))]
    return "/score", {"prompt": prompt(number), "continuations": texts, "attributes": {"truthfulness": 1}}


def echo(number: random.Random) -> tuple[str, dict[str, Any]]:
    texts = [prompt(number) for _ in range(number.randint(1, 6))]
    return "/v1/completions", {"model": "demo", "prompt": texts, "echo": True, "logprobs": 3, "max_tokens": 1}


def chat(**fields: Any) -> Made:
    def made(number: random.Random) -> tuple[str, dict[str, Any]]:
        turns = [{"role": "user", "content": number.choice(PROMPTS)}]
        model = number.choice(("demo-model", "demo", "demo@v2"))
        body = {"model": model, "messages": turns, "max_tokens": number.randint(1, 32)}
        return "/v1/chat/completions", body | fields

    return made


def responses(**fields: Any) -> Made:
    def made(number: random.Random) -> tuple[str, dict[str, Any]]:
        body = {"model": "demo", "input": number.choice(PROMPTS), "max_output_tokens": number.randint(1, 32)}
        return "/v1/responses", body | fields

    return made


def tokenize(number: random.Random) -> tuple[str, dict[str, Any]]:
    return "/tokenize", {"prompt": prompt(number) * number.randint(1, 200), "return_token_strs": True}


TRACED = {"trace": True, "logprobs": 5}
ASKED: dict[str, tuple[int, Made]] = {  # how often, and what
    "generate": (10, generate()),
    "generate, 8 texts": (3, generate(n=8)),
    "A/B": (6, generate(baseline=True)),
    "trace": (4, generate(**TRACED)),
    "score": (6, score),
    "compare": (4, compare()),
    "echo": (4, echo),
    "chat": (6, chat()),
    "responses": (4, responses()),
    "tokenize": (4, tokenize),
}
STREAMED: dict[str, tuple[int, Made]] = {
    "stream": (10, generate(stream=True)),
    "A/B stream": (4, generate(stream=True, baseline=True, **TRACED)),
    "compare stream": (3, compare(stream=True)),
    "chat stream": (6, chat(stream=True)),
    "responses stream": (4, responses(stream=True)),
}
LONG = generate(stream=True, n=8, ignore_eos=True, max_new_tokens=60, **TRACED)
BAD_BODIES = (
    b"{",
    b'{"prompt": 1}',
    b'{"prompt": "a", "no": 1}',
    b'{"prompt": ["a", null]}',
    b'{"prompt": "\xff"}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": ["", ' + b"1," * 300_000 + b"1]}",
    b'{"messages": [' + b"{}," * 30_000 + b"{}]}",
    b'{"attributes": ' + b"[" * 5000 + b"}",
    b'{"prompt": "a", "attributes": {"courage": 1}}',
    b'{"prompt": "a", "checkpoint": "nobody"}',
)
BAD_HTTP = (
    b"\x16\x03\x01\x02\x00\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nno colon\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: -4\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x: y\r\n" * 40_000 + b"\r\n",
    b"POST /generate HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nnone\r\n",
)


def whole(made: Made) -> Ask:
    """The answer in one piece."""

    async def ask(soak: Soak, number: random.Random) -> str:
        path, body = made(number)
        return str((await soak.post(path, body)).status_code)

    return ask


def streamed(made: Made) -> Ask:
    """A stream that is read to its end."""

    async def ask(soak: Soak, number: random.Random) -> str:
        path, body = made(number)
        async with soak.client.stream("POST", path, json=body, headers={"authorization": f"Bearer {KEY}"}) as answer:
            text = (await answer.aread()).decode()
        if answer.status_code != 200:
            return str(answer.status_code)
        return "200" if any(end in text for end in ENDS) else "500 in a stream"

    return ask


async def leave(soak: Soak, number: random.Random) -> str:
    """Any request, by a client that is gone after a moment, in the middle of its body or before its answer is out."""
    path, body = number.choice([made for _, made in (ASKED | STREAMED).values()])(number)
    sent = request(path, json.dumps(body).encode())
    _, writer = await asyncio.open_connection(*soak.address)
    writer.write(sent[: number.randint(1, len(sent))] if number.random() < 0.3 else sent)
    await asyncio.sleep(number.expovariate(10))
    writer.transport.abort() if number.random() < 0.5 else writer.close()
    return "left"


async def read_slowly(soak: Soak, number: random.Random) -> str:
    """A long stream, a little at a time; after a few seconds the rest at once."""
    path, body = LONG(number)
    reader, writer = await asyncio.open_connection(*soak.address, limit=4096)
    try:
        writer.write(request(path, json.dumps(body).encode()))
        received = await reader.read(4096)
        until = time.monotonic() + number.uniform(1, 5)
        while time.monotonic() < until:
            received += await reader.read(4096)
            await asyncio.sleep(0.1)
        received += await reader.read()
    finally:
        writer.close()
    status = received.split(None, 2)[1].decode() if received else "cut"
    return "cut" if status == "200" and ENDS[0].encode() not in received else status


async def bad_body(soak: Soak, number: random.Random) -> str:
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    answer = await soak.client.post("/generate", content=number.choice(BAD_BODIES), headers=headers)
    return str(answer.status_code)


async def bad_key(soak: Soak, number: random.Random) -> str:
    if number.random() < 0.5:
        return str((await soak.post("/checkpoints/demo/activate", {}, key=KEY)).status_code)
    return str((await soak.post("/generate", {"prompt": "a" * number.randrange(10**5)}, key="other")).status_code)


async def bad_http(soak: Soak, number: random.Random) -> str:
    reader, writer = await asyncio.open_connection(*soak.address)
    try:
        writer.write(number.choice(BAD_HTTP))
        return (await reader.read()).split(None, 2)[1].decode()
    finally:
        writer.close()


async def swap(soak: Soak, number: random.Random) -> str:
    """Activates one version, and unloads or loads another; the active one cannot be unloaded."""
    one, other = number.sample(VERSIONS, 2)
    answer = await soak.post("/checkpoints/demo/activate", {"version": one}, key=ADMIN_KEY)
    if answer.status_code == 200 and number.random() < 0.2:
        answer = await soak.post("/checkpoints/demo/load", {"version": other}, key=ADMIN_KEY)
    elif answer.status_code == 200:
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        answer = await soak.client.delete("/checkpoints/demo", params={"version": other}, headers=headers)
    return str(answer.status_code)


async def listing(soak: Soak, number: random.Random) -> str:
    path = number.choice(("/checkpoints", "/checkpoints/demo", "/v1/models", "/healthz", "/readyz", "/", "/docs"))
    return str((await soak.client.get(path, headers={"authorization": f"Bearer {KEY}"})).status_code)


async def greedy(soak: Soak, number: random.Random) -> str:
    """A text that has to be the same each time, whatever runs beside it."""
    asked, version = f"Q: {number.choice(PROMPTS)} A:", number.choice(VERSIONS)
    body = {"prompt": asked, "checkpoint": f"demo@{version}", "temperature": 0, "max_new_tokens": 32}
    answer = await soak.post("/generate", body)
    if answer.status_code == 200:
        soak.texts.setdefault((asked, version), set()).add(answer.json()["results"][0]["text"])
    return str(answer.status_code)


def request(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\nAuthorization: Bearer {KEY}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


NO_HTTP = "bad HTTP"
OF_ANSWERS: dict[str, tuple[int, str, Ask]] = {  # how often, what may come of it, and how
    **{kind: (weight, "200 429", whole(made)) for kind, (weight, made) in ASKED.items()},
    **{kind: (weight, "200 429", streamed(made)) for kind, (weight, made) in STREAMED.items()},
    "greedy": (6, "200 429", greedy),
}
KINDS: dict[str, tuple[int, str, Ask]] = OF_ANSWERS | {
    "lists and pages": (3, "200", listing),
    "swap": (2, "200 409", swap),
    "client leaves": (10, "left", leave),
    "slow reader": (1, "200 429", read_slowly),
    "bad body": (4, "400 404 422", bad_body),
    "bad key": (3, "401 403", bad_key),
    NO_HTTP: (3, "400 431", bad_http),
}


# --- what came of it ---


def report(soak: Soak) -> dict[str, Any]:
    statuses = Counter(one.status for one in soak.seen)
    fast = [one for one in soak.seen if one.kind in OF_ANSWERS and one.status == "200"]
    first = milliseconds([one.seconds for one in fast if one.at < FIRST_S])
    rest = milliseconds([one.seconds for one in fast if one.at >= FIRST_S])
    kinds: dict[str, dict[str, Any]] = {}
    for kind in KINDS:
        these = [one for one in soak.seen if one.kind == kind]
        kinds[kind] = {
            "requests": len(these),
            "status": dict(sorted(Counter(one.status for one in these).items())),
            "ms": milliseconds([one.seconds for one in these]),
        }
    slowest = sorted(fast, key=lambda one: -one.seconds)[:10]
    held, samples = left(soak), list(soak.samples.values())
    servers = [of_server(each) for each in samples]
    errors = {status: count for status, count in sorted(statuses.items()) if status[0] == "5"}
    unexpected = Counter(f"{one.kind}: {one.status}" for one in soak.seen if not one.as_expected)
    changed = sum(len(texts) > 1 for texts in soak.texts.values())
    return {
        "requests": len(soak.seen),
        "kinds": kinds,
        "5xx": {"503": 0, "504": 0} | errors,
        "429": statuses["429"],
        "unexpected": dict(unexpected),
        "greedy_texts": {"different_requests": len(soak.texts), "with_more_than_one_text": changed},
        "ms": {"first_minute": first, "rest": rest},
        "metrics_ms": milliseconds([one["metrics_s"] for each in samples for one in each]),
        "slowest": [(one.kind, round(one.at), round(one.seconds, 1)) for one in slowest],
        "servers": servers,
        "left": held,
        "criteria": {
            "no 5xx": not errors,
            "every answer is one that was to be expected": not unexpected,
            "greedy texts stay the same": not changed,
            "p99 is at most twice that of the first minute": not rest or rest["p99"] <= 2 * first["p99"],
            f"memory does not grow by more than {TOLERANCE:g} MiB a minute, within its interval": all(
                memory["mib_a_minute"] is None or memory["low"] <= TOLERANCE
                for memory in (server["rss_mib"] for server in servers)
            ),
            "blocks, rows, leases and queue are free again": not any(held.values()),
            "no process was replaced": len(servers) == len(soak.servers),
        },
    }


def of_server(samples: list[dict[str, float]]) -> dict[str, Any]:
    """One process: its memory, and at the beginning, at most and at the end, its open files and threads."""
    spans = {}
    for name in ("files", "threads"):
        counts = [each[name] for each in samples if name in each]
        spans[name] = [counts[0], max(counts), counts[-1]]
    return {"rss_mib": growth(samples), "samples": len(samples), "preemptions": samples[-1]["preemptions"]} | spans


def growth(samples: list[dict[str, float]]) -> dict[str, Any]:
    """Of memory after `WARM_S`: the slope of Theil and Sen over medians of `BIN_S` seconds, which single high samples
    do not move, with its interval of 95 %."""
    at, rss = (np.array([each[name] for each in samples[:-1]]) for name in ("at", "rss_mib"))
    bins = [rss[(at >= low) & (at < low + BIN_S)] for low in np.arange(WARM_S, at[-1], BIN_S)]
    medians = [float(np.median(each)) for each in bins if len(each)]
    found: dict[str, Any] = {"began": round(float(rss[0]), 1), "ended": round(float(rss[-1]), 1), "mib_a_minute": None}
    found |= {"medians_of_a_minute": [round(float(np.median(rss[at // 60 == n])), 1) for n in range(int(at[-1] // 60))]}
    if len(medians) < 4:
        return found
    slope = stats.theilslopes(medians, np.arange(len(medians)) * BIN_S / 60)
    named = {"mib_a_minute": slope.slope, "low": slope.low_slope, "high": slope.high_slope}
    return found | {name: round(float(value), 3) for name, value in named.items()}


def milliseconds(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {f"p{share}": round(1000 * float(np.percentile(seconds, share)), 1) for share in (50, 99)}


def table(results: dict[str, Any]) -> str:
    lines = [f"{'kind':<18} {'requests':>8} {'p50 ms':>9} {'p99 ms':>9}  status"]
    for kind, of in results["kinds"].items():
        status = ", ".join(f"{status}: {count}" for status, count in of["status"].items())
        lines.append(
            f"{kind:<18} {of['requests']:>8} {of['ms'].get('p50', 0):>9} {of['ms'].get('p99', 0):>9}  {status}"
        )
    names = ("requests", "5xx", "429", "unexpected", "greedy_texts", "ms", "metrics_ms", "left")
    lines += [f"{name:<18} {results[name]}" for name in names]
    lines += [f"{'server':<18} {server}" for server in results["servers"]]
    return "\n".join(lines + [f"{'met' if met else 'NOT MET':<18} {what}" for what, met in results["criteria"].items()])


if __name__ == "__main__":
    main()
