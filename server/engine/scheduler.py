"""Which tokens the next forward pass computes. Touches no tensor.

Continuous batching with chunked prefill: in every step each sequence that is generated gets its one token (decode), and
what is left of `max_num_batched_tokens` goes to prompts and to continuations that are scored (prefill), in fair shares
between requests. The first one that does not fit is cut into chunks, of half of what is left at least; behind it,
shorter ones that fit into the rest need not wait for it. Sequences join and leave at any step.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from server.engine.block_manager import BlockManager
from server.engine.fair_queue import FairQueue
from server.engine.sequence import ScheduledChunk, Sequence

# A sequence waits for another one that is computing the same beginning if that saves this share of its own work.
WORTH_WAITING = 0.5
WATERMARK = 0.01  # of the blocks stay free when a sequence is admitted beside others: each new token may need one

Chunks = tuple[ScheduledChunk, ...]
InFlight = Mapping[Sequence, ScheduledChunk]  # of the step that is being computed; empty: none is


class Scheduler:
    """Sequences that wait and sequences that run. The one that was admitted first always goes on: when there is no free
    block, the youngest of the request that runs the most is preempted (by recompute: its blocks are freed, and it waits
    again), so that nothing waits for itself. A request of which nothing is generated yet takes a place from one that
    has several, and has had more."""

    def __init__(
        self, blocks: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int, max_num_logits: int = 2**20
    ) -> None:
        """`max_num_seqs`: that are generated together, and as many more that are scored. `max_num_batched_tokens`: of
        one forward pass. `max_num_logits`: tokens of one pass whose logits are kept for scores."""
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(
                f"a step of {max_num_batched_tokens} tokens cannot hold one for each of {max_num_seqs} rows"
            )
        self.blocks = blocks
        self.preemptions = 0
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_logits = max(2, max_num_logits)
        self._waiting = FairQueue()
        self._running: list[Sequence] = []  # in the order of admission

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    @property
    def running(self) -> list[Sequence]:
        return self._running

    @property
    def waiting(self) -> list[Sequence]:
        """All that wait, those in lockstep with another one included."""
        return [sequence for leader in self._waiting for sequence in leader.lockstep]

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Queues sequences."""
        self._waiting.add(sequences)

    def schedule(self) -> Chunks:
        """The chunks of the next step, single tokens first; nothing when there is nothing to do. Its caller reports
        `postprocess` for each, and puts what was sampled on the sequences."""
        return self._schedule({})

    def schedule_ahead(self, chunks: Chunks) -> Chunks:
        """Async scheduling: the step after these chunks, while they are computed and the tokens that they sample are
        not known yet. A sequence whose token ends its text, other than by its length, is computed once in vain. Nothing
        where somebody would have to be preempted: that waits for `schedule`."""
        return self._schedule({chunk.sequence: chunk for chunk in chunks})

    def postprocess(self, chunk: ScheduledChunk, steered: list[int]) -> None:
        """The chunk has been computed; `steered`: for each of its tokens whether it was."""
        self.blocks.commit(chunk.sequence, chunk.end, steered)
        if chunk.is_sampled:
            self._waiting.charge(chunk.sequence, 1)

    def finish(self, sequence: Sequence) -> None:
        """The sequence has ended: it is in no later step."""
        self._running.remove(sequence)
        self._waiting.leave(sequence)
        self.blocks.free(sequence)
        sequence.ended = True

    def abort(self, request_id: str, *, index: int | None = None, keep: bool = True) -> list[Sequence]:
        """Takes the sequences of a request out, every one or that of an `index`; returns those that were there. `keep`:
        what they computed is sound."""

        def meant(sequence: Sequence) -> bool:
            return sequence.request_id == request_id and index in (None, sequence.index)

        running = [sequence for sequence in self._running if meant(sequence)]
        waiting = [sequence for sequence in self.waiting if meant(sequence)]
        for sequence in running:
            self._running.remove(sequence)
            self.blocks.free(sequence, keep=keep)
        for sequence in running + waiting:
            self._waiting.leave(sequence)
            sequence.ended = True
        return running + waiting

    def clear(self) -> list[Sequence]:
        """Takes everything out; returns it."""
        sequences = [*self._running, *self.waiting]
        for sequence in self._running:
            self.blocks.free(sequence, keep=False)
        for sequence in sequences:
            sequence.ended = True
        self._running, self._waiting = [], FairQueue()
        return sequences

    # --- inside ---------------------------------------------------------------------------------

    def _schedule(self, in_flight: InFlight) -> Chunks:
        going = [sequence for sequence in self._running if not _ends(sequence, in_flight)]
        if in_flight and self._would_give_way(going):
            return ()
        preempted = self.preemptions
        decodes = self._decode(going, in_flight)
        if decodes is None:
            return ()
        budget = PrefillBudget(self._max_num_batched_tokens - len(decodes), self._max_num_logits, in_flight)
        for sequence in going:
            if sequence.block_table and (sequence.is_scored or _num_uncomputed(sequence, in_flight) > 1):
                budget.add(sequence)
        if self.preemptions == preempted:
            self._admit(budget, decodes, going, may_preempt=not in_flight)
        chunks = [chunk for chunk in (*decodes, *budget.chunks) if chunk.sequence.block_table]  # not those preempted
        return tuple(sorted(chunks, key=lambda chunk: len(chunk) > 1))

    def _decode(self, going: list[Sequence], in_flight: InFlight) -> list[ScheduledChunk] | None:
        """One token for every sequence that is generated and has just one to compute. None: somebody would have to be
        preempted while a step is computed."""
        chunks = []
        for sequence in going:
            if not sequence.block_table or sequence.is_scored or _num_uncomputed(sequence, in_flight) != 1:
                continue
            start = _num_computed(sequence, in_flight)
            if in_flight and not self.blocks.grow_to(sequence, start + 1):
                return None
            if in_flight or self._append_or_preempt(sequence):
                chunks.append(ScheduledChunk(sequence, start, start + 1))
        return chunks

    def _append_or_preempt(self, sequence: Sequence) -> bool:
        """Gives the sequence a block for its last token; preempts others or, at last, itself: of the request that runs
        the most the one that was admitted last, which is never the oldest of all while there is another."""
        while not self.blocks.grow_to(sequence, len(sequence.token_ids)):
            leaders = [one for one in reversed(self._running) if one.lockstep]
            size = _sizes(leaders)
            youngest = max(leaders, key=size)  # the first of those that are equal
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, leader: Sequence) -> None:
        for sequence in leader.lockstep:
            self._running.remove(sequence)
            self.blocks.free(sequence)
            sequence.restart()
        self._waiting.put_back(leader)
        self.preemptions += 1

    def _admit(
        self, budget: "PrefillBudget", decodes: list[ScheduledChunk], going: list[Sequence], *, may_preempt: bool
    ) -> None:
        """Beside those that are `going` on."""
        taken = Counter(sequence.is_scored for sequence in going)
        places = {kind: self._max_num_seqs - taken[kind] for kind in (False, True)}
        for leader in self._waiting.in_turn():
            if budget.num_tokens <= 0:
                return
            full = places[leader.is_scored] <= 0
            gives_way = self._gives_way(leader, decodes) if full and may_preempt else None
            if (full and gives_way is None) or not budget.can_take(leader):
                continue
            if budget.chunked and not self._fits(leader, budget.num_tokens):
                continue
            if self._should_wait_for_prefix(leader):
                continue
            if not self._allocate(leader):
                return
            if gives_way is not None:
                self._preempt(gives_way)
            else:
                places[leader.is_scored] -= len(leader.lockstep)
            self._waiting.take(leader)
            self._waiting.charge(leader, sum(one.num_uncomputed for one in leader.lockstep))
            self._running += leader.lockstep
            budget.add(leader)

    def _gives_way(self, leader: Sequence, decodes: list[ScheduledChunk]) -> Sequence | None:
        """Who is preempted for the first sequence of a client, or of a client's request, that is to be generated: the
        youngest of the client, or of the request of that client, that generates the most, at least two, where that one
        has had no less."""
        generated = [one for one in self._running if not one.is_scored]
        client = leader.share.client
        if leader.is_scored or any(one.share == leader.share for one in generated):
            return None
        rivals = [one for one in generated if one.share.client == client]
        if rivals:
            runs = Counter(one.share.request for one in rivals)
            many = {one for one in rivals if runs[one.share.request] > 1}
            counter = self._waiting.counter
        else:
            runs = Counter(one.share.client for one in generated)
            many = {one for one in generated if runs[one.share.client] > 1}
            counter = self._waiting.client_counter
        had = counter(leader)
        younger = (chunk.sequence for chunk in reversed(decodes) if chunk.sequence.block_table)
        return max((one for one in younger if one in many and counter(one) >= had), key=_sizes(generated), default=None)

    def _would_give_way(self, going: list[Sequence]) -> bool:
        """Whether something waits that could take the place of a sequence that is going on."""
        if sum(not one.is_scored for one in going) < self._max_num_seqs:
            return False
        shares = Counter(one.share for one in self._running if not one.is_scored)
        clients: Counter[str] = Counter()
        for share, count in shares.items():
            clients[share.client] += count
        crowded = {share.client for share, count in shares.items() if count > 1}
        some_client = any(count > 1 for count in clients.values())
        return any(
            leader.share.client in crowded if leader.share.client in clients else some_client
            for leader in self._waiting
            if not leader.is_scored and leader.share not in shares
        )

    def _fits(self, leader: Sequence, num_tokens: int) -> bool:
        whole = len(leader.token_ids) * len(leader.lockstep)
        return whole <= num_tokens or whole - sum(map(self.blocks.num_cached, leader.lockstep)) <= num_tokens

    def _should_wait_for_prefix(self, sequence: Sequence) -> bool:
        """Whether sequences that run are about to compute what this one would have to compute as well."""
        length = len(sequence.token_ids)
        coming = self.blocks.num_coming(sequence, self._running)
        if coming <= WORTH_WAITING * length:
            return False
        known = self.blocks.num_cached(sequence)
        return coming - known > WORTH_WAITING * (length - known)

    def _allocate(self, leader: Sequence) -> bool:
        """Blocks for all that is to be computed, as long as some stay for those that run."""
        spare = int(self.blocks.num_blocks * WATERMARK) if self._running else 0
        done: list[Sequence] = []
        for sequence in leader.lockstep:
            if not self.blocks.allocate(sequence, len(sequence.token_ids), spare=spare):
                for one in done:
                    self.blocks.free(one)
                return False
            done.append(sequence)
        return True


class PrefillBudget:
    """How a step's tokens are spent on prefill: prompts and scored continuations."""

    def __init__(self, num_tokens: int, num_logits: int, in_flight: InFlight) -> None:
        self._in_flight = in_flight
        self.num_tokens = num_tokens  # left for sequences that fit whole
        self.chunked: Sequence | None = None  # the one that does not, and is cut into chunks
        self._num_logits = num_logits
        self._reserved = 0, 0  # its half of tokens and logits, to which the rest is added in the end
        self._whole: list[ScheduledChunk] = []

    @property
    def chunks(self) -> list[ScheduledChunk]:
        tokens, logits = self._reserved
        if self.chunked is None:
            return self._whole
        rest = _cut(self.chunked, tokens + self.num_tokens, logits + self._num_logits, self._in_flight)
        return [*self._whole, *rest]

    def can_take(self, leader: Sequence) -> bool:
        """Whether there is anything left for a sequence."""
        return self.num_tokens > 0 and (self._num_logits > 0 or not leader.is_scored)

    def add(self, leader: Sequence) -> None:
        """Of the sequences in the order in which they came. Those in lockstep share what their leader gets."""
        if not leader.lockstep or not self.can_take(leader):
            return
        chunks = _cut(leader, self.num_tokens, self._num_logits, self._in_flight)
        if [chunk.end for chunk in chunks] == list(_targets(leader, self._in_flight).values()):
            self._whole += chunks
            self.num_tokens -= sum(map(len, chunks))
            self._num_logits -= sum(chunk.num_logits for chunk in chunks if leader.is_scored)
        elif self.chunked is None:
            self.chunked = leader
            tokens, logits = (_half(number, leader) for number in (self.num_tokens, self._num_logits))
            self._reserved = tokens, logits * leader.is_scored
            self.num_tokens -= self._reserved[0]
            self._num_logits -= self._reserved[1]


def _half(number: int, leader: Sequence) -> int:
    """Half of a number, but one for each of those in lockstep if there are as many."""
    return min(number, max((number + 1) // 2, len(leader.lockstep)))


def _cut(leader: Sequence, num_tokens: int, num_logits: int, in_flight: InFlight) -> list[ScheduledChunk]:
    """The next chunk of a sequence, or of each of those in lockstep, of so many tokens and logits at most in all."""
    targets = _targets(leader, in_flight)
    tokens, logits = num_tokens // len(targets), num_logits // len(targets)
    chunks = []
    for sequence, target in targets.items():
        start = _num_computed(sequence, in_flight)
        stop = min(target, start + tokens)
        if sequence.is_scored:
            stop = min(stop, max(start, sequence.num_prompt_tokens - 1) + logits)
        if stop > start:
            chunks.append(ScheduledChunk(sequence, start, stop))
    return chunks


def _targets(leader: Sequence, in_flight: InFlight) -> dict[Sequence, int]:
    """The end index that each member may reach in this step. A lockstep pair first computes both prompts independently,
    then advances over the continuation together."""
    behind = {one: one.num_prompt_tokens - 1 for one in leader.lockstep}
    behind = {one: stop for one, stop in behind.items() if _num_computed(one, in_flight) < stop}
    if behind and len(leader.lockstep) > 1:
        return behind
    return {one: len(one.token_ids) for one in leader.lockstep}


def _sizes(sequences: Iterable[Sequence]) -> Callable[[Sequence], tuple[int, int]]:
    """Of a sequence, how many of these its client has, and then its request."""
    sequences = list(sequences)
    clients = Counter(one.share.client for one in sequences)
    requests = Counter(one.share for one in sequences)
    return lambda one: (clients[one.share.client], requests[one.share])


# --- sequences, as they will be once what is in flight has been computed ---------------------------


def _num_computed(sequence: Sequence, in_flight: InFlight) -> int:
    chunk = in_flight.get(sequence)
    return sequence.num_computed_tokens if chunk is None else chunk.end


def _num_uncomputed(sequence: Sequence, in_flight: InFlight) -> int:
    """Of its tokens, the one that is being sampled included."""
    chunk = in_flight.get(sequence)
    return sequence.num_uncomputed if chunk is None else len(sequence.token_ids) + chunk.is_sampled - chunk.end


def _ends(sequence: Sequence, in_flight: InFlight) -> bool:
    """Whether nothing will be left of it to compute, whatever token is being sampled."""
    chunk = in_flight.get(sequence)
    if chunk is None:
        return False
    if sequence.is_scored:
        return chunk.end == len(sequence.token_ids)
    return chunk.end + 1 - sequence.num_prompt_tokens >= sequence.sampling_params.max_new_tokens
