"""/v1/responses: the body of an answer, and the events of a stream."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from server.api.exception_handlers import error_detail, to_server_error
from server.api.openai.responses_schemas import (
    IncompleteDetails,
    OutputMessage,
    OutputText,
    ResponseBody,
    ResponsesRequest,
    ResponseUsage,
)
from server.formatting import steering, token_trace, trace
from server.tokenizer import Codec
from server.types import GenerateResult, ResultStream, TokenChunk

Status = Literal["in_progress", "completed", "incomplete"]


@dataclass
class ResponsesFormatter:
    """One request's response, whole or as events, which are numbered in the order in which they are made."""

    request: ResponsesRequest
    id: str
    created_at: int
    codec: Codec
    _events: int = 0

    def response(self, result: GenerateResult) -> ResponseBody:
        (arm,), (text,) = result.arms, result.arms[0].texts
        complete = text.finish_reason == "stop"
        prompt, answer = len(text.sequence.prompt_token_ids), len(text.token_ids)
        return self._body(
            "completed" if complete else "incomplete",
            output=[self._message("completed" if complete else "incomplete", text.text)],
            incomplete_details=None if complete else IncompleteDetails(),
            usage=ResponseUsage(input_tokens=prompt, output_tokens=answer, total_tokens=prompt + answer),
            steering=steering(text, arm),
            trace=trace(self.codec, text),
        )

    async def events(self, stream: ResultStream, request_id: str) -> AsyncIterator[str]:
        """Server-sent events, each with its type as its name; those that are ready together come together."""
        yield "".join(self._first())
        try:
            async for ready in stream:
                events: list[str] = []
                for item in ready:
                    match item:
                        case TokenChunk():
                            events += self._token(item)
                        case GenerateResult():
                            events += await asyncio.to_thread(list, self._last(item))
                if events:
                    yield "".join(events)
        except Exception as exception:  # the status has been sent: an error can only be an event
            detail = error_detail(to_server_error(exception), request_id)
            about = {name: detail[name] for name in ("code", "message", "param")}
            yield self._event("error", **about, error=detail)

    def _first(self) -> Iterator[str]:
        begun = self._body("in_progress", output=[]).model_dump(mode="json")
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        item = self._message("in_progress", None).model_dump(mode="json")
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event(
            "response.content_part.added", **self._place, part=OutputText(text="").model_dump(mode="json")
        )

    def _token(self, chunk: TokenChunk) -> Iterator[str]:
        traced = chunk.event.sequence.trace
        if not chunk.event.text and not traced:
            return
        more: dict[str, Any] = {}
        if traced:
            more["trace"] = [asdict(token_trace(self.codec, chunk.event.token))]
        yield self._event("response.output_text.delta", **self._place, delta=chunk.event.text, logprobs=[], **more)

    def _last(self, result: GenerateResult) -> Iterator[str]:
        body = self.response(result)
        (message,) = body.output
        (part,) = message.content
        yield self._event("response.output_text.done", **self._place, text=part.text, logprobs=[])
        yield self._event("response.content_part.done", **self._place, part=part.model_dump(mode="json"))
        yield self._event("response.output_item.done", output_index=0, item=message.model_dump(mode="json"))
        # Also where the text is incomplete, which `status` says: OpenAI's client waits for an event of this name.
        yield self._event("response.completed", response=body.model_dump(mode="json"))

    @property
    def _place(self) -> Mapping[str, Any]:
        return {"item_id": self._message_id, "output_index": 0, "content_index": 0}

    @property
    def _message_id(self) -> str:
        return f"msg_{self.id.removeprefix('resp_')}"

    def _message(self, status: Status, text: str | None) -> OutputMessage:
        """`text` None: nothing of it is there yet."""
        content = [] if text is None else [OutputText(text=text)]
        return OutputMessage(id=self._message_id, status=status, content=content)

    def _body(self, status: Status, **more: Any) -> ResponseBody:
        asked = self.request
        return ResponseBody(
            id=self.id,
            created_at=self.created_at,
            status=status,
            model=asked.model,
            instructions=asked.instructions,
            metadata=asked.metadata or {},
            max_output_tokens=asked.max_output_tokens,
            temperature=asked.temperature,
            top_p=asked.top_p,
            **more,
        )

    def _event(self, kind: str, **fields: Any) -> str:
        data = json.dumps({"type": kind, "sequence_number": self._events, **fields})
        self._events += 1
        return f"event: {kind}\ndata: {data}\n\n"
