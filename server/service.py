"""The use cases: text in, results out. Knows no HTTP and no tensors."""

import asyncio
import secrets
import time
import weakref
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from server.config import Settings
from server.engine.engine import Engine
from server.engine.types import Finished, Likelihood, Pair, Piece, PositionsName, Row, Steer
from server.errors import DeadlineExceeded, InvalidField, UnknownCheckpoint, UnknownModel
from server.exchange import (
    Answer,
    ArmAnswer,
    Ask,
    Comparison,
    Echo,
    Part,
    ScoreAnswer,
    ScoreAsk,
    SteeringReport,
    Stream,
    Told,
    Use,
)
from server.metrics import Metrics
from server.registry import Holding, Loaded, Registry
from server.teller import Teller
from server.ticket import Ticket
from server.tokenizer import Codec
from steering.types import RowSteering

T = TypeVar("T")


@dataclass(frozen=True)
class _Steering:
    """An arm's steering, resolved: what its rows carry, what it is made of, and how to report it."""

    steer: Steer
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class _Run:
    """A request that the engine has taken: of each text a row for each arm, neighbours."""

    created: int
    until: float  # of time.monotonic: the request's time is up
    ask: Ask
    arms: tuple[_Steering, ...]
    rows: list[Row]
    ticket: Ticket
    holding: Holding
    echoes: "Future[list[tuple[Likelihood, ...]]] | None"  # of prompts without their first tokens, while it is made
    teller: Teller


class Service:
    """What the server can do, for any front end."""

    def __init__(self, settings: Settings, codec: Codec, engine: Engine, registry: Registry, metrics: Metrics) -> None:
        self.settings = settings
        self.model = settings.served_name
        self.created = int(time.time())
        self.codec = codec
        self.engine = engine
        self.registry = registry
        self.metrics = metrics

    async def generate(self, ask: Ask) -> Answer:
        """Every prompt, `n` times, by every arm.

        A cancelled call (the client has gone) ends its rows before the engine's next step.
        """
        run = await self._begin(ask, stream=False)
        async with self._until_done(run):
            return await self._answer(run, await self._echoes(run))

    async def stream(self, ask: Ask) -> Stream:
        """The same, the tokens as they come after the echoes, and the answer at the end. What is wrong is raised at
        once."""
        run = await self._begin(ask, stream=True)
        told = self._tell(run)
        # A client that leaves before the first token is asked for never gets `told` to begin, nor to end.
        weakref.finalize(told, run.holding.close)
        return told

    async def score(self, ask: ScoreAsk) -> ScoreAnswer:
        """The log-likelihood of each continuation, steered as if it were being generated."""
        created, until = int(time.time()), time.monotonic() + self.settings.deadline_s
        texts = await asyncio.to_thread(self._split, ask)
        holding = Holding(self.registry)
        try:
            steering = await asyncio.to_thread(self._resolve, ask.uses, ask.positions, holding)
            told = await self._in_time(self.engine.score(texts, steering.steer), until)
        finally:
            holding.close()
        return ScoreAnswer(
            id=f"score-{secrets.token_hex(12)}",
            created=created,
            model=self.model,
            scores=await asyncio.to_thread(Teller(self.codec).scores, told),
            steering=SteeringReport(steering.parts, steering.steer.positions, None),
        )

    async def _begin(self, ask: Ask, *, stream: bool) -> _Run:
        created, until = int(time.time()), time.monotonic() + self.settings.deadline_s
        prompts = await asyncio.to_thread(self._encode, ask)
        holding = Holding(self.registry)
        try:
            arms = await asyncio.to_thread(self._arms, ask, holding)
            rows = self._rows(f"gen-{secrets.token_hex(12)}", ask, prompts, [arm.steer for arm in arms], stream=stream)
            ended = holding.claim()
            ticket = Ticket(len(rows), on_end=ended, interval=self.settings.stream_interval)
            try:
                self.engine.submit(rows, ticket)
            except Exception:
                ended()
                raise
            echoes = self._score_prompts(ask, prompts, arms[0].steer)
        except BaseException:  # a client that goes away cancels
            holding.close()
            raise
        return _Run(created, until, ask, arms, rows, ticket, holding, echoes, Teller(self.codec, offsets=ask.offsets))

    def _score_prompts(
        self, ask: Ask, prompts: Sequence[tuple[int, ...]], steer: Steer
    ) -> "Future[list[tuple[Likelihood, ...]]] | None":
        if not ask.echo or ask.sampling.logprobs is None:
            return None
        given = [(prompt[:1], prompt[1:]) for prompt in prompts if len(prompt) > 1]
        return self.engine.score(given, steer, ask.sampling.logprobs)

    async def _tell(self, run: _Run) -> Stream:
        async with self._until_done(run):
            echoes = await self._echoes(run)
            if echoes:
                yield echoes
            async for pieces in run.ticket.pieces():
                yield [_told(run, piece) for piece in pieces]
            yield [await self._answer(run, echoes)]

    @asynccontextmanager
    async def _until_done(self, run: _Run) -> AsyncIterator[None]:
        """Whoever leaves before the answer is there takes the rows with them."""
        try:
            yield
        except BaseException:
            self.engine.cancel(run.rows[0].request)
            if run.echoes is not None:
                run.echoes.cancel()
            raise
        finally:
            run.holding.close()

    async def _answer(self, run: _Run, echoes: tuple[Echo, ...]) -> Answer:
        finished = await run.ticket.finished()
        for event in finished:
            self.metrics.text(event)
        events = [finished[arm :: len(run.arms)] for arm in range(len(run.arms))]
        reference = run.ask.reference
        arms = []
        for index, (arm, steering, mine) in enumerate(zip(run.ask.arms, run.arms, events, strict=True)):
            results = await asyncio.to_thread(run.teller.results, mine, steering.parts)
            compared = None if index == reference else await self._compare(mine, events[reference], run.until)
            arms.append(ArmAnswer(arm.name, results, compared))
        return Answer(run.rows[0].request, run.created, self.model, tuple(arms), echoes)

    async def _echoes(self, run: _Run) -> tuple[Echo, ...]:
        if not run.ask.echo:
            return ()
        prompts = [row.tokens for row in run.rows[:: run.ask.n * len(run.arms)]]
        scored: Sequence[Sequence[Likelihood] | None] = [None] * len(prompts)
        if run.echoes:
            told = await self._in_time(run.echoes, run.until)
            found = iter(told)
            scored = [next(found) if len(prompt) > 1 else () for prompt in prompts]
        return await asyncio.to_thread(run.teller.echoes, run.ask.prompts, prompts, scored)

    def _encode(self, ask: Ask) -> list[tuple[int, ...]]:
        if ask.messages:
            return [self.codec.encode_chat(ask.messages, "messages")]
        return [
            self.codec.encode(prompt, "prompt" if ask.single else f"prompt.{index}")
            for index, prompt in enumerate(ask.prompts)
        ]

    def _split(self, ask: ScoreAsk) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        return [
            self.codec.encode_pair(ask.prompt, continuation, f"continuations.{index}")
            for index, continuation in enumerate(ask.continuations)
        ]

    def _arms(self, ask: Ask, holding: Holding) -> tuple[_Steering, ...]:
        return tuple(self._resolve(arm.uses, ask.positions, holding) for arm in ask.arms)

    def _resolve(self, uses: Sequence[Use], asked: PositionsName | None, holding: Holding) -> _Steering:
        """Names to loaded columns; a checkpoint that is not loaded yet is loaded now. Blocks."""
        used = [(use, loaded) for use in uses if (loaded := self._checkpoint(use, holding))]
        for index, (use, one) in enumerate(used):
            if any(one is other for _, other in used[:index]):
                raise InvalidField(
                    f"Checkpoint {one.label} is named twice; put its attributes together.",
                    param=f"{use.param}checkpoint",
                )
        parts = [(one, one.multipliers(use.attributes, f"{use.param}attributes")) for use, one in used]
        positions = _positions(asked, [one for one, _ in parts])
        return _Steering(
            Steer(RowSteering.of([(one.handle, multipliers) for one, multipliers in parts]), positions),
            tuple(
                Part(
                    one.name, one.version, one.sha256, dict(one.defaults if use.attributes is None else use.attributes)
                )
                for use, one in used
            ),
        )

    @staticmethod
    def _checkpoint(use: Use, holding: Holding) -> Loaded | None:
        try:
            loaded = holding.take(use.checkpoint, use.named_by or f"{use.param}checkpoint")
        except UnknownCheckpoint:
            if use.named_by != "model":
                raise
            raise UnknownModel(
                f"There is no model {use.checkpoint!r}; GET /v1/models lists those there are.", param="model"
            ) from None
        if loaded is None and use.attributes:
            raise UnknownCheckpoint(
                "No checkpoint is active, so there are no attributes; name one in 'checkpoint'.",
                param=f"{use.param}attributes",
            )
        return loaded

    def _rows(
        self, request: str, ask: Ask, prompts: Sequence[tuple[int, ...]], arms: Sequence[Steer], *, stream: bool
    ) -> list[Row]:
        count = len(prompts) * ask.n * len(arms)
        if count > self.settings.max_request_rows:
            raise InvalidField(
                f"The request asks for {count} texts (prompts x n x arms); at most {self.settings.max_request_rows}.",
                param="n" if ask.n > 1 else "prompt",
            )
        rows: list[Row] = []
        for prompt in prompts:
            # All arms share a seed. Drawn ones differ by prompt, so that a prompt sent twice gives two texts; the
            # index among the choices makes the choices differ.
            seed = secrets.randbits(63) if ask.seed is None else ask.seed
            room = ask.sampling.max_new_tokens
            if self.codec.context is not None:
                room = min(room, self.codec.context - len(prompt))
            for choice in range(ask.n):
                sampling = replace(ask.sampling, max_new_tokens=room, seed=seed, choice=choice)
                rows += [
                    Row(request, len(rows) + i, prompt, sampling, arm, stream, ask.trace) for i, arm in enumerate(arms)
                ]
        return rows

    async def _in_time(self, future: "Future[T]", until: float) -> T:
        """Raises DeadlineExceeded; what nobody waits for any more is done no further."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), until - time.monotonic())
        except TimeoutError:
            raise DeadlineExceeded(f"The request took longer than {self.settings.deadline_s:g} s.") from None

    async def _compare(
        self, steered: Sequence[Finished], reference: Sequence[Finished], until: float
    ) -> tuple[Comparison, ...]:
        compared = []
        for mine, base in zip(steered, reference, strict=True):
            pair = Pair(mine.row.tokens, mine.tokens, base.tokens, mine.row.steer, base.row.steer)
            divergence = await self._in_time(self.engine.compare(pair), until)
            compared.append(
                Comparison(
                    first_divergence=_first_difference(mine.tokens, base.tokens),
                    kl_per_token=divergence.kl_per_token,
                    logprob_under_baseline=divergence.logprob_under_baseline,
                    perplexity_ratio=divergence.perplexity_ratio,
                )
            )
        return tuple(compared)


def _told(run: _Run, piece: Piece) -> Told:
    index, arm = divmod(piece.row.index, len(run.arms))
    return run.teller.told(run.ask.arms[arm].name, index, piece)


def _positions(asked: PositionsName | None, loaded: Sequence[Loaded]) -> PositionsName:
    """As asked, else as the checkpoints say; where they disagree the client has to choose."""
    if asked is not None:
        return asked
    named = {one.positions for one in loaded}
    if len(named) > 1:
        raise InvalidField(
            f"The checkpoints steer at different positions ({', '.join(sorted(named))}); choose with 'positions'.",
            param="positions",
        )
    return named.pop() if named else "generated"


def _first_difference(mine: Sequence[int], base: Sequence[int]) -> int | None:
    """The first index at which two texts differ, one that ends earlier included; None when they are the same."""
    for index, (one, other) in enumerate(zip(mine, base, strict=False)):
        if one != other:
            return index
    return None if len(mine) == len(base) else min(len(mine), len(base))
