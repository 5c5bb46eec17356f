"""On a CUDA device: decoding steps are captured in graphs, and say what the plain model says on the CPU."""

import random
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

from server.engine import cuda_graphs
from server.engine.sequence import SamplingParams, ScheduledChunk, SteeringParams
from steering.types import SequenceSteering
from tests.server.desk import Desk, sequence
from tests.server.reference import greedy, plain
from tests.server.test_architectures import columns, greedy_sequence, sequences, tiny
from tests.steer_ops.test_registry import CUDA_OPS, OPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral", "qwen3", "gpt_neox"])
def test_captured_steps_equal_the_plain_model(name: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    reference = tiny(name)
    desk = Desk(tiny(name).to("cuda"), max_num_seqs=6, max_num_batched_tokens=12, graphs=True, ahead=True)
    handle = desk.bank.add(columns(name))
    mixes = [(1.0, 0.0), (-1.0, 1.5)]
    steering = [SteeringParams(), *(SteeringParams(SequenceSteering.of([(handle, mix)])) for mix in mixes)]
    number = random.Random(0)
    asked = sequences(number, steering)
    texts = desk.run(asked, arrivals=[number.randint(0, 40) for _ in asked])
    for one, text in texts.items():
        new, prompt = one.sampling_params.max_new_tokens, one.prompt_token_ids
        if one.steering_params.columns.slots:
            multipliers = dict(zip(("kind", "fair"), one.steering_params.columns.parts[0][1], strict=True))
            assert text == greedy(reference, prompt, columns(name), multipliers, new=new, eos=None), one
            assert desk.steered(one) == new, "a captured hook counts every token"
        else:
            assert text == plain(reference, prompt, new=new), one


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_op_has_a_kernel_that_passes_its_trial(dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    missing = {op.name for op in [*OPS, *CUDA_OPS] if not op.has_kernel(torch.device("cuda"), dtype)}
    assert missing == {"tiled_linear"} | ({"varlen_attention"} if dtype == torch.float32 else set())


def test_a_prompt_in_chunks_has_the_plain_models_logits_in_bfloat16() -> None:
    prompt = tuple(range(3, 40))
    desk = Desk(tiny("llama").bfloat16().to("cuda"))
    scored = sequence(prompt[:1], continuation=(*prompt[1:], 0))
    assert desk.blocks.allocate(scored, len(prompt))
    chunks = [(ScheduledChunk(scored, start, stop),) for start, stop in ((0, 20), (20, 37))]
    found = torch.cat([desk.runner.forward(chunk)[0] for chunk in chunks]).float().cpu()
    with torch.no_grad():
        expected = tiny("llama").bfloat16()(torch.tensor([prompt])).logits[0].float()
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_columns_that_come_while_graphs_exist_act() -> None:
    name = "llama"
    desk = Desk(tiny(name).to("cuda"), graphs=True)
    prompt, new = (5, 6, 7, 8), 12
    unsteered = greedy_sequence(prompt, new, SteeringParams())
    before = desk.run([unsteered])[unsteered]
    handle = desk.bank.add(columns(name))
    steered = greedy_sequence(prompt, new, SteeringParams(SequenceSteering.of([(handle, (2.0, 2.0))])))
    again = greedy_sequence(prompt, new, SteeringParams())
    texts = desk.run([steered, again])
    assert texts[again] == before
    assert texts[steered] != before
    assert desk.steered(steered) == new


def test_steps_on_the_last_device_are_captured_and_replayed_there() -> None:
    """Whatever the current device was, and though graphs have been captured on another one."""
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    prompt, new = (5, 6, 7, 8), 12
    with torch.cuda.device(0):
        Desk(tiny("llama").to("cuda:0"), graphs=True)
        torch.cuda.set_device(0)
        desk = Desk(tiny("llama").to(device), graphs=True)
        assert torch.cuda.current_device() == device.index
        for _ in range(2):  # a thread that has another one
            asked = greedy_sequence(prompt, new, SteeringParams())
            assert desk.run([asked])[asked] == plain(tiny("llama"), prompt, new=new)
            torch.cuda.set_device(0)


def test_a_capture_that_is_broken_off_leaves_thread_and_allocator_as_they_were() -> None:
    """By a layer that looks at the device's values."""

    def look(layer: Any, given: Any, found: Any) -> None:
        given[0].sum().item()

    prompt, new, stream = (5, 6, 7, 8), 12, torch.cuda.current_stream()
    for looks in (True, False):
        model = tiny("llama").to("cuda")
        if looks:
            model.model.layers[1].register_forward_hook(look)
        desk = Desk(model, graphs=True)
        assert bool(desk.runner._graphs and desk.runner._graphs._captured) != looks
        assert torch.cuda.current_stream() == stream
        torch.cuda.empty_cache()
        asked = greedy_sequence(prompt, new, SteeringParams())
        assert desk.run([asked])[asked] == plain(tiny("llama"), prompt, new=new)


@pytest.mark.parametrize("beside", ["", "a prompt", "a prompt, eager"])
@pytest.mark.parametrize("top_k", [0, 20])
def test_nothing_waits_for_the_device_until_two_steps_have_been_begun(
    top_k: int, beside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "eager" in beside:
        monkeypatch.setattr(cuda_graphs, "MIXED_SIZES", (0,))
    desk = Desk(tiny("llama").to("cuda"), graphs=True)
    rules: dict[str, Any] = {"top_p": 0.9, "min_p": 0.01, "seed": 3, "logit_bias": ((9, 1.0),), "logprobs": 2}
    rules |= {"repetition_penalty": 1.2, "frequency_penalty": 0.3}
    params = SamplingParams(
        max_new_tokens=30, temperature=1.0, top_k=top_k, min_tokens=30, stop_token_ids=(4,), **rules
    )
    texts = [sequence((5, 6, 7 + index), sampling_params=params, trace=index == 0) for index in range(3)]
    desk.add(*texts)
    for _ in range(5):
        desk.step()
    if beside:
        desk.add(sequence(tuple(range(3, 53)) * 3))
        desk.engine._receive(wait=False)
    chunks = desk.scheduler.schedule()
    assert max(map(len, chunks)) == (61 if beside else 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step = desk.runner.execute_async(chunks)
        following = desk.runner.execute_async(desk.scheduler.schedule_ahead(chunks), step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for begun in (step, following):
        for chunk, output in zip(begun.chunks, begun.result(), strict=True):
            desk.scheduler.postprocess(chunk, output.steered)
            assert output.sampled or chunk.sequence not in texts
            if output.sampled:
                chunk.sequence.token_ids.append(output.sampled.token_id)
    assert all(one.num_uncomputed == 1 for one in texts)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices")
def test_a_model_over_two_devices_equals_the_plain_one() -> None:
    reference = tiny("llama")
    half = len(reference.model.layers) // 2
    places: dict[str, int] = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{index}": int(index >= half) for index in range(len(reference.model.layers))}
    desk = Desk(dispatch_model(tiny("llama"), places))
    handle = desk.bank.add(columns("llama"))
    mixed = SteeringParams(SequenceSteering.of([(handle, (1.0, -0.5))]))
    for one, text in desk.run(sequences(random.Random(0), [SteeringParams(), mixed])).items():
        new, prompt = one.sampling_params.max_new_tokens, one.prompt_token_ids
        if one.steering_params.columns.slots:
            multipliers = {"kind": 1.0, "fair": -0.5}
            assert text == greedy(reference, prompt, columns("llama"), multipliers, new=new, eos=None)
        else:
            assert text == plain(reference, prompt, new=new)
