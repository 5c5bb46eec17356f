"""Tensors: computes the chunks that the scheduler chose, and samples the tokens that are due. The only caller of the
model."""

import inspect
import logging
import time
from collections.abc import Hashable, Iterator, Mapping
from collections.abc import Sequence as Listing
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.utils import logging as hf_logging

from server.attention.backend import NAME, Attention
from server.attention.layout import BlockCopy, ChunkLayout
from server.attention.static import ForwardMetadata
from server.engine.block_manager import BlockManager
from server.engine.compute_threads import ThreadScaler
from server.engine.cuda_graphs import Bucket, CudaGraphs
from server.engine.gate_stats import GateStats
from server.engine.sampler import PenalisedText, Sampler, SamplerOutput, TokenCounts
from server.engine.scoring import PendingScores, score_chunks
from server.engine.sequence import (
    ColumnTrace,
    SampledToken,
    SamplingParams,
    ScheduledChunk,
    Sequence,
    StepOutput,
    TokenLogprob,
    steering_mask,
)
from steering.bank import ColumnBank, upload
from steering.hook import Steering
from steering.types import SequenceSteering

log = logging.getLogger(__name__)
WARM_UP_TOKENS = 8
Chunks = tuple[ScheduledChunk, ...]


class HostCopy:
    """Tensors on their way from the device, in one copy."""

    def __init__(self, tensors: Mapping[Hashable, Tensor]) -> None:
        """All on one device; what becomes of them afterwards does not matter."""
        self._kinds = {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
        self._bytes = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors.values()])
        self._ready: Any = None
        if self._bytes.device.type == "cuda":
            on_device, device = self._bytes, self._bytes.device
            self._bytes = torch.empty(on_device.shape, dtype=torch.uint8, pin_memory=True)
            self._bytes.copy_(on_device, non_blocking=True)
            self._ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ready.record(torch.cuda.current_stream(device))

    def arrays(self) -> dict[Hashable, NDArray[Any]]:
        """Waits until they are here. Raises what the device's computation raised."""
        if self._ready is not None:
            self._ready.synchronize()
        found: dict[Hashable, NDArray[Any]] = {}
        numbers, start = self._bytes.numpy(), 0
        for key, (shape, dtype) in self._kinds.items():
            end = start + shape.numel() * dtype.itemsize
            found[key] = numbers[start:end].view(_NUMPY[dtype]).reshape(shape)
            start = end
        return found


_NUMPY: dict[torch.dtype, Any] = {
    torch.int64: np.int64,
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.bool: np.bool_,
}


@dataclass(frozen=True)
class InFlightStep:
    """A step that the device computes."""

    chunks: Chunks
    sampling: tuple[ScheduledChunk, ...] = ()  # those after which a token is sampled
    unchecked: tuple[ScheduledChunk, ...] = ()  # those whose logits nobody wants: they are only checked
    traced: tuple[ScheduledChunk, ...] = ()  # those of which the copy has traces, a row each
    observed: tuple[ScheduledChunk, ...] = ()  # those of them that metrics look at
    gate_stats: GateStats | None = None
    sampled: SamplerOutput | None = None
    scores: PendingScores | None = None
    copy: HostCopy | None = None
    error: Exception | None = None  # instead of all that

    def next_ids(self, chunks: Chunks) -> Tensor | None:
        """The tokens of the chunks that follow it, [N] int64, on the device, where those are that it samples; None: the
        host knows all of them."""
        if self.error is not None:
            raise self.error
        rows = {chunk.sequence: row for row, chunk in enumerate(self.sampling)}
        known, places, wanted = [], [], []
        for chunk in chunks:
            known += chunk.token_ids
            if chunk.end > len(chunk.sequence.token_ids):
                places.append(len(known))
                wanted.append(rows[chunk.sequence])
                known.append(0)
        if self.sampled is None or not wanted:
            return None
        tokens = self.sampled.tokens
        if wanted == list(range(len(known))) == list(range(len(tokens))):
            return tokens
        ids = upload(np.array(known, dtype=np.int64), tokens.device)
        into, of = upload(np.array([places, wanted], dtype=np.int64), tokens.device)
        return ids.index_copy_(0, into, tokens[of])

    def result(self) -> list[StepOutput]:
        """Of each chunk, in order. Waits for the device. Raises what its computation raised."""
        if self.copy is None:
            raise self.error or ValueError("this step was never begun")
        found = self.copy.arrays()
        counts = iter(found["steered"].tolist())
        steered = [list(islice(counts, len(chunk))) for chunk in self.chunks]
        rows = {chunk: row for row, chunk in enumerate(self.traced)}
        sampled = dict(zip(self.sampling, _sampled_tokens(self.sampling, found, rows), strict=True))
        for chunk, counted in zip(self.chunks, steered, strict=True):
            if self.gate_stats is not None and chunk in self.observed and counted[-1]:
                self.gate_stats.add(chunk, found, rows[chunk])
        finite: dict[ScheduledChunk, bool] = dict(zip(self.sampling, found["finite"].tolist(), strict=True))
        finite |= zip(self.unchecked, found["checked"].tolist(), strict=True)
        scored = self.scores.result(found) if self.scores else {}
        finite |= {chunk: one.finite for chunk, one in scored.items()}
        return [
            StepOutput(counts, sampled.get(chunk), scored.get(chunk), finite[chunk])
            for chunk, counts in zip(self.chunks, steered, strict=True)
        ]


class Lines:
    """Which line of the bank holds the latched gates of a sequence, from its first step until it has ended: also while
    it waits to be computed again, when the token that latches may come from the prefix cache."""

    def __init__(self) -> None:
        self.most = 0  # lines that were ever in use
        self._of: dict[Sequence, int] = {}
        self._free: list[int] = []

    def of(self, sequence: Sequence) -> int:
        """Its line, from 1 on."""
        if sequence not in self._of:
            if not self._free:
                self._free = [self._of.pop(one) for one in list(self._of) if one.ended]
            if not self._free:
                self.most += 1
                self._free.append(self.most)
            self._of[sequence] = self._free.pop()
        return self._of[sequence]


@dataclass(frozen=True)
class ForwardInputs:
    """What a pass computes beside the tokens themselves: plain data, for whoever has a part of the model."""

    chunks: list[ChunkLayout]
    num_rows: list[int]  # of each: for how many of its tokens, the last ones, logits are computed
    rows: tuple[SequenceSteering, ...]  # this and what follows: see `ColumnBank.fill`
    token_rows: NDArray[np.int64]  # also of idle tokens behind those of the chunks, where there are some
    token_lines: NDArray[np.int64] | None
    num_lines: int  # of latched gates that were ever in use

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.chunks))

    def padded(self, room: int) -> "ForwardInputs":
        """With idle tokens behind the others, `room` in all."""
        token_rows = np.full(room, -1, dtype=np.int64)
        token_rows[: len(self.token_rows)] = self.token_rows
        token_lines = None
        if self.token_lines is not None:
            token_lines = np.zeros((2, room), dtype=np.int64)
            token_lines[:, : self.token_lines.shape[1]] = self.token_lines
        return replace(self, token_rows=token_rows, token_lines=token_lines)


class Followers(Protocol):
    """Processes that have the other shards of a model, each with a `ModelRunner` of its own (`ModelRunner.follow`)."""

    def copy(self, copies: Listing[BlockCopy]) -> None: ...

    def forward(self, inputs: ForwardInputs, ids: Tensor, *, traced: bool) -> AbstractContextManager[None]:
        """They compute a pass while this process does, inside."""
        ...


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
        self._texts = TokenCounts(self.vocab_size, self.device)  # of those that are penalised
        self.gate_stats = GateStats()
        self.followers: Followers | None = None  # where this process has a shard of the model, and leads
        self._lines = Lines()
        model.set_attn_implementation(NAME)

    @property
    def overlaps(self) -> bool:
        """Whether the host is free while the device computes."""
        return self.device.type == "cuda"

    def allocate(
        self, num_blocks: int, block_size: int, *, graph_rows: int = 0, max_model_len: int | None = None
    ) -> BlockManager:
        """Makes room for keys and values; returns who hands it out. `graph_rows`: decoding steps of up to so many
        sequences have static shapes once `capture_graphs` has been called, and are replayed from CUDA graphs where the
        device has them. `max_model_len`: tokens of the longest text; None: as many as there is room for."""
        self.blocks = BlockManager(num_blocks, block_size)
        self.attention.allocate(num_blocks + 1, block_size)  # the last one is for rows of a graph that are idle
        longest = min(num_blocks, self.blocks.blocks_for(max_model_len)) if max_model_len else num_blocks
        self._graphs = (
            CudaGraphs(
                self._run,
                self.device,
                block_size=block_size,
                padding_block=num_blocks,
                most_rows=graph_rows,
                most_blocks=longest if self.attention.by_length else None,
                most_tokens=self.bank.max_tokens if self.attention.prefills_in_blocks else 0,
            )
            if graph_rows
            else None
        )
        return self.blocks

    def release(self) -> None:
        """Gives up what `allocate` has made room for."""
        self.attention.pools.clear()
        self._graphs = None
        self._forget_samples()

    @property
    def graphs_due(self) -> list[Bucket]:
        """The buckets that a graph is to be captured for: those of a start, and after the bank has moved."""
        return self._graphs.due(self.bank.version) if self._graphs else []

    @property
    def num_graphs(self) -> int:
        """How many have been captured, and serve steps now."""
        return len(self._graphs.captured(self.bank.version)) if self._graphs else 0

    def want_graphs(self) -> list[Bucket]:
        """From now on all graphs that can be known beforehand are due: these."""
        if self._graphs:
            self._graphs.want_all()
        return self.graphs_due

    def capture_graphs(self) -> None:
        """Captures all graphs that can be known beforehand, with a progress bar."""
        start, due = time.monotonic(), self.want_graphs()
        if self._graphs is None or not due:
            return
        for _ in hf_logging.tqdm(due, desc="Capturing CUDA graphs", unit="graph"):
            self.capture_next_graph()
        captured = len(self._graphs.captured(self.bank.version))
        log.info("CUDA graphs of %d sizes are captured, in %.1f s", captured, time.monotonic() - start)

    def warm_up(self) -> None:
        """Captures the CUDA graphs, and computes a step of each kind: the beginning of a text, more of it, one token,
        and another text beside it. What is made at first use on the engine's thread (a team of workers, primitives,
        compiled kernels) is there for the first request, also for one that brings the first checkpoint. It writes into
        blocks that nothing may hold yet: the first."""
        self.steering.warm_up()
        self._warm_up_steps()  # also of more tokens than graphs have
        if self._graphs is not None:
            self.capture_graphs()
            self._warm_up_steps()
        self._forget_samples()

    def _warm_up_steps(self) -> None:
        end = WARM_UP_TOKENS
        last, half = end - 1, end // 2
        one, other = (Sequence("warm-up", index, (0,) * end, SamplingParams(temperature=1.0)) for index in range(2))
        one.block_table = other.block_table = list(range(self.blocks.blocks_for(end)))
        more = ScheduledChunk(other, half, last)
        token = ScheduledChunk(one, last, end)
        for chunks in ((ScheduledChunk(one, 0, half),), (more,), (token,), (token, more)):
            self.execute_async(chunks).result()

    def capture_next_graph(self) -> None:
        """Captures one of those that are due, between two steps. Never raises."""
        if self._graphs is None or not (due := self.graphs_due):
            return
        bucket, version = due[0], self.bank.version
        try:
            self.bank.clear()
            self.steering.record(False)
            self.steering.recording = True
            with torch.inference_mode():
                self._graphs.capture(bucket, version)
        except Exception as error:
            self._graphs.give_up(bucket, version, error)
        finally:
            self.steering.recording = False
            self.bank.take_counts(0)

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
        counted it. `ids`: the tokens [N] int64, where the host does not know them. The next pass may write over the
        logits."""
        inputs = self._inputs(chunks)
        self._reserve(inputs)  # before a graph is looked for: those of smaller buffers are of no use after it
        graphs = self._graphs if self._graphs and not self.steering.traced else None
        bucket = graphs.find(chunks, self.bank.version) if graphs else None
        if bucket:
            inputs = inputs.padded(bucket.tokens)
        if ids is None:
            known = [token for chunk in chunks for token in chunk.token_ids]
            ids = upload(np.array(known, dtype=np.int64), self.device)
        if self.followers is None:
            return self._compute(inputs, ids, bucket)
        with self.followers.forward(inputs, ids, traced=self.steering.traced):
            return self._compute(inputs, ids, bucket)

    def follow(self, inputs: ForwardInputs, ids: Tensor, *, traced: bool) -> None:
        """A pass of the process that leads: see `Followers`."""
        self.steering.record(traced)
        self._reserve(inputs)
        self._compute(inputs, ids)

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
        """After a failed step; raises when the device does not answer any more. What PyTorch keeps of the device's
        memory for later is given back: what has failed for want of memory may be another library's."""
        self._forget_samples()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        torch.zeros(1, device=self.device).add_(1).item()

    # --- inside ---------------------------------------------------------------------------------

    def _forget_samples(self) -> None:
        """What is kept of the batch before."""
        self._sampler, self._sampled = None, []
        self._texts = TokenCounts(self.vocab_size, self.device)

    def _execute(self, chunks: Chunks, after: InFlightStep | None) -> InFlightStep:
        sampling = tuple(chunk for chunk in chunks if chunk.is_sampled)
        unchecked = tuple(chunk for chunk in chunks if not chunk.num_logits)
        observed = self.gate_stats.choose(sampling)
        traced = tuple(chunk for chunk in sampling if chunk.sequence.trace or chunk in observed)
        self.steering.record(bool(traced))
        if sampling:
            self._prepare_sampler(sampling)
        ids = after.next_ids(chunks) if after else None
        self.thread_scaler.look()
        self._copy_blocks()
        logits, counts = self.forward(chunks, ids)
        with torch.inference_mode():
            rows = _rows_of(chunks)
            sampled = self._sample(sampling, _select(logits, [rows[chunk].start for chunk in sampling]))
            scored = {chunk: logits[rows[chunk]] for chunk in chunks if chunk.sequence.is_scored and chunk.num_logits}
            scores = score_chunks(scored) if scored else None
            checked = _select(logits, [rows[chunk].start for chunk in unchecked]) if unchecked else logits[:0, :1]
            # The one copy from the device that a step needs.
            found: dict[Hashable, Tensor] = {"steered": counts, "checked": checked.amax(dim=-1).isfinite()}
            found |= sampled.tensors() if sampled else {"tokens": counts[:0], "finite": counts[:0]}
            found |= scores.tensors() if scores else {}
            copy = HostCopy(found | self._traces(chunks, traced))
        return InFlightStep(
            chunks,
            sampling,
            unchecked,
            traced=traced,
            observed=observed,
            gate_stats=self.gate_stats,
            sampled=sampled,
            scores=scores,
            copy=copy,
        )

    def _copy_blocks(self) -> None:
        """The list is cleared only when all copies were made: `Engine._fail` reads it to fail the sequences whose
        blocks were never filled."""
        copies = self.blocks.pending_copies
        if copies and self.followers is not None:
            self.followers.copy(copies)
        with torch.inference_mode():
            self.attention.copy(copies)
        copies.clear()

    def _reserve(self, inputs: ForwardInputs) -> None:
        self.bank.reserve(inputs.num_tokens)
        if inputs.token_lines is not None:
            self.bank.reserve_lines(inputs.num_lines)

    def _compute(self, inputs: ForwardInputs, ids: Tensor, bucket: Bucket | None = None) -> tuple[Tensor, Tensor]:
        """See `forward`."""
        self.bank.fill(inputs.rows, inputs.token_rows, inputs.token_lines)
        try:
            with torch.inference_mode():
                if self._graphs and bucket:
                    logits = self._graphs(bucket, inputs.chunks, ids)
                else:
                    logits = self._eager(inputs, ids)
        finally:
            # Taken even from a pass that failed, so that nothing is counted twice.
            counts = self.bank.take_counts(len(ids))
        return logits, counts

    def _eager(self, inputs: ForwardInputs, ids: Tensor) -> Tensor:
        metadata = self.attention.metadata(inputs.chunks)
        wanted: list[int] = []
        end = 0
        for chunk, num_rows in zip(inputs.chunks, inputs.num_rows, strict=True):
            end += len(chunk)
            wanted += range(end - num_rows, end)
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

    def _inputs(self, chunks: Chunks) -> ForwardInputs:
        rows: dict[SequenceSteering, int] = {}
        token_rows: list[int] = []
        lines: list[tuple[int, int, int]] = []  # of latched gates: where a row's tokens begin and end, its line
        latching: list[tuple[int, int]] = []  # the token that latches, and its line
        for chunk in chunks:
            steering, prompt = chunk.sequence.steering_params, chunk.sequence.num_prompt_tokens
            row = rows.setdefault(steering.columns, len(rows))
            if self.bank.latches(steering.columns):
                line, at, first = self._lines.of(chunk.sequence), len(token_rows) - chunk.start, prompt - 1
                lines.append((max(chunk.start, first) + at, chunk.end + at, line))
                if chunk.start <= first < chunk.end:
                    latching.append((first + at, line))
            if len(chunk) == 1 and chunk.start >= prompt:
                token_rows.append(-1 if steering.positions == "prompt" else row)
            else:
                acting = steering_mask(steering.positions, chunk.start, chunk.end, prompt)
                token_rows += np.where(acting, row, -1).tolist()
        token_lines = None
        if lines:
            token_lines = np.zeros((2, len(token_rows)), dtype=np.int64)
            for begin, end, line in lines:
                token_lines[0, begin:end] = line
            for token, line in latching:
                token_lines[1, token] = line
        return ForwardInputs(
            chunks=[chunk.layout for chunk in chunks],
            num_rows=[chunk.num_rows for chunk in chunks],
            rows=tuple(rows),
            token_rows=np.array(token_rows, dtype=np.int64),
            token_lines=token_lines,
            num_lines=self._lines.most,
        )

    def _traces(self, chunks: Chunks, traced: Chunks) -> dict[Hashable, Tensor]:
        """What the columns did to the last token of each chunk that is `traced`: of each site [chunks, columns,
        measures]."""
        if not traced:
            return {}
        ends = dict(zip(chunks, np.cumsum([len(chunk) for chunk in chunks]).tolist(), strict=True))
        handles = {handle for chunk in traced for handle in chunk.sequence.steering_params.columns.handles}
        sites = {site for handle in handles for site, _ in handle.slots}
        places = upload(np.array([ends[chunk] - 1 for chunk in traced], dtype=np.int64), self.device)
        return {site: self.steering.traces[site][places] for site in sites}

    def _prepare_sampler(self, chunks: Chunks) -> None:
        """Made before the forward pass: later its uploads would queue behind it."""
        sequences = [chunk.sequence for chunk in chunks]
        if self._sampler is None or sequences != self._sampled:
            params = [sequence.sampling_params for sequence in sequences]
            ends = [sequence.end_token_ids for sequence in sequences]
            self._sampler, self._sampled = Sampler(params, self.vocab_size, self.device, ends), sequences
        penalised: dict[Hashable, PenalisedText] = {
            chunk.sequence: PenalisedText(chunk.sequence.token_ids, chunk.sequence.prompt_token_ids, chunk.end)
            for chunk in chunks
            if chunk.sequence.sampling_params.is_penalised
        }
        with torch.inference_mode():
            self._texts.hold(penalised)

    def _sample(self, chunks: Chunks, logits: Tensor) -> SamplerOutput | None:
        if not chunks:
            return None
        assert self._sampler is not None, "prepared before"
        steps = [chunk.end - chunk.sequence.num_prompt_tokens for chunk in chunks]
        return self._sampler.sample(logits, steps, self._texts)


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


def _select(logits: Tensor, rows: list[int]) -> Tensor:
    """Mostly all of them, as they are."""
    if rows == list(range(len(logits))):
        return logits
    return logits[upload(np.array(rows, dtype=np.int64), logits.device)]


def _sampled_tokens(
    chunks: Chunks, found: Mapping[Hashable, NDArray[Any]], traced: Mapping[ScheduledChunk, int]
) -> list[SampledToken]:
    """`traced`: rows of the traces."""
    tokens = found["tokens"].tolist()
    chosen, top_tokens, top_logprobs = (
        found[name].tolist() if name in found else None for name in ("logprobs", "top_tokens", "top_logprobs")
    )
    sampled = []
    for row, chunk in enumerate(chunks):
        wanted, logprob = chunk.sequence.sampling_params.logprobs, None
        if chosen and wanted is not None:
            top = (tuple(most[row][:wanted]) for most in (top_tokens, top_logprobs) if most)
            logprob = TokenLogprob(tokens[row], chosen[row], *top)
        trace = _trace(chunk.sequence, found, traced[chunk]) if chunk.sequence.trace else ()
        sampled.append(SampledToken(tokens[row], logprob, trace))
    return sampled


def _trace(sequence: Sequence, found: Mapping[Hashable, NDArray[Any]], row: int) -> tuple[ColumnTrace, ...]:
    """What the columns that the sequence asks for did, in a row of what was traced."""
    handles = sequence.steering_params.columns.handles
    asked = [(handle.attributes[i], *slot) for handle in handles for i, slot in enumerate(handle.slots)]
    return tuple(ColumnTrace(name, str(site), *found[site][row, column].tolist()) for name, site, column in asked)
