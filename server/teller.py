"""What the engine says, as clients are told it: with the texts of tokens, and without infinities."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from server.engine.types import Draw, Finished, Likelihood, Piece, Row
from server.exchange import Echo, Part, Result, Score, Spelled, Spoken, SteeringReport, Told, Traced
from server.tokenizer import Codec, TextOffsets

IMPOSSIBLE = -9999.0


class Teller:
    """Tells of one request. What tells of many tokens at once takes its time: not for the event loop."""

    def __init__(self, codec: Codec, *, offsets: bool = False) -> None:
        """`offsets`: log-probabilities say where in the text their tokens begin."""
        self._codec = codec
        self._wants_offsets = offsets
        self._offsets: dict[Row, TextOffsets | None] = {}  # of the rows that stream

    def told(self, arm: str, index: int, piece: Piece) -> Told:
        """A token of the text of that index among the arm's; to be called for each of its tokens, in order."""
        row, draw = piece.row, piece.draw
        if row not in self._offsets:
            self._offsets[row] = self._offsets_after(row.tokens)
        likelihoods = [draw.likelihood] if draw.likelihood else []
        return Told(
            arm=arm,
            index=index,
            token_id=draw.token,
            text=piece.text,
            logprob=next(self._spoken(likelihoods, self._offsets[row]), None),
            trace=self._traced(draw) if row.trace else None,
        )

    def echoes(
        self,
        given: Iterable[str | tuple[int, ...]],
        prompts: Iterable[Sequence[int]],
        likelihoods: Iterable[Iterable[Likelihood] | None],
    ) -> tuple[Echo, ...]:
        """Prompts as they were given, as the model reads them, and each with the likelihoods of its tokens from the
        second one on, where they were asked for."""
        return tuple(self._echo(*each) for each in zip(given, prompts, likelihoods, strict=True))

    def results(self, events: Iterable[Finished], parts: tuple[Part, ...]) -> tuple[Result, ...]:
        """Texts that have ended. `parts`: what has steered them."""
        return tuple(self._result(event, parts) for event in events)

    def scores(self, texts: Iterable[Sequence[Likelihood]]) -> tuple[Score, ...]:
        """Of texts, from the likelihoods of their tokens."""
        return tuple(
            Score(
                _finite(sum(one.logprob for one in text)), tuple(self._spelled(one.token, one.logprob) for one in text)
            )
            for text in texts
        )

    def _echo(
        self, given: str | tuple[int, ...], prompt: Sequence[int], likelihoods: Iterable[Likelihood] | None
    ) -> Echo:
        whole = self._codec.decode_all(prompt)
        text = given if isinstance(given, str) else whole
        spoken = None
        if likelihoods is not None:
            offsets = self._offsets_after((), special=True)
            if offsets:
                offsets.next(prompt[0])
            # What the tokenizer has put before the text is no part of it.
            lead = max(0, whole.find(text))
            spoken = tuple(self._spoken(likelihoods, offsets, lambda at: min(max(0, at - lead), len(text))))
        return Echo(text, self._codec.token_text(prompt[0]), spoken)

    def _result(self, event: Finished, parts: tuple[Part, ...]) -> Result:
        row, draws = event.row, event.draws
        likelihoods = (draw.likelihood for draw in draws if draw.likelihood)
        asked = row.sampling.logprobs is not None
        return Result(
            text=event.text,
            token_ids=event.tokens,
            reason=event.reason,
            prompt_tokens=len(row.tokens),
            steering=SteeringReport(parts, row.steer.positions, event.steered_tokens),
            timing=event.timing,
            logprobs=tuple(self._spoken(likelihoods, self._offsets_after(row.tokens))) if asked else None,
            trace=tuple(map(self._traced, draws)) if row.trace else None,
        )

    def _spelled(self, token: int, logprob: float) -> Spelled:
        return Spelled(token, self._codec.token_text(token), _finite(logprob))

    def _offsets_after(self, tokens: Sequence[int], *, special: bool = False) -> TextOffsets | None:
        return TextOffsets(self._codec, tokens, special=special) if self._wants_offsets else None

    def _spoken(
        self,
        likelihoods: Iterable[Likelihood],
        offsets: TextOffsets | None,
        placed: Callable[[int], int] = lambda at: at,
    ) -> Iterator[Spoken]:
        for one in likelihoods:
            offset = placed(offsets.next(one.token)) if offsets else None
            top = tuple(map(self._spelled, one.top_tokens, one.top_logprobs))
            yield Spoken(self._spelled(one.token, one.logprob), top, offset)

    def _traced(self, draw: Draw) -> Traced:
        return Traced(draw.token, self._codec.token_text(draw.token).text, draw.touches)


def _finite(logprob: float) -> float:
    """JSON has no minus infinity: what is impossible under the model has OpenAI's number for it."""
    return max(logprob, IMPOSSIBLE)
