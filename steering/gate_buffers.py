"""The gates that read another site than their columns steer (CAST, arXiv 2409.05907), by the site that they read."""

import torch
from torch import Tensor

from steer_ops.plain import full_precision, gates, widen
from steering.column import Column
from steering.slots import Slots


class GateBuffers(Slots):
    """What a hook reads at a site whose activations open the gates of columns at other sites: G slots, of which the
    free ones are zero.

    weights [G, D], biases [G] float32; kinds [G] int8 (`Gate.code`); latched [G] bool; places [G] int64: where each
    gate goes in a line of the bank's `opened`; held [lines, G] float32: latched gates of the rows that have lines.
    """

    BUFFERS = ("weights", "biases", "kinds", "latched", "places")

    def __init__(self, width: int, lines: int, device: torch.device) -> None:
        super().__init__()
        self.width = width
        self.weights = torch.zeros(0, width, device=device)
        self.biases = torch.zeros(0, device=device)
        self.kinds = torch.zeros(0, dtype=torch.int8, device=device)
        self.latched = torch.zeros(0, dtype=torch.bool, device=device)
        self.places = torch.zeros(0, dtype=torch.int64, device=device)
        self.held = torch.zeros(lines, 0, device=device)

    @property
    def latches(self) -> bool:
        """Whether some gate is latched."""
        return any(column.reads.latched for column in self.columns if column and column.reads)

    def resize(self, capacity: int, lines: int) -> None:
        """Adds free slots up to `capacity` and lines up to `lines`; gates keep their slots, and what is held."""
        self._grow(capacity)
        held = self.held.new_zeros(lines, capacity)
        held[: len(self.held), : self.held.shape[1]] = self.held
        self.held = held

    def put(self, column: Column) -> int:
        """Writes a column's gate into a free slot and says which."""
        assert column.reads is not None
        index = self._take(column)
        self.weights[index].copy_(column.gate_weight)
        self.biases[index].fill_(column.gate_bias)
        self.kinds[index].fill_(column.gate.code)
        self.latched[index].fill_(column.reads.latched)
        return index

    def open(self, activations: Tensor, opened: Tensor, lines: Tensor, latching: Tensor) -> None:
        """Writes the gates of activations [n, D] into `opened` [n, columns]. lines and latching [n] int64: the line of
        each token's row, and the same where the token sets what is latched; elsewhere 0, a line that nobody has."""
        weights, biases, kinds = (part.to(activations.device) for part in (self.weights, self.biases, self.kinds))
        with full_precision(activations):
            a, weights, biases = widen(activations.detach(), weights, biases)
            found = gates(a, weights, biases, kinds).to(opened)
        if self.held.shape[0]:
            self.held.index_copy_(0, latching, found)
            found = torch.where(self.latched, self.held[lines], found)
        opened.index_copy_(1, self.places, found)

    def check(self) -> None:
        """Raises AssertionError when a slot does not hold what its column says."""
        for i, column in enumerate(self.columns):
            weight, bias, kind, latched = torch.zeros(self.width), 0.0, 0, False
            if column and column.reads:
                weight, bias, kind = column.gate_weight, column.gate_bias, column.gate.code
                latched = column.reads.latched
            assert torch.equal(self.weights[i].cpu(), weight), f"gate {i} has another weight"
            assert torch.equal(self.biases[i].cpu(), torch.tensor(bias)), f"gate {i} has another bias"
            assert (int(self.kinds[i]), bool(self.latched[i])) == (kind, latched), f"gate {i} is another gate"
