"""The engine survives what fails, lets go of what is cancelled, and never blocks the event loop."""

import asyncio
import threading
import time
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from server.assembly import open_service
from server.config import Settings
from server.engine.model_runner import ModelRunner
from server.errors import EngineDown, OutOfMemory
from steer_ops import PAGED_ATTENTION_DECODE
from tests.server.conftest import World, held_until_queued, hold_steps, wait_until

pytestmark = pytest.mark.usefixtures("overlaps")


def api(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=30)


def runner_of(world: World) -> ModelRunner:
    runner = world.service.engine._runner
    assert isinstance(runner, ModelRunner)
    return runner


class Broken:
    """A forward pass that fails once, or for good, and otherwise is the real one."""

    def __init__(self, runner: ModelRunner, *, at: int, times: int = 1, error: Exception | None = None) -> None:
        self._real = runner.forward
        self._error = error or RuntimeError("the step breaks")
        self._from, self._to = at, at + times
        self._calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._calls += 1
        if self._from <= self._calls < self._to:
            raise self._error
        return self._real(*args, **kwargs)


def test_a_server_has_computed_on_its_engines_thread_before_it_is_ready(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    devices: set[tuple[str, torch.device]] = set()
    real = ModelRunner.forward

    def forward(runner: ModelRunner, *args: Any, **kwargs: Any) -> Any:
        threads.append(threading.current_thread().name)
        return real(runner, *args, **kwargs)

    def use_device(device: torch.device) -> None:
        devices.add((threading.current_thread().name, device))

    monkeypatch.setattr(ModelRunner, "forward", forward)
    monkeypatch.setattr("server.loading.use_device", use_device)
    monkeypatch.setattr("server.engine.engine.use_device", use_device)
    service = open_service(settings)
    try:
        assert threads.count("engine") == 4, "chunks, a token, and both"
        assert devices == {(thread, torch.device("cpu")) for thread in threads}, "each thread has the model's device"
        assert service.engine.status.used_blocks == 0
        assert service.engine.stats.sequences == 0
    finally:
        service.engine.stop()


@pytest.mark.skipif(
    not PAGED_ATTENTION_DECODE.has_kernel(torch.device("cpu"), torch.float32), reason="nothing can be compiled here"
)
def test_a_server_has_captured_all_graphs_before_it_is_ready(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the hooks of the checkpoint that is active. (Here what would be captured runs as it is.)"""
    real = ModelRunner.allocate

    def allocate(runner: ModelRunner, *args: Any, **options: Any) -> Any:
        return real(runner, *args, **options | {"graph_rows": 4})

    monkeypatch.setattr(ModelRunner, "allocate", allocate)
    service = open_service(settings.model_copy(update={"checkpoint": "demo"}))
    try:
        runner = service.engine._runner
        assert runner._graphs is not None
        assert [bucket.rows for bucket in runner._graphs.captured(runner.bank.version)] == [4, 2, 1]
        assert runner.bank.version > 0
        assert not runner.graphs_due
    finally:
        service.engine.stop()


@pytest.mark.parametrize("at", [1, 3])
def test_a_failing_step_fails_only_the_requests_in_it(fresh: World, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    body = {"prompt": "Q: What", "temperature": 0, "max_new_tokens": 8}
    before = fresh.post(**body)
    runner = runner_of(fresh)
    monkeypatch.setattr(runner, "forward", Broken(runner, at=at))
    status, error = fresh.refused(**body)
    assert (status, error["type"]) == (500, "generation_failed")
    assert "breaks" not in error["message"]
    after = fresh.post(**body)
    assert after["results"][0]["token_ids"] == before["results"][0]["token_ids"]
    assert after["results"][0]["steering"]["steered_tokens"] == before["results"][0]["steering"]["steered_tokens"]
    assert fresh.service.engine.stats.failed_steps == 1
    assert fresh.service.registry.pins == 0
    assert fresh.client.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried a lot."), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when"),
     RuntimeError("Triton Error [CUDA]: out of memory"), RuntimeError("CUDA driver error: out of memory"),
     RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), MemoryError()],
)  # fmt: skip
def test_a_step_without_memory_is_told_as_one_and_may_be_asked_again(
    fresh: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    body = {"prompt": "Q: What", "temperature": 0, "max_new_tokens": 8}
    before = fresh.post(**body)["results"][0]["token_ids"]
    with monkeypatch.context() as patch:
        patch.setattr(runner_of(fresh), "forward", Broken(runner_of(fresh), at=3, error=error))
        response = fresh.client.post("/generate", json=body)
    assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
    told = response.json()["error"]
    assert told["type"] == "out_of_memory"
    assert told["message"] == "The device ran out of memory on this request's batch; try again later, or with less."
    assert fresh.post(**body)["results"][0]["token_ids"] == before


def test_work_between_steps_without_memory_is_told_as_such(fresh: World) -> None:
    def work() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(OutOfMemory, match="out of memory on work for this request"):
        fresh.service.engine.call(work).result(10)


def test_a_copy_that_fails_is_not_tried_again_in_later_steps(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, copied = runner_of(fresh), []

    def broken(copies: Any) -> None:
        copied.append(list(copies))
        if copies:
            raise RuntimeError("out of memory")

    body = {"prompt": "Q: What colour", "temperature": 0, "max_new_tokens": 6}
    before = fresh.post(**body)["results"][0]["token_ids"]
    monkeypatch.setattr(runner.attention, "copy", broken)
    assert fresh.refused(**body, n=2)[0] == 500, "the second of them takes a copy of the prompt's last block"
    assert any(copied)
    fresh.service.engine.call(lambda: None).result(10)
    assert not runner.blocks.pending_copies
    assert fresh.post(**body)["results"][0]["token_ids"] == before
    runner.blocks.check([])


def test_a_step_that_cannot_be_begun_fails_nobody_who_has_ended_before(
    fresh: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of(fresh)
    forward, seen = runner.forward, set()

    def broken(chunks: Any, *more: Any) -> Any:
        lengths = frozenset(chunk.sequence.sampling_params.max_new_tokens for chunk in chunks)
        seen.add(lengths)
        if {5, 60} in seen and lengths == {60}:
            raise RuntimeError("the step breaks")
        return forward(chunks, *more)

    monkeypatch.setattr(runner, "forward", broken)

    async def together() -> list[int]:
        async with api(fresh.app) as client:
            # The short one ends with the step before the one that breaks.
            bodies = [{"prompt": ["a", "b"], "max_new_tokens": new, "ignore_eos": True} for new in (5, 60)]
            asked = (client.post("/generate", json=body) for body in bodies)
            _, *answers = await asyncio.gather(held_until_queued(fresh.service.engine, 4), *asked)
            return [answer.status_code for answer in answers]

    assert asyncio.run(together()) == [200, 500]
    assert fresh.service.engine.stats.failed_steps == 1
    assert not fresh.service.engine.open_sequences


def test_what_is_computed_behind_the_end_of_a_text_cannot_spoil_another(fresh: World) -> None:
    """The end-of-text token, which a step that is begun ahead computes in vain, has no finite keys and values here."""
    weight = runner_of(fresh)._model.get_input_embeddings().weight
    sound = {"prompt": "Q: Where", "temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
    before = fresh.post(**sound)["results"][0]["token_ids"]
    assert 0 not in before
    weight[0] = torch.inf
    body = {"prompt": "Q: What", "n": 12, "temperature": 5.0, "seed": 11, "max_new_tokens": 80}
    for _ in range(3):
        ended = [result["token_ids"][-1] == 0 for result in fresh.post(**body)["results"]]
        assert any(ended)
        fresh.service.engine.call(runner_of(fresh).blocks.reset_prefix_cache).result(10)
        assert fresh.post(**sound)["results"][0]["token_ids"] == before


def test_a_dead_device_makes_the_server_unready(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(fresh)

    def dead() -> None:
        raise RuntimeError("no device")

    monkeypatch.setattr(runner, "forward", Broken(runner, at=1, times=1000))
    monkeypatch.setattr(runner, "recover", dead)
    assert fresh.refused(prompt="a")[0] == 500
    wait_until(lambda: fresh.service.engine.trouble is not None)
    assert fresh.refused(prompt="a")[0] == 503
    ready = fresh.client.get("/readyz")
    assert (ready.status_code, ready.json()["error"]["type"]) == (503, "engine_down")
    assert "no device" in ready.json()["error"]["message"]
    assert fresh.client.get("/health").status_code == 503
    assert fresh.client.get("/healthz").status_code == 200


def test_a_row_without_a_next_token_fails_its_request_and_no_other(fresh: World) -> None:
    import torch

    poison = fresh.service.codec.encode("~", "prompt")
    with torch.no_grad():
        runner_of(fresh)._model.get_input_embeddings().weight[list(poison)] = float("nan")

    async def together() -> list[httpx.Response]:
        async with api(fresh.app) as client:
            common = {"max_new_tokens": 30, "ignore_eos": True, "temperature": 0}
            bodies = [{"prompt": ["Q: What", "Q: ~", "Q: sky"], **common}, {"prompt": "Q: Where", **common}]
            return list(await asyncio.gather(*(client.post("/generate", json=body) for body in bodies)))

    broken, sound = asyncio.run(together())
    assert (broken.status_code, broken.json()["error"]["type"]) == (500, "not_finite")
    assert sound.json()["results"][0]["usage"]["completion_tokens"] == 30
    stats = fresh.service.engine.stats
    assert stats.largest_batch >= 2
    assert stats.tokens <= 3 + 30, "the other rows of the broken request go on for nobody"
    assert not fresh.service.engine.open_sequences
    assert fresh.service.registry.pins == 0


def test_a_comparison_that_fails_is_named_and_disturbs_nobody(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(logits: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("server.engine.model_runner.score_chunks", broken)
        status, error = fresh.refused(prompt="a", baseline=True, max_new_tokens=2)
    assert (status, error["type"]) == (500, "generation_failed")
    assert "memory" not in error["message"]
    assert fresh.post(prompt="a", baseline=True, max_new_tokens=2)["comparison"]


def test_work_between_steps_that_takes_too_long_makes_the_server_unready(
    fresh: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, inside, go_on = fresh.service.engine, threading.Event(), threading.Event()
    monkeypatch.setattr(engine, "_stall_s", 0.05)

    def work() -> None:
        inside.set()
        assert go_on.wait(10)

    done = engine.call(work)
    assert inside.wait(10)
    time.sleep(0.1)
    assert fresh.client.get("/readyz").status_code == 503
    go_on.set()
    done.result(10)
    wait_until(lambda: fresh.client.get("/readyz").status_code == 200)


def test_the_event_loop_answers_while_the_model_runs(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go_on = hold_steps(runner_of(fresh), monkeypatch)

    async def story() -> Any:
        async with api(fresh.app) as client:
            asking = asyncio.create_task(client.post("/generate", json={"prompt": "a", "max_new_tokens": 2}))
            await asyncio.to_thread(inside.wait, 10)
            assert (await client.get("/healthz")).status_code == 200
            assert (await client.get("/readyz")).status_code == 200
            assert (await client.get("/checkpoints")).status_code == 200
            assert not asking.done()
            go_on.set()
            return await asking

    assert asyncio.run(story()).status_code == 200


def test_a_step_that_takes_too_long_makes_the_server_unready(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fresh.service.engine
    monkeypatch.setattr(engine, "_busy_since", time.monotonic() - fresh.service.settings.stall_s - 1)
    assert fresh.client.get("/readyz").status_code == 503


async def _disconnecting(app: FastAPI, body: bytes, gone: asyncio.Event) -> list[Any]:
    """A POST whose client goes away once `gone` is set; what it was sent."""
    sent: list[Any] = []
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/generate",
        "raw_path": b"/generate",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
        "root_path": "",
    }
    await app(scope, receive, send)
    return sent


def test_a_client_that_goes_away_frees_its_row_by_the_next_step(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, engine = runner_of(fresh), fresh.service.engine
    real, seen, gate = runner.execute_async, [], threading.Semaphore(0)
    stepped = threading.Event()

    def counted(chunks: Any, *more: Any) -> Any:
        seen.append(len(chunks))
        stepped.set()
        assert gate.acquire(timeout=10)
        return real(chunks, *more)

    monkeypatch.setattr(runner, "execute_async", counted)

    async def story() -> tuple[list[Any], Any]:
        gone = asyncio.Event()
        long = b'{"prompt": "a", "max_new_tokens": 60, "ignore_eos": true}'
        async with api(fresh.app) as client:
            leaving = asyncio.create_task(_disconnecting(fresh.app, long, gone))
            staying = asyncio.create_task(
                client.post("/generate", json={"prompt": "b", "max_new_tokens": 20, "ignore_eos": True})
            )
            await asyncio.to_thread(stepped.wait, 10)
            gate.release()
            gone.set()
            sent = await leaving
            for _ in range(100):
                gate.release()
            return sent, await staying

    sent, stayed = asyncio.run(story())
    assert 20 <= len(seen) <= 22
    assert seen[-18:] == [1] * 18, seen
    assert stayed.json()["results"][0]["usage"]["completion_tokens"] == 20
    assert sent[0]["status"] == 499
    assert not engine.open_sequences
    assert fresh.service.registry.pins == 0


def test_a_cancelled_request_that_waits_never_runs(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fresh.service.engine
    inside, go_on = hold_steps(runner_of(fresh), monkeypatch)

    async def story() -> None:
        async with api(fresh.app) as client:
            first = asyncio.create_task(client.post("/generate", json={"prompt": "a", "max_new_tokens": 3}))
            await asyncio.to_thread(inside.wait, 10)
            second = asyncio.create_task(client.post("/generate", json={"prompt": "b", "n": 4}))
            while engine._queued < 4:
                await asyncio.sleep(0.005)
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            go_on.set()
            assert (await first).status_code == 200

    asyncio.run(story())
    assert engine.stats.sequences == 1
    assert engine._queued == 0
    assert fresh.service.registry.pins == 0


def test_rows_that_end_leave_the_batch_and_disturb_nobody(fresh: World) -> None:

    async def together() -> list[Any]:
        async with api(fresh.app) as client:
            bodies = [
                {
                    "prompt": "Q: " + "sky " * i,
                    "max_new_tokens": 2 + 5 * i,
                    "ignore_eos": True,
                    "temperature": 1,
                    "seed": i,
                }
                | {"repetition_penalty": 1.3 if i % 2 else 1.0, "top_k": 20 if i % 3 else 0}
                for i in range(8)
            ]
            alone = [(await client.post("/generate", json=body)).json() for body in bodies]
            asked = (client.post("/generate", json=body) for body in bodies)
            _, *crowd = await asyncio.gather(held_until_queued(fresh.service.engine, len(bodies)), *asked)
            return list(zip(alone, (answer.json() for answer in crowd), strict=True))

    for i, (alone, crowd) in enumerate(asyncio.run(together())):
        assert crowd["results"][0]["token_ids"] == alone["results"][0]["token_ids"], i
    assert fresh.service.engine.stats.largest_batch == 8


def test_steps_that_are_begun_ahead_change_nothing(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that end by themselves, by a stop string, by their length; some that cannot be hurried among them."""
    launched: list[bool] = []
    real = ModelRunner.execute_async

    def counted(runner: ModelRunner, chunks: Any, after: Any = None) -> Any:
        launched.append(after is not None)
        return real(runner, chunks, after)

    monkeypatch.setattr(ModelRunner, "execute_async", counted)
    crowd = {"prompt": "Q: What", "n": 12, "temperature": 5.0, "seed": 11, "max_new_tokens": 80}
    few = {"prompt": "a", "max_new_tokens": 8}
    bodies = [crowd, crowd | {"n": 2, "stop": "e"}, few | {"logprobs": 1}, few | {"trace": True}]

    async def together() -> list[Any]:
        async with api(fresh.app) as client:
            answers = await asyncio.gather(*(client.post("/generate", json={"seed": 1} | body) for body in bodies))
            told = [result for answer in answers for result in answer.json()["results"]]
            return [
                {name: result[name] for name in ("text", "token_ids", "finish_reason", "steering")} for result in told
            ]

    seen = []
    for overlaps in (False, True):
        monkeypatch.setattr(ModelRunner, "overlaps", overlaps)
        seen.append(asyncio.run(together()))
        assert any(launched) is overlaps
    assert sum(launched) > 30
    assert seen[0] == seen[1]
    assert {result["finish_reason"] for result in seen[0]} == {"stop", "length"}
    assert fresh.service.engine.stats.tokens == 2 * sum(len(result["token_ids"]) for result in seen[0])
    assert not fresh.service.engine.open_sequences


def test_stopping_answers_everybody(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, engine = runner_of(fresh), fresh.service.engine
    real, inside = runner.execute_async, threading.Event()

    def slow(*batch: Any) -> Any:
        inside.set()
        time.sleep(0.02)
        return real(*batch)

    monkeypatch.setattr(runner, "execute_async", slow)

    async def story() -> Any:
        async with api(fresh.app) as client:
            body = {"prompt": ["a"] * 64, "n": 4, "ignore_eos": True}
            asking = asyncio.create_task(client.post("/generate", json=body))
            await asyncio.to_thread(inside.wait, 10)
            await asyncio.to_thread(engine.stop)
            return await asking

    answer = asyncio.run(story())
    assert answer.status_code == 503
    assert fresh.refused(prompt="a")[0] == 503


def test_stopping_answers_everybody_before_what_has_no_end(fresh: World) -> None:
    """Who waits for it, who waits for it to end, and nobody twice."""
    engine, inside, go_on = fresh.service.engine, threading.Event(), threading.Event()

    def work() -> None:
        inside.set()
        assert go_on.wait(20)

    stopping = threading.Thread(target=engine.stop)

    async def story() -> Any:
        async with api(fresh.app) as client:
            running = engine.call(work)
            await asyncio.to_thread(inside.wait, 10)
            asking = asyncio.create_task(client.post("/generate", json={"prompt": "a"}))
            loading = asyncio.create_task(client.post("/checkpoints/other/load"))
            while engine._inbox.qsize() < 2:
                await asyncio.sleep(0.005)
            stopping.start()
            answers = await asyncio.wait_for(asyncio.gather(asking, loading), 10)
            assert isinstance(await asyncio.to_thread(running.exception, 10), EngineDown)
            return answers

    assert [answer.status_code for answer in asyncio.run(story())] == [503, 503]
    assert stopping.is_alive(), "the engine's thread still has the model"
    go_on.set()
    stopping.join(10)
    assert not stopping.is_alive()
    assert not engine.open_sequences
    assert fresh.service.registry.pins == 0


def test_a_checkpoint_can_be_loaded_while_others_generate(fresh: World) -> None:
    async def together() -> list[Any]:
        async with api(fresh.app) as client:
            bodies = [
                {"prompt": "Q: What", "checkpoint": name, "max_new_tokens": 40} for name in ("demo", "other", "demo@1")
            ]
            return list(await asyncio.gather(*(client.post("/generate", json=body) for body in bodies)))

    answers = asyncio.run(together())
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    steering = [answer.json()["results"][0]["steering"] for answer in answers]
    assert [(s["checkpoint"], s["version"]) for s in steering] == [("demo", "2"), ("other", "1"), ("demo", "1")]
    assert all(s["steered_tokens"] > 0 for s in steering)
