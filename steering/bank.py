"""The bank of steering columns: static device buffers per site, and the multipliers of the current batch.

One bank serves one model. Every method is called from the thread that runs the model, between forward passes; nothing
here takes a lock.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from steer_ops.plain import READ
from steering.column import Column
from steering.errors import ColumnError
from steering.gate_buffers import GateBuffers
from steering.slots import Slots
from steering.types import Handle, SequenceSteering, Site

LINES = 257  # of latched gates at first: so many rows less one
NO_OWNER = -1  # the owner of a token that no column acts on


class SiteBuffers(Slots):
    """What a hook reads at one site: C slots, of which the free ones are zero and have multipliers of zero.

    vectors and weights [C, D], biases [C] float32; kinds [C] int8 (`Gate.code`); keep_norm [C] bool; clamps [C, 2]
    float32 (value, origin), NaN where a column adds; multipliers and opened [max_tokens, C] float32, views of the
    bank's buffers. Addresses change in `resize` only; the views change whenever the bank's buffers do.
    """

    BUFFERS = ("vectors", "weights", "biases", "kinds", "keep_norm", "clamps")
    multipliers: Tensor
    opened: Tensor
    owner: int  # where this site's columns begin in the bank's buffer; how `ColumnBank.owners` calls the site

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.width = width
        self.vectors = torch.zeros(0, width, device=device)
        self.weights = torch.zeros(0, width, device=device)
        self.biases = torch.zeros(0, device=device)
        self.kinds = torch.zeros(0, dtype=torch.int8, device=device)
        self.keep_norm = torch.zeros(0, dtype=torch.bool, device=device)
        self.clamps = torch.zeros(0, 2, device=device)

    @property
    def all_keep(self) -> bool:
        """Whether every column keeps the activation's norm."""
        return all(column.keep_norm for column in self.columns if column is not None)

    @property
    def clamped(self) -> bool:
        """Whether some column clamps."""
        return any(column.clamp is not None for column in self.columns if column is not None)

    def attach(self, multipliers: Tensor, opened: Tensor, owner: int) -> None:
        self.multipliers, self.opened = (whole[:, owner : owner + len(self.columns)] for whole in (multipliers, opened))
        self.owner = owner

    def resize(self, capacity: int) -> None:
        """Adds free slots up to `capacity`; columns keep their slots."""
        self._grow(capacity)

    def put(self, column: Column) -> int:
        """Writes a column into a free slot and says which."""
        index = self._take(column)
        self.vectors[index].copy_(column.vector)
        if column.reads is None:
            self.weights[index].copy_(column.gate_weight)
            self.biases[index].fill_(column.gate_bias)
        self.kinds[index].fill_(READ if column.reads else column.gate.code)
        self.keep_norm[index].fill_(column.keep_norm)
        self.clamps[index].copy_(_clamp(column))
        return index

    def check(self) -> None:
        """Raises AssertionError when a slot does not hold what its column says."""
        for i, column in enumerate(self.columns):
            nothing = torch.zeros(self.width)
            own = column is not None and column.reads is None
            vector, weight = column.vector if column else nothing, column.gate_weight if column and own else nothing
            assert torch.equal(self.vectors[i].cpu(), vector), f"slot {i} holds another vector"
            assert torch.equal(self.weights[i].cpu(), weight), f"slot {i} holds another gate weight"
            bias, keep = column.gate_bias if column and own else 0.0, column.keep_norm if column else False
            kind = (column.gate.code if own else READ) if column else 0
            assert torch.equal(self.biases[i].cpu(), torch.tensor(bias)), f"slot {i} holds another bias"
            assert int(self.kinds[i]) == kind, f"slot {i} holds another gate"
            assert bool(self.keep_norm[i]) == keep, f"slot {i} holds another norm rule"
            clamp = _clamp(column) if column else torch.zeros(2)
            assert torch.allclose(self.clamps[i].cpu(), clamp, rtol=0, atol=0, equal_nan=True), (
                f"slot {i} holds another clamp"
            )


class MultiplierTable:
    """A device-side cache of what sequences ask for: one line of multipliers for each SequenceSteering in use.

    Lines [capacity, columns] of multipliers, and for each line the first site that acts on its tokens.

    Line 0 stays zero: it is what an unsteered token reads. A row is written when it is first placed and stays until
    its line is needed or one of its handles is forgotten, so that a step whose rows were seen before copies nothing.
    """

    def __init__(self, device: torch.device, starts: Mapping[Site, int], columns: int, capacity: int = 257) -> None:
        self.values = torch.zeros(capacity, columns, device=device)
        self.owners = torch.full((capacity,), NO_OWNER, dtype=torch.int32, device=device)
        self._starts = dict(starts)  # where a site's columns begin; also the number by which the site is an owner
        self._lines: dict[SequenceSteering, int] = {}
        self._free = list(range(capacity - 1, 0, -1))

    def place(self, rows: Sequence[SequenceSteering], live: set[Handle]) -> NDArray[np.int64]:
        """The line of each row. Raises ColumnError, changing nothing, for a row with a handle that is not `live`."""
        new = [row for row in dict.fromkeys(rows) if row.slots and row not in self._lines]
        for row in new:
            if not live.issuperset(row.handles):
                raise ColumnError("a row is steered by a handle that was removed or belongs to another bank")
        if len(new) > len(self._free):
            self._evict_all_but(rows)
        if len(new) > len(self._free):
            self._grow(len(new))
        if new:
            self._write(new)
        return np.fromiter((self._lines.get(row, 0) for row in rows), dtype=np.int64, count=len(rows))

    def forget(self, handle: Handle) -> None:
        """Frees every line that uses `handle`, whose slots may next belong to other columns."""
        self._evict([row for row in self._lines if handle in row.handles])

    def check(self, live: set[Handle]) -> None:
        """Raises AssertionError when an invariant is broken."""
        used = list(self._lines.values())
        assert sorted([0, *used, *self._free]) == list(range(len(self.values))), "a line is neither free nor used once"
        assert not self.values[0].any(), "line 0 steers"
        assert self.owners[0] == NO_OWNER, "line 0 is counted"
        for row, line in self._lines.items():
            assert live.issuperset(row.handles), "a line belongs to a removed handle"
            values, owner = self._describe(row)
            assert self.values[line].cpu().numpy().tolist() == values.tolist(), "a line differs from its row"
            assert int(self.owners[line]) == owner, "a line has the wrong owner"

    def _describe(self, row: SequenceSteering) -> tuple[NDArray[np.float32], int]:
        values = np.zeros(self.values.shape[1], dtype=np.float32)
        for site, index, value in row.slots:
            values[self._starts[site] + index] = value
        return values, self._starts[row.slots[0][0]]

    def _write(self, new: list[SequenceSteering]) -> None:
        described = [self._describe(row) for row in new]
        lines = [self._free.pop() for _ in new]
        where = upload(np.array(lines, dtype=np.int64), self.values.device)
        self.values.index_copy_(0, where, upload(np.stack([values for values, _ in described]), self.values.device))
        owners = np.array([owner for _, owner in described], dtype=np.int32)
        self.owners.index_copy_(0, where, upload(owners, self.values.device))
        self._lines.update(zip(new, lines, strict=True))

    def _evict_all_but(self, rows: Sequence[SequenceSteering]) -> None:
        kept = set(rows)
        self._evict([row for row in self._lines if row not in kept])

    def _evict(self, rows: list[SequenceSteering]) -> None:
        self._free.extend(self._lines.pop(row) for row in rows)

    def _grow(self, needed: int) -> None:
        old, more = len(self.values), max(needed, len(self.values))
        self.values = torch.cat([self.values, self.values.new_zeros(more, self.values.shape[1])])
        self.owners = torch.cat([self.owners, self.owners.new_full((more,), NO_OWNER)])
        self._free.extend(range(old + more - 1, old - 1, -1))


class ColumnBank:
    """Columns of any number of checkpoints, and which of them act on which token of the next forward pass.

    `multipliers` [max_tokens, all columns] float32, `owners` [max_tokens] int32 (the first site that acts on a token)
    and `steered_tokens` [max_tokens] int64 are what the hooks read and count in. In `opened` [max_tokens, all columns
    + 1] float32 hooks leave gates for columns at later sites; the last column is for gates that nobody has. They, and
    the buffers of each site, keep their addresses until `version` changes: whoever captured them in a CUDA graph
    captures again when it does. It changes when a buffer grows and when a site gets its first column or gate.

    A latched gate is state of a row of the batch, and lies in a line (`fill`) that whoever fills the bank has chosen
    for that row, and keeps for it from the token that latches to its last one.
    """

    multipliers: Tensor
    opened: Tensor
    lines: Tensor
    latching: Tensor
    owners: Tensor
    steered_tokens: Tensor

    def __init__(self, *, device: torch.device | str, max_tokens: int, spare: int = 8) -> None:
        """`spare`: how many free slots a site has at least after it grew, so that more checkpoints load without
        growing."""
        if max_tokens < 1 or spare < 0:
            raise ColumnError(f"max_tokens must be 1 or more and spare 0 or more, not {max_tokens} and {spare}")
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self.max_tokens = max_tokens
        self.spare = spare
        self.version = 0
        self.listeners: list[Callable[[], None]] = []  # called when `sites` or an address has changed
        self.max_lines = 0
        self._buffers: dict[Site, SiteBuffers] = {}
        self._gates: dict[Site, GateBuffers] = {}
        self._gate_slots: dict[tuple[Site, int], tuple[Site, int]] = {}  # of a column's slot: that of its gate
        self._live: set[Handle] = set()
        self._rows: tuple[SequenceSteering, ...] = ()
        self._token_rows: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._token_lines = _no_lines(0)
        self._reading: frozenset[Site] = frozenset()
        self._active: frozenset[Site] = frozenset()
        self._allocate()

    # Columns

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites with live columns, in the order in which a forward pass meets them."""
        return tuple(sorted(site for site, buffers in self._buffers.items() if buffers.live))

    @property
    def active_sites(self) -> frozenset[Site]:
        """The sites at which some row of the current batch is steered."""
        return self._active

    @property
    def read_sites(self) -> tuple[Site, ...]:
        """The sites that gates of live columns at other sites read."""
        return tuple(sorted(filter(self.is_read, self._gates)))

    @property
    def active_read_sites(self) -> frozenset[Site]:
        """Those that gates of the current batch read."""
        return self._reading

    def is_read(self, site: Site) -> bool:
        """Whether gates of live columns at other sites read a site."""
        return site in self._gates and self._gates[site].live > 0

    def has(self, site: Site) -> bool:
        """Whether a site has or had columns."""
        return site in self._buffers

    def gates_at(self, site: Site) -> GateBuffers:
        """The gates that read a site, or have read it; KeyError where there never was one."""
        return self._gates[site]

    def latches(self, row: SequenceSteering) -> bool:
        """Whether a row has latched gates, so that it needs a line."""
        if not self._gate_slots:
            return False
        columns = (self._buffers[site].columns[index] for site, index, _ in row.slots)
        return any(column.reads.latched for column in columns if column and column.reads)

    def at(self, site: Site) -> SiteBuffers:
        """The buffers of a site that has or had columns; KeyError for any other."""
        return self._buffers[site]

    def columns(self, handle: Handle) -> tuple[Column, ...]:
        """The columns behind a handle. Raises ColumnError for a handle that is not live in this bank."""
        self._check_live(handle)
        found = (self._buffers[site].columns[index] for site, index in handle.slots)
        return tuple(column for column in found if column is not None)

    def add(self, columns: Sequence[Column]) -> Handle:
        """Loads columns into free slots; grows a site that is full. The current batch stays as it was filled.

        Raises ColumnError for no columns or for widths that differ at one site, and what an installed `Steering`
        raises for a site that its model does not have; no column stays behind.
        """
        if not columns:
            raise ColumnError("a handle needs at least one column")
        self._check_widths(columns)
        before = self.sites, self.read_sites
        with _writable():
            grown = self._make_room(columns)
            slots = tuple((column.site, self._buffers[column.site].put(column)) for column in columns)
            for slot, column in zip(slots, columns, strict=True):
                if column.reads:
                    site = column.reads.site
                    self._gate_slots[slot] = site, self._gates[site].put(column)
            handle = Handle(slots, tuple(column.attribute for column in columns))
            self._live.add(handle)
            if grown:
                self._allocate()
            else:
                self._place_gates()
        if grown or (self.sites, self.read_sites) != before:
            self.version += 1
            try:
                self._notify()
            except BaseException:
                self.remove(handle)
                raise
        return handle

    def remove(self, handle: Handle) -> None:
        """Clears and frees the slots of `handle`; rows of the current batch lose what they asked of it.

        Raises ColumnError for a handle that was removed before or belongs to another bank.
        """
        self._check_live(handle)
        before = self.sites, self.read_sites
        self._live.remove(handle)
        self._table.forget(handle)
        with _writable():
            for site, index in handle.slots:
                self._buffers[site].drop(index)
                if gate := self._gate_slots.pop((site, index), None):
                    self._gates[gate[0]].drop(gate[1])
            self._place_gates()
        if any(handle in row.handles for row in self._rows):
            self._fill(tuple(row.without(handle) for row in self._rows), self._token_rows, self._token_lines)
        if (self.sites, self.read_sites) != before:
            # A graph captured with a hook that goes now stays right, since its multipliers are zero: same version.
            self._notify()

    def reserve(self, max_tokens: int) -> None:
        """Makes room for batches of `max_tokens` tokens; the current batch stays. Never shrinks."""
        if max_tokens > self.max_tokens:
            self.max_tokens = max_tokens
            self._allocate()
            self.version += 1
            self._notify()

    def reserve_lines(self, lines: int) -> None:
        """Makes room for the latched gates of rows with lines 1 to `lines`; what is held stays. Never shrinks."""
        if lines + 1 > self.max_lines:
            self.max_lines = max(lines + 1, 2 * self.max_lines)
            with _writable():
                for buffers in self._gates.values():
                    buffers.resize(len(buffers.columns), self.max_lines)
            self.version += 1
            self._notify()

    # The batch

    @property
    def filled(self) -> int:
        """How many tokens the current batch has."""
        return len(self._token_rows)

    def fill(
        self,
        rows: Sequence[SequenceSteering],
        token_rows: ArrayLike | Tensor | None = None,
        token_lines: NDArray[np.int64] | None = None,
    ) -> None:
        """Sets the multipliers of the next forward pass, in place.

        rows: what each row of the batch asks for. token_rows [N]: for each token of the flattened forward, in order,
        the index of its row, or -1 for a token that is not steered; None: token i belongs to row i (one token a row,
        a decode step). Tokens beyond N are not steered. token_lines [2, N]: for each token the line (from 1 on, see
        `reserve_lines`) of the latched gates of its row, and the same again where the token is the one that latches
        them; 0 for others; None: no row has latched gates.

        Costs one small host-to-device copy and two gathers whatever the number of sites, and nothing at all when the
        batch is the one before. Raises ColumnError, changing nothing, for a removed handle, a row index out of range
        or more than `max_tokens` tokens.
        """
        index = _token_index(token_rows, len(rows))
        if len(index) > self.max_tokens:
            raise ColumnError(f"the batch has {len(index)} tokens but the bank holds {self.max_tokens}: reserve more")
        lines = _no_lines(len(index)) if token_lines is None else token_lines
        same = np.array_equal(index, self._token_rows) and np.array_equal(lines, self._token_lines)
        if not (same and _same(rows, self._rows)):
            self._fill(tuple(rows), index, lines)

    def clear(self) -> None:
        """Steers no token until the next `fill`."""
        self.fill(())

    def take_counts(self, tokens: int | None = None) -> Tensor:
        """How often each of the first `tokens` token positions was steered since this was last asked; resets all.

        int64 [tokens] on the bank's device. Counted by the hooks: a token counts once in a forward pass, however many
        sites and columns act on it.
        """
        counts = self.steered_tokens[:tokens].clone()
        self.steered_tokens.zero_()
        return counts

    # Invariants

    def check(self) -> None:
        """Raises AssertionError when an invariant is broken. Slow: for tests."""
        owned = [slot for handle in self._live for slot in handle.slots]
        held = {(site, i) for site, buffers in self._buffers.items() for i, c in enumerate(buffers.columns) if c}
        assert len(owned) == len(set(owned)), "two handles share a slot"
        assert set(owned) == held, "a slot is live without a handle, or the other way round"
        start = 0
        for site, buffers in self._buffers.items():
            assert buffers.owner == start, f"the columns of {site} begin in the wrong place"
            assert buffers.multipliers.data_ptr() == self.multipliers[:, start:].data_ptr(), f"{site} is not attached"
            assert buffers.multipliers.shape == (self.max_tokens, len(buffers.columns)), f"{site} is not attached"
            assert buffers.opened.data_ptr() == self.opened[:, start:].data_ptr(), f"{site} is not attached"
            buffers.check()
            start += len(buffers.columns)
        assert self.opened.shape == (self.max_tokens, start + 1), "the gates have the wrong shape"
        gates = {(site, i): column for site, at in self._gates.items() for i, column in enumerate(at.columns) if column}
        readers = {slot: self._buffers[slot[0]].columns[slot[1]] for slot in owned}
        assert set(self._gate_slots) == {slot for slot, column in readers.items() if column and column.reads}
        assert {self._gate_slots[slot]: readers[slot] for slot in self._gate_slots} == gates, (
            "a gate is not its column's"
        )
        assert self._expected_places() == {site: at.places.tolist() for site, at in self._gates.items()}
        for at in self._gates.values():
            at.check()
            assert at.held.shape == (self.max_lines, len(at.columns)), "the lines have the wrong shape"
        lines = np.stack([part.cpu().numpy() for part in (self.lines, self.latching)])
        assert np.array_equal(lines[:, : self.filled], self._token_lines), "a token has another line"
        assert not lines[:, self.filled :].any(), "a token beyond the batch has a line"
        assert self.multipliers.shape == (self.max_tokens, start), "the multipliers have the wrong shape"
        assert self.owners.shape == self.steered_tokens.shape == (self.max_tokens,), "a token has no counter"
        multipliers, owners = self._expected()
        assert torch.equal(self.multipliers.cpu(), multipliers), "the multipliers are not those of the batch"
        assert torch.equal(self.owners.cpu(), owners), "a token is counted at the wrong site"
        assert self._active == {site for row in self._rows for site in row.sites}, "the active sites are wrong"
        self._table.check(self._live)

    def _expected(self) -> tuple[Tensor, Tensor]:
        multipliers = torch.zeros(self.multipliers.shape)
        owners = torch.full((self.max_tokens,), NO_OWNER, dtype=torch.int32)
        for token, row in enumerate(self._token_rows.tolist()):
            slots = self._rows[row].slots if row >= 0 else ()
            for site, index, value in slots:
                multipliers[token, self._buffers[site].owner + index] = value
            if slots:
                owners[token] = self._buffers[min(site for site, _, _ in slots)].owner
        return multipliers, owners

    # Inside

    def _check_live(self, handle: Handle) -> None:
        if handle not in self._live:
            raise ColumnError("the handle was removed before or belongs to another bank")

    def _check_widths(self, columns: Sequence[Column]) -> None:
        widths = {site: buffers.width for site, buffers in self._buffers.items()}
        widths |= {site: gates.width for site, gates in self._gates.items()}
        for column in columns:
            for site in (column.site, *([column.reads.site] if column.reads else ())):
                width = widths.setdefault(site, column.width)
                if column.width != width:
                    raise ColumnError(
                        f"column {column.attribute!r} has width {column.width}, but site {site} has width {width}"
                    )

    def _make_room(self, columns: Sequence[Column]) -> bool:
        widths = {column.site: column.width for column in columns}
        grown = False
        for site, wanted in Counter(column.site for column in columns).items():
            buffers = self._buffers.setdefault(site, SiteBuffers(widths[site], self.device))
            if wanted > buffers.free:
                buffers.resize(self._capacity(buffers, wanted))
                grown = True
        if not self.max_lines and any(column.reads and column.reads.latched for column in columns):
            self.max_lines, grown = LINES, True
            for gates in self._gates.values():
                gates.resize(len(gates.columns), self.max_lines)
        read = [(column.reads.site, column.width) for column in columns if column.reads]
        for (site, width), wanted in Counter(read).items():
            gates = self._gates.setdefault(site, GateBuffers(width, self.max_lines, self.device))
            if wanted > gates.free:
                gates.resize(self._capacity(gates, wanted), self.max_lines)
                grown = True
        return grown

    def _capacity(self, slots: Slots, wanted: int) -> int:
        """Of slots that grow for so many more columns. At least doubled, so that a site grows few times however many
        checkpoints come."""
        return max(slots.live + wanted + self.spare, 2 * len(slots.columns))

    def _expected_places(self) -> dict[Site, list[int]]:
        unused = self.opened.shape[1] - 1
        places = {site: [unused] * len(buffers.columns) for site, buffers in self._gates.items()}
        for (site, index), (read, gate) in self._gate_slots.items():
            places[read][gate] = self._buffers[site].owner + index
        return places

    def _place_gates(self) -> None:
        """Tells every gate where its column is."""
        for site, places in self._expected_places().items():
            self._gates[site].places.copy_(torch.tensor(places, dtype=torch.int64))

    def _allocate(self) -> None:
        """Lays the sites' columns out side by side in new buffers, and fills them with the current batch."""
        with _writable():
            starts, columns = _layout(self._buffers)
            self.multipliers = torch.zeros(self.max_tokens, columns, device=self.device)
            self.opened = torch.zeros(self.max_tokens, columns + 1, device=self.device)
            for site, buffers in self._buffers.items():
                buffers.attach(self.multipliers, self.opened, starts[site])
            self._place_gates()
            self._table = MultiplierTable(self.device, starts, columns)
            if not hasattr(self, "owners") or len(self.owners) < self.max_tokens:
                self._allocate_counters()
            self._fill(self._rows, self._token_rows, self._token_lines)

    def _allocate_counters(self) -> None:
        counted = getattr(self, "steered_tokens", None)
        self.owners = torch.full((self.max_tokens,), NO_OWNER, dtype=torch.int32, device=self.device)
        self.lines, self.latching = torch.zeros(2, self.max_tokens, dtype=torch.int64, device=self.device).unbind()
        self.steered_tokens = torch.zeros(self.max_tokens, dtype=torch.int64, device=self.device)
        if counted is not None:
            self.steered_tokens[: len(counted)] = counted

    def _fill(
        self, rows: tuple[SequenceSteering, ...], index: NDArray[np.int64], token_lines: NDArray[np.int64]
    ) -> None:
        with _writable():
            lines = np.append(self._table.place(rows, self._live), 0)  # index -1 reads the last entry: line 0, zeros
            tokens = np.zeros(max(len(index), self.filled), dtype=np.int64)  # clears the rest of the batch before
            tokens[: len(index)] = lines[index]
            where = upload(tokens, self.device)
            torch.index_select(self._table.values, 0, where, out=self.multipliers[: len(tokens)])
            torch.index_select(self._table.owners, 0, where, out=self.owners[: len(tokens)])
            if token_lines.any() or self._token_lines.any():
                whole = np.zeros((2, len(tokens)), dtype=np.int64)
                whole[:, : len(index)] = token_lines
                own = upload(whole, self.device)
                self.lines[: len(tokens)].copy_(own[0])
                self.latching[: len(tokens)].copy_(own[1])
        self._rows, self._token_rows, self._token_lines = rows, index, token_lines
        different = set(rows)
        self._active = frozenset().union(*(row.sites for row in different))
        used = {(site, slot) for row in different for site, slot, _ in row.slots} if self._gate_slots else set()
        self._reading = frozenset(self._gate_slots[slot][0] for slot in used & self._gate_slots.keys())

    def _notify(self) -> None:
        for listener in tuple(self.listeners):
            listener()


def _clamp(column: Column) -> Tensor:
    """[2]: value and origin, NaN where the column adds."""
    clamp = column.clamp
    return torch.tensor([math.nan, math.nan] if clamp is None else [clamp.value, clamp.origin])


def _layout(buffers: Mapping[Site, SiteBuffers]) -> tuple[dict[Site, int], int]:
    starts, end = {}, 0
    for site, at in buffers.items():
        starts[site] = end
        end += len(at.columns)
    return starts, end


def _no_lines(tokens: int) -> NDArray[np.int64]:
    return np.zeros((2, tokens), dtype=np.int64)


def _token_index(token_rows: ArrayLike | Tensor | None, rows: int) -> NDArray[np.int64]:
    if token_rows is None:
        return np.arange(rows)
    host = token_rows.cpu().numpy() if isinstance(token_rows, Tensor) else np.asarray(token_rows)
    if host.size and not np.issubdtype(host.dtype, np.integer):
        raise ColumnError(f"token_rows must hold whole numbers, not {host.dtype}")
    index = host.reshape(-1).astype(np.int64)  # a copy: the caller may reuse its array
    if index.size and (index.min() < -1 or index.max() >= rows):
        raise ColumnError(f"token_rows must hold -1 to {rows - 1}, not {index.min()} to {index.max()}")
    return index


def _same(rows: Sequence[SequenceSteering], others: Sequence[SequenceSteering]) -> bool:
    return len(rows) == len(others) and all(a is b for a, b in zip(rows, others, strict=True))


def _writable() -> AbstractContextManager[object]:
    """Buffers made here stay ordinary tensors, which may be written inside and outside inference mode."""
    return torch.inference_mode(False)


def upload(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """A device copy of a small host array that does not wait for the device's queue.

    A copy from pageable memory would make the host wait for the step that is running; pinned blocks come from
    PyTorch's cache, which keeps them until the copy has been made.
    """
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
