"""Puts a server under load, and shows what its clients felt."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import typer
from rich.table import Table
from rich.text import Text

from server.bench import Summary, Workload, closed, open_, send
from server.errors import ServerError
from server.terminal import terminal


def report(summaries: Sequence[Summary], out: Path | None) -> bool:
    """A table, and the numbers in a file; whether every request was answered."""
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
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout, limits=limits) as http:
        try:
            if not work.model:
                work = replace(work, model=await _first_model(http))
            for body in replace(work, requests=warmup, seed=work.seed + 1).bodies():
                await send(http, body)
            if rate is not None:
                return [await open_(http, work.bodies(), rate, work.seed)]
            return [await closed(http, work.bodies(), count) for count in clients]
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise ServerError(f"There is no server of OpenAI's API at {url}: {error!r}.") from None


async def _first_model(http: httpx.AsyncClient) -> str:
    response = await http.get("/v1/models")
    response.raise_for_status()
    name: str = response.json()["data"][0]["id"]
    return name
