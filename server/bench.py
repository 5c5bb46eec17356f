"""`matsteer bench`: load on a server of OpenAI's API, ours or another, and the latency that its clients see.

Closed loop: so many clients, each sends its next request when the last is answered. Open loop: requests arrive at a
rate (a Poisson process), whether the server keeps up or not.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import typer
from rich.table import Table
from rich.text import Text

from server.errors import ServerError
from server.event_lines import EventLines
from server.proxies import with_proxy_hint
from server.terminal import terminal

TEXT = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were her all she there would their we him been has when who will more no if out so said what up its about "
    "into than them can only other new some could time these two may then do first any my now such like our over man"
)
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Workload:
    """Which requests are sent. The same seed sends the same ones."""

    model: str
    requests: int = 64
    prompt: tuple[int, int] = (16, 128)  # words, or tokens where `vocab` is given: least and most
    new: tuple[int, int] = (16, 128)  # tokens
    vocab: int | None = None  # prompts are random token ids below it, instead of words
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)  # further fields of every request

    def bodies(self) -> list[dict[str, Any]]:
        """The bodies of POST /v1/completions."""
        number = random.Random(self.seed)
        made = []
        for _ in range(self.requests):
            length, new = number.randint(*self.prompt), number.randint(*self.new)
            prompt: Any = " ".join(number.choices(TEXT.split(), k=length))
            if self.vocab is not None:
                prompt = [number.randrange(self.vocab) for _ in range(length)]
            body = {"model": self.model, "prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True}
            made.append(body | {"stream_options": {"include_usage": True}} | dict(self.extra))
        return made


@dataclass
class Outcome:
    """One request, in seconds since it was sent."""

    first: float | None = None  # when the first chunk with text came
    gaps: list[float] = field(default_factory=list)  # between two such chunks
    total: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Summary:
    """One run. Milliseconds; percentiles over requests, of `inter_token_ms` over pairs of neighbouring chunks."""

    load: str
    requests: int
    failed: int
    seconds: float
    requests_per_s: float
    new_tokens_per_s: float
    prompt_tokens_per_s: float
    ttft_ms: dict[str, float]
    inter_token_ms: dict[str, float]
    latency_ms: dict[str, float]
    first_error: str | None

    @classmethod
    def of(cls, load: str, outcomes: Sequence[Outcome], seconds: float) -> "Summary":
        sound = [one for one in outcomes if one.error is None]
        return cls(
            load=load,
            requests=len(outcomes),
            failed=len(outcomes) - len(sound),
            seconds=round(seconds, 3),
            requests_per_s=round(len(sound) / seconds, 2),
            new_tokens_per_s=round(sum(one.new_tokens for one in sound) / seconds, 1),
            prompt_tokens_per_s=round(sum(one.prompt_tokens for one in sound) / seconds, 1),
            ttft_ms=percentiles([one.first for one in sound if one.first is not None]),
            inter_token_ms=percentiles([gap for one in sound for gap in one.gaps]),
            latency_ms=percentiles([one.total for one in sound]),
            first_error=next((one.error for one in outcomes if one.error), None),
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds, by linear interpolation; empty for no numbers."""
    if not seconds:
        return {}
    if len(seconds) == 1:
        return {f"p{share}": round(seconds[0] * 1000, 2) for share in PERCENTILES}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"p{share}": round(cuts[share - 1] * 1000, 2) for share in PERCENTILES}


async def closed_loop(http: httpx.AsyncClient, bodies: Sequence[Mapping[str, Any]], clients: int) -> Summary:
    """Sends all requests, each of `clients` clients the next one when its last is answered."""
    left = iter(bodies)
    outcomes: list[Outcome] = []

    async def client() -> None:
        for body in left:
            outcomes.append(await send(http, body))

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return Summary.of(f"{clients} clients", outcomes, time.perf_counter() - start)


async def open_loop(http: httpx.AsyncClient, bodies: Sequence[Mapping[str, Any]], rate: float, seed: int) -> Summary:
    """Sends all requests at a random time each, `rate` a second on average, without waiting for answers."""
    number = random.Random(seed)
    start = time.perf_counter()
    tasks = []
    due = 0.0
    for body in bodies:
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        tasks.append(asyncio.create_task(send(http, body)))
        due += number.expovariate(rate)
    outcomes = await asyncio.gather(*tasks)
    return Summary.of(f"{rate:g} requests/s", outcomes, time.perf_counter() - start)


async def send(http: httpx.AsyncClient, body: Mapping[str, Any]) -> Outcome:
    """One request, answered or failed."""
    outcome = Outcome()
    start = time.perf_counter()
    last = start
    try:
        async for chunk in _chunks(http, body):
            now = time.perf_counter()
            if usage := chunk.get("usage"):
                outcome.prompt_tokens = usage["prompt_tokens"]
                outcome.new_tokens = usage["completion_tokens"]
            if any(choice.get("text") for choice in chunk.get("choices") or ()):
                if outcome.first is None:
                    outcome.first = now - start
                else:
                    outcome.gaps.append(now - last)
                last = now
    except (httpx.HTTPError, ValueError, KeyError, RuntimeError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
        if isinstance(error, httpx.TransportError) or "<html" in outcome.error.lower():
            outcome.error = with_proxy_hint(outcome.error, str(http.base_url))
    outcome.total = time.perf_counter() - start
    return outcome


async def _chunks(http: httpx.AsyncClient, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async with http.stream("POST", "/v1/completions", json=body) as response:
        if response.is_error:
            raise RuntimeError(f"{response.status_code} {(await response.aread()).decode(errors='replace')[:300]}")
        ended, lines = False, EventLines()
        async for line in (line async for text in response.aiter_text() for line in lines.feed(text)):
            data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
            if data == "[DONE]":
                ended = True
            elif data:
                chunk = json.loads(data)
                if "error" in chunk:
                    raise RuntimeError(str(chunk["error"])[:300])
                yield chunk
        if not ended:
            raise RuntimeError("the stream ended too early")


def report(summaries: Sequence[Summary], out: Path | None) -> bool:
    """Prints a table and writes the numbers to `out`. Returns whether every request was answered."""
    table = Table(*("load", "failed", "requests/s", "tokens/s", "first token ms", "between tokens ms", "answer ms"))
    for one in summaries:
        spans = [
            " / ".join(f"{value:g}" for value in span.values())
            for span in (one.ttft_ms, one.inter_token_ms, one.latency_ms)
        ]
        table.add_row(one.load, str(one.failed), f"{one.requests_per_s:g}", f"{one.new_tokens_per_s:g}", *spans)
    terminal().print(table, Text("percentiles 50 / 90 / 99", style="dim"), sep="\n")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps([one.as_dict() for one in summaries], indent=1) + "\n", encoding="utf-8")
    for one in summaries:
        if one.first_error:
            typer.echo(f"{one.load}: {one.failed} of {one.requests} failed, first: {one.first_error}")
    return not any(one.failed for one in summaries)


async def measure(
    url: str,
    api_key: str | None,
    work: Workload,
    clients: Sequence[int],
    *,
    rate: float | None,
    warmup: int,
    timeout: float,
) -> list[Summary]:
    """A run for each number of clients, or one at a rate. Raises ServerError."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=None)
    try:
        client = httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout, limits=limits)
    except (httpx.InvalidURL, ValueError, ImportError) as error:  # ImportError: a proxy of SOCKS
        raise ServerError(f"There is no server of OpenAI's API at {url}: {with_proxy_hint(str(error), url)}") from None
    async with client as http:
        try:
            if not work.model:
                work = replace(work, model=await _first_model(http))
            for body in replace(work, requests=warmup, seed=work.seed + 1).bodies():
                await send(http, body)
            if rate is not None:
                return [await open_loop(http, work.bodies(), rate, work.seed)]
            return [await closed_loop(http, work.bodies(), count) for count in clients]
        except (httpx.HTTPError, ValueError, LookupError) as error:
            said = with_proxy_hint(repr(error), url)
            raise ServerError(f"There is no server of OpenAI's API at {url}: {said}") from None


async def _first_model(http: httpx.AsyncClient) -> str:
    response = await http.get("/v1/models")
    response.raise_for_status()
    name: str = response.json()["data"][0]["id"]
    return name
