"""`matsteer generate` and `compare`: one request, answered here or by a server, and its texts side by side."""

import asyncio
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any, Literal

import httpx
from rich.columns import Columns
from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from server.client import ApiError, Client
from server.config import Settings
from server.errors import ServerError
from server.proxies import with_proxy_hint
from server.schemas import (
    CompareRequest,
    CompareResponse,
    ComparisonBody,
    GenerateRequest,
    GenerateResponse,
    ResultBody,
    SteeringBody,
)
from server.terminal import terminal
from server.types import AppliedCheckpoint
from steering.imports import importing

Route = Literal["generate", "compare"]
COLOURS = ("green", "cyan", "magenta", "yellow", "blue", "red")


def answer_here(settings: Settings, route: Route, body: dict[str, Any]) -> GenerateResponse | CompareResponse:
    """The route's answer, by a model that is loaded for this one request. Raises ServerError with one sentence."""
    with importing():
        from server.api.exception_handlers import parse
        from server.assembly import open_service
        from server.formatting import Formatter

    request: GenerateRequest | CompareRequest = (
        parse(GenerateRequest, body) if route == "generate" else parse(CompareRequest, body)
    )
    service = open_service(settings)
    try:
        result = asyncio.run(service.generate(request.to_params()))
    finally:
        service.client.stop()
    formatter = Formatter(service.codec)
    return formatter.generate_response(result) if route == "generate" else formatter.compare_response(result)


def ask_server(
    url: str, api_key: str | None, route: Route, body: Mapping[str, Any]
) -> GenerateResponse | CompareResponse:
    """The answer of the server at `url`. Raises ServerError with one sentence, whatever goes wrong."""
    given = {name: value for name, value in body.items() if value is not None}
    try:
        with Client(url, api_key=api_key) as client:
            if route == "generate":
                return client.generate(**given)
            return client.compare(given.pop("prompt", None), **given)
    except ApiError as error:
        raise ServerError(f"The server refuses: {error.message}") from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, ImportError) as error:  # ImportError: a proxy of SOCKS
        raise ServerError(f"There is no mat-steer at {url}: {with_proxy_hint(str(error), url)}") from None


def show_arms(prompt: str, answer: GenerateResponse | CompareResponse) -> None:
    """The arms' texts side by side, with how far each is from the one that it is compared with."""
    if isinstance(answer, CompareResponse):
        arms = [(arm.name, arm.results[0], arm.comparison) for arm in answer.arms]
    else:
        arms = [("steered", answer.results[0], answer.comparison)]
        arms += [("baseline", result, None) for result in answer.baseline or []]
    attributes = list(dict.fromkeys(name for _, result, _ in arms for name in _traced(result)))
    colours = dict(zip(attributes, cycle(COLOURS), strict=False))
    console = terminal()
    console.print(Text(prompt, style="bold"))
    width = max(24, console.width // len(arms) - 1)
    console.print(Columns([_panel(name, result, comparison, colours, width) for name, result, comparison in arms]))
    if colours:
        legend = Text("moved most by ")
        for name, colour in colours.items():
            legend.append(f" {name} ", style=f"black on {colour}").append(" ")
        console.print(legend)


def _panel(title: str, result: ResultBody, comparison: object, colours: Mapping[str, str], width: int) -> Panel:
    steering = result.steering
    parts: Sequence[AppliedCheckpoint | SteeringBody] = steering.parts or [steering]
    used = [
        f"{part.checkpoint}@{part.version} {name}={value:g}"
        for part in parts
        for name, value in part.attributes.items()
    ]
    lines = [_coloured(result, colours), Text()]
    if isinstance(comparison, ComparisonBody):
        where = "never" if comparison.first_divergence is None else f"at token {comparison.first_divergence}"
        lines.append(
            Text(
                f"parts {where}; KL a token {comparison.kl_per_token:.3f} nats; "
                f"perplexity ratio {comparison.perplexity_ratio:.2f}",
                style="dim",
            )
        )
    lines.append(Text(f"{', '.join(used) or 'no steering'}; {steering.steered_tokens} steered tokens", style="dim"))
    return Panel(Group(*lines), title=Text(title), width=width)


def _traced(result: ResultBody) -> list[str]:
    return [column.attribute for token in result.trace or () for column in token.columns if column.strength]


def _coloured(result: ResultBody, colours: Mapping[str, str]) -> Text:
    """Each token by the attribute whose strength is the greatest, from a tenth on; the text alone without a trace."""
    if not any(token.columns for token in result.trace or ()):
        return Text(result.text)
    text = Text()
    for token in result.trace or ():
        most = max(token.columns, key=lambda column: abs(column.strength), default=None)
        shown = most is not None and abs(most.strength) >= 0.1
        text.append(token.token, style=f"black on {colours[most.attribute]}" if shown and most else "")
    return text
