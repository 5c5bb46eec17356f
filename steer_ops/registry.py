"""Operations that are computed faster than plain PyTorch, and which implementation of each serves a device and dtype.

An op is registered with `torch.library` as `torch.ops.steer_ops.<name>`: its schema says which arguments it writes to,
fake tensors and `torch.compile` know it, and its reference in PyTorch serves every device that has no kernel. A kernel
is used after it has computed what the reference computes on random numbers; this is tried once in a process for each
device and dtype.
"""

import logging
from collections.abc import Callable, Hashable, Iterable
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from steer_ops.cpu import build
from steer_ops.cuda import library

log = logging.getLogger(__name__)
NAMESPACE = "steer_ops"
DTYPES = (torch.float32, torch.bfloat16)  # that kernels for CPUs compute
# How far a kernel's numbers may be from the reference's, as a share of the largest of them.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
Implementation = Callable[..., Any]
Example = tuple[tuple[Any, ...], dict[str, Any]]
_definitions: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]  # registrations last as long as this object
_lock = RLock()


class Op:
    """One operation, with its reference in PyTorch and its kernels."""

    def __init__(
        self,
        schema: str,
        reference: Implementation,
        examples: Callable[..., Iterable[Example]],
        *,
        fake: Implementation | None = None,
    ) -> None:
        """schema: as `torch.library.define` takes it, with the name. examples: arguments of a dtype on the CPU that the
        kernels are tried on; of an op that is chosen for sizes (`choose_for`) also of those. fake: what the op returns
        for fake tensors; None: nothing, it writes to its arguments."""
        self.name = schema.partition("(")[0]
        self.reference = reference
        self._examples = examples
        self._chosen: dict[tuple[str, torch.dtype], Implementation] = {}
        self._fits: dict[tuple[Implementation, str, torch.dtype, Hashable], bool] = {}
        _definitions.define(schema)
        _definitions.impl(self.name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", fake or _returns_nothing, lib=_definitions)
        self.overload: Implementation = getattr(getattr(torch.ops, NAMESPACE), self.name).default

    def for_tensor(self, tensor: Tensor) -> Implementation:
        """The implementation for tensors like this one."""
        return self._chosen.get((tensor.device.type, tensor.dtype)) or self.choose(tensor.device, tensor.dtype)

    def choose(self, device: torch.device, dtype: torch.dtype) -> Implementation:
        """The implementation for a device and dtype: the kernel where there is one that computes what the reference
        computes, else the reference. The first call in a process may compile the kernels, which takes seconds."""
        key = device.type, dtype
        with _lock:
            if key not in self._chosen:
                use = has_kernel(self.name, *key) and self._passes_trial(self.overload, device, dtype)
                self._chosen[key] = self.overload if use else self.reference
            return self._chosen[key]

    def choose_for(self, device: torch.device, dtype: torch.dtype, sizes: Hashable) -> Implementation:
        """As `choose`, of what will be computed in these sizes: a kernel may not fit a device in all of them."""
        kernel = self.choose(device, dtype)
        if kernel is self.reference:
            return kernel
        key = kernel, device.type, dtype, sizes
        with _lock:
            if key not in self._fits:
                self._fits[key] = self._passes_trial(kernel, device, dtype, sizes)
            return kernel if self._fits[key] else self.reference

    def has_kernel(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether a kernel serves this device and dtype, rather than the reference."""
        return self.choose(device, dtype) is not self.reference

    def forget(self) -> None:
        """Implementations are chosen anew. For tests."""
        self._chosen.clear()
        self._fits.clear()

    def _passes_trial(self, kernel: Implementation, device: torch.device, dtype: torch.dtype, *sizes: Hashable) -> bool:
        of = " ".join(map(str, (dtype, *sizes)))
        exact = torch.device("cpu")  # on a GPU products of float32 may be TF32
        try:
            with torch.no_grad():
                same = all(
                    _same(_run(kernel, args, named, device), _run(self.reference, args, named, exact), dtype)
                    for args, named in self._examples(dtype, *sizes)
                )
        except Exception as error:
            log.warning("the kernel of %s for %s fails (%s): PyTorch computes that", self.name, of, error)
            return False
        if not same:
            log.warning("the kernel of %s for %s computes something else: PyTorch computes that", self.name, of)
        return same


def has_kernel(name: str, device: str, dtype: torch.dtype) -> bool:
    """Whether a kernel is registered for an op on a kind of device ("cpu", "cuda"). Kernels are compiled when first
    asked for."""
    if device == "cuda":
        return library.has_kernel(name, dtype)
    if device != "cpu" or dtype not in DTYPES or build.load() is None:
        return False
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU"))


def _returns_nothing(*args: Any, **named: Any) -> None:
    pass


def _run(
    implementation: Implementation, args: tuple[Any, ...], named: dict[str, Any], device: torch.device
) -> list[Tensor]:
    """What an implementation returns for copies of these arguments, and what it leaves in them."""
    copies = [_copied(arg, device) for arg in args]
    result = implementation(*copies, **{name: _copied(arg, device) for name, arg in named.items()})
    results = result if isinstance(result, tuple) else (result,)
    parts = [part for whole in (*results, *copies) for part in (whole if isinstance(whole, list) else [whole])]
    return [part for part in parts if isinstance(part, Tensor)]


def _copied(arg: Any, device: torch.device) -> Any:
    if isinstance(arg, list):
        return [_copied(part, device) for part in arg]
    return arg.to(device, copy=True) if isinstance(arg, Tensor) else arg


def _largest(numbers: Tensor) -> float:
    return float(numbers.abs().nan_to_num(0, torch.inf).max()) if numbers.numel() else 0.0


def _same(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> bool:
    """found: on any device."""
    return len(found) == len(expected) and all(
        _agrees(mine.to(theirs.device), theirs, dtype) for mine, theirs in zip(found, expected, strict=True)
    )


def _agrees(mine: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    return (
        mine.shape == theirs.shape
        and mine.dtype == theirs.dtype
        and torch.equal(mine.isnan(), theirs.isnan())
        and _largest(mine.double() - theirs.double()) <= TOLERANCES[dtype] * _largest(theirs.double())
    )
