"""The front's end: an `EngineClient` whose engine is in another process. Texts are made here."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from server.engine.divergence import Divergence
from server.engine.sequence import (
    Event,
    Failed,
    Finished,
    Progress,
    SampledToken,
    SteeringParams,
    Timing,
    TokenLogprob,
)
from server.engine.sequence_output import SequenceOutput
from server.engine.text_builder import Decoders
from server.engine_client import (
    AppliedSteering,
    CheckpointEntry,
    CheckpointInfo,
    EngineClient,
    EngineFacts,
    EngineRequest,
    EngineSnapshot,
    OnEvent,
    ScoreRequest,
    Scores,
    Submitted,
    TokenIds,
)
from server.errors import EngineDown, GenerationFailed, ServerError
from server.process.messages import (
    Call,
    Cancel,
    CancelCall,
    Close,
    Ended,
    Events,
    FromEngine,
    Message,
    Reply,
    StopSequence,
    decode,
    encode,
    frame,
    read_frame,
    types_of,
)

T = TypeVar("T")
log = logging.getLogger(__name__)
SNAPSHOT_S = 10.0  # after which an engine that does not say how it is does not answer
GONE = "the engine's process has ended"
DRAINING = "the server is draining: it finishes its requests and stops"
NO_TIMING = Timing(0, 0, 0)


class ProcessClient:
    """One for each front, on one event loop from `connect` on."""

    def __init__(self, path: Path, facts: EngineFacts, decoders: Decoders) -> None:
        """`path`: the socket at which the engine listens."""
        self.facts = facts
        self.failure: str | None = None  # when the engine has gone, and everybody who waits has been told
        self.decoders = decoders
        self._path = path
        self._numbers = itertools.count()
        self._replies: dict[int, asyncio.Future[bytes]] = {}
        self._requests: dict[int, _Request] = {}  # by the number of their call, until `close`
        self._by_name: dict[str, _Request] = {}
        self._trouble: str | None = "the engine is not connected"
        self._draining = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def connect(self) -> None:
        """Raises OSError where no engine listens."""
        self._loop = asyncio.get_running_loop()
        reader, self._writer = await asyncio.open_unix_connection(self._path)
        self._trouble = None
        self._reading = asyncio.create_task(self._read(reader))

    async def disconnect(self) -> None:
        """The engine ends whatever this front has asked for."""
        self._reading.cancel()
        self._writer.close()

    # --- EngineClient ---------------------------------------------------------------------------

    async def submit(self, request: EngineRequest, on_event: OnEvent) -> Submitted:
        if self._draining:
            raise EngineDown("The engine cannot take requests: the server is shutting down.")
        # A stop string is looked for here, in each token as it comes.
        sent = replace(request, stream=request.stream or bool(request.sampling.stop))
        number = next(self._numbers)
        made = _Request(self, number, request, on_event)
        self._requests[number] = self._by_name[request.id] = made
        try:
            arms = decode(await self._send_call(number, "submit", sent), tuple[AppliedSteering, ...])
        except BaseException:
            self._send(Cancel(request.id))  # whoever has stopped waiting does not know whether it was taken
            self._forget(request.id)
            raise
        for sequence in made.sequences:
            sequence.steering_params = SteeringParams(positions=arms[sequence.index % len(arms)].positions)
        asyncio.get_running_loop().call_soon(made.release)
        return Submitted(made.sequences, arms)

    def cancel(self, request_id: str) -> None:
        self._send(Cancel(request_id))

    def close(self, request_id: str) -> None:
        # The garbage collector may call this from any thread.
        if request_id in self._by_name and self._loop is not None:
            with suppress(RuntimeError):  # the loop has ended, and the connection with it
                self._loop.call_soon_threadsafe(self._forget, request_id)

    async def prompt_logprobs(self, request_id: str) -> list[tuple[TokenLogprob, ...]]:
        return await self._call(EngineClient.prompt_logprobs, request_id)

    async def compare(
        self, request_id: str, steered: int, reference: int, texts: tuple[TokenIds, TokenIds]
    ) -> Divergence:
        return await self._call(EngineClient.compare, request_id, steered, reference, texts)

    async def score(self, request: ScoreRequest) -> Scores:
        return await self._call(EngineClient.score, request)

    async def checkpoints(self, name: str | None) -> list[CheckpointEntry]:
        return await self._call(EngineClient.checkpoints, name)

    async def find_checkpoint(self, name: str) -> CheckpointInfo | None:
        return await self._call(EngineClient.find_checkpoint, name)

    async def reload(self, name: str, version: str | None, activate: bool) -> CheckpointInfo:
        return await self._call(EngineClient.reload, name, version, activate)

    async def unload(self, name: str, version: str | None) -> list[str]:
        return await self._call(EngineClient.unload, name, version)

    async def snapshot(self) -> EngineSnapshot:
        try:
            snapshot = await asyncio.wait_for(self._call(EngineClient.snapshot), SNAPSHOT_S)
        except TimeoutError:
            raise EngineDown(f"The engine's process has not answered for {SNAPSHOT_S:g} s.") from None
        return replace(snapshot, trouble=snapshot.trouble or (DRAINING if self._draining else None))

    def drain(self) -> None:
        """Of this front alone: others go on."""
        self._draining = True

    def stop(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end, "the server is shutting down")

    # --- messages -------------------------------------------------------------------------------

    async def _call(self, method: Callable[..., Coroutine[Any, Any, T]], *arguments: Any) -> T:
        reply = await self._send_call(next(self._numbers), method.__name__, *arguments)
        result: T = decode(reply, types_of(method)[1])
        return result

    async def _send_call(self, number: int, method: str, *arguments: Any) -> bytes:
        """The reply. Where nobody waits for it any more, the engine's process stops what it does for it."""
        if self._trouble is not None:
            raise EngineDown(f"The engine cannot take requests: {self._trouble}.")
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._replies[number] = reply
        self._send(Call(number, method, encode(arguments)))
        try:
            return await reply
        except asyncio.CancelledError:
            self._send(CancelCall(number))
            raise
        finally:
            self._replies.pop(number, None)

    def _send(self, message: Message) -> None:
        if self._trouble is None:
            self._writer.write(frame(message))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                self._take(decode(await read_frame(reader), FromEngine))
        except (OSError, asyncio.IncompleteReadError):
            pass
        except Exception:  # a bug: whoever waits is told
            log.exception("what the engine's process sends cannot be read")
        self._end(GONE)
        self.failure = GONE

    def _take(self, message: FromEngine) -> None:
        match message:
            case Reply(id=id, result=result, error=error):
                reply = self._replies.get(id)
                if reply is None or reply.done():
                    return
                if error is not None:
                    reply.set_exception(error.to_exception())
                else:
                    reply.set_result(result)
            case Events(tokens=tokens, detailed=detailed, ended=ended):
                each = iter(tokens)
                for number, index, token in zip(each, each, each, strict=True):
                    if request := self._requests.get(number):
                        request.token(index, SampledToken(token))
                for one in detailed:
                    if request := self._requests.get(one.request):
                        request.token(one.index, one.token, one.progress)
                for last in ended:
                    if request := self._requests.get(last.request):
                        request.end(last)

    def _forget(self, request_id: str) -> None:
        request = self._by_name.pop(request_id, None)
        if request is not None:
            del self._requests[request.number]
            self._send(Close(request_id))

    def _end(self, why: str) -> None:
        """Whoever waits for the engine is told that it is gone."""
        for request in list(self._by_name.values()):
            self._send(Cancel(request.id))
            request.fail(EngineDown(f"The engine stopped: {why}."))
        self._trouble = self._trouble or why
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(EngineDown(f"The engine stopped: {why}."))


class _Request:
    """Makes texts of a request's tokens."""

    def __init__(self, client: ProcessClient, number: int, request: EngineRequest, on_event: OnEvent) -> None:
        self.id = request.id
        self.number = number
        self.sequences = request.sequences([SteeringParams()] * len(request.arms))
        self._client = client
        self._take = on_event
        self._early: list[Event] | None = []  # before `submit` has returned
        self._stream = request.stream
        self._open = {one.index: SequenceOutput(one, client.facts.eos, client.decoders) for one in self.sequences}
        self._finished: dict[int, Finished] = {}  # but for what the engine says of it last

    def release(self) -> None:
        """From now on events are told as they come."""
        early, self._early = self._early or (), None
        for event in early:
            self._take(event)

    def _on_event(self, event: Event) -> None:
        if self._early is None:
            self._take(event)
        else:
            self._early.append(event)

    def token(self, index: int, token: SampledToken, progress: Progress | None = None) -> None:
        if (output := self._open.get(index)) is None:
            return  # a stop string has ended it, and the engine did not know yet
        try:
            reason = output.accept(token)
            finished = None
            if reason is not None:
                steered, timing = (progress.steered_tokens, progress.timing) if progress else (0, NO_TIMING)
                finished = output.finish(reason, steered, timing)
            event = output.token_event(token, last=finished is not None) if self._stream else None
        except Exception:
            self._cannot_decode()
            return
        if event is not None:
            self._on_event(event)
        if finished is None:
            return
        if progress is None:
            self._finished[index] = finished
            return
        del self._open[index]
        self._client._send(StopSequence(self.id, index))
        self._on_event(finished)

    def end(self, last: Ended) -> None:
        """What the engine says of a sequence last."""
        output = self._open.get(last.index)
        if output is None:
            return
        if last.error is not None:
            del self._open[last.index]
            self._on_event(Failed(output.sequence, last.error.to_exception()))
            return
        try:
            finished = self._finished.get(last.index)
            if finished is None:
                for token in last.tokens or map(SampledToken, last.token_ids):
                    output.accept(token)
                finished = output.finish(last.finish_reason, 0, NO_TIMING)
        except Exception:
            self._cannot_decode()
            return
        del self._open[last.index]
        self._on_event(replace(finished, steered_tokens=last.steered_tokens, timing=last.timing or NO_TIMING))

    def fail(self, error: ServerError) -> None:
        """Every sequence that has not ended."""
        while self._open:
            _, output = self._open.popitem()
            self._on_event(Failed(output.sequence, error))

    def _cannot_decode(self) -> None:
        log.exception("the text of a sequence of request %s cannot be decoded", self.id)
        self._client._send(Cancel(self.id))
        self.fail(GenerationFailed("The generated tokens could not be turned into text."))
