"""The use cases of the server: generate, stream and score. Knows the tokenizer, the registry and the engine; no HTTP,
no tensors."""

import asyncio
import logging
import secrets
import time
import weakref
from collections import abc
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

from server.config import Settings
from server.engine.engine import Engine
from server.engine.scoring import ComparisonPair, Divergence
from server.engine.sequence import (
    Finished,
    PositionsName,
    SamplingParams,
    Sequence,
    ShareKey,
    SteeringParams,
    TokenEvent,
    TokenLogprob,
)
from server.errors import DeadlineExceeded, InvalidField, NotFound, PromptTooLong, UnknownCheckpoint, UnknownModel
from server.judge import Judge, verdicts
from server.keys import ApiKeys
from server.metrics import Metrics
from server.registry import CheckpointEntry, CheckpointLease, LoadedCheckpoint, Registry
from server.request_record import RequestRecord, current_record
from server.request_stream import RequestStream
from server.studies import Studies
from server.threads import KeyedThreads
from server.tokenizer import Codec, texts_of
from server.types import (
    AppliedCheckpoint,
    ArmResult,
    CheckpointRef,
    EchoedPrompt,
    GenerateParams,
    GenerateResult,
    ResultStream,
    ScoreParams,
    ScoreResult,
    TokenChunk,
    TokenizeParams,
)
from steering.types import SequenceSteering

T = TypeVar("T")
LOADING_THREADS = 4
JUDGING_THREADS = 4
LONG_TEXT = 2**16  # characters or tokens: that many are tokenized in some 50 ms
log = logging.getLogger(__name__)
FORMS = {"chat": "conversations (messages)", "plain": "plain text (prompt)"}


_Found = list[tuple[CheckpointRef, LoadedCheckpoint]]  # an arm's checkpoints


@dataclass(frozen=True)
class _ArmSteering:
    """An arm's steering with its checkpoints found: for the engine, and for the answer."""

    steering_params: SteeringParams
    checkpoints: tuple[AppliedCheckpoint, ...]


@dataclass(frozen=True)
class _RunningRequest:
    """A request that has been submitted to the engine. Its sequences are in the order prompt, choice, arm:
    index = (prompt * n + choice) * arms + arm."""

    created: int  # Unix time, seconds
    deadline: float  # of time.monotonic
    params: GenerateParams
    arms: tuple[_ArmSteering, ...]
    sequences: list[Sequence]
    stream: RequestStream
    lease: CheckpointLease
    record: RequestRecord
    prompt_logprobs: "Future[list[tuple[TokenLogprob, ...]]] | None"  # of prompts with more than one token


class Service:
    """What the server can do, for any front end."""

    def __init__(
        self,
        settings: Settings,
        codec: Codec,
        engine: Engine,
        registry: Registry,
        metrics: Metrics,
        *,
        adapter: str | None = None,
        judge: Judge | None = None,
        studies: Studies | None = None,
    ) -> None:
        """`adapter`: the LoRA adapter that was merged into the model's weights."""
        self.settings = settings
        self.keys = ApiKeys(settings)
        self.judge = judge
        self.studies = studies
        self.adapter = adapter
        self.model = settings.served_name
        self.created = int(time.time())
        self.codec = codec
        self.engine = engine
        self.registry = registry
        self._remarked: weakref.WeakSet[LoadedCheckpoint] = weakref.WeakSet()
        self.metrics = metrics
        # What reads files has threads of its own: requests that do not need it never wait for it.
        self._loads = KeyedThreads(LOADING_THREADS, "load")
        self._lists = KeyedThreads(1, "list")
        self._votes = KeyedThreads(1, "studies")
        self._judging = KeyedThreads(JUDGING_THREADS, "judge")
        self._long_texts = KeyedThreads(2, "text")  # keys: prompts, and what /tokenize and /detokenize get

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
        # A generator that is never started never runs its `finally`: the lease ends with the object.
        weakref.finalize(items, request.lease.close)
        return items

    async def score(self, params: ScoreParams) -> ScoreResult:
        """The log-likelihood of each continuation, steered as if it were being generated."""
        created, deadline = int(time.time()), time.monotonic() + self.settings.deadline_s
        length = sum(len(params.prompt) + len(one) for one in params.continuations)
        texts = await self._on_texts("prompts", length, lambda: self._encode_pairs(params))
        lease = CheckpointLease(self.registry)
        try:
            found = await self._acquire(params.checkpoints, lease)
            arm = await asyncio.to_thread(self._resolve, found, params.positions, "plain")
            record = self._note([arm], sum(len(prompt) + len(rest) for prompt, rest in texts), params.prompt)
            rows = self.keys.take_rows(record.key, len(texts))
            try:
                share = record.share(f"score-{secrets.token_hex(12)}")
                logprobs = await self._until(deadline, self.engine.score(texts, arm.steering_params, share=share))
            finally:
                rows()
        finally:
            lease.close()
        return ScoreResult(
            id=f"score-{secrets.token_hex(12)}",
            created=created,
            model=self.model,
            continuations=tuple(logprobs),
            checkpoints=arm.checkpoints,
            positions=arm.steering_params.positions,
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
        return await _of(self._judging.submit(secrets.token_hex(8), lambda: verdicts(judge, prompt, texts)))

    async def in_studies(self, work: Callable[[Studies], T]) -> T:
        """`work` done with the studies; their file may be another process' for a while. Raises NotFound where the
        operator keeps none."""
        if (studies := self.studies) is None:
            raise NotFound("This server keeps no studies: MATSTEER_STUDIES names the file that it would keep them in.")
        return await _of(self._votes.submit("", lambda: work(studies)))

    async def _on_texts(self, key: str, length: int, work: Callable[[], T]) -> T:
        """`work` done on a thread; what is long is done one after another by `key`, so that short texts find a thread
        free."""
        if length <= LONG_TEXT:
            return await asyncio.to_thread(work)
        return await _of(self._long_texts.submit(key, work))

    async def checkpoints(self, name: str | None = None) -> list[CheckpointEntry]:
        """Every complete folder of checkpoints, or those of one name. One reader at a time."""
        return await _of(self._lists.submit("", lambda: self.registry.entries(name)))

    async def reload(self, name: str, version: str | None, *, activate: bool = False) -> LoadedCheckpoint:
        """See `Registry.reload`."""
        return await _of(self._loads.submit(name, lambda: self.registry.reload(name, version, activate=activate)))

    async def unload(self, name: str, version: str | None) -> list[str]:
        """See `Registry.unload`."""
        return await _of(self._loads.submit(name, lambda: self.registry.unload(name, version)))

    async def check_model(self, name: str | None) -> None:
        """Raises UnknownModel where a request names what is neither the base model nor a checkpoint."""
        if name is None or name == self.model or self.registry.find_loaded(name):
            return
        folder, at, version = name.partition("@")
        entries = await _of(self._loads.submit(folder, lambda: self.registry.entries(folder)))
        if not any(entry.problem is None and (not at or version == entry.version) for entry in entries):
            raise UnknownModel(f"There is no model {name!r}; GET /v1/models lists those there are.", param="model")

    async def _submit(self, params: GenerateParams, *, stream: bool) -> _RunningRequest:
        created, deadline = int(time.time()), time.monotonic() + self.settings.deadline_s
        self._check_ids(params.sampling)
        length = sum(map(len, params.prompts)) + _characters(params.messages)
        prompts = await self._on_texts("prompts", length, lambda: self._encode(params))
        lease = CheckpointLease(self.registry)
        try:
            found = [await self._acquire(arm.checkpoints, lease) for arm in params.arms]
            arms = await asyncio.to_thread(self._resolve_arms, params, found)
            steering_params = [arm.steering_params for arm in arms]
            record = self._note(arms, sum(map(len, prompts)), params.prompts or params.messages)
            record.arms = tuple(arm.name for arm in params.arms)
            name = f"gen-{secrets.token_hex(12)}"
            share = record.share(name)
            sequences = self._sequences(name, params, prompts, steering_params, stream=stream, share=share)
            give_back = self.keys.take_rows(record.key, len(sequences))
            release = lease.acquire()  # the engine needs the columns until all sequences have ended

            def on_end() -> None:
                release()
                give_back()

            def on_settled(ended: list[Finished]) -> None:
                for text in ended:
                    self.metrics.text(text, arms[text.sequence.index % len(arms)].checkpoints, record.key_name)

            events = RequestStream(
                len(sequences), on_end=on_end, on_settled=on_settled, interval=self.settings.stream_interval
            )
            try:
                self.engine.submit(sequences, events.on_event)
            except Exception:
                on_end()
                raise
            try:
                prompt_logprobs = self._score_prompts(
                    params, prompts, arms[0].steering_params, share=sequences[0].share
                )
            except Exception:  # the queue may be full for it alone: the texts must not go on for nobody
                self.engine.cancel(sequences[0].request_id)
                raise
        except BaseException:  # also the cancellation when the client has gone
            lease.close()
            raise
        return _RunningRequest(created, deadline, params, arms, sequences, events, lease, record, prompt_logprobs)

    def _note(self, arms: abc.Sequence[_ArmSteering], prompt_tokens: int, prompt: object) -> RequestRecord:
        """Notes in the request's record what the engine is about to be given."""
        record = current_record()
        named = (f"{one.checkpoint}@{one.version}" for arm in arms for one in arm.checkpoints)
        record.model, record.checkpoints = self.model, tuple(dict.fromkeys(named))
        record.prompt_tokens = prompt_tokens
        record.submitted_ns = time.time_ns()
        if self.settings.log_prompts:
            record.prompt = prompt
        return record

    def _score_prompts(
        self,
        params: GenerateParams,
        prompts: abc.Sequence[tuple[int, ...]],
        steering_params: SteeringParams,
        *,
        share: ShareKey,
    ) -> "Future[list[tuple[TokenLogprob, ...]]] | None":
        if not params.echo or params.sampling.logprobs is None:
            return None
        pairs = [(prompt[:1], prompt[1:]) for prompt in prompts if len(prompt) > 1]
        return self.engine.score(pairs, steering_params, params.sampling.logprobs, share=share)

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
        """Ends the request's sequences where the block is left before the result is there, and always its lease."""
        try:
            yield
        except BaseException:
            self.engine.cancel(request.sequences[0].request_id)
            if request.prompt_logprobs is not None:
                request.prompt_logprobs.cancel()
            raise
        finally:
            request.lease.close()

    async def _result(self, request: _RunningRequest, prompts: tuple[EchoedPrompt, ...]) -> GenerateResult:
        finished = await request.stream.finished()
        request.record.end(finished)
        texts = [tuple(finished[arm :: len(request.arms)]) for arm in range(len(request.arms))]
        reference = request.params.reference
        compared = [index for index in range(len(texts)) if index != reference]
        pairs = [self._pairs(texts[index], texts[reference]) for index in compared]
        divergences = iter(await self._compare(request, [pair for each in pairs for pair in each]))
        of_arm = {index: tuple(islice(divergences, len(each))) for index, each in zip(compared, pairs, strict=True)}
        arms = [
            ArmResult(arm.name, steering.checkpoints, texts[index], of_arm.get(index))
            for index, (arm, steering) in enumerate(zip(request.params.arms, request.arms, strict=True))
        ]
        return GenerateResult(
            id=request.sequences[0].request_id,
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
        tokens = [one.prompt_token_ids for one in request.sequences[:: request.params.n * len(request.arms)]]
        logprobs: list[tuple[TokenLogprob, ...] | None] = [None] * len(tokens)
        if request.prompt_logprobs is not None:
            scored = await self._until(request.deadline, request.prompt_logprobs)
            each = iter(scored)
            logprobs = [next(each) if len(prompt) > 1 else () for prompt in tokens]
        return tuple(map(EchoedPrompt, request.params.prompts, tokens, logprobs))

    @staticmethod
    def _pairs(texts: abc.Sequence[Finished], reference: abc.Sequence[Finished]) -> list[ComparisonPair]:
        return [
            ComparisonPair(
                text.sequence.prompt_token_ids,
                text.token_ids,
                base.token_ids,
                text.sequence.steering_params,
                base.sequence.steering_params,
            )
            for text, base in zip(texts, reference, strict=True)
        ]

    async def _compare(self, request: _RunningRequest, pairs: abc.Sequence[ComparisonPair]) -> list[Divergence]:
        """Where one of them fails, nobody waits for the others: they end before the request's lease does."""
        futures = [self.engine.compare(pair, share=request.sequences[0].share) for pair in pairs]
        try:
            return await asyncio.gather(*(self._until(request.deadline, future) for future in futures))
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    async def _until(self, deadline: float, future: "Future[T]") -> T:
        """The future's result; after the deadline it is cancelled. Raises DeadlineExceeded."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), deadline - time.monotonic())
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

    async def _acquire(self, refs: abc.Sequence[CheckpointRef], lease: CheckpointLease) -> _Found:
        """The checkpoints of an arm; those that are not loaded yet are loaded first, beside everything else.

        Raises UnknownCheckpoint, UnusableCheckpoint, WrongModel, UnknownModel.
        """
        found = []
        for ref in refs:
            while (loaded := lease.add(ref.checkpoint)) is None and ref.checkpoint is not None:
                await self._load(ref, ref.checkpoint)
            if loaded is not None:
                found.append((ref, loaded))
            elif ref.attributes:
                raise UnknownCheckpoint(
                    "No checkpoint is active, so there are no attributes; name one in 'checkpoint'.",
                    param=f"{ref.param}attributes",
                )
        return found

    async def _load(self, ref: CheckpointRef, reference: str) -> None:
        param = ref.named_by or f"{ref.param}checkpoint"
        name = reference.partition("@")[0]
        try:
            await _of(self._loads.submit(name, lambda: self.registry.load(reference, param)))
        except UnknownCheckpoint:
            if ref.named_by != "model":
                raise
            raise UnknownModel(
                f"There is no model {reference!r}; GET /v1/models lists those there are.", param="model"
            ) from None

    def _resolve_arms(self, params: GenerateParams, found: abc.Sequence[_Found]) -> tuple[_ArmSteering, ...]:
        form = "chat" if params.messages else "plain" if all(isinstance(one, str) for one in params.prompts) else None
        return tuple(self._resolve(one, params.positions, form) for one in found)

    def _resolve(self, found: _Found, positions: PositionsName | None, form: str | None) -> _ArmSteering:
        """Checks the multipliers of an arm. Raises UnknownAttribute, InvalidField."""
        for index, (ref, loaded) in enumerate(found):
            if any(loaded is other for _, other in found[:index]):
                raise InvalidField(
                    f"Checkpoint {loaded.label} is named twice; put its attributes together.",
                    param=f"{ref.param}checkpoint",
                )
        columns = [
            (loaded.handle, loaded.multipliers(ref.attributes, f"{ref.param}attributes")) for ref, loaded in found
        ]
        for (_, loaded), (_, multipliers) in zip(found, columns, strict=True):
            if form and any(multipliers):
                self._remark(loaded, form)
        applied = [
            AppliedCheckpoint(
                loaded.name,
                loaded.version,
                loaded.sha256,
                dict(loaded.defaults if ref.attributes is None else ref.attributes),
            )
            for ref, loaded in found
        ]
        chosen = _positions(positions, [loaded for _, loaded in found])
        return _ArmSteering(SteeringParams(SequenceSteering.of(columns), chosen), tuple(applied))

    def _remark(self, loaded: LoadedCheckpoint, form: str) -> None:
        """Logs, once for a checkpoint, that requests have another form than what it was trained on."""
        if loaded.form in (None, form) or loaded in self._remarked:
            return
        self._remarked.add(loaded)
        log.warning(
            "checkpoint %s was trained on %s, and a request steers %s with it: it may steer less there (said once)",
            loaded.label, FORMS[loaded.form], FORMS[form],
        )  # fmt: skip

    def _sequences(
        self,
        request: str,
        params: GenerateParams,
        prompts: abc.Sequence[tuple[int, ...]],
        arms: abc.Sequence[SteeringParams],
        *,
        stream: bool,
        share: ShareKey,
    ) -> list[Sequence]:
        count = len(prompts) * params.n * len(arms)
        if count > self.settings.max_request_rows:
            raise InvalidField(
                f"The request asks for {count} texts (prompts x n x arms); at most {self.settings.max_request_rows}.",
                param="n" if params.n > 1 else "prompt",
            )
        sequences: list[Sequence] = []
        for prompt in prompts:
            # All arms share a seed. A random one is drawn for each prompt, so that a prompt sent twice gives two texts.
            # The `n` texts of a prompt differ by `choice`.
            seed = secrets.randbits(63) if params.seed is None else params.seed
            room = params.sampling.max_new_tokens
            if self.codec.context is not None:
                room = min(room, self.codec.context - len(prompt))
            if len(arms) > 1:
                room = min(room, self._room_for_comparison(prompt))
            for choice in range(params.n):
                sampling = replace(params.sampling, max_new_tokens=room, seed=seed, choice=choice)
                for arm in arms:
                    one = Sequence(request, len(sequences), prompt, sampling, arm, stream, params.trace, share=share)
                    sequences.append(one)
        return sequences

    def _room_for_comparison(self, prompt: tuple[int, ...]) -> int:
        """How many new tokens two arms may have, so that they can be compared: both are in the cache at once."""
        most = self.engine.max_pair_tokens
        if len(prompt) >= most:
            raise PromptTooLong(
                f"The prompt is too long: it has {len(prompt)} tokens; arms are compared two at a time, and the cache "
                f"has room for two texts of {most} tokens, prompt and answer together.",
                param="prompt",
            )
        return most - len(prompt)


def _characters(messages: abc.Sequence[abc.Mapping[str, Any]]) -> int:
    return sum(len(text) for message in messages for text in texts_of(message.get("content")))


async def _of(future: "Future[T]") -> T:
    return await asyncio.wrap_future(future)


def _chunk(request: _RunningRequest, token: TokenEvent) -> TokenChunk:
    index, arm = divmod(token.sequence.index, len(request.arms))
    return TokenChunk(request.params.arms[arm].name, index, token)


def _positions(asked: PositionsName | None, checkpoints: abc.Sequence[LoadedCheckpoint]) -> PositionsName:
    """As the request says, else as the checkpoints do. Raises InvalidField where they do not agree."""
    if asked is not None:
        return asked
    named = {loaded.positions for loaded in checkpoints}
    if len(named) > 1:
        raise InvalidField(
            f"The checkpoints steer at different positions ({', '.join(sorted(named))}); choose with 'positions'.",
            param="positions",
        )
    return named.pop() if named else "generated"
