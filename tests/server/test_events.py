"""What comes out of the engine while rows run: pieces of text, and what the columns did to each token."""

import queue
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.sequence import Event, Finished, SamplingParams, Sequence, SteeringParams, TokenEvent
from steering.checkpoint import load
from steering.operators import trace
from steering.types import SequenceSteering
from tests.server.conftest import World

PROMPT = "Q: What colour"
NAMES = count()


pytestmark = pytest.mark.usefixtures("overlaps")


def events(world: World, rows: list[Sequence]) -> list[Event]:
    """Everything that the engine tells of rows, in order."""
    told: queue.SimpleQueue[Event] = queue.SimpleQueue()
    world.service.engine.submit(rows, told.put)
    seen: list[Event] = []
    while sum(isinstance(event, Finished) for event in seen) < len(rows):
        seen.append(told.get(timeout=20))
    return seen


def row(world: World, index: int = 0, **sampling: Any) -> Sequence:
    rules = SamplingParams(**({"temperature": 1.0, "max_new_tokens": 30, "ignore_eos": True, "seed": 4} | sampling))
    return Sequence(f"r{next(NAMES)}", index, world.service.codec.encode(PROMPT, "prompt"), rules, stream=True)


def test_the_pieces_of_a_text_put_together_are_the_text(world: World) -> None:
    """Random bytes, so that characters span tokens and some never end."""
    rows = [row(world, i, seed=i, temperature=3.0) for i in range(6)]
    seen = events(world, rows)
    for one in rows:
        *pieces, last = [event for event in seen if event.sequence is one]
        assert isinstance(last, Finished)
        told = [event for event in pieces if isinstance(event, TokenEvent)]
        assert "".join(piece.text for piece in told) == last.text
        assert [piece.index for piece in told] == list(range(30))
        assert tuple(piece.token.token_id for piece in told) == last.token_ids
        assert sum(bool(piece.text) for piece in told) > 10, "the text comes as it is made"


def test_what_may_be_the_beginning_of_a_stop_string_is_held_back(world: World) -> None:
    whole = events(world, [row(world, temperature=2.0)])[-1]
    assert isinstance(whole, Finished)
    stop = whole.text[10:14]
    assert len(stop) == 4
    *pieces, last = events(world, [row(world, temperature=2.0, stop=("never" * 3, stop))])
    assert isinstance(last, Finished)
    assert last.finish_reason == "stop"
    assert last.text == whole.text[: whole.text.index(stop)]
    shown = ""
    for piece in pieces:
        assert isinstance(piece, TokenEvent)
        shown += piece.text
        assert last.text.startswith(shown), "what was shown is never taken back"
    assert shown == last.text


def test_a_stop_id_ends_a_row_like_the_end_of_the_text(world: World) -> None:
    whole = events(world, [row(world)])[-1]
    assert isinstance(whole, Finished)
    end = whole.token_ids[7]
    first = whole.token_ids.index(end)
    cut = events(world, [row(world, stop_token_ids=(end,))])[-1]
    assert isinstance(cut, Finished)
    assert (cut.finish_reason, cut.token_ids) == ("stop", whole.token_ids[: first + 1])


def test_a_trace_says_what_the_formulas_say_of_each_token(world: World, model: Any, checkpoints: Path) -> None:
    columns = load(checkpoints / "demo" / "2").columns
    loaded = world.service.registry.load("demo@2", "checkpoint")
    mix = (1.5, 0.0, -0.5)
    plain = row(world, temperature=0, max_new_tokens=6)
    traced = replace(
        plain, index=1, steering_params=SteeringParams(SequenceSteering.of([(loaded.handle, mix)])), trace=True
    )
    seen = events(world, [plain, traced, replace(plain, index=2, trace=True)])
    finished = {event.sequence.index: event for event in seen if isinstance(event, Finished)}
    assert all(not draw.trace for index in (0, 2) for draw in finished[index].tokens), "nothing steers them"
    result = finished[1]

    caught: list[torch.Tensor] = []
    module = model.model.layers[1].self_attn
    hook = module.register_forward_hook(lambda module, args, output: caught.append(output[0][0]))
    try:
        with torch.inference_mode():
            model(torch.tensor([[*traced.prompt_token_ids, *result.token_ids]]), use_cache=False)
    finally:
        hook.remove()
    # Steered at one layer only, so that what comes before it is as in the plain pass.
    activations = caught[0][len(traced.prompt_token_ids) - 1 : -1]
    expected = trace(
        activations,
        torch.stack([column.vector for column in columns]),
        torch.stack([column.gate_weight for column in columns]),
        torch.tensor([column.gate_bias for column in columns]),
        torch.tensor([column.gate.code for column in columns], dtype=torch.int8),
        torch.tensor([mix] * len(activations)),
    )
    assert len(result.tokens) == 6
    for token, draw in enumerate(result.tokens):
        assert [touch.attribute for touch in draw.trace] == ["kind", "true", "fair"]
        assert {touch.site for touch in draw.trace} == {"1.attn_output"}
        for i, touch in enumerate(draw.trace):
            assert touch.gate == pytest.approx(float(expected.gates[token, i]), rel=1e-3, abs=1e-5)
            assert touch.strength == pytest.approx(float(expected.strengths[token, i]), rel=1e-3, abs=1e-5)
            assert touch.delta_norm == pytest.approx(float(expected.delta_norms[token, i]), rel=1e-3, abs=1e-4)
            assert touch.cosine == pytest.approx(float(expected.cosines[token, i]), rel=1e-2, abs=1e-4)
    assert not world.service.engine._runner.steering.traced or events(world, [replace(plain, index=9)])
    assert not world.service.engine._runner.steering.traced, "nobody asks, nothing is recorded"


def test_the_last_of_a_text_is_told_although_no_step_follows(world: World) -> None:
    for _ in range(3):
        *pieces, last = events(world, [row(world, max_new_tokens=2)])
        assert len(pieces) == 2
        assert isinstance(last, Finished)


def test_a_text_is_told_in_the_order_in_which_it_was_drawn(world: World) -> None:
    seen = events(world, [row(world, i, seed=i, max_new_tokens=5 + i) for i in range(4)])
    for index in range(4):
        own = [event for event in seen if event.sequence.index == index]
        assert [event.index for event in own if isinstance(event, TokenEvent)] == list(range(5 + index))
        assert isinstance(own[-1], Finished)
