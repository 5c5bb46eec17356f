"""Response bodies of the native routes, made from the engine's numbers.

Whole answers may have a million log-probabilities: they are formatted in a thread, not on the event loop.
"""

from collections.abc import Sequence
from typing import Any

from server.engine.divergence import Divergence
from server.engine.sequence import Finished, PositionsName, SampledToken, TokenLogprob
from server.engine_client import CheckpointEntry, CheckpointInfo
from server.schemas import (
    ArmBody,
    AttributeBody,
    CheckpointBody,
    CheckpointDetailBody,
    ColumnTraceBody,
    CompareResponse,
    ComparisonBody,
    GenerateResponse,
    LoadedBody,
    LogprobBody,
    ResultBody,
    ScoreBody,
    ScoreResponse,
    SteeringBody,
    StudyBody,
    TimingBody,
    TokenBody,
    TokenizeBody,
    TokenizerInfoBody,
    TokenLogprobBody,
    TokenTraceBody,
    UsageBody,
)
from server.studies import Tally
from server.tokenizer import Codec
from server.types import AppliedCheckpoint, ArmResult, GenerateResult, ScoreResult, TokenChunk

IMPOSSIBLE = -9999.0  # JSON has no minus infinity; OpenAI's API has this number for it


class Formatter:
    """Formats results and streamed tokens as the bodies of /generate, /compare and /score."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def token(self, chunk: TokenChunk) -> TokenBody:
        """One event of a stream; cheap enough for the event loop."""
        event = chunk.event
        sampled = event.token
        return TokenBody(
            arm=chunk.arm,
            index=chunk.index,
            token_id=sampled.token_id,
            text=event.text,
            logprob=self._token_logprob(sampled.logprob) if sampled.logprob else None,
            trace=token_trace(self._codec, sampled) if event.sequence.trace else None,
        )

    def generate_response(self, result: GenerateResult) -> GenerateResponse:
        steered, *others = (self._arm(arm, result) for arm in result.arms)
        return GenerateResponse(
            id=result.id,
            model=result.model,
            created=result.created,
            results=steered.results,
            baseline=others[0].results if others else None,
            comparison=steered.comparison,
        )

    def compare_response(self, result: GenerateResult) -> CompareResponse:
        arms = [self._arm(arm, result) for arm in result.arms]
        return CompareResponse(id=result.id, model=result.model, created=result.created, arms=arms)

    def score_response(self, result: ScoreResult) -> ScoreResponse:
        return ScoreResponse(
            id=result.id,
            model=result.model,
            created=result.created,
            scores=[
                ScoreBody(
                    logprob=finite(sum(one.logprob for one in tokens)),
                    tokens=[self._logprob(one.token_id, one.logprob) for one in tokens],
                )
                for tokens in result.continuations
            ],
            steering=_steering(result.checkpoints, result.positions, None),
        )

    def _arm(self, arm: ArmResult, result: GenerateResult) -> ArmBody:
        comparison: ComparisonBody | list[ComparisonBody] | None = None
        if arm.divergences is not None:
            reference = result.arms[result.reference].texts
            all_ = [_comparison(*each) for each in zip(arm.texts, reference, arm.divergences, strict=True)]
            comparison = all_[0] if len(all_) == 1 else all_
        return ArmBody(name=arm.name, results=[self._result(text, arm) for text in arm.texts], comparison=comparison)

    def _result(self, text: Finished, arm: ArmResult) -> ResultBody:
        logprobs = None
        if text.sequence.sampling_params.logprobs is not None:
            logprobs = [self._token_logprob(one.logprob) for one in text.tokens if one.logprob]
        return ResultBody(
            text=text.text,
            token_ids=list(text.token_ids),
            finish_reason=text.finish_reason,
            usage=UsageBody(prompt_tokens=len(text.sequence.prompt_token_ids), completion_tokens=len(text.token_ids)),
            steering=steering(text, arm),
            timing=TimingBody(
                queue_ms=text.timing.queue_ms, ttft_ms=text.timing.ttft_ms, total_ms=text.timing.total_ms
            ),
            logprobs=logprobs,
            trace=trace(self._codec, text),
        )

    def _logprob(self, token: int, logprob: float) -> LogprobBody:
        return LogprobBody(token, self._codec.token_text(token).text, finite(logprob))

    def _token_logprob(self, one: TokenLogprob) -> TokenLogprobBody:
        top = list(map(self._logprob, one.top_token_ids, one.top_logprobs))
        return TokenLogprobBody(one.token_id, self._codec.token_text(one.token_id).text, finite(one.logprob), top)


def steering(text: Finished, arm: ArmResult) -> SteeringBody:
    """What steered a text."""
    return _steering(arm.checkpoints, text.sequence.steering_params.positions, text.steered_tokens)


def trace(codec: Codec, text: Finished) -> list[TokenTraceBody] | None:
    """Of all tokens of a text; None where the request does not ask for it."""
    return [token_trace(codec, one) for one in text.tokens] if text.sequence.trace else None


def token_trace(codec: Codec, sampled: SampledToken) -> TokenTraceBody:
    columns = [
        ColumnTraceBody(one.attribute, one.site, one.gate, one.strength, one.delta_norm, one.cosine)
        for one in sampled.trace
    ]
    return TokenTraceBody(sampled.token_id, codec.token_text(sampled.token_id).text, columns)


def study(tally: Tally) -> StudyBody:
    low, high = tally.interval
    return StudyBody(
        study=tally.study,
        arms=tally.arms,
        votes=tally.votes,
        wins=tally.wins,
        ties=tally.ties,
        win_rate=tally.win_rate,
        low=low,
        high=high,
    )


def finite(logprob: float) -> float:
    return max(logprob, IMPOSSIBLE)


def tokenized(codec: Codec, ids: Sequence[int], *, names: bool) -> TokenizeBody:
    """`names`: also each token as the vocabulary spells it."""
    return TokenizeBody(
        count=len(ids),
        max_model_len=codec.context,
        tokens=list(ids),
        token_strs=codec.token_names(ids) if names else None,
    )


def tokenizer_info(codec: Codec) -> TokenizerInfoBody:
    info = codec.describe()
    special = {name: info.special_tokens.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return TokenizerInfoBody(
        tokenizer_class=info.tokenizer_class,
        model_max_length=codec.context,
        vocab_size=info.vocab_size,
        chat_template=info.chat_template,
        **special,
    )


def loaded(checkpoint: CheckpointInfo) -> LoadedBody:
    return LoadedBody(name=checkpoint.name, version=checkpoint.version, sha256=checkpoint.sha256)


def checkpoint(entry: CheckpointEntry) -> CheckpointBody:
    """A checkpoint folder, as the list of all shows it."""
    return CheckpointBody(**_checkpoint_fields(entry))


def checkpoint_detail(entry: CheckpointEntry) -> CheckpointDetailBody:
    """The same, with how it was trained and evaluated."""
    config = entry.config
    training, evaluation = (config.training, config.evaluation) if config else ({}, {})
    return CheckpointDetailBody(**_checkpoint_fields(entry), training=training, evaluation=evaluation)


def _checkpoint_fields(entry: CheckpointEntry) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "name": entry.name,
        "version": entry.version,
        "active": entry.active,
        "loaded": entry.loaded,
        "changed": entry.changed,
        "loadable": entry.problem is None,
        "reason": entry.problem,
    }
    if (config := entry.config) is None:
        return fields
    attributes = {}
    for name in dict.fromkeys(column.attribute for column in config.columns):
        first, *others = (column for column in config.columns if column.attribute == name)
        sites = [f"{column.layer}.{column.site.value}" for column in (first, *others)]
        attributes[name] = AttributeBody(default=first.default_multiplier, range=first.range, sites=sites)
    return fields | {
        "method": config.method,
        "positions": config.positions.value,
        "sha256": config.sha256,
        "base_model": config.base_model.model_dump(),
        "attributes": attributes,
    }


def _steering(
    checkpoints: Sequence[AppliedCheckpoint], positions: PositionsName, steered_tokens: int | None
) -> SteeringBody:
    single = checkpoints[0] if len(checkpoints) == 1 else None
    return SteeringBody(
        checkpoint=single.checkpoint if single else None,
        version=single.version if single else None,
        sha256=single.sha256 if single else None,
        attributes=dict(single.attributes) if single else {},
        positions=positions,
        steered_tokens=steered_tokens,
        parts=list(checkpoints) if len(checkpoints) > 1 else None,
    )


def _comparison(text: Finished, reference: Finished, divergence: Divergence) -> ComparisonBody:
    return ComparisonBody(
        first_divergence=_first_difference(text.token_ids, reference.token_ids),
        kl_per_token=divergence.kl_per_token,
        logprob_under_baseline=divergence.logprob_under_baseline,
        perplexity_ratio=divergence.perplexity_ratio,
    )


def _first_difference(tokens: Sequence[int], reference: Sequence[int]) -> int | None:
    """The first index at which two texts differ, be it that one of them has ended there; None: they are the same."""
    for index, (one, other) in enumerate(zip(tokens, reference, strict=False)):
        if one != other:
            return index
    return None if len(tokens) == len(reference) else min(len(tokens), len(reference))
