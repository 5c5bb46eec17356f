"""On a CUDA device: decoding steps are captured in graphs, and say what the plain model says on the CPU."""

import random
from dataclasses import replace

import pytest
import torch
from accelerate import dispatch_model

from server.engine.tape import Tape
from server.engine.types import Row, Sampling, Steer
from steering.types import SequenceSteering
from tests.server.desk import Desk
from tests.server.reference import greedy, plain
from tests.server.test_architectures import columns, rows, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral", "qwen3", "gpt_neox"])
def test_captured_steps_equal_the_plain_model(name: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    reference = tiny(name)
    desk = Desk(tiny(name).to("cuda"), largest=64, roots=8, max_rows=6, step_tokens=12, graphs=True, ahead=True)
    handle = desk.bank.add(columns(name))
    mixes = [(1.0, 0.0), (-1.0, 1.5)]
    steers = [Steer(), *(Steer(SequenceSteering.of([(handle, mix)])) for mix in mixes)]
    number = random.Random(0)
    asked = rows(number, steers)
    texts = desk.run(asked, arrivals=[number.randint(0, 40) for _ in asked])
    for row, text in texts.items():
        new = row.sampling.max_new_tokens
        if row.steer.columns.slots:
            multipliers = dict(zip(("kind", "fair"), row.steer.columns.parts[0][1], strict=True))
            assert text == greedy(reference, row.tokens, columns(name), multipliers, new=new, eos=None), row
            assert desk.steered[row] == new, "a captured hook counts every token"
        else:
            assert text == plain(reference, row.tokens, new=new), row


def test_columns_that_come_while_graphs_exist_act() -> None:
    name = "llama"
    desk = Desk(tiny(name).to("cuda"), largest=64, roots=8, graphs=True)
    row = rows(random.Random(0), [Steer()])[0]
    before = desk.run([row])[row]
    handle = desk.bank.add(columns(name))
    steered: Row = replace(row, steer=Steer(SequenceSteering.of([(handle, (2.0, 2.0))])))
    again = replace(row)
    texts = desk.run([steered, again])
    assert texts[again] == before
    assert texts[steered] != before
    assert desk.steered[steered] == row.sampling.max_new_tokens


def test_nothing_waits_for_the_device_until_two_steps_have_been_begun() -> None:
    desk = Desk(tiny("llama").to("cuda"), largest=64, roots=8, graphs=True)
    sampling = Sampling(max_new_tokens=30, temperature=1.0, top_p=0.9, min_p=0.01, seed=3)
    desk.scheduler.add([Tape.of(Row("r", index, (5, 6, 7 + index), sampling)) for index in range(3)])
    for _ in range(5):
        desk.step()
    works = desk.scheduler.next()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step = desk.runner.launch(works)
        following = desk.runner.launch(desk.scheduler.ahead(works), step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for begun in (step, following):
        for work, outcome in zip(begun.works, begun.outcomes(), strict=True):
            desk.scheduler.done(work, outcome.steered)
            assert outcome.draw
            work.tape.tokens.append(outcome.draw.token)
    assert all(work.tape.cached == len(work.tape.tokens) - 1 for work in works)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices")
def test_a_model_over_two_devices_equals_the_plain_one() -> None:
    reference = tiny("llama")
    half = len(reference.model.layers) // 2
    places: dict[str, int] = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{index}": int(index >= half) for index in range(len(reference.model.layers))}
    desk = Desk(dispatch_model(tiny("llama"), places), largest=64, roots=8)
    handle = desk.bank.add(columns("llama"))
    asked = rows(random.Random(0), [Steer(), Steer(SequenceSteering.of([(handle, (1.0, -0.5))]))])
    for row, text in desk.run(asked).items():
        new = row.sampling.max_new_tokens
        if row.steer.columns.slots:
            assert text == greedy(
                reference, row.tokens, columns("llama"), {"kind": 1.0, "fair": -0.5}, new=new, eos=None
            )
        else:
            assert text == plain(reference, row.tokens, new=new)
