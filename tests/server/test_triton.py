"""The engine as it is on CUDA, with Triton's kernels interpreted on the CPU: decoding, prompts beside it, steering."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from server.attention import kv_pool
from server.engine.sequence import SteeringParams
from steer_ops import layers, plain
from steer_ops.cuda import library
from steering.types import SequenceSteering
from tests.server.desk import Desk
from tests.server.reference import greedy
from tests.server.reference import plain as unsteered
from tests.server.test_architectures import columns, greedy_sequence, tiny
from tests.steer_ops.interpreted import mend_interpreter
from tests.steer_ops.test_registry import CUDA_OPS, OPS

pytest.importorskip("triton", reason="triton is not installed: pip install 'mat-steer[triton]'")
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/server/test_gpu.py runs the same compiled"),
]
CPU = torch.device("cpu")


ATTENTION = {"paged_attention_decode", "write_kv", "gather_kv", "steer_and_count"}
LAYERS = {"rms_norm", "add_rms_norm", "silu_mul", "rotary"}


class Calls(Counter[str]):
    """How often each kernel was called."""

    def of(self, name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            self[name] += 1
            return kernel(*args, **named)

        return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, kernels: set[str]) -> Calls:
    """These kernels are Triton's, FlashAttention's reference stands for it, and products are PyTorch's own."""
    mend_interpreter(monkeypatch)
    counts = Calls()
    by_name = {op.name: op for op in [*OPS, *CUDA_OPS]}
    found = {name: kernel for name, (kernel, _) in library.triton_kernels(CPU).items() if name in kernels}
    for name, kernel in {**found, "varlen_attention": plain.varlen_attention}.items():
        monkeypatch.setitem(by_name[name]._chosen, (CPU.type, torch.float32), counts.of(name, kernel))
    monkeypatch.setattr(kv_pool, "varlen_takes", lambda *args: True)
    monkeypatch.setattr(layers, "_packed", lambda weight, bias, native: layers.DenseLinear(weight, bias))
    return counts


@pytest.mark.parametrize(
    ("name", "kernels"),
    [("llama", ATTENTION | LAYERS), ("gemma2", ATTENTION), ("gpt_oss", ATTENTION), ("gpt2", ATTENTION)],
)
def test_sequences_equal_the_plain_model(name: str, kernels: set[str], calls: Calls) -> None:
    """A prompt is cut in two, its end is read beside another text's decoding, and a column comes when static steps
    exist."""
    reference, new = tiny(name), 3
    desk = Desk(tiny(name), num_blocks=16, block_size=4, max_num_seqs=2, max_num_batched_tokens=6, graphs=True)
    first = greedy_sequence((5, 6, 7), 2, SteeringParams())
    assert desk.run([first])[first] == unsteered(reference, first.prompt_token_ids, new=2)
    handle = desk.bank.add(columns(name))
    steering = SteeringParams(SequenceSteering.of([(handle, (-1.0, 1.5))]))
    calls.clear()
    asked = [greedy_sequence(prompt, new, steering) for prompt in ((8, 9), (21, 4, 17, 33, 40, 12, 9))]
    texts = desk.run(asked)
    for one in asked:
        expected = greedy(
            reference, one.prompt_token_ids, columns(name), {"kind": -1.0, "fair": 1.5}, new=new, eos=None
        )
        assert texts[one] == expected
        assert desk.steered(one) == new
    assert desk.computed == [3, 1, 6, 4, 2, 1], "the fourth pass is a chunk of three tokens beside one that decodes"
    # Neither caps nor sinks are FlashAttention's business.
    expected_calls = kernels - {"gather_kv"} if name in ("gemma2", "gpt_oss") else kernels | {"varlen_attention"}
    assert set(calls) == expected_calls
    captures = 2  # of the steps of one and of two rows, for the column that has come
    assert calls["paged_attention_decode"] == (3 + captures) * reference.config.num_hidden_layers
    assert calls["steer_and_count"] == 4 + captures
