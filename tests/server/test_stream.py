"""A stream tells the same as the answer at once, and never leaves anybody waiting."""

import asyncio
import gc
import json
import threading
import time
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from server.app import create_app
from server.config import Settings
from server.engine.sequence import Finished, SampledToken, SamplingParams, Sequence, Timing, TokenEvent
from server.request_stream import RequestStream
from server.schemas import GenerateRequest
from tests.server.conftest import World, wait_until
from tests.server.test_engine import _disconnecting, api, runner_of

BODY: dict[str, Any] = {
    "prompt": ["Q: What colour", "Q: Where"],
    "attributes": {"kind": 1.0},
    "temperature": 2.0,
    "seed": 5,
    "max_new_tokens": 20,
    "baseline": True,
    "n": 2,
}


def told(text: str) -> list[tuple[str, Any]]:
    """The events of a stream."""
    events = []
    for block in text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        assert name.startswith("event: ")
        assert data.startswith("data: ")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def lasting(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What two answers to one request have in common: not the time, nor the last digits of a log-probability."""
    return [{key: result[key] for key in ("text", "token_ids", "finish_reason", "usage")} for result in results]


def test_a_stream_ends_with_the_answer_that_comes_at_once(world: World) -> None:
    whole = world.post(**BODY, trace=True, logprobs=2)
    response = world.client.post("/generate", json=BODY | {"stream": True, "trace": True, "logprobs": 2})
    assert response.headers["content-type"].startswith("text/event-stream")
    *tokens, (last, done) = told(response.text)
    assert {name for name, _ in tokens} == {"token"}
    assert last == "done"
    assert lasting(done["baseline"]) == lasting(whole["baseline"])
    assert lasting(done["results"]) == lasting(whole["results"])
    for arm, results in (("steered", done["results"]), ("baseline", done["baseline"])):
        for index, result in enumerate(results):
            own = [data for _, data in tokens if (data["arm"], data["index"]) == (arm, index)]
            assert "".join(data["text"] for data in own) == result["text"]
            assert [data["token_id"] for data in own] == result["token_ids"]
            assert [data["trace"] for data in own] == result["trace"]
            assert [data["logprob"] for data in own] == result["logprobs"]


def test_a_trace_names_every_attribute_of_every_token(world: World) -> None:
    answer = world.post(
        prompt="Q: What", attributes={"kind": 1.5, "true": -1.0}, trace=True, baseline=True, max_new_tokens=5
    )
    (result,), (base,) = answer["results"], answer["baseline"]
    assert [token["token_id"] for token in result["trace"]] == result["token_ids"]
    for token in result["trace"]:
        by_name = {column["attribute"]: column for column in token["columns"]}
        assert set(by_name) == {"kind", "true", "fair"}
        assert by_name["kind"]["strength"] == pytest.approx(1.5 * by_name["kind"]["gate"], rel=1e-5)
        assert by_name["kind"]["delta_norm"] > 0
        assert by_name["fair"]["strength"] == 0
        assert all(-1 <= column["cosine"] <= 1 for column in token["columns"])
    assert all(not token["columns"] for token in base["trace"]), "nothing steers the baseline"
    assert world.post(prompt="Q: What", max_new_tokens=2)["results"][0]["trace"] is None


def test_a_bad_request_to_stream_is_an_ordinary_error(world: World) -> None:
    assert world.refused(prompt="a", stream=True, attributes={"nonsense": 1})[0] == 422
    assert world.refused(prompt="a", stream=True, checkpoint="nothing")[0] == 404


def test_what_fails_under_way_ends_the_stream_with_an_error(fresh: World) -> None:
    with torch.no_grad():
        poison = fresh.service.codec.encode("~", "prompt")
        runner_of(fresh)._model.get_input_embeddings().weight[list(poison)] = float("nan")
    response = fresh.client.post("/generate", json={"prompt": ["Q: What", "Q: ~"], "stream": True})
    assert response.status_code == 200
    name, data = told(response.text)[-1]
    assert name == "error"
    assert data["error"]["type"] == "not_finite"
    assert data["error"]["request_id"] == response.headers["x-request-id"]


def test_a_client_that_leaves_a_stream_takes_its_rows_along(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, runner = fresh.service.engine, runner_of(fresh)
    real = runner.execute_async

    def slow(*batch: Any) -> Any:
        time.sleep(0.01)
        return real(*batch)

    monkeypatch.setattr(runner, "execute_async", slow)

    async def story() -> list[Any]:
        gone = asyncio.Event()
        body = b'{"prompt": "a", "max_new_tokens": 80, "ignore_eos": true, "stream": true, "n": 3, "baseline": true}'
        leaving = asyncio.create_task(_disconnecting(fresh.app, body, gone))
        while engine.stats.tokens < 12:
            await asyncio.sleep(0.001)
        gone.set()
        return await leaving

    asyncio.run(story())
    wait_until(lambda: not engine.open_sequences)
    assert fresh.service.registry.pins == 0
    assert engine.stats.tokens < 6 * 80
    runner_of(fresh).blocks.check([])


def test_many_streams_at_once_each_get_their_own_text(world: World) -> None:
    async def together() -> list[tuple[str, str]]:
        async with api(world.app) as client:
            bodies: list[dict[str, Any]] = [
                {"prompt": f"Q: {'sky ' * (i % 4)}", "seed": i, "max_new_tokens": 5 + i, "temperature": 2}
                for i in range(12)
            ]
            streams = [client.post("/generate", json=body | {"stream": True}) for body in bodies]
            streamed = await asyncio.gather(*streams)
            whole = [await client.post("/generate", json=body) for body in bodies]
        texts = []
        for stream, plain in zip(streamed, whole, strict=True):
            text = "".join(data["text"] for name, data in told(stream.text) if name == "token")
            texts.append((text, plain.json()["results"][0]["text"]))
        return texts

    for streamed, whole in asyncio.run(together()):
        assert streamed == whole


@pytest.mark.parametrize("interval", [1, 4, 100])
def test_tokens_are_streamed_as_many_together_as_the_setting_says(fresh: World, interval: int) -> None:
    service = fresh.service
    service.settings = service.settings.model_copy(update={"stream_interval": interval})
    body = {"prompt": "Q: What", "max_new_tokens": 11, "ignore_eos": True, "temperature": 0}

    async def story() -> list[list[Any]]:
        stream = await service.stream(GenerateRequest(**body, stream=True).to_params())
        return [list(some) async for some in stream]

    *groups, last = asyncio.run(story())
    told = [one for group in groups for one in group]
    assert [one.event.token.token_id for one in told] == fresh.post(**body)["results"][0]["token_ids"]
    assert [one.arms[0].texts[0].text for one in last] == ["".join(one.event.text for one in told)]
    assert len(groups) <= {1: 11, 4: 4, 100: 2}[interval], "what has come meanwhile is sent together, too"


def test_the_first_token_does_not_wait_and_no_text_waits_for_another() -> None:
    rows = [Sequence("r", index, (1, 2), SamplingParams(), stream=True) for index in range(2)]

    def piece(row: int, index: int) -> TokenEvent:
        return TokenEvent(rows[row], index, SampledToken(7), "a")

    def finished(row: int) -> Finished:
        return Finished(rows[row], (7,), "a", "length", 0, Timing(0, 0, 0), ())

    async def story() -> list[list[tuple[int, int]]]:
        stream = RequestStream(2, interval=4)
        seen: list[list[tuple[int, int]]] = []

        async def take() -> None:
            seen.extend([[(one.sequence.index, one.index) for one in some] async for some in stream.tokens()])

        taking = asyncio.create_task(take())
        first = [piece(0, index) for index in range(6)]
        for event in [*first, finished(0), piece(1, 0), piece(1, 1), finished(1)]:
            stream.on_event(event)
            for _ in range(4):
                await asyncio.sleep(0)
        await taking
        return seen

    assert asyncio.run(story()) == [
        [(0, 0)],
        [(0, 1), (0, 2), (0, 3), (0, 4)],
        [(0, 5)],
        [(1, 0)],
        [(1, 1)],
    ]


def test_sixty_four_clients_that_vanish_leave_nothing(fresh: World) -> None:
    engine, registry = fresh.service.engine, fresh.service.registry

    async def story() -> None:
        async def leave(after: int) -> None:
            body = {"prompt": "Q: What", "max_new_tokens": 80, "ignore_eos": True, "stream": True, "seed": after}
            told = await fresh.service.stream(GenerateRequest(**body).to_params())
            for _ in range(after % 5):
                await anext(told)
            if after % 2:
                await told.aclose()  # type: ignore[attr-defined]

        await asyncio.gather(*(leave(index) for index in range(64)))
        gc.collect()
        await asyncio.to_thread(
            wait_until, lambda: not engine.status.running and not engine.status.waiting and not registry.pins
        )

    asyncio.run(story())
    assert engine.status.running == engine.status.waiting == engine.status.used_blocks == 0
    assert registry.pins == 0
    assert engine.stats.tokens < 64 * 80 / 2, "their rows have not been generated to the end"
    runner_of(fresh).blocks.check([])
    assert fresh.post(prompt="a", max_new_tokens=2)["results"]


def test_a_comparison_that_fails_takes_the_others_of_its_request_along(
    fresh: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, answered = runner_of(fresh), threading.Event()
    real, steps = runner.forward, []

    def breaking(chunks: Any, *more: Any) -> Any:
        if any(chunk.sequence.is_scored for chunk in chunks):
            steps.append(len(chunks))
            if len(steps) == 1:
                raise RuntimeError("the first step that compares fails")
            answered.wait(timeout=30)
        return real(chunks, *more)

    monkeypatch.setattr(runner, "forward", breaking)
    body = {"prompt": "Q: What colour", "n": 40, "baseline": True, "max_new_tokens": 4, "ignore_eos": True}
    response = fresh.client.post("/generate", json=body)
    answered.set()
    assert response.status_code == 500, response.text
    while fresh.service.engine.open_sequences:
        time.sleep(0.01)
    assert len(steps) <= 2, "nobody waits for the others"
    runner.blocks.check([])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["Q: What colour is the sky?"] * 64, "echo": True, "logprobs": 1}),
        ("/v1/completions", {"prompt": [[5]], "echo": True, "logprobs": 1, "max_tokens": 80, "ignore_eos": True}),
        ("/score", {"prompt": "Q: What colour is the sky?", "continuations": [f" {i} is" for i in range(64)]}),
    ],
    ids=["echo", "echo of one token", "score"],
)
def test_texts_that_are_read_too_long_end_with_a_504_and_are_read_no_further(
    settings: Settings, path: str, body: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(settings.model_copy(update={"deadline_s": 0.15}))
    with TestClient(app) as client:
        engine = app.state.service.engine
        real, passes = engine._runner.forward, []

        def slow(*works: Any) -> Any:
            passes.append(len(works))
            time.sleep(0.1)
            return real(*works)

        monkeypatch.setattr(engine._runner, "forward", slow)
        response = client.post(path, json=body if path == "/score" else {"model": "demo", "max_tokens": 0, **body})
        assert response.status_code == 504, response.text
        assert response.json()["error"]["type"] == "deadline_exceeded"
        monkeypatch.undo()
        wait_until(lambda: client.post("/score", json={"prompt": "a", "continuations": ["b"]}).status_code == 200)
        assert len(passes) < 7
        assert engine.status.used_blocks == 0
        engine._runner.blocks.check([])


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_ends_with_a_504(settings: Settings, stream: bool) -> None:
    app = create_app(settings.model_copy(update={"deadline_s": 0.15, "max_num_seqs": 2, "max_num_batched_tokens": 2}))
    with TestClient(app) as client:
        body = {
            "prompt": "Q: What colour is the sky?",
            "n": 60,
            "max_new_tokens": 90,
            "ignore_eos": True,
            "stream": stream,
        }
        response = client.post("/generate", json=body)
        if stream:
            (last, error) = told(response.text)[-1]
            assert last == "error"
        else:
            assert response.status_code == 504
            error = response.json()
        assert error["error"]["type"] == "deadline_exceeded"
        assert "0.15 s" in error["error"]["message"]
        load = app.state.service.engine.status
        assert load.running == load.waiting == 0
        wait_until(lambda: client.post("/generate", json={"prompt": "a", "max_new_tokens": 1}).status_code == 200)
