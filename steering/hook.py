"""Steering a Hugging Face model: one forward hook per live site, reading the bank's static buffers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steering.bank import ColumnBank, SiteBuffers
from steering.column import Column
from steering.errors import HookError, UnsupportedArchitecture
from steering.fused import fused_steer
from steering.operators import Trace, steer, trace
from steering.plain_batch import PlainBatch
from steering.sharding import RowwiseLinear
from steering.sites import site_module, site_width
from steering.types import Positions, Site, SiteKind


class Steering:
    """Installs and removes the hooks. Use as a context manager, or `install` and `remove`.

    While installed it follows the bank: a site that gets its first column gets its hook, one that loses its last
    column loses it. Installed hooks have no control flow that depends on values on the device, so that they can be
    captured in a CUDA graph.
    """

    def __init__(self, model: nn.Module, bank: ColumnBank, *, traced: bool = False, native: bool = True) -> None:
        """`traced`: record what every column does to every token in `traces` (see there); costs nothing when off.
        `native`: by a compiled kernel, where that can be had."""
        self.model = model
        self.bank = bank
        self.traced = traced
        self.native = native
        self.recording = False  # passes are recorded for batches to come: what this one asks for must not matter
        self.traces: dict[Site, Tensor] = {}
        self.batch: PlainBatch | None = None  # of a `steered` block
        self._hooks: dict[Site, RemovableHandle] = {}
        self._installed = False

    @property
    def steered_tokens(self) -> Tensor:
        """The bank's counters, int64 [max_tokens] on the device: see `ColumnBank.take_counts`."""
        return self.bank.steered_tokens

    @property
    def installed(self) -> bool:
        return self._installed

    def install(self) -> Self:
        """Hooks every live site; does nothing when installed already.

        Raises UnsupportedArchitecture, leaving no hook behind, where the model has no such site.
        """
        if not self._installed:
            self._installed = True
            self.bank.listeners.append(self._sync)
            try:
                self._sync()
            except BaseException:
                self.remove()
                raise
        return self

    def remove(self) -> None:
        """Takes every hook off the model; does nothing when none is installed."""
        if self._installed:
            self._installed = False
            self.bank.listeners.remove(self._sync)
        for site in list(self._hooks):
            self._hooks.pop(site).remove()
        self.traces.clear()

    def warm_up(self) -> None:
        """What is compiled at first use is compiled now, for every width that a site of the model can have: no pass
        waits for it when columns come."""
        if not self.native:
            return
        dtype: torch.dtype = self.model.dtype  # type: ignore[assignment]
        for width in self._site_widths():
            bank = ColumnBank(device=self.bank.device, max_tokens=1)
            at = SiteBuffers(width, bank.device)
            at.resize(1)
            at.attach(bank.multipliers.new_zeros(1, 1), bank.opened.new_zeros(1, 2), 0)
            with torch.inference_mode():
                fused_steer(
                    at, torch.zeros(1, width, dtype=dtype, device=bank.device), bank.owners, bank.steered_tokens
                )

    def _site_widths(self) -> set[int]:
        widths = set()
        for kind in SiteKind:
            with suppress(UnsupportedArchitecture):
                widths.add(site_width(self.model, kind))
        return widths

    def keep(self, rows: Sequence[int]) -> None:
        """Of a `steered` block: from now on its batch is of these rows, in their order."""
        assert self.batch is not None, "a block of `steered` has a batch"
        self.batch.keep(rows)

    def record(self, on: bool) -> None:
        """Fill `traces` in the passes that follow, or do not."""
        if on != self.traced:
            self.traced = on
            if self._installed:
                self._sync()

    def __enter__(self) -> Self:
        return self.install()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()

    def _sync(self) -> None:
        """Makes the hooks those of the bank's live sites, and of those that gates read."""
        live = self.bank.sites
        hooked = {*live, *self.bank.read_sites}
        for site in set(self._hooks) - hooked:
            self._hooks.pop(site).remove()
        for site in set(self.traces) - set(live):
            self.traces.pop(site)
        for site in sorted(hooked):
            if site not in self._hooks:
                self._hooks[site] = self._hook(site)
            if self.traced and site in live:
                shape = (*self.bank.at(site).multipliers.shape, len(fields(Trace)))
                if site not in self.traces or self.traces[site].shape != shape:
                    with torch.inference_mode(False):
                        self.traces[site] = torch.zeros(shape, device=self.bank.device)

    def _hook(self, site: Site) -> RemovableHandle:
        module, side = site_module(self.model, site)
        at = self.bank.at(site) if self.bank.has(site) else self.bank.gates_at(site)
        expected = site_width(self.model, site.kind)
        if at.width != expected:
            raise HookError(
                f"site {site} of {type(self.model).__name__} has width {expected}, its columns have {at.width}"
            )
        # Before any hook that is there already: who records activations shall see what the next module sees.
        if side == "input":
            return module.register_forward_pre_hook(self._on_input(site), prepend=True, with_kwargs=True)
        return module.register_forward_hook(self._on_output(site), prepend=True)

    def _on_input(self, site: Site) -> Callable[..., Any]:
        def steer_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (self._act_on_input(site, module, args[0]), *args[1:]), kwargs
            name = next(iter(kwargs))
            return args, kwargs | {name: self._act_on_input(site, module, kwargs[name])}

        return steer_input

    def _on_output(self, site: Site) -> Callable[..., Any]:
        def steer_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, Tensor):
                return self._act(site, output)
            return type(output)((self._act(site, output[0]), *output[1:]))

        return steer_output

    @property
    def _is_recorded(self) -> bool:
        """Whether this pass is recorded for later batches, so that what the host knows of this one must not matter."""
        if self.recording or torch.compiler.is_compiling():
            return True
        return self.bank.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _act_on_input(self, site: Site, module: nn.Module, activations: Tensor) -> Tensor:
        """Where several processes have a slice of the activations each, every one of them steers the whole."""
        if not isinstance(module, RowwiseLinear):
            return self._act(site, activations)
        recorded = self._is_recorded
        if not (self._opens(site, recorded) or self._steers(site, recorded)):
            return activations
        return module.on_whole(partial(self._act, site), activations)

    def _opens(self, site: Site, recorded: bool) -> bool:
        """Whether gates at other sites read this one in this pass."""
        bank = self.bank
        return bank.is_read(site) and (recorded or self.traced or site in bank.active_read_sites)

    def _steers(self, site: Site, recorded: bool) -> bool:
        """Whether columns act here in this pass."""
        bank = self.bank
        return bank.has(site) and (recorded or self.traced or site in bank.active_sites)

    def _act(self, site: Site, activations: Tensor) -> Tensor:
        """Opens gates of later sites by what is here, then steers."""
        bank = self.bank
        tokens = activations.reshape(-1, activations.shape[-1])
        n = len(tokens)
        if n > bank.max_tokens:
            raise HookError(f"a forward pass of {n} tokens met a bank for {bank.max_tokens}: reserve more")
        recorded = self._is_recorded
        if n < bank.filled and not recorded:
            raise HookError(f"a forward pass of {n} tokens met multipliers for {bank.filled}: fill or clear the bank")
        if self._opens(site, recorded):
            bank.gates_at(site).open(tokens, bank.opened[:n], bank.lines[:n], bank.latching[:n])
        if self._steers(site, recorded):
            return self._steer(site, tokens, recorded).reshape(activations.shape)
        return activations

    def _steer(self, site: Site, tokens: Tensor, recorded: bool) -> Tensor:
        """tokens [n, D] -> [n, D]"""
        bank, at, n = self.bank, self.bank.at(site), len(tokens)
        all_keep, clamped = (False, True) if recorded else (at.all_keep, at.clamped)
        if self.traced:
            self._trace(site, tokens)
        if self.native and not torch.compiler.is_compiling():
            moved = fused_steer(at, tokens, bank.owners, bank.steered_tokens)
            if moved is not None:
                return moved
        vectors, weights, biases, kinds, keep_norm, clamps, multipliers, opened = self._parts(site, tokens)
        bank.steered_tokens[:n].add_(bank.owners[:n] == at.owner)
        return steer(
            tokens, vectors, weights, biases, kinds, keep_norm, multipliers, clamps=clamps if clamped else None,
            opened=opened, all_keep=all_keep,
        )  # fmt: skip

    def _trace(self, site: Site, tokens: Tensor) -> None:
        vectors, weights, biases, kinds, _, clamps, multipliers, opened = self._parts(site, tokens)
        seen = trace(tokens, vectors, weights, biases, kinds, multipliers, clamps=clamps, opened=opened)
        measures = [getattr(seen, part.name) for part in fields(Trace)]
        self.traces[site][: len(tokens)].copy_(torch.stack(measures, dim=2).detach())

    def _parts(self, site: Site, tokens: Tensor) -> tuple[Tensor, ...]:
        """The arguments of `steer`, where the tokens are."""
        at, n = self.bank.at(site), len(tokens)
        parts: tuple[Tensor, ...] = (
            at.vectors, at.weights, at.biases, at.kinds, at.keep_norm, at.clamps, at.multipliers[:n], at.opened[:n]
        )  # fmt: skip
        if tokens.device != self.bank.device:  # the model is spread over several
            parts = tuple(part.to(tokens.device) for part in parts)
        return parts


@contextmanager
def steered(
    model: nn.Module,
    columns: Sequence[Column],
    multipliers: Sequence[float] | Tensor,
    *,
    mask: Tensor | None = None,
    positions: Positions = Positions.GENERATED,
) -> Iterator[Steering]:
    """Steers plain calls of a Hugging Face causal language model: `model(...)` and `model.generate(...)`.

    multipliers: one for each column [C], or a row of them for each row of the batch [B, C]; beams and returned
    sequences take those of the prompt that they continue.
    mask [B, T]: steer exactly these tokens of one forward pass, as for scoring a given answer; T counts the cached
    tokens that the pass goes on from, which stay as they are. Without a mask
    `positions` decides, for left-padded prompts and a model that caches keys and values: GENERATED steers the last
    token of every forward pass (the last prompt token, then each new token), PROMPT every token but padding of passes
    that have no cache yet, ALL every token but padding. A latched gate is set by the first token that is steered inside
    the block; rows that end are taken out of the block by `Steering.keep`.

    Raises ColumnError for columns and multipliers that do not fit, HookError for a forward pass that does not fit the
    mask, the multipliers or the rule, UnsupportedArchitecture for a model without such sites. Whatever happens inside,
    no hook outlives the block.
    """
    bank = ColumnBank(device=next(model.parameters()).device, max_tokens=1, spare=0)
    batch = PlainBatch(bank, bank.add(columns), multipliers, mask, positions)
    with Steering(model, bank) as steering:
        steering.batch = batch
        watch = model.register_forward_pre_hook(batch.before, with_kwargs=True)
        try:
            yield steering
        finally:
            watch.remove()
