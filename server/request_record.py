"""What a request was and what became of it: filled by whoever knows, told in one place when the request has ended."""

import time
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any

from server.engine.sequence import Finished, ShareKey
from server.keys import ApiKey

HIDDEN = frozenset({"started_ns", "started", "submitted", "key"})


@dataclass
class RequestRecord:
    """One request. None: not known, or there is no such thing. Times are milliseconds."""

    request_id: str = ""
    client: str | None = None  # address; behind a trusted proxy the one that it names
    method: str = ""
    path: str = ""  # as it was sent, in printable ASCII
    route: str = "other"  # the path's template
    status: int = 0  # 0: the client left before it had one
    outcome: str | None = None  # "ok", "client_gone", or the `type` of the error that the client was told
    key: ApiKey | None = None
    model: str | None = None
    checkpoints: tuple[str, ...] | None = None  # NAME@VERSION, each once
    arms: tuple[str, ...] | None = None
    prompt_tokens: int | None = None  # a prompt counts once, however many texts it has
    completion_tokens: int | None = None
    queue_ms: float | None = None  # from the submission to the first text's first step
    ttft_ms: float | None = None  # from the submission to the first token of all
    engine_ms: float | None = None  # from the submission to the last text's end
    total_ms: float | None = None  # from the request's headers to the answer's end
    prompt: Any = None  # what was asked, where the settings have it logged
    trace_id: str | None = None  # OpenTelemetry's
    started_ns: int | None = None  # Unix time
    started: float = 0.0  # the same of time.monotonic, which no change of the clock moves: for durations
    submitted: float | None = None  # of time.monotonic: when the engine was given the texts

    def share(self, request: str) -> ShareKey:
        """Of the engine: the key's, and in it the request's."""
        return ShareKey(f"key {self.key.name}" if self.key else request, request)

    def count(self, tokens: int) -> None:
        """So many more of a stream have come; `end` knows better, where it is called."""
        if self.ttft_ms is None and self.submitted is not None:
            self.ttft_ms = round((time.monotonic() - self.submitted) * 1000, 3)
        self.completion_tokens = (self.completion_tokens or 0) + tokens

    def end(self, texts: Iterable[Finished]) -> None:
        """All texts have ended."""
        texts = list(texts)
        self.completion_tokens = sum(len(text.token_ids) for text in texts)
        self.queue_ms = min(text.timing.queue_ms for text in texts)
        self.ttft_ms = min(text.timing.ttft_ms for text in texts)
        self.engine_ms = max(text.timing.total_ms for text in texts)

    @property
    def key_name(self) -> str:
        """Empty: it came without a key."""
        return self.key.name if self.key else ""

    def fields(self) -> dict[str, Any]:
        """What is known, by name."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in HIDDEN}
        found["api_key"] = self.key_name or None
        return {name: value for name, value in found.items() if value is not None}

    def line(self) -> str:
        """For people: what was asked, how it ended, and who asked."""
        tokens = "" if self.prompt_tokens is None else f"{self.prompt_tokens} + {self.completion_tokens or 0} tokens"
        more = ", ".join(part for part in (tokens, self.key and f"key {self.key.name}") if part)
        said = f"{self.request_id} {self.method} {self.path} {self.status} {self.total_ms or 0:.1f} ms"
        return f"{said} ({more})" if more else said


_current: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


def open_record(record: RequestRecord) -> None:
    """From now on `current_record` is this one, in this task and in those that it starts."""
    _current.set(record)


def current_record() -> RequestRecord:
    """Of the request that is being answered; outside of one a new record, which nobody reads."""
    return _current.get() or RequestRecord()
