"""Nothing in a step waits for the device but the one copy at its end: seen on a CPU, by what the step asks PyTorch for.
`tests/server/test_gpu.py` has PyTorch itself look, on a GPU."""

import random
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from server.engine import cuda_graphs
from steer_ops import PAGED_ATTENTION_PREFILL
from tests.server.test_ahead import Ask, Bench, sequence
from tests.steer_ops.interpreted import mend_interpreter

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/server/test_gpu.py runs the same compiled"),
]
# Ops whose result, or the shape of it, the host needs before it can go on.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Where a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in INDEXING and any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
        counted = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITING or masks or counted:
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, name: str) -> None:
        places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_stack(None)]
        if not any(file.endswith("triton/runtime/interpreter.py") for file, _ in places):
            ours = [place for place in places if "/site-packages/" not in place[0] and place[0] != __file__]
            self.found.append(f"{name}: {ours[:1]}")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """Notes what is asked for inside `with waits`."""
    waits = Waits()

    def noted(name: str) -> Callable[..., Any]:
        method = getattr(Tensor, name)

        def call(self: Tensor, *args: Any, **named: Any) -> Any:
            if torch.utils._python_dispatch._get_current_dispatch_mode() is waits:
                waits.note(name)
            return method(self, *args, **named)

        return call

    for name in ("tolist", "cpu"):  # NumPy refuses what is on a device
        monkeypatch.setattr(Tensor, name, noted(name))
    return waits


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: int(x[0]),
        lambda x: x[x > 0],
        lambda x: bool((x > 0).any()),
        lambda x: x.masked_fill_(x > 0, 1).tolist(),
        lambda x: x.repeat_interleave(torch.tensor([1, 2])),
        lambda x: torch.nonzero(x),
        lambda x: x.cpu(),
    ],
)
def test_what_waits_is_noted(wait: Callable[[Tensor], Any], waits: Waits) -> None:
    with waits:
        wait(torch.tensor([1.0, 0.0]))
    assert len(waits.found) == 1


@pytest.mark.parametrize("static", [True, False])
def test_steps_of_all_kinds_wait_for_nothing(static: bool, waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks beside texts that decode and texts that are scored, steered, traced, with all rules."""
    prefill = pytest.importorskip("steer_ops.cuda.paged_prefill", reason="no triton", exc_type=ImportError)
    mend_interpreter(monkeypatch)
    monkeypatch.setitem(PAGED_ATTENTION_PREFILL._chosen, ("cpu", torch.float32), prefill.paged_attention_prefill)
    monkeypatch.setattr(cuda_graphs, "MIXED_SIZES", (12,) if static else (0,))
    bench = Bench(num_blocks=64, block_size=4, max_num_seqs=4, max_num_batched_tokens=12, graphs=True, ahead=True)
    desk, number = bench.desk, random.Random(1)
    execute, kinds = desk.runner.execute_async, set[tuple[bool, ...]]()

    def watched(chunks: Any, after: Any = None) -> Any:
        kinds.add((any(len(one) > 1 for one in chunks), any(len(one) == 1 for one in chunks), after is not None))
        with waits:
            step = execute(chunks, after)
        assert step.error is None, step.error
        return step

    desk.runner.execute_async = watched  # type: ignore[method-assign]
    asked = [bench.sequence(replace(Ask.of(number), trace=index % 3 == 0)) for index in range(6)]
    scored = [sequence((5, 6, 7), continuation=(8, 9, 10, 11), steering_params=one) for one in bench.steerings]
    desk.add(*scored)
    desk.run(asked, arrivals=[number.randint(0, 6) for _ in asked])
    assert all(one.logprobs for one in scored)
    assert not waits.found, set(waits.found)
    assert {(True, True, True), (False, True, True), (True, True, False)} <= kinds, "mixed, and begun ahead"
