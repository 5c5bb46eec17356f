"""`matsteer chat`: a conversation in the terminal, steered, unsteered, or both side by side in turn."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape

from server.client import ApiError, AsyncClient, Client
from server.config import Settings
from server.errors import ServerError
from server.schemas import GenerateRequest, GenerateResponse, ResultBody, TokenBody
from steering.imports import importing

Events = AsyncIterator[TokenBody | GenerateResponse]
Ask = Callable[[Mapping[str, Any]], Events]  # a body of POST /generate -> its events
ARMS = ("steered", "baseline")
HELP = """\
/steered on|off   answer with steering
/baseline on|off  answer without
/set NAME=X ...   multipliers from now on; without any: the checkpoint's defaults
/undo             take the last question and its answer back
/reset            a new conversation
/help             this list
/quit             the end, as Ctrl-D is

With both arms on, the conversation goes on from the steered answer. Ctrl-C ends an answer."""


@dataclass
class Conversation:
    """What has been said, and how the next question is answered."""

    rules: Mapping[str, Any]  # fields of every request: checkpoint, temperature, ...
    multipliers: dict[str, float] | None = None  # None: the checkpoint's defaults
    system: str | None = None
    on: dict[str, bool] = field(default_factory=lambda: {"steered": True, "baseline": False})
    messages: list[dict[str, str]] = field(default_factory=list)

    def body(self, question: str) -> dict[str, Any]:
        """Of POST /generate."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, *self.messages, {"role": "user", "content": question}]
        attributes = self.multipliers if self.on["steered"] else {}
        body = {**self.rules, "messages": messages, "attributes": attributes, "baseline": all(self.on.values())}
        return {name: value for name, value in body.items() if value is not None}

    def said(self, question: str, answer: str) -> None:
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def command(self, line: str) -> str:
        """Does what a line that begins with a slash says. Returns what to tell. Raises ValueError: what is wrong."""
        name, *words = line[1:].split()
        match name, words:
            case "steered" | "baseline", [("on" | "off") as state]:
                after = {**self.on, name: state == "on"}
                if not any(after.values()):
                    raise ValueError("one of the two has to be on")
                self.on = after
                return f"answers: {' and '.join(arm for arm in ARMS if self.on[arm])}"
            case "set", _:
                self.multipliers = dict(map(_pair, words)) if words else None
                shown = " ".join(f"{key}={value:g}" for key, value in (self.multipliers or {}).items())
                return f"multipliers: {shown or 'the defaults of the checkpoint'}"
            case "undo", []:
                if not self.messages:
                    raise ValueError("nothing has been said")
                del self.messages[-2:]
                return f"{len(self.messages) // 2} questions are left"
            case "reset", []:
                self.messages.clear()
                return "a new conversation"
            case "help", []:
                return HELP
        raise ValueError(f"there is no command {line!r}; /help lists them")


def talk(conversation: Conversation, ask: Ask, console: Console) -> None:
    """Reads lines from standard input until it ends: questions, or commands. What the server refuses is told, and the
    conversation goes on without it."""
    _line_editing()
    console.print("A conversation; /help lists commands.", style="dim")
    while True:
        try:
            line = console.input("[bold]you:[/bold] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line in ("/quit", "/exit"):
            return
        if line.startswith("/"):
            try:
                console.print(conversation.command(line), style="dim", markup=False, highlight=False)
            except ValueError as error:
                console.print(f"{error}", style="red", markup=False, highlight=False)
        elif line:
            _answer(conversation, line, ask, console)


def _answer(conversation: Conversation, question: str, ask: Ask, console: Console) -> None:
    try:
        result = asyncio.run(_show(ask(conversation.body(question)), conversation.on, console))
    except KeyboardInterrupt:
        console.print("\n(ended; the question is forgotten)", style="dim")
    except ServerError as error:
        console.print(error.message, style="red", markup=False, highlight=False)
    else:
        conversation.said(question, result.text)


async def _show(events: Events, on: Mapping[str, bool], console: Console) -> ResultBody:
    """Writes the first arm's answer as it comes, then the other one. Returns the answer to go on from."""
    first = "steered" if on["steered"] else "baseline"
    _begin(first, console)
    async with aclosing(events) as each:  # type: ignore[type-var]
        async for event in each:
            if isinstance(event, GenerateResponse):
                console.print()
                if event.baseline:
                    _begin("baseline", console)
                    console.print(event.baseline[0].text, markup=False, highlight=False)
                return event.results[0]
            if event.arm == "steered":
                console.print(event.text, end="", markup=False, highlight=False, soft_wrap=True)
    raise ServerError("The answer ended before it was whole.")


def _begin(arm: str, console: Console) -> None:
    console.print(f"[bold]{escape(arm)}:[/bold] ", end="")


@contextmanager
def asking_here(settings: Settings) -> Iterator[Ask]:
    """A model that is loaded for the conversation. Raises ServerError with one sentence."""
    with importing():
        from server.api.exception_handlers import parse
        from server.assembly import open_service
        from server.formatting import Formatter
    from server.types import GenerateResult, TokenChunk

    service = open_service(settings)
    formatter = Formatter(service.codec)

    async def ask(body: Mapping[str, Any]) -> Events:
        stream = await service.stream(parse(GenerateRequest, {**body, "stream": True}).to_params())
        async with aclosing(stream) as each:  # type: ignore[type-var]
            async for ready in each:
                for item in ready:
                    if isinstance(item, TokenChunk):
                        yield formatter.token(item)
                    elif isinstance(item, GenerateResult):
                        yield formatter.generate_response(item)

    try:
        if service.codec.chat is None:
            raise ServerError(
                "This model has no chat template, so it cannot hold a conversation; `matsteer generate` continues "
                "texts, and --chat-template FILE gives it a template."
            )
        yield ask
    finally:
        service.client.stop()


@contextmanager
def asking_server(url: str, api_key: str | None) -> Iterator[Ask]:
    """The server at `url`. Raises ServerError with one sentence where there is none."""

    async def ask(body: Mapping[str, Any]) -> Events:
        with _told(url):
            async with AsyncClient(url, api_key=api_key) as client:
                async for event in client.stream(**body):
                    yield event

    with _told(url), Client(url, api_key=api_key) as client:
        client.ready()
    yield ask


@contextmanager
def _told(url: str) -> Iterator[None]:
    try:
        yield
    except ApiError as error:
        raise ServerError(f"The server refuses: {error.message}") from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise ServerError(f"There is no mat-steer at {url}: {str(error).rstrip('.')}.") from None


def _pair(word: str) -> tuple[str, float]:
    name, _, value = word.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not name or not abs(number) < float("inf"):
        raise ValueError(f"/set takes NAME=NUMBER, as in truthfulness=1.5, not {word}")
    return name, number


def _line_editing() -> None:
    """Where there is a terminal and a library for it, lines can be edited and found again."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401
