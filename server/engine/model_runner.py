"""Tensors: computes the chunks that the scheduler chose, and samples the tokens that are due. The only caller of the
model."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.attention.backend import NAME, Attention
from server.attention.metadata import ForwardMetadata
from server.engine.block_manager import BlockManager
from server.engine.cuda_graphs import CudaGraphs
from server.engine.sampler import Sampler, SamplerOutput
from server.engine.scoring import PendingScores, score_chunks
from server.engine.sequence import (
    ColumnTrace,
    SampledToken,
    ScheduledChunk,
    Sequence,
    StepOutput,
    TokenLogprob,
    steering_mask,
)
from server.threads import ThreadScaler
from steering.bank import ColumnBank, upload
from steering.hook import Steering
from steering.types import SequenceSteering

Chunks = tuple[ScheduledChunk, ...]


class HostCopy:
    """Numbers on their way from the device."""

    def __init__(self, numbers: Tensor) -> None:
        """numbers: [N] int64."""
        self._ready: Any = None
        self._numbers = numbers
        if numbers.device.type == "cuda":
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record(torch.cuda.current_stream(numbers.device))

    def numbers(self) -> list[int]:
        """Waits until they are here. Raises what the device's computation raised."""
        if self._ready is not None:
            self._ready.synchronize()
        found: list[int] = self._numbers.tolist()
        return found


@dataclass(frozen=True)
class InFlightStep:
    """A step that the device computes."""

    chunks: Chunks
    sampling: Mapping[ScheduledChunk, int] = field(default_factory=dict)  # chunks to their last tokens' places
    sampled: SamplerOutput | None = None
    scores: PendingScores | None = None
    copy: HostCopy | None = None
    traces: Callable[[Sequence, int], tuple[ColumnTrace, ...]] = lambda sequence, place: ()
    error: Exception | None = None  # instead of all that

    def next_ids(self, chunks: Chunks) -> Tensor:
        """What this step samples for the sequences of chunks that continue it, [chunks] int64, on the device."""
        if self.sampled is None:
            raise self.error or ValueError("nothing continues a step that samples nothing")
        places = {chunk.sequence: index for index, chunk in enumerate(self.sampling)}
        wanted = [places[chunk.sequence] for chunk in chunks]
        if wanted == list(range(len(places))):
            return self.sampled.tokens
        return self.sampled.tokens[upload(np.array(wanted), self.sampled.tokens.device)]

    def result(self) -> list[StepOutput]:
        """Of each chunk, in order. Waits for the device. Raises what its computation raised."""
        if self.copy is None:
            raise self.error or ValueError("this step was never begun")
        numbers = iter(self.copy.numbers())
        steered = [list(islice(numbers, len(chunk))) for chunk in self.chunks]
        sequences = [chunk.sequence for chunk in self.sampling]
        traces = [self.traces(chunk.sequence, place) for chunk, place in self.sampling.items()]
        token_ids = list(islice(numbers, len(sequences)))
        tokens = iter(_sampled_tokens(sequences, self.sampled, token_ids, traces) if self.sampled else ())
        finite = dict(zip([*self.sampling, *_without_logits(self.chunks)], map(bool, numbers), strict=True))
        scored = self.scores.result() if self.scores else {}
        finite |= {chunk: found.finite for chunk, found in scored.items()}
        return [
            StepOutput(counts, next(tokens) if chunk in self.sampling else None, scored.get(chunk), finite[chunk])
            for chunk, counts in zip(self.chunks, steered, strict=True)
        ]


class ModelRunner:
    """A Hugging Face causal language model whose attention reads a `KVPool` and whose steering hooks, once they are
    installed, read `bank`. One forward pass and one sampling a step."""

    blocks: BlockManager  # set by `allocate`

    def __init__(self, model: Any, bank: ColumnBank, *, native: bool = True) -> None:
        """`native`: with kernels that are compiled for this CPU or GPU, where they can be had."""
        self.bank = bank
        self.steering = Steering(model, bank, native=native)
        self.device: torch.device = bank.device
        head = model.get_output_embeddings()
        self.vocab_size: int = head.out_features if hasattr(head, "out_features") else head.weight.shape[0]
        self.attention = Attention(bank.device, native=native)
        self.thread_scaler = ThreadScaler(torch.get_num_threads() if bank.device.type == "cpu" else 1)
        self._graphs: CudaGraphs | None = None
        self._model = model
        self._spread = is_spread(model)
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._sampler: Sampler | None = None
        self._sampled: list[Sequence] = []  # those that it was made for
        model.set_attn_implementation(NAME)

    @property
    def overlaps(self) -> bool:
        """Whether the host is free while the device computes."""
        return self.device.type == "cuda"

    def allocate(
        self, num_blocks: int, block_size: int, *, graphs: bool = False, max_model_len: int | None = None
    ) -> BlockManager:
        """Makes room for keys and values; returns who hands it out. `graphs`: decoding steps have static shapes, and
        are replayed from CUDA graphs where the device has them. `max_model_len`: tokens of the longest text; None: as
        many as there is room for."""
        self.blocks = BlockManager(num_blocks, block_size)
        self.attention.allocate(num_blocks + 1, block_size)  # the last one is for rows of a graph that are idle
        longest = min(num_blocks, self.blocks.blocks_for(max_model_len)) if max_model_len else num_blocks
        self._graphs = (
            CudaGraphs(
                self._run,
                self.device,
                block_size=block_size,
                padding_block=num_blocks,
                most_blocks=longest if self.attention.by_length else None,
            )
            if graphs
            else None
        )
        return self.blocks

    def execute_async(self, chunks: Chunks, after: InFlightStep | None = None) -> InFlightStep:
        """Launches a step. Never raises: errors come from `InFlightStep.result`. `after`: the step before, where its
        tokens are not known yet: they go from one to the other on the device."""
        try:
            return self._execute(chunks, after)
        except Exception as error:
            return InFlightStep(chunks, error=error)

    def forward(self, chunks: Chunks, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Computes the chunks as one line of N tokens -> logits [wanted, vocab] in the model's dtype, of the last
        `num_rows` tokens of each chunk, and whether each token of the line was steered [N] int64, as the hooks
        counted it. `ids`: the tokens [N] int64, where the host does not know them."""
        tokens = sum(map(len, chunks))
        static = self._graphs if self._graphs and self._graphs.fits(chunks) and not self.steering.traced else None
        room = static.rows(chunks) if static else tokens
        self.bank.reserve(room)
        self._fill_bank(chunks, room)
        if ids is None:
            known = [token for chunk in chunks for token in chunk.token_ids]
            ids = upload(np.array(known, dtype=np.int64), self.device)
        try:
            with torch.inference_mode():
                if static:
                    if static.prepare(chunks, ids, self.bank.version):
                        self.bank.take_counts()  # passes that were only made to capture
                    logits = static(chunks, ids)
                else:
                    logits = self._eager(chunks, ids)
        finally:
            # Taken even from a pass that failed, so that nothing is counted twice.
            counts = self.bank.take_counts(tokens)
        return logits, counts

    @contextmanager
    def few_layers(self) -> Iterator[None]:
        """Passes inside end after the first layer of each kind, in models that stop at `config.num_hidden_layers`, as
        most do: what they give means nothing, but the largest tensors have been made."""
        config = self._model.config.get_text_config(decoder=True)
        kinds = getattr(config, "layer_types", None) or ["the same"]
        layers = config.num_hidden_layers
        config.num_hidden_layers = 1 + max(kinds.index(kind) for kind in set(kinds))
        try:
            yield
        finally:
            config.num_hidden_layers = layers

    def recover(self) -> None:
        """After a failed step; raises when the device does not answer any more."""
        self._sampler, self._sampled = None, []
        torch.zeros(1, device=self.device).add_(1).item()

    # --- inside ---------------------------------------------------------------------------------

    def _execute(self, chunks: Chunks, after: InFlightStep | None) -> InFlightStep:
        ends = np.cumsum([len(chunk) for chunk in chunks]).tolist()
        sampling = {chunk: end - 1 for chunk, end in zip(chunks, ends, strict=True) if chunk.is_sampled}
        self.steering.record(any(chunk.sequence.trace for chunk in sampling))
        if sampling:
            self._prepare_sampler([chunk.sequence for chunk in sampling])
        ids = None if after is None else after.next_ids(chunks)
        self.thread_scaler.look()
        self._copy_blocks()
        logits, counts = self.forward(chunks, ids)
        with torch.inference_mode():
            rows = _rows_of(chunks)
            sampled = self._sample(list(sampling), _select(logits, [rows[chunk].start for chunk in sampling]))
            scored = {chunk: logits[rows[chunk]] for chunk in chunks if chunk.sequence.is_scored and chunk.num_logits}
            scores = score_chunks(scored) if scored else None
            unchecked = [rows[chunk].start for chunk in _without_logits(chunks)]
            checked = [_select(logits, unchecked).amax(dim=-1).isfinite().long()] if unchecked else []
        # The one copy from the device that a step needs; logprobs, where asked for, are a second one.
        parts = [counts, *([] if sampled is None else [sampled.tokens, sampled.finite.long()]), *checked]
        return InFlightStep(chunks, sampling, sampled, scores, HostCopy(torch.cat(parts)), traces=self._traces)

    def _copy_blocks(self) -> None:
        """The list is cleared only when all copies were made: `Engine._fail` reads it to fail the sequences whose
        blocks were never filled."""
        with torch.inference_mode():
            self.attention.copy(self.blocks.pending_copies)
        self.blocks.pending_copies.clear()

    def _eager(self, chunks: Chunks, ids: Tensor) -> Tensor:
        metadata = self.attention.metadata([chunk.layout for chunk in chunks])
        wanted: list[int] = []
        end = 0
        for chunk in chunks:
            end += len(chunk)
            wanted += range(end - chunk.num_rows, end)
        keep = None
        if len(wanted) < end:
            keep = upload(np.array(wanted, dtype=np.int64), torch.device("cpu") if self._spread else self.device)
        return self._run(ids[None], metadata.positions[None], metadata, keep)

    def _run(self, ids: Tensor, positions: Tensor, metadata: ForwardMetadata, keep: Tensor | None = None) -> Tensor:
        """ids, positions [1, N] -> logits [N, vocab], or those of the tokens to `keep`."""
        selected = {"logits_to_keep": keep} if self._keeps and keep is not None else {}
        with self.attention.forward_context(metadata):
            output = self._model(input_ids=ids, position_ids=positions, use_cache=False, return_dict=True, **selected)
        logits: Tensor = output.logits[0].to(self.device)
        return logits if selected or keep is None else logits[keep]

    def _fill_bank(self, chunks: Chunks, room: int) -> None:
        """Fills the bank for the tokens of the chunks, and for idle ones up to `room`."""
        rows: dict[SequenceSteering, int] = {}
        token_rows: list[int] = []
        for chunk in chunks:
            steering, prompt = chunk.sequence.steering_params, chunk.sequence.num_prompt_tokens
            row = rows.setdefault(steering.columns, len(rows))
            if len(chunk) == 1 and chunk.start >= prompt:
                token_rows.append(-1 if steering.positions == "prompt" else row)
            else:
                acting = steering_mask(steering.positions, chunk.start, chunk.end, prompt)
                token_rows += np.where(acting, row, -1).tolist()
        token_rows += [-1] * (room - len(token_rows))
        self.bank.fill(tuple(rows), np.array(token_rows, dtype=np.int64))

    def _traces(self, sequence: Sequence, place: int) -> tuple[ColumnTrace, ...]:
        """What the columns that the sequence asks for did to the token at a place of the line."""
        if not sequence.trace:
            return ()
        handles = sequence.steering_params.columns.handles
        asked = [(h.attributes[i], *slot) for h in handles for i, slot in enumerate(h.slots)]
        numbers = {site: self.steering.traces[site][place].tolist() for _, site, _ in asked}
        return tuple(ColumnTrace(attribute, str(site), *numbers[site][index]) for attribute, site, index in asked)

    def _prepare_sampler(self, sequences: list[Sequence]) -> None:
        """Made before the forward pass: later its uploads would queue behind it."""
        if self._sampler is None or sequences != self._sampled:
            params = [sequence.sampling_params for sequence in sequences]
            ends = [sequence.end_token_ids for sequence in sequences]
            self._sampler, self._sampled = Sampler(params, self.vocab_size, self.device, ends), sequences

    def _sample(self, chunks: list[ScheduledChunk], logits: Tensor) -> SamplerOutput | None:
        if not chunks:
            return None
        assert self._sampler is not None, "prepared before"
        token_ids = [chunk.sequence.token_ids for chunk in chunks]
        return self._sampler.sample(
            logits, token_ids, [chunk.end - chunk.sequence.num_prompt_tokens for chunk in chunks]
        )


def is_spread(model: Any) -> bool:
    """Whether accelerate has put the model's layers on several devices."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def _rows_of(chunks: Chunks) -> dict[ScheduledChunk, slice]:
    """Where the logits of each chunk are among all that are computed."""
    rows, start = {}, 0
    for chunk in chunks:
        rows[chunk] = slice(start, start + chunk.num_rows)
        start += chunk.num_rows
    return rows


def _without_logits(chunks: Chunks) -> list[ScheduledChunk]:
    """Those whose logits nobody wants: they are only checked."""
    return [chunk for chunk in chunks if not chunk.num_logits]


def _select(logits: Tensor, rows: list[int]) -> Tensor:
    """Mostly all of them, as they are."""
    if rows == list(range(len(logits))):
        return logits
    return logits[upload(np.array(rows, dtype=np.int64), logits.device)]


def _sampled_tokens(
    sequences: list[Sequence], sampled: SamplerOutput, tokens: list[int], traces: list[tuple[ColumnTrace, ...]]
) -> list[SampledToken]:
    chosen = sampled.logprobs.tolist() if sampled.logprobs is not None else None
    top_tokens = sampled.top_tokens.tolist() if sampled.top_tokens is not None else None
    top_logprobs = sampled.top_logprobs.tolist() if sampled.top_logprobs is not None else None
    found = []
    for i, sequence in enumerate(sequences):
        wanted, logprob = sequence.sampling_params.logprobs, None
        if chosen and wanted is not None:
            top = (tuple(most[i][:wanted]) for most in (top_tokens, top_logprobs) if most)
            logprob = TokenLogprob(tokens[i], chosen[i], *top)
        found.append(SampledToken(tokens[i], logprob, traces[i]))
    return found
