"""The engine and its checkpoints, for whoever runs in the same process."""

import asyncio
import logging
import weakref
from collections import abc
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TypeVar

from server.engine.divergence import Divergence
from server.engine.engine import Engine
from server.engine.scoring import ComparisonPair
from server.engine.sequence import Event, PositionsName, Sequence, ShareKey, SteeringParams, TokenEvent, TokenLogprob
from server.engine_client import (
    AppliedSteering,
    CheckpointEntry,
    CheckpointInfo,
    EngineFacts,
    EngineRequest,
    EngineSnapshot,
    Form,
    GateSample,
    OnEvent,
    ScoreRequest,
    Scores,
    Submitted,
    TokenIds,
)
from server.errors import InvalidField, UnknownCheckpoint, UnknownModel
from server.registry import CheckpointLease, LoadedCheckpoint, Registry
from server.threads import KeyedThreads, result_of
from server.types import AppliedCheckpoint, CheckpointRef
from steering.types import SequenceSteering

T = TypeVar("T")
LOADING_THREADS = 4  # so many at once, since each may take the memory of two checkpoints (`MAX_TENSORS`)
LOOKING_THREADS = 4
log = logging.getLogger(__name__)
FORMS = {"chat": "conversations (messages)", "plain": "plain text (prompt)"}
_Found = list[tuple[CheckpointRef, LoadedCheckpoint]]  # an arm's checkpoints
_Delivery = tuple[asyncio.AbstractEventLoop, OnEvent, Event]


@dataclass(frozen=True)
class _RunningRequest:
    """A request until its `close`."""

    lease: CheckpointLease
    sequences: list[Sequence]
    prompt_logprobs: "Future[list[tuple[TokenLogprob, ...]]] | None"


class EngineCore:
    """An `EngineClient` for this process: checkpoints are found and held here, for as long as a request needs them.

    The events of a step reach an event loop together: it is woken once.
    """

    def __init__(
        self, engine: Engine, registry: Registry, facts: EngineFacts, *, on_stop: abc.Callable[[], None] | None = None
    ) -> None:
        """`on_stop`: called when the engine has stopped."""
        self.engine = engine
        self._on_stop = on_stop
        self.registry = registry
        self.facts = facts
        engine.on_flush = self._deliver
        self._undelivered: list[_Delivery] = []  # used by the engine's thread alone
        self._requests: dict[str, _RunningRequest] = {}
        self._remarked: weakref.WeakSet[LoadedCheckpoint] = weakref.WeakSet()
        # What reads files has threads of its own: requests that do not need it never wait for it. What only looks at
        # them, since they have been read, does not wait for what reads others.
        self._loads = KeyedThreads(LOADING_THREADS, "load")
        self._looks = KeyedThreads(LOOKING_THREADS, "look")
        self._lists = KeyedThreads(1, "list")

    @property
    def failure(self) -> str | None:
        return self.engine.failure

    async def submit(self, request: EngineRequest, on_event: OnEvent) -> Submitted:
        lease = CheckpointLease(self.registry)
        try:
            found = [await self._acquire(refs, lease) for refs in request.arms]
            resolved = await asyncio.to_thread(self._resolve_arms, found, request.positions, request.form)
            steering = [params for params, _ in resolved]
            sequences = request.sequences(steering)
            self._submit(sequences, on_event, lease)
            try:
                logprobs = (
                    self._score_prompts(request, steering[0], sequences[0].share) if request.echo_logprobs else None
                )
            except Exception:  # the queue may be full for it alone: the texts must not go on for nobody
                self.engine.cancel(request.id)
                raise
        except BaseException:  # also the cancellation when the client has gone
            lease.close()
            raise
        self._requests[request.id] = _RunningRequest(lease, sequences, logprobs)
        return Submitted(sequences, tuple(applied for _, applied in resolved))

    def cancel(self, request_id: str) -> None:
        self.engine.cancel(request_id)
        request = self._requests.get(request_id)
        if request is not None and request.prompt_logprobs is not None:
            request.prompt_logprobs.cancel()

    def stop_sequence(self, request_id: str, index: int) -> None:
        """Where a stop string is complete, for an engine that makes no texts."""
        self.engine.stop_sequence(request_id, index)

    def close(self, request_id: str) -> None:
        if (request := self._requests.pop(request_id, None)) is not None:
            request.lease.close()

    async def prompt_logprobs(self, request_id: str) -> list[tuple[TokenLogprob, ...]]:
        future = self._requests[request_id].prompt_logprobs
        assert future is not None, "the request did not ask for them"
        return await result_of(future)

    async def compare(
        self, request_id: str, steered: int, reference: int, texts: tuple[TokenIds, TokenIds]
    ) -> Divergence:
        sequences = self._requests[request_id].sequences
        mine, base = sequences[steered], sequences[reference]
        pair = ComparisonPair(mine.prompt_token_ids, *texts, mine.steering_params, base.steering_params)
        return await result_of(self.engine.compare(pair, share=mine.share))

    async def score(self, request: ScoreRequest) -> Scores:
        lease = CheckpointLease(self.registry)
        try:
            found = await self._acquire(request.checkpoints, lease)
            ((steering, applied),) = await asyncio.to_thread(self._resolve_arms, [found], request.positions, "plain")
            scored = await result_of(self.engine.score([*request.texts], steering, share=request.share))
            return Scores(tuple(scored), applied)
        finally:
            lease.close()

    async def checkpoints(self, name: str | None) -> list[CheckpointEntry]:
        """Of the list of all, one reader at a time."""
        if name is None:
            return await result_of(self._lists.submit("", lambda: self.registry.entries()))
        return await self._on_folders(name, lambda: self.registry.entries(name))

    async def find_checkpoint(self, name: str) -> CheckpointInfo | None:
        found = self.registry.find_loaded(name)
        return found.info if found else None

    async def reload(self, name: str, version: str | None, activate: bool) -> CheckpointInfo:
        loaded = await self._on_folders(name, lambda: self.registry.reload(name, version, activate=activate))
        return loaded.info

    async def unload(self, name: str, version: str | None) -> list[str]:
        return await self._on_folders(name, lambda: self.registry.unload(name, version))

    async def snapshot(self) -> EngineSnapshot:
        active, loaded = self.registry.active, self.registry.loaded
        return EngineSnapshot(
            trouble=self.engine.trouble,
            stats=self.engine.stats,
            status=self.engine.status,
            open_sequences=self.engine.open_sequences,
            pins=self.registry.pins,
            loaded=[one.info for one in loaded],
            active=active.info if active else None,
            loads=self.registry.loads,
            swaps=self.registry.swaps,
            gates={one.label: self._gates(one) for one in loaded},
        )

    def _gates(self, loaded: LoadedCheckpoint) -> dict[str, GateSample]:
        return {
            attribute: GateSample(
                seen.gates.cumulative(),
                seen.gates.total,
                seen.delta_norms.cumulative(),
                seen.delta_norms.total,
                seen.saturated,
            )
            for attribute, seen in self.engine.gate_stats(loaded.handle).items()
        }

    def drain(self) -> None:
        self.engine.drain()

    def stop(self) -> None:
        self.engine.stop()
        if self._on_stop:
            self._on_stop()

    # --- events ---------------------------------------------------------------------------------

    def _submit(self, sequences: list[Sequence], on_event: OnEvent, lease: CheckpointLease) -> None:
        """The engine needs the columns until all sequences have ended, whether or not anybody waits for them."""
        release, loop, left = lease.acquire(), asyncio.get_running_loop(), len(sequences)

        def take(event: Event) -> None:
            nonlocal left
            self._undelivered.append((loop, on_event, event))
            if not isinstance(event, TokenEvent):
                left -= 1
                if not left:
                    release()

        try:
            self.engine.submit(sequences, take)
        except Exception:
            release()
            raise

    def _deliver(self) -> None:
        """Called on the engine's thread when the events of a step have been taken."""
        if not self._undelivered:
            return
        events, self._undelivered = self._undelivered, []
        for loop, of_loop in groupby(events, key=itemgetter(0)):
            try:
                loop.call_soon_threadsafe(_hand_over, list(of_loop))
            except RuntimeError:  # the loop has closed: nobody waits, and the engine goes on
                log.debug("nobody took the events of a step")

    # --- checkpoints ----------------------------------------------------------------------------

    def _score_prompts(
        self, request: EngineRequest, steering: SteeringParams, share: ShareKey
    ) -> "Future[list[tuple[TokenLogprob, ...]]]":
        prompts = [prompt.token_ids for prompt in request.prompts]
        pairs = [(prompt[:1], prompt[1:]) for prompt in prompts if len(prompt) > 1]
        return self.engine.score(pairs, steering, request.sampling.logprobs or 0, share=share)

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
            await self._on_folders(name, lambda: self.registry.load(reference, param))
        except UnknownCheckpoint:
            if ref.named_by != "model":
                raise
            raise UnknownModel(
                f"There is no model {reference!r}; GET /v1/models lists those there are.", param="model"
            ) from None

    async def _on_folders(self, name: str, work: abc.Callable[[], T]) -> T:
        """`work` with the folders of a name, after what is done with them already."""
        if not self._loads.busy(name) and await result_of(
            self._looks.submit(name, lambda: self.registry.has_read(name))
        ):
            return await result_of(self._looks.submit(name, work))
        return await result_of(self._loads.submit(name, work))

    def _resolve_arms(
        self, found: abc.Sequence[_Found], positions: PositionsName | None, form: Form | None
    ) -> list[tuple[SteeringParams, AppliedSteering]]:
        return [self._resolve(one, positions, form) for one in found]

    def _resolve(
        self, found: _Found, positions: PositionsName | None, form: Form | None
    ) -> tuple[SteeringParams, AppliedSteering]:
        """Checks the multipliers of an arm -> for the engine, and for the answer. Raises UnknownAttribute,
        InvalidField."""
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
        applied = tuple(
            AppliedCheckpoint(
                loaded.name,
                loaded.version,
                loaded.sha256,
                dict(loaded.defaults if ref.attributes is None else ref.attributes),
            )
            for ref, loaded in found
        )
        chosen = _positions(positions, [loaded for _, loaded in found])
        for (_, loaded), (_, multipliers) in zip(found, columns, strict=True):
            if chosen != "generated" and (name := loaded.latched(multipliers)):
                raise InvalidField(
                    f"{name!r} of checkpoint {loaded.label} has a latched gate, which is known from the last prompt "
                    f"token on: positions must be 'generated', not {chosen!r}.",
                    param="positions",
                )
        return SteeringParams(SequenceSteering.of(columns), chosen), AppliedSteering(applied, chosen)

    def _remark(self, loaded: LoadedCheckpoint, form: Form) -> None:
        """Logs, once for a checkpoint, that requests have another form than what it was trained on."""
        if loaded.form in (None, form) or loaded in self._remarked:
            return
        self._remarked.add(loaded)
        log.warning(
            "checkpoint %s was trained on %s, and a request steers %s with it: it may steer less there (said once)",
            loaded.label, FORMS[loaded.form], FORMS[form],
        )  # fmt: skip


def _hand_over(events: list[_Delivery]) -> None:
    for _, on_event, event in events:
        try:
            on_event(event)
        except Exception:  # of one request, and of nobody else
            log.exception("nobody took an event of request %s", event.sequence.request_id)


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
