"""The use cases of the server: generate, stream and score. Knows the tokenizer and, through an `EngineClient`, the
engine and its checkpoints; no HTTP, no tensors."""

import asyncio
import secrets
import time
import weakref
from collections import abc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from server.config import Settings
from server.engine.divergence import Divergence
from server.engine.sequence import Finished, SamplingParams, TokenEvent, TokenLogprob
from server.engine_client import (
    AppliedSteering,
    CheckpointEntry,
    CheckpointInfo,
    EngineClient,
    EngineRequest,
    EngineSnapshot,
    Prompt,
    ScoreRequest,
    Submitted,
)
from server.errors import DeadlineExceeded, InvalidField, NotFound, PromptTooLong, UnknownModel
from server.judge import Judge, verdicts
from server.keys import ApiKeys
from server.metrics import Metrics
from server.request_record import RequestRecord, current_record
from server.request_stream import Backlog, RequestStream
from server.studies import Studies
from server.threads import KeyedThreads, result_of
from server.tokenizer import Codec, texts_of
from server.types import (
    ArmResult,
    EchoedPrompt,
    GenerateParams,
    GenerateResult,
    ResultStream,
    ScoreParams,
    ScoreResult,
    TokenChunk,
    TokenizeParams,
)

if TYPE_CHECKING:  # a front has none of these
    from server.engine.engine import Engine
    from server.engine_core import EngineCore
    from server.registry import Registry

T = TypeVar("T")
_Pair = tuple[Finished, Finished]  # a text, and the one that it is compared with
JUDGING_THREADS = 4
LONG_TEXT = 2**16  # characters or tokens: that many are tokenized in some 50 ms


@dataclass(frozen=True)
class _RunningRequest:
    """A request that has been submitted to the engine."""

    id: str
    created: int  # Unix time, seconds
    deadline: float  # of time.monotonic
    params: GenerateParams
    submitted: Submitted
    stream: RequestStream
    record: RequestRecord


class Service:
    """What the server can do, for any front end."""

    def __init__(
        self,
        settings: Settings,
        codec: Codec,
        client: EngineClient,
        metrics: Metrics,
        *,
        judge: Judge | None = None,
        studies: Studies | None = None,
    ) -> None:
        self.settings = settings
        self.keys = ApiKeys(settings)
        self.judge = judge
        self.studies = studies
        self.model = settings.served_name
        self.codec = codec
        self.client = client
        self.metrics = metrics
        self._backlog = Backlog()
        # What waits for files, or for the operator's code, has threads of its own: other requests never wait for it.
        self._votes = KeyedThreads(1, "studies")
        self._judging = KeyedThreads(JUDGING_THREADS, "judge")
        self._long_texts = KeyedThreads(2, "text")  # keys: prompts, and what /tokenize and /detokenize get

    @property
    def engine(self) -> "Engine":
        """Where it runs in this process."""
        return self._core.engine

    @property
    def registry(self) -> "Registry":
        """Where the engine runs in this process."""
        return self._core.registry

    @property
    def _core(self) -> "EngineCore":
        from server.engine_core import EngineCore

        assert isinstance(self.client, EngineCore), "the engine runs in another process"
        return self.client

    async def generate(self, params: GenerateParams) -> GenerateResult:
        """All texts of a request. Where the call is cancelled (the client has gone), its sequences end before the
        engine's next step."""
        request = await self._submit(params, stream=False)
        async with self._cancelled_on_error(request):
            return await self._result(request, await self._prompts(request))

    async def stream(self, params: GenerateParams) -> ResultStream:
        """The same as a stream: echoed prompts, tokens as they are generated, and the result. Errors of the request
        are raised by this call, those under way by the iterator."""
        request = await self._submit(params, stream=True)
        items = self._items(request)
        # A generator that is never started never runs its `finally`: the request ends with the object.
        weakref.finalize(items, self.client.close, request.id)
        return items

    async def score(self, params: ScoreParams) -> ScoreResult:
        """The log-likelihood of each continuation, steered as if it were being generated."""
        created, deadline = int(time.time()), time.monotonic() + self.settings.deadline_s
        length = sum(len(params.prompt) + len(one) for one in params.continuations)
        texts = await self._on_texts("prompts", length, lambda: self._encode_pairs(params))
        name = f"score-{secrets.token_hex(12)}"
        record = self._note(sum(len(prompt) + len(rest) for prompt, rest in texts), params.prompt)
        rows = self.keys.take_rows(record.key, len(texts))
        try:
            request = ScoreRequest(tuple(texts), params.checkpoints, params.positions, record.share(name))
            scores = await self._until(deadline, self.client.score(request))
        finally:
            rows()
        _note_checkpoints(record, [scores.steering])
        return ScoreResult(
            id=name,
            created=created,
            model=self.model,
            continuations=scores.continuations,
            checkpoints=scores.steering.checkpoints,
            positions=scores.steering.positions,
        )

    async def tokenize(self, params: TokenizeParams, model: str | None, answer: Callable[[tuple[int, ...]], T]) -> T:
        """`answer` of the ids that a text or a conversation becomes, as a request to generate from it would have them;
        it is called on the thread that has made them, for there may be millions.

        Raises InvalidField, ChatTemplateUnusable; UnknownModel where there is no such `model`.
        """
        await self.check_model(model)
        length = len(params.prompt or "") + _characters(params.messages)
        return await self._on_texts("any", length, lambda: answer(self.codec.encode_any(params)))

    async def detokenize(self, token_ids: abc.Sequence[int], model: str | None = None) -> str:
        """The text of tokens, special ones included. Raises InvalidField, UnknownModel where there is no such
        `model`."""
        await self.check_model(model)

        def text() -> str:
            self.codec.check_ids(token_ids, "tokens")
            return self.codec.decode_all(token_ids)

        return await self._on_texts("any", len(token_ids), text)

    async def verdicts(self, prompt: str, texts: list[str]) -> list[dict[str, bool | None]]:
        """What the operator's judge says, however long it takes. Raises NotFound where there is none; InvalidField."""
        if (judge := self.judge) is None:
            raise NotFound("This server has no judge: MATSTEER_JUDGE names one.")
        return await result_of(self._judging.submit(secrets.token_hex(8), lambda: verdicts(judge, prompt, texts)))

    async def in_studies(self, work: Callable[[Studies], T]) -> T:
        """`work` done with the studies; their file may be another process' for a while. Raises NotFound where the
        operator keeps none."""
        if (studies := self.studies) is None:
            raise NotFound("This server keeps no studies: MATSTEER_STUDIES names the file that it would keep them in.")
        return await result_of(self._votes.submit("", lambda: work(studies)))

    async def _on_texts(self, key: str, length: int, work: Callable[[], T]) -> T:
        """`work` done on a thread; what is long is done one after another by `key`, so that short texts find a thread
        free."""
        if length <= LONG_TEXT:
            return await asyncio.to_thread(work)
        return await result_of(self._long_texts.submit(key, work))

    async def checkpoints(self, name: str | None = None) -> list[CheckpointEntry]:
        """Every complete folder of checkpoints, or those of one name."""
        return await self.client.checkpoints(name)

    async def find_checkpoint(self, name: str) -> CheckpointInfo | None:
        """What NAME or NAME@VERSION means now; None: it is not loaded."""
        return await self.client.find_checkpoint(name)

    async def reload(self, name: str, version: str | None, *, activate: bool = False) -> CheckpointInfo:
        """See `Registry.reload`."""
        return await self.client.reload(name, version, activate)

    async def unload(self, name: str, version: str | None) -> list[str]:
        """See `Registry.unload`."""
        return await self.client.unload(name, version)

    async def snapshot(self) -> EngineSnapshot:
        """The engine and its checkpoints as they are now."""
        return await self.client.snapshot()

    async def check_model(self, name: str | None) -> None:
        """Raises UnknownModel where a request names what is neither the base model nor a checkpoint."""
        if name is None or name == self.model or await self.client.find_checkpoint(name):
            return
        folder, at, version = name.partition("@")
        entries = await self.client.checkpoints(folder)
        if not any(entry.problem is None and (not at or version == entry.version) for entry in entries):
            raise UnknownModel(f"There is no model {name!r}; GET /v1/models lists those there are.", param="model")

    async def _submit(self, params: GenerateParams, *, stream: bool) -> _RunningRequest:
        created, deadline = int(time.time()), time.monotonic() + self.settings.deadline_s
        self._check_ids(params.sampling)
        length = sum(map(len, params.prompts)) + _characters(params.messages)
        prompts = await self._on_texts("prompts", length, lambda: self._encode(params))
        record = self._note(sum(map(len, prompts)), params.prompts or params.messages)
        record.arms = tuple(arm.name for arm in params.arms)
        request = self._request(params, prompts, record, stream=stream)
        texts = len(prompts) * params.n * len(params.arms)
        give_back = self.keys.take_rows(record.key, texts)

        submitted: Submitted | None = None

        def on_settled(ended: list[Finished]) -> None:
            if submitted is None:  # the call has failed, and given them back
                return
            give_back()
            for text in ended:
                applied = submitted.arms[text.sequence.index % len(submitted.arms)]
                self.metrics.text(text, applied.checkpoints, record.key_name)

        events = RequestStream(
            texts,
            on_settled=on_settled,
            interval=self.settings.stream_interval,
            backlog=self._backlog,
            on_given_up=lambda: self.client.cancel(request.id),
        )
        try:
            submitted = await self.client.submit(request, events.on_event)
        except BaseException:
            give_back()
            raise
        _note_checkpoints(record, submitted.arms)
        return _RunningRequest(request.id, created, deadline, params, submitted, events, record)

    def _note(self, prompt_tokens: int, prompt: object) -> RequestRecord:
        """Notes in the request's record what the engine is about to be given."""
        record = current_record()
        record.model = self.model
        record.prompt_tokens = prompt_tokens
        record.submitted = time.monotonic()
        if self.settings.log_prompts:
            record.prompt = prompt
        return record

    async def _items(self, request: _RunningRequest) -> ResultStream:
        async with self._cancelled_on_error(request):
            prompts = await self._prompts(request)
            if prompts:
                yield prompts
            async for tokens in request.stream.tokens():
                request.record.count(len(tokens))
                yield [_chunk(request, token) for token in tokens]
            yield [await self._result(request, prompts)]

    @asynccontextmanager
    async def _cancelled_on_error(self, request: _RunningRequest) -> AsyncIterator[None]:
        """Ends the request's sequences where the block is left before the result is there, and in any case what it has
        of the engine."""
        try:
            yield
        except BaseException:
            self.client.cancel(request.id)
            raise
        finally:
            self.client.close(request.id)

    async def _result(self, request: _RunningRequest, prompts: tuple[EchoedPrompt, ...]) -> GenerateResult:
        finished = await request.stream.finished()
        request.record.end(finished)
        applied = request.submitted.arms
        texts = [tuple(finished[arm :: len(applied)]) for arm in range(len(applied))]
        reference = request.params.reference
        compared = [index for index in range(len(texts)) if index != reference]
        pairs = [list(zip(texts[index], texts[reference], strict=True)) for index in compared]
        divergences = iter(await self._compare(request, [pair for each in pairs for pair in each]))
        of_arm = {index: tuple(islice(divergences, len(each))) for index, each in zip(compared, pairs, strict=True)}
        arms = [
            ArmResult(arm.name, steering.checkpoints, texts[index], of_arm.get(index))
            for index, (arm, steering) in enumerate(zip(request.params.arms, applied, strict=True))
        ]
        return GenerateResult(
            id=request.id,
            created=request.created,
            model=self.model,
            arms=tuple(arms),
            reference=reference,
            prompts=prompts,
        )

    async def _prompts(self, request: _RunningRequest) -> tuple[EchoedPrompt, ...]:
        """The prompts with their log-probabilities, where the request asks for them."""
        if not request.params.echo:
            return ()
        each_prompt = request.params.n * len(request.submitted.arms)
        tokens = [one.prompt_token_ids for one in request.submitted.sequences[::each_prompt]]
        logprobs: list[tuple[TokenLogprob, ...] | None] = [None] * len(tokens)
        if request.params.sampling.logprobs is not None:
            scored = await self._until(request.deadline, self.client.prompt_logprobs(request.id))
            each = iter(scored)
            logprobs = [next(each) if len(prompt) > 1 else () for prompt in tokens]
        return tuple(map(EchoedPrompt, request.params.prompts, tokens, logprobs))

    async def _compare(self, request: _RunningRequest, pairs: abc.Iterable[_Pair]) -> list[Divergence]:
        """Where one of them fails, nobody waits for the others: they end before the request's lease does."""
        compare, request_id = self.client.compare, request.id
        tasks = [
            asyncio.ensure_future(
                compare(request_id, text.sequence.index, base.sequence.index, (text.token_ids, base.token_ids))
            )
            for text, base in pairs
        ]
        try:
            return await asyncio.gather(*(self._until(request.deadline, task) for task in tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            raise

    async def _until(self, deadline: float, work: Awaitable[T]) -> T:
        """What it gives; after the deadline it is cancelled. Raises DeadlineExceeded."""
        try:
            return await asyncio.wait_for(work, deadline - time.monotonic())
        except TimeoutError:
            raise DeadlineExceeded(f"The request took longer than {self.settings.deadline_s:g} s.") from None

    def _check_ids(self, sampling: SamplingParams) -> None:
        """Raises InvalidField where tokens are named that the model does not have."""
        self.codec.check_ids(sampling.stop_token_ids, "stop_token_ids")
        for token, _ in sampling.logit_bias:
            self.codec.check_id(token, f"logit_bias.{token}")

    def _encode(self, params: GenerateParams) -> list[tuple[int, ...]]:
        special = params.add_special_tokens
        if params.messages:
            return [self.codec.encode_chat(params.messages, "messages", params.chat, add_special_tokens=special)]
        return [
            self.codec.encode(prompt, "prompt" if params.single else f"prompt.{index}", add_special_tokens=special)
            for index, prompt in enumerate(params.prompts)
        ]

    def _encode_pairs(self, params: ScoreParams) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        return [
            self.codec.encode_pair(
                params.prompt, continuation, f"continuations.{index}", add_special_tokens=params.add_special_tokens
            )
            for index, continuation in enumerate(params.continuations)
        ]

    def _request(
        self, params: GenerateParams, prompts: abc.Sequence[tuple[int, ...]], record: RequestRecord, *, stream: bool
    ) -> EngineRequest:
        """Raises InvalidField for too many texts, PromptTooLong."""
        count = len(prompts) * params.n * len(params.arms)
        if count > self.settings.max_request_rows:
            raise InvalidField(
                f"The request asks for {count} texts (prompts x n x arms); at most {self.settings.max_request_rows}.",
                param="n" if params.n > 1 else "prompt",
            )
        # All arms share a seed. A random one is drawn for each prompt, so that a prompt sent twice gives two texts.
        # The `n` texts of a prompt differ by `choice`.
        name = f"gen-{secrets.token_hex(12)}"
        return EngineRequest(
            id=name,
            share=record.share(name),
            prompts=tuple(
                Prompt(prompt, secrets.randbits(63) if params.seed is None else params.seed, self._room(params, prompt))
                for prompt in prompts
            ),
            arms=tuple(arm.checkpoints for arm in params.arms),
            sampling=params.sampling,
            n=params.n,
            positions=params.positions,
            form="chat"
            if params.messages
            else "plain"
            if all(isinstance(one, str) for one in params.prompts)
            else None,
            stream=stream,
            trace=params.trace,
            echo_logprobs=params.echo and params.sampling.logprobs is not None,
        )

    def _room(self, params: GenerateParams, prompt: tuple[int, ...]) -> int:
        """How many new tokens a text may have at most."""
        room = params.sampling.max_new_tokens
        if self.codec.context is not None:
            room = min(room, self.codec.context - len(prompt))
        return room if len(params.arms) == 1 else min(room, self._room_for_comparison(prompt))

    def _room_for_comparison(self, prompt: tuple[int, ...]) -> int:
        """How many new tokens two arms may have, so that they can be compared: both are in the cache at once."""
        most = self.client.facts.max_pair_tokens
        if len(prompt) >= most:
            raise PromptTooLong(
                f"The prompt is too long: it has {len(prompt)} tokens; arms are compared two at a time, and the cache "
                f"has room for two texts of {most} tokens, prompt and answer together.",
                param="prompt",
            )
        return most - len(prompt)


def _characters(messages: abc.Sequence[abc.Mapping[str, Any]]) -> int:
    return sum(len(text) for message in messages for text in texts_of(message.get("content")))


def _note_checkpoints(record: RequestRecord, arms: abc.Iterable[AppliedSteering]) -> None:
    """Those of a request, each once."""
    named = (f"{one.checkpoint}@{one.version}" for arm in arms for one in arm.checkpoints)
    record.checkpoints = tuple(dict.fromkeys(named))


def _chunk(request: _RunningRequest, token: TokenEvent) -> TokenChunk:
    index, arm = divmod(token.sequence.index, len(request.params.arms))
    return TokenChunk(request.params.arms[arm].name, index, token)
