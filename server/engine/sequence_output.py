"""One sequence's new tokens, the text that they make, and when it ends."""

from server.engine.sequence import (
    Finished,
    FinishReason,
    Progress,
    SampledToken,
    Sequence,
    Timing,
    TokenEvent,
)
from server.engine.text_builder import Decoders, TextBuilder


class SequenceOutput:
    """Takes tokens until an end-of-text token, a stop string, the length or a cancellation ends the sequence."""

    def __init__(self, sequence: Sequence, eos: frozenset[int], decoders: Decoders | None) -> None:
        """`eos`: the model's end tokens. Without `decoders` there is no text, and no stop string is looked for: that is
        left to whoever takes the events."""
        sampling = sequence.sampling_params
        sequence.end_token_ids = (frozenset() if sampling.ignore_eos else eos) | set(sampling.stop_token_ids)
        self.sequence = sequence
        self.token_ids: list[int] = []
        self._tokens: list[SampledToken] = []
        self._text = TextBuilder(decoders, sequence.prompt_token_ids, sampling) if decoders else None
        self._sent = 0  # characters of the text that token events have sent

    def accept(self, token: SampledToken) -> FinishReason | None:
        """Takes one step's token; returns why the sequence ends, or None while it goes on."""
        sampling = self.sequence.sampling_params
        self.token_ids.append(token.token_id)
        if sampling.logprobs is not None or self.sequence.trace:
            self._tokens.append(token)
        if token.token_id in self.sequence.end_token_ids:
            if self._text is not None:
                self._text.end(token.token_id)
            return "stop"
        if self._text is not None:
            self._text.push(token.token_id)
        if sampling.stop and self._read_and_check_stop():
            return "stop"
        return "length" if len(self.token_ids) >= sampling.max_new_tokens else None

    def finish(self, reason: FinishReason, steered_tokens: int, timing: Timing) -> Finished:
        """The sequence's last event."""
        if self._read_and_check_stop(final=True) and reason == "length":
            reason = "stop"
        return Finished(
            sequence=self.sequence,
            token_ids=tuple(self.token_ids),
            text="" if self._text is None else self._text.text,
            finish_reason=reason,
            steered_tokens=steered_tokens,
            timing=timing,
            tokens=tuple(self._tokens),
        )

    def token_event(self, token: SampledToken, *, last: bool, progress: Progress | None = None) -> TokenEvent:
        """What the token that was accepted adds to the text that is certain."""
        index = len(self.token_ids) - 1
        if self._text is None:
            return TokenEvent(self.sequence, index, token, "", progress)
        if not self.sequence.sampling_params.stop and not last:
            self._read_and_check_stop()
        certain = len(self._text.text) if last else self._text.certain
        text, self._sent = self._text.text[self._sent : certain], max(self._sent, certain)
        return TokenEvent(self.sequence, index, token, text)

    @property
    def needs_reader(self) -> bool:
        """Whether a stop string may end the sequence that is not looked for here."""
        return self._text is None and bool(self.sequence.sampling_params.stop)

    def _read_and_check_stop(self, *, final: bool = False) -> bool:
        """Takes in the text that has become certain; returns whether a stop string has ended it."""
        if self._text is None:
            return False
        return self._text.read(final=final, stops=len(self.token_ids) >= self.sequence.sampling_params.min_tokens)
