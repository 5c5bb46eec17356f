"""Gates that read another site than they steer, served: whatever happens to a sequence, its condition is its own."""

import random
from collections.abc import Sequence as Many
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from torch import Tensor

from server.app import create_app
from server.config import Settings
from server.engine.cuda_graphs import Bucket, CudaGraphs
from server.engine.sequence import SteeringParams
from steering.checkpoint import base_model_info
from steering.column import Column
from steering.types import Gate, Reading, SequenceSteering, Site
from tests.server.conftest import columns as tiny_columns
from tests.server.conftest import write
from tests.server.desk import Desk
from tests.server.reference import plain
from tests.server.test_architectures import columns, greedy_sequence, sequences, tiny

READ, STEERED = Site.parse("0.residual"), Site.parse("2.residual")


def conditioned(latched: bool, gate: Gate = Gate.COSINE) -> list[Column]:
    made = [replace(one, site=STEERED, gate=gate, keep_norm=False, gate_bias=0.0) for one in columns("llama")]
    return [replace(one, reads=Reading(READ, latched)) for one in made]


@torch.no_grad()
def greedy(model: Any, prompt: Many[int], columns: Many[Column], multipliers: Many[float], *, new: int) -> list[int]:
    """Every step is one whole forward pass over the text so far, its gates by the formula in float64."""
    ids, start = list(prompt), len(prompt) - 1
    for _ in range(new):
        seen: list[Tensor] = []
        keep = model.model.layers[0].register_forward_hook(lambda m, a, out, seen=seen: seen.append(whole(out)))

        def move(module: Any, args: Any, output: Any, seen: list[Tensor] = seen) -> Any:
            moved = whole(output).clone()
            for one, multiplier in zip(columns, multipliers, strict=True):
                a = seen[0][0].double()
                overlap = a @ one.gate_weight.double()
                gates = (overlap / a.norm(dim=-1) > 0).double() if one.gate is Gate.COSINE else overlap
                gates = gates[start].expand_as(gates) if one.reads and one.reads.latched else gates
                moved[0, start:] += (multiplier * gates[start:, None] * one.vector.double()).to(moved.dtype)
            return moved if isinstance(output, Tensor) else (moved, *output[1:])

        acting = model.model.layers[2].register_forward_hook(move)
        try:
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        finally:
            keep.remove()
            acting.remove()
    return ids[len(prompt) :]


def whole(output: Any) -> Tensor:
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden


def test_no_graph_is_replayed_that_more_latched_rows_have_made_useless(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has captured are the addresses of the lines before."""
    monkeypatch.setattr("steering.bank.LINES", 2)
    versions: list[tuple[int, int]] = []
    static = CudaGraphs.__call__

    def replayed(graphs: CudaGraphs, bucket: Bucket, *args: Any) -> Tensor:
        versions.append((graphs._captured[bucket].version, desk.bank.version))
        return static(graphs, bucket, *args)

    monkeypatch.setattr(CudaGraphs, "__call__", replayed)
    desk = Desk(tiny("llama"), graphs=True)
    steering = SteeringParams(SequenceSteering.of([(desk.bank.add(conditioned(latched=True)), (1.0, 0.5))]))
    desk.run([greedy_sequence((10 + one, 6, 7), 8, steering) for one in range(5)], arrivals=[0, 2, 4, 6, 8])
    assert desk.bank.max_lines > 2
    assert versions
    assert all(captured == now for captured, now in versions)


@pytest.mark.parametrize("how", ["native", "torch", "static"])
@pytest.mark.parametrize("latched", [False, True])
def test_a_condition_stays_with_its_sequence_whatever_happens_to_it(latched: bool, how: str) -> None:
    """Random arrivals, chunked prompts, shared beginnings, a cache that is too small, steps that are begun before the
    tokens of the one before are known, and the static ones that CUDA graphs replay."""
    reference, made = tiny("llama"), conditioned(latched)
    options = {"native": how == "native", "graphs": how == "static", "ahead": how != "native"}
    desk = Desk(tiny("llama"), num_blocks=16, block_size=4, max_num_seqs=6, max_num_batched_tokens=12, **options)
    handle = desk.bank.add(made)
    mixes = [(1.0, 0.0), (-1.0, 1.5)]
    steering = [SteeringParams(), *(SteeringParams(SequenceSteering.of([(handle, mix)])) for mix in mixes)]
    number = random.Random(1)
    asked = sequences(number, steering)
    texts = desk.run(asked, arrivals=[number.randint(0, 40) for _ in asked])
    assert desk.scheduler.preemptions, "the cache was not small enough to prove anything"
    assert desk.blocks.cached_tokens > 40
    moved = still = 0
    for one, text in texts.items():
        new, columns_of = one.sampling_params.max_new_tokens, one.steering_params.columns
        unsteered = plain(reference, one.prompt_token_ids, new=new)
        if not columns_of.slots:
            assert text == unsteered, one
            continue
        assert text == greedy(reference, one.prompt_token_ids, made, columns_of.parts[0][1], new=new), one
        moved += text != unsteered
        still += text == unsteered
    assert moved > 2, "the test steers too weakly to prove anything"
    assert not latched or len(set(desk.runner._lines._of.values())) == len(desk.runner._lines._of)


def test_lines_of_sequences_that_have_ended_serve_others() -> None:
    desk = Desk(tiny("llama"))
    handle = desk.bank.add(conditioned(True))
    steering = SteeringParams(SequenceSteering.of([(handle, (1.0, 1.0))]))
    for round in range(5):
        asked = [greedy_sequence((5 + round, 6 + index), 4, steering) for index in range(3)]
        desk.run(asked)
        assert all(one.ended for one in asked)
    assert desk.runner._lines.most == 3


def test_a_trace_shows_the_gate_that_was_held() -> None:
    desk = Desk(tiny("llama"))
    made = conditioned(True, Gate.LINEAR)
    handle = desk.bank.add(made)
    steering = SteeringParams(SequenceSteering.of([(handle, (1.0, 0.5))]))
    one = greedy_sequence((5, 6, 7), 4, steering)
    one.trace = True
    desk.run([one])
    gates = [[each.gate for each in token.trace] for token in desk.finished[one].tokens]
    assert len(gates) == 4
    for later in gates[1:]:
        assert later == gates[0]
    with torch.no_grad():
        state = tiny("llama")(torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states[1][0, -1]
    expected = [float(state.double() @ column.gate_weight.double()) for column in made]
    assert gates[0] == pytest.approx(expected, rel=1e-4, abs=1e-4)


def held(seed: int) -> list[Column]:
    read = Reading(Site.parse("0.residual"), latched=True)
    return [replace(one, gate=Gate.LINEAR, reads=read) for one in tiny_columns(32, seed=seed, strength=9.0)[:2]]


def test_a_checkpoint_with_a_latched_gate_is_served_and_swapped_like_any_other(
    model: Any, model_folder: Path, tmp_path: Path
) -> None:
    info = base_model_info(model, "tiny", None)
    for version in (1, 2):
        write(tmp_path, "held", str(version), info, held(version))
    settings = Settings(model=str(model_folder), checkpoints=tmp_path, device="cpu", threads=1, remember=False)
    with TestClient(create_app(settings)) as client:

        def ask(**body: Any) -> Any:
            fixed = {"prompt": "Q: What colour", "temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
            return client.post("/generate", json=fixed | body)

        unsteered = ask(checkpoint="held@1", attributes={}).json()["results"][0]["token_ids"]
        texts = []
        for version in ("1", "2", "1"):
            answer = ask(checkpoint=f"held@{version}", attributes={"kind": 2.0}, trace=True).json()["results"][0]
            texts.append(answer["token_ids"])
            traced = [each for token in answer["trace"] for each in token["columns"]]
            gates = [each["gate"] for each in traced if each["attribute"] == "kind"]
            assert len(gates) == 8
            assert len(set(gates)) == 1
            if version == "1":  # the other one is active
                assert client.delete("/checkpoints/held", params={"version": version}).status_code == 200
        assert texts[0] == texts[2]
        assert len({tuple(text) for text in (unsteered, *texts)}) == 3
        assert ask(checkpoint="held@1", attributes={"kind": 0}).json()["results"][0]["token_ids"] == unsteered
        for positions in ("all", "prompt"):
            refused = ask(checkpoint="held@1", attributes={"kind": 1.0}, positions=positions)
            assert refused.status_code == 422
            assert "latched gate" in refused.json()["error"]["message"]
            assert ask(checkpoint="held@1", attributes={"kind": 0}, positions=positions).status_code == 200
