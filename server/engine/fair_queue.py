"""Whose turn it is: sequences that wait, in fair shares between clients, and in each between its requests. Touches no
tensor.

Virtual token counters, as in "Fairness in Serving Large Language Models" (Sheng et al., arXiv 2401.00588): each client
has a counter of the tokens that the engine has computed for it, and the one with the lowest counter is next. A client
that arrives begins at the virtual time of weighted fair queueing, which is what a client would have been given that had
been there, and had wanted something, all along. So nobody is owed for the time before he came, and a client with many
sequences, which is ahead of that time, is not passed by new ones for ever: the time catches up with it. A client is an
API key, or a request that came without one; the requests of a key share what is its own in the same way.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from server.engine.sequence import Sequence


@dataclass(eq=False)
class Share:
    """A client's or a request's. It lasts as long as there are sequences of it that wait or run."""

    number: int  # in the order of arrival
    counter: float  # tokens


@dataclass(eq=False)
class RequestShare(Share):
    waiting: deque[Sequence] = field(default_factory=deque)  # of sequences in lockstep only the leader
    sequences: int = 0  # that wait or run


@dataclass(eq=False)
class ClientShare(Share):
    requests: dict[str, RequestShare] = field(default_factory=dict)
    virtual_time: float = 0.0  # of its requests


class FairQueue:
    """Sequences that wait, and the share of each client and request that has any, running ones included."""

    def __init__(self) -> None:
        self._clients: dict[str, ClientShare] = {}
        self._virtual_time = 0.0
        self._arrived = 0

    def __bool__(self) -> bool:
        return any(share.waiting for share in self._requests())

    def __iter__(self) -> Iterator[Sequence]:
        """Everything that waits, by request."""
        return (leader for share in self._requests() for leader in list(share.waiting))

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Sequences that arrive."""
        for sequence in sequences:
            name, request = sequence.share
            if name not in self._clients:
                self._clients[name] = ClientShare(self._number(), self._virtual_time)
            client = self._clients[name]
            if request not in client.requests:
                client.requests[request] = RequestShare(self._number(), client.virtual_time)
            share = client.requests[request]
            share.sequences += 1
            if sequence.lockstep:
                share.waiting.append(sequence)

    def put_back(self, leader: Sequence) -> None:
        """A sequence that ran goes before the others of its request."""
        self._request(leader).waiting.appendleft(leader)

    def take(self, leader: Sequence) -> None:
        """It runs now."""
        self._request(leader).waiting.remove(leader)

    def leave(self, sequence: Sequence) -> None:
        """A sequence has ended, or is to: it has waited or run."""
        share = self._request(sequence)
        share.sequences -= 1
        if sequence in share.waiting:
            share.waiting.remove(sequence)
        if not share.sequences:
            client = self._clients[sequence.share.client]
            del client.requests[sequence.share.request]
            if not client.requests:
                del self._clients[sequence.share.client]

    def counter(self, sequence: Sequence) -> float:
        """The tokens that its request has had, from where it began."""
        return self._request(sequence).counter

    def client_counter(self, sequence: Sequence) -> float:
        """The tokens that its client has had, from where it began."""
        return self._clients[sequence.share.client].counter

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """So many tokens are computed for a sequence that has not left."""
        client = self._clients[sequence.share.client]
        client.requests[sequence.share.request].counter += num_tokens
        client.virtual_time += num_tokens / len(client.requests)
        client.counter += num_tokens
        self._virtual_time += num_tokens / len(self._clients)

    def in_turn(self) -> Iterator[Sequence]:
        """Everything that waits, each time the next one of the client, and of its request, whose counter is the lowest
        by then. What is yielded may be taken, and its request charged, before the next one is asked for."""
        return _in_turn(
            (client, _in_turn((share, iter(list(share.waiting))) for share in client.requests.values()))
            for client in self._clients.values()
        )

    # --- inside ---

    def _request(self, sequence: Sequence) -> RequestShare:
        return self._clients[sequence.share.client].requests[sequence.share.request]

    def _requests(self) -> Iterator[RequestShare]:
        return (share for client in list(self._clients.values()) for share in list(client.requests.values()))

    def _number(self) -> int:
        self._arrived += 1
        return self._arrived


def _in_turn(shares: Iterable[tuple[Share, Iterator[Sequence]]]) -> Iterator[Sequence]:
    """Each time the next sequence of the share whose counter is the lowest by then."""
    heap = [(share.counter, share.number, share, waiting) for share, waiting in shares]
    heapq.heapify(heap)
    while heap:
        _, number, share, waiting = heap[0]
        leader = next(waiting, None)
        if leader is None:
            heapq.heappop(heap)
            continue
        yield leader
        heapq.heapreplace(heap, (share.counter, number, share, waiting))
