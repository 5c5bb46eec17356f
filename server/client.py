"""A typed client of the HTTP API, blocking and asynchronous, on httpx.

    from server.client import Client

    with Client("http://127.0.0.1:8000") as client:
        answer = client.generate("Q: What colour is the sky? A:", attributes={"truthfulness": 1.0}, baseline=True)
        print(answer.results[0].text, answer.baseline[0].text)

Every method takes the fields of its route by keyword (`docs/api.md`) and returns the body of its answer. What the
server refuses is raised as `ApiError`, what does not reach it as httpx's own exceptions; where a proxy of the
environment stood between, a note of the exception says so. The routes under /v1 are left to OpenAI's own client.
"""

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import httpx
from pydantic import BaseModel

from server.event_lines import EventLines
from server.proxies import proxy_hint, with_proxy_hint
from server.schemas import (
    TOKEN_BODY,
    CheckpointListBody,
    CheckpointVersionsBody,
    CompareResponse,
    DetokenizeBody,
    GenerateResponse,
    LoadedBody,
    ReadyBody,
    ScoreResponse,
    TokenBody,
    TokenizeBody,
    TokenizerInfoBody,
    UnloadedBody,
)

LOCAL = "http://127.0.0.1:8000"
Body = TypeVar("Body", bound=BaseModel)


class ApiError(Exception):
    """An error of the server: its HTTP status, and the fields of `error` in its body."""

    def __init__(
        self,
        status: int,
        type: str,
        message: str,
        param: str | None = None,
        request_id: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.type = type
        self.message = message
        self.param = param
        self.request_id = request_id
        self.code = code or type

    @classmethod
    def of(cls, status: int, text: str, url: str = "") -> "ApiError":
        """Of the body of an answer from `url`."""
        try:
            error = json.loads(text)["error"]
            return cls(status, error["type"], error["message"], error["param"], error["request_id"], error.get("code"))
        except (ValueError, KeyError, TypeError):  # a proxy's page, perhaps
            return cls(status, "unknown", with_proxy_hint(f"The server answered {status}: {text[:200]}", url))


@dataclass(frozen=True)
class _Call(Generic[Body]):
    """A request and the body of its answer."""

    method: str
    path: str
    answer: type[Body]
    json: Mapping[str, Any] | None = None
    params: Mapping[str, str] | None = None

    def request(self) -> dict[str, Any]:
        return {"method": self.method, "url": self.path, "json": self.json, "params": self.params}

    def read(self, response: httpx.Response) -> Body:
        if response.is_error:
            raise ApiError.of(response.status_code, response.text, str(response.url))
        return self.answer.model_validate_json(response.content)


class _Events(Generic[Body]):
    """Parses a stream's lines: tokens, and last the whole answer."""

    def __init__(self, answer: type[Body]) -> None:
        self._answer = answer
        self._event = ""
        self.ended = False

    def line(self, line: str) -> TokenBody | Body | None:
        name, _, value = line.partition(": ")
        if name == "event":
            self._event = value
        elif name == "data":
            match self._event:
                case "token":
                    return TOKEN_BODY.validate_json(value)
                case "done":
                    self.ended = True
                    return self._answer.model_validate_json(value)
                case "error":
                    raise ApiError.of(200, value)
        return None

    def end(self) -> None:
        if not self.ended:
            raise ApiError(200, "incomplete", "The stream ended before the answer did.")


class Client:
    """Blocking. Closes its connections with `close` or at the end of a `with` block."""

    def __init__(
        self, url: str = LOCAL, *, api_key: str | None = None, timeout: float = 600.0, http: httpx.Client | None = None
    ) -> None:
        """`timeout`: seconds of silence; `http`: a client of httpx's own, made with proxies, certificates ..."""
        self._http = http or httpx.Client(base_url=url, timeout=timeout)
        self._http.headers.update(_headers(api_key))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def generate(self, prompt: str | Sequence[str] | None = None, **fields: Any) -> GenerateResponse:
        """POST /generate."""
        return self._send(_generate(prompt, fields))

    def stream(
        self, prompt: str | Sequence[str] | None = None, **fields: Any
    ) -> Iterator[TokenBody | GenerateResponse]:
        """The same, token by token; the whole answer comes last."""
        return self._stream(_generate(prompt, fields | {"stream": True}))

    def compare(self, prompt: str | None, arms: Sequence[Mapping[str, Any]], **fields: Any) -> CompareResponse:
        """POST /compare; `prompt` None: the field `messages` instead."""
        return self._send(_compare(prompt, arms, fields))

    def stream_compare(
        self, prompt: str | None, arms: Sequence[Mapping[str, Any]], **fields: Any
    ) -> Iterator[TokenBody | CompareResponse]:
        """The same, token by token; the whole answer comes last."""
        return self._stream(_compare(prompt, arms, fields | {"stream": True}))

    def score(self, prompt: str, continuations: Sequence[str], **fields: Any) -> ScoreResponse:
        """POST /score."""
        return self._send(_score(prompt, continuations, fields))

    def tokenize(self, prompt: str | None = None, **fields: Any) -> TokenizeBody:
        """POST /tokenize."""
        return self._send(_tokenize(prompt, fields))

    def detokenize(self, tokens: Sequence[int], **fields: Any) -> DetokenizeBody:
        """POST /detokenize."""
        return self._send(_detokenize(tokens, fields))

    def tokenizer_info(self) -> TokenizerInfoBody:
        """GET /tokenizer_info."""
        return self._send(_Call("GET", "/tokenizer_info", TokenizerInfoBody))

    def checkpoints(self) -> CheckpointListBody:
        """GET /checkpoints."""
        return self._send(_Call("GET", "/checkpoints", CheckpointListBody))

    def checkpoint(self, name: str) -> CheckpointVersionsBody:
        """GET /checkpoints/{name}."""
        return self._send(_Call("GET", f"/checkpoints/{name}", CheckpointVersionsBody))

    def load(self, name: str, version: str | None = None) -> LoadedBody:
        """POST /checkpoints/{name}/load."""
        return self._send(_change(name, "load", version))

    def activate(self, name: str, version: str | None = None) -> LoadedBody:
        """POST /checkpoints/{name}/activate."""
        return self._send(_change(name, "activate", version))

    def unload(self, name: str, version: str | None = None) -> UnloadedBody:
        """DELETE /checkpoints/{name}."""
        return self._send(_unload(name, version))

    def ready(self) -> ReadyBody:
        """GET /readyz; raises ApiError where the server takes no requests."""
        return self._send(_Call("GET", "/readyz", ReadyBody))

    def _send(self, call: _Call[Body]) -> Body:
        with _proxy_named(self._http):
            return call.read(self._http.request(**call.request()))

    def _stream(self, call: _Call[Body]) -> Iterator[TokenBody | Body]:
        events, lines = _Events(call.answer), EventLines()
        with _proxy_named(self._http), self._http.stream(**call.request()) as response:
            if response.is_error:
                text = response.read().decode(errors="replace")
                raise ApiError.of(response.status_code, text, str(response.url))
            for text in response.iter_text():
                for line in lines.feed(text):
                    if (item := events.line(line)) is not None:
                        yield item
        events.end()


class AsyncClient:
    """The same for asyncio; see `Client`."""

    def __init__(
        self,
        url: str = LOCAL,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        self._http = http or httpx.AsyncClient(base_url=url, timeout=timeout)
        self._http.headers.update(_headers(api_key))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def generate(self, prompt: str | Sequence[str] | None = None, **fields: Any) -> GenerateResponse:
        """POST /generate."""
        return await self._send(_generate(prompt, fields))

    def stream(
        self, prompt: str | Sequence[str] | None = None, **fields: Any
    ) -> AsyncIterator[TokenBody | GenerateResponse]:
        """The same, token by token; the whole answer comes last."""
        return self._stream(_generate(prompt, fields | {"stream": True}))

    async def compare(self, prompt: str | None, arms: Sequence[Mapping[str, Any]], **fields: Any) -> CompareResponse:
        """POST /compare; `prompt` None: the field `messages` instead."""
        return await self._send(_compare(prompt, arms, fields))

    def stream_compare(
        self, prompt: str | None, arms: Sequence[Mapping[str, Any]], **fields: Any
    ) -> AsyncIterator[TokenBody | CompareResponse]:
        """The same, token by token; the whole answer comes last."""
        return self._stream(_compare(prompt, arms, fields | {"stream": True}))

    async def score(self, prompt: str, continuations: Sequence[str], **fields: Any) -> ScoreResponse:
        """POST /score."""
        return await self._send(_score(prompt, continuations, fields))

    async def tokenize(self, prompt: str | None = None, **fields: Any) -> TokenizeBody:
        """POST /tokenize."""
        return await self._send(_tokenize(prompt, fields))

    async def detokenize(self, tokens: Sequence[int], **fields: Any) -> DetokenizeBody:
        """POST /detokenize."""
        return await self._send(_detokenize(tokens, fields))

    async def tokenizer_info(self) -> TokenizerInfoBody:
        """GET /tokenizer_info."""
        return await self._send(_Call("GET", "/tokenizer_info", TokenizerInfoBody))

    async def checkpoints(self) -> CheckpointListBody:
        """GET /checkpoints."""
        return await self._send(_Call("GET", "/checkpoints", CheckpointListBody))

    async def checkpoint(self, name: str) -> CheckpointVersionsBody:
        """GET /checkpoints/{name}."""
        return await self._send(_Call("GET", f"/checkpoints/{name}", CheckpointVersionsBody))

    async def load(self, name: str, version: str | None = None) -> LoadedBody:
        """POST /checkpoints/{name}/load."""
        return await self._send(_change(name, "load", version))

    async def activate(self, name: str, version: str | None = None) -> LoadedBody:
        """POST /checkpoints/{name}/activate."""
        return await self._send(_change(name, "activate", version))

    async def unload(self, name: str, version: str | None = None) -> UnloadedBody:
        """DELETE /checkpoints/{name}."""
        return await self._send(_unload(name, version))

    async def ready(self) -> ReadyBody:
        """GET /readyz; raises ApiError where the server takes no requests."""
        return await self._send(_Call("GET", "/readyz", ReadyBody))

    async def _send(self, call: _Call[Body]) -> Body:
        with _proxy_named(self._http):
            return call.read(await self._http.request(**call.request()))

    async def _stream(self, call: _Call[Body]) -> AsyncIterator[TokenBody | Body]:
        events, lines = _Events(call.answer), EventLines()
        with _proxy_named(self._http):
            async with self._http.stream(**call.request()) as response:
                if response.is_error:
                    text = (await response.aread()).decode(errors="replace")
                    raise ApiError.of(response.status_code, text, str(response.url))
                async for text in response.aiter_text():
                    for line in lines.feed(text):
                        if (item := events.line(line)) is not None:
                            yield item
        events.end()


@contextmanager
def _proxy_named(http: httpx.Client | httpx.AsyncClient) -> Iterator[None]:
    """Adds to what httpx raises that a proxy of the environment stood between."""
    try:
        yield
    except httpx.TransportError as error:
        if http.trust_env and (hint := proxy_hint(str(http.base_url))):
            error.add_note(hint)
        raise


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def _generate(prompt: str | Sequence[str] | None, fields: Mapping[str, Any]) -> _Call[GenerateResponse]:
    given = {} if prompt is None else {"prompt": prompt if isinstance(prompt, str) else list(prompt)}
    return _Call("POST", "/generate", GenerateResponse, given | dict(fields))


def _compare(
    prompt: str | None, arms: Sequence[Mapping[str, Any]], fields: Mapping[str, Any]
) -> _Call[CompareResponse]:
    given = {} if prompt is None else {"prompt": prompt}
    return _Call("POST", "/compare", CompareResponse, given | {"arms": [*map(dict, arms)]} | dict(fields))


def _score(prompt: str, continuations: Sequence[str], fields: Mapping[str, Any]) -> _Call[ScoreResponse]:
    return _Call("POST", "/score", ScoreResponse, {"prompt": prompt, "continuations": [*continuations]} | dict(fields))


def _tokenize(prompt: str | None, fields: Mapping[str, Any]) -> _Call[TokenizeBody]:
    given = {} if prompt is None else {"prompt": prompt}
    return _Call("POST", "/tokenize", TokenizeBody, given | dict(fields))


def _detokenize(tokens: Sequence[int], fields: Mapping[str, Any]) -> _Call[DetokenizeBody]:
    return _Call("POST", "/detokenize", DetokenizeBody, {"tokens": [*tokens]} | dict(fields))


def _change(name: str, what: str, version: str | None) -> _Call[LoadedBody]:
    return _Call("POST", f"/checkpoints/{name}/{what}", LoadedBody, {"version": version})


def _unload(name: str, version: str | None) -> _Call[UnloadedBody]:
    params = None if version is None else {"version": version}
    return _Call("DELETE", f"/checkpoints/{name}", UnloadedBody, params=params)
