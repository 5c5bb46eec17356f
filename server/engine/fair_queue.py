"""Whose turn it is: sequences that wait, in fair shares between requests. Touches no tensor.

Virtual token counters, as in "Fairness in Serving Large Language Models" (Sheng et al., arXiv 2401.00588): each request
has a counter of the tokens that the engine has computed for it, and the one with the lowest counter is next. A request
that arrives begins at the virtual time of weighted fair queueing, which is what a request would have been given that
had been there, and had wanted something, all along. So nobody is owed for the time before he came, and a request with
many sequences, which is ahead of that time, is not passed by new ones for ever: the time catches up with it.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from server.engine.sequence import Sequence


@dataclass(eq=False)
class Share:
    """One request's share. It lasts as long as the request has sequences that wait or run."""

    number: int  # in the order of arrival
    counter: float  # tokens
    waiting: deque[Sequence] = field(default_factory=deque)  # of sequences in lockstep only the leader
    sequences: int = 0  # that wait or run


class FairQueue:
    """Sequences that wait, and the share of each request that has any, running ones included."""

    def __init__(self) -> None:
        self._shares: dict[str, Share] = {}
        self._virtual_time = 0.0
        self._arrived = 0

    def __bool__(self) -> bool:
        return any(share.waiting for share in self._shares.values())

    def __iter__(self) -> Iterator[Sequence]:
        """Everything that waits, by request."""
        return (leader for share in list(self._shares.values()) for leader in list(share.waiting))

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Sequences that arrive."""
        for sequence in sequences:
            share = self._shares.get(sequence.share)
            if share is None:
                share = self._shares[sequence.share] = Share(self._arrived, self._virtual_time)
                self._arrived += 1
            share.sequences += 1
            if sequence.lockstep:
                share.waiting.append(sequence)

    def put_back(self, leader: Sequence) -> None:
        """A sequence that ran goes before the others of its request."""
        self._shares[leader.share].waiting.appendleft(leader)

    def take(self, leader: Sequence) -> None:
        """It runs now."""
        self._shares[leader.share].waiting.remove(leader)

    def leave(self, sequence: Sequence) -> None:
        """A sequence has ended, or is to: it has waited or run."""
        share = self._shares[sequence.share]
        share.sequences -= 1
        if sequence in share.waiting:
            share.waiting.remove(sequence)
        if not share.sequences:
            del self._shares[sequence.share]

    def counter(self, sequence: Sequence) -> float:
        """The tokens that its request has had, from where it began."""
        return self._shares[sequence.share].counter

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """So many tokens are computed for a sequence that has not left."""
        self._shares[sequence.share].counter += num_tokens
        self._virtual_time += num_tokens / len(self._shares)

    def in_turn(self) -> Iterator[Sequence]:
        """Everything that waits, each time the next one of the request whose counter is the lowest by then. What is
        yielded may be taken, and its request charged, before the next one is asked for."""
        heap = [
            (share.counter, share.number, share, iter(list(share.waiting)))
            for share in self._shares.values()
            if share.waiting
        ]
        heapq.heapify(heap)
        while heap:
            _, number, share, waiting = heap[0]
            leader = next(waiting, None)
            if leader is None:
                heapq.heappop(heap)
                continue
            yield leader
            heapq.heapreplace(heap, (share.counter, number, share, waiting))
