"""The engine as it is on CUDA, with Triton's kernels interpreted on the CPU: decoding, prompts beside it, steering."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine import cuda_graphs
from server.engine.model_runner import _rows_of
from server.engine.sequence import Sequence, SteeringParams
from steer_ops import Op, linears
from steer_ops.cuda import library
from steer_ops.layers import FusedRMSNorm, GatedMLP, RotaryAttention
from steering.types import SequenceSteering
from tests.server.desk import Desk
from tests.server.reference import logits
from tests.server.test_architectures import MORE, columns, greedy_sequence, tiny
from tests.steer_ops.interpreted import mend_interpreter
from tests.steer_ops.test_registry import CUDA_OPS, OPS
from tests.steering.families import FAMILIES

pytest.importorskip("triton", reason="triton is not installed: pip install 'mat-steer[triton]'")
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/server/test_gpu.py runs the same compiled"),
]
CPU = torch.device("cpu")


class Calls(Counter[str]):
    """How often each kernel was called."""

    def of(self, name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            self[name] += 1
            return kernel(*args, **named)

        return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """All kernels are Triton's, which attend to prompts without FlashAttention, and products are PyTorch's own. They
    are not tried before: that takes as long as a test."""
    mend_interpreter(monkeypatch)
    monkeypatch.setattr(Op, "_passes_trial", lambda *_: True)
    counts = Calls()
    by_name = {op.name: op for op in [*OPS, *CUDA_OPS]}
    for name, (kernel, _) in library.triton_kernels(CPU).items():
        monkeypatch.setitem(by_name[name]._chosen, (CPU.type, torch.float32), counts.of(name, kernel))
    monkeypatch.setattr(linears, "_packed", lambda weight, bias, native: linears.DenseLinear(weight, bias))
    return counts


def recorded_logits(desk: Desk) -> dict[tuple[Sequence, int], Tensor]:
    """From now on, those after each chunk, by its sequence and end."""
    found: dict[tuple[Sequence, int], Tensor] = {}
    forward = desk.runner.forward

    def recording(chunks: Any, *rest: Any) -> Any:
        computed = forward(chunks, *rest)
        for chunk, rows in _rows_of(chunks).items():
            found[chunk.sequence, chunk.end] = computed[0][rows][-1].clone()
        return computed

    desk.runner.forward = recording  # type: ignore[method-assign]
    return found


EAGER = ("llama", "gemma2", "gpt_oss")
TWO_LAYERS = ("llama", "gemma2", "gemma3", "gpt_oss", "granite_swa")  # of two kinds, or what ends one begins the next


@pytest.mark.parametrize(
    ("name", "mixed"), [*((name, True) for name in [*FAMILIES, *MORE]), *((name, False) for name in EAGER)]
)
def test_texts_and_logits_equal_the_plain_models(
    name: str, mixed: bool, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column comes when static steps exist. A prompt that shares blocks with another is cut in two, and its end is
    read beside a steered text's decoding; then both decode, one steered, one not."""
    monkeypatch.setattr(cuda_graphs, "MIXED_SIZES", (6,) if mixed else (0,))
    layers, new = 2 if name in TWO_LAYERS else 1, 3
    reference, model = (tiny(name, layers=layers) for _ in range(2))
    steered_by = columns(name, layers - 1)
    desk = Desk(model, num_blocks=16, block_size=4, max_num_seqs=2, max_num_batched_tokens=6, graphs=True)
    found = recorded_logits(desk)
    stem = (21, 4, 17, 33, 40)
    texts = desk.run([greedy_sequence(stem, 1, SteeringParams())])
    handle = desk.bank.add(steered_by)
    steering = SteeringParams(SequenceSteering.of([(handle, (-1.0, 1.5))]))
    calls.clear()
    desk.runner.capture_graphs()
    steered = greedy_sequence((8, 9), new, steering)
    long = greedy_sequence((*stem, 12, 9, 30, 7, 55, 3), new, SteeringParams())
    texts |= desk.run([steered, long])
    assert desk.computed == [5, 6, 3, 2, 1], "the third pass is a chunk of two tokens beside one that decodes"
    assert desk.blocks.cached_tokens >= 4, "it begins like the first text"
    for one, text in texts.items():
        ids, prompt = [*one.prompt_token_ids, *text], len(one.prompt_token_ids)
        multipliers = {"kind": -1.0, "fair": 1.5} if one is steered else {}
        expected = logits(reference, ids, steered_by, multipliers, prompt=prompt)
        assert text == expected[prompt - 1 : -1].argmax(-1).tolist()
        assert desk.steered(one) == (new if one is steered else 0)
        for end in range(prompt, len(ids)):
            away = (found[one, end] - expected[end - 1]).norm()
            assert away < 1e-4 * expected[end - 1].norm(), f"after {end} tokens"

    count = Counter(type(module) for module in model.modules())
    # Static steps are run again for the column that has come: two sizes of tokens alone, one of both. The first of the
    # four passes is of chunks alone, and eager, as it is traced; the second of both; the others of tokens alone.
    sizes, decodes, chunked = 2 + mixed, 3, 2
    assert calls["paged_attention_decode"] == (sizes + decodes) * layers
    assert calls["steer_and_count"] == new + sizes
    assert calls["write_kv"] == calls["paged_attention_prefill"] == (chunked + mixed) * layers
    turned = (chunked + mixed) * count[RotaryAttention]
    assert calls["rotary"] == turned, "decoded tokens are turned where they are attended to"
    assert bool({"silu_mul", "gelu_tanh_mul"} & calls.keys()) == bool(count[GatedMLP])
    assert ("rms_norm" in calls) == bool(count[FusedRMSNorm])


def test_no_kernel_is_launched_for_the_first_time_while_a_request_waits(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a request's steps launch, one after the other, a step of the warm-up has launched together. As with more
    tokens than static steps have."""
    monkeypatch.setattr(cuda_graphs, "MIXED_SIZES", (0,))
    desk = Desk(
        tiny("llama", layers=1), num_blocks=16, block_size=4, max_num_seqs=2, max_num_batched_tokens=6, graphs=True
    )
    passes: list[set[str]] = []
    forward = desk.runner.forward

    def recording(*args: Any) -> Any:
        calls.clear()
        computed = forward(*args)
        passes.append(set(calls))
        return computed

    desk.runner.forward = recording  # type: ignore[method-assign]
    desk.runner.warm_up()
    warm, passes[:] = passes.copy(), []
    stem = (21, 4, 17, 33, 40)
    desk.run([greedy_sequence(stem, 1, SteeringParams())])
    long = (*stem, 12, 9, 30, 7, 55, 3)
    texts = greedy_sequence((8, 9), 3, SteeringParams()), greedy_sequence(long, 3, SteeringParams())
    desk.run([*texts])
    kinds = {"paged_attention_decode", "paged_attention_prefill"}
    for each in ({"paged_attention_prefill"}, {"paged_attention_decode"}, kinds):
        assert each in [one & kinds for one in passes], "a beginning, tokens, and a chunk beside a token"
    for one in passes:
        assert any(one <= each for each in warm), one
