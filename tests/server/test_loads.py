"""What reads checkpoint folders delays only those who need it."""

import asyncio
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.config import Settings
from server.engine_core import LOADING_THREADS
from server.service import LONG_TEXT
from steering import checkpoint as folders
from tests.server.conftest import World
from tests.server.test_engine import api


@contextmanager
def slow(monkeypatch: pytest.MonkeyPatch, *names: str) -> Iterator[threading.Event]:
    """Folders of these names take until the event is set to be read."""
    real, go_on = folders.load, threading.Event()

    def load(folder: Path) -> Any:
        if folder.parent.name in names:
            assert go_on.wait(20)
        return real(folder)

    monkeypatch.setattr(folders, "load", load)
    try:
        yield go_on
    finally:
        go_on.set()


def test_a_checkpoint_that_loads_slowly_delays_nobody_else(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh.service.registry._read_cache.clear()

    async def story() -> None:
        async with api(fresh.app) as client:

            def ask(**body: Any) -> Any:
                return asyncio.create_task(client.post("/generate", json={"prompt": "a", "max_new_tokens": 1, **body}))

            with slow(monkeypatch, "other") as go_on:
                waiting = [ask(checkpoint="other") for _ in range(60)]
                waiting += [ask(checkpoint="other@1") for _ in range(10)]
                waiting += [asyncio.create_task(client.post("/checkpoints/other/activate")) for _ in range(10)]
                waiting.append(asyncio.create_task(client.post("/tokenize", json={"prompt": "a", "model": "other"})))
                await asyncio.sleep(0.05)
                async with asyncio.timeout(15):
                    assert (await ask()).status_code == 200
                    assert (await ask(checkpoint="demo@1")).status_code == 200, "another folder is loaded beside it"
                    assert (await client.post("/tokenize", json={"prompt": "a"})).status_code == 200
                    assert (await client.post("/detokenize", json={"tokens": [5]})).status_code == 200
                    assert (await client.get("/v1/models")).status_code == 200
                    assert (await client.get("/checkpoints")).status_code == 200
                    assert (await client.post("/checkpoints/demo/load")).status_code == 200
                assert not any(task.done() for task in waiting)
                go_on.set()
                assert {(await task).status_code for task in waiting} == {200}

    asyncio.run(story())
    assert fresh.service.registry.pins == 0


def test_what_has_been_read_waits_for_none_of_those_that_load_slowly(
    settings: Settings, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"slow-{number}" for number in range(LOADING_THREADS + 1)]
    shutil.copytree(checkpoints / "demo", tmp_path / "demo")
    for name in names:
        shutil.copytree(checkpoints / "other", tmp_path / name)
    app = create_app(settings.model_copy(update={"checkpoints": tmp_path, "checkpoint": "demo@2"}))
    app.state.service.registry._read_cache.clear()

    async def story() -> None:
        async with api(app) as client:
            assert (await client.get("/checkpoints/demo")).status_code == 200
            with slow(monkeypatch, *names) as go_on:
                body = {"prompt": "a", "max_new_tokens": 1}
                waiting = [
                    asyncio.create_task(client.post("/generate", json={**body, "checkpoint": name})) for name in names
                ]
                await asyncio.sleep(0.05)
                async with asyncio.timeout(15):
                    assert (await client.get("/checkpoints/demo")).status_code == 200
                    assert (await client.get("/checkpoints/none")).status_code == 404
                    assert (await client.post("/checkpoints/demo/activate", json={"version": "1"})).status_code == 200
                    assert (await client.delete("/checkpoints/demo", params={"version": "2"})).status_code == 200
                    named = {"prompt": "a", "model": "demo@2"}
                    assert (await client.post("/tokenize", json=named)).status_code == 200, "it is looked for"
                    assert (await client.post("/generate", json={**body, "checkpoint": "demo@2"})).status_code == 200
                assert not any(task.done() for task in waiting)
                go_on.set()
                assert {(await task).status_code for task in waiting} == {200}

    with TestClient(app):
        asyncio.run(story())


def test_long_texts_delay_no_short_ones(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, go_on = fresh.service.codec, threading.Event()
    at_once: list[int] = []
    most = []
    real = codec.encode_any

    def encode_any(params: Any) -> Any:
        if len(params.prompt) > LONG_TEXT:
            at_once.append(1)
            most.append(len(at_once))
            assert go_on.wait(20)
            at_once.pop()
        return real(params)

    monkeypatch.setattr(codec, "encode_any", encode_any)

    async def story() -> None:
        async with api(fresh.app) as client:
            long = {"prompt": "a" * (LONG_TEXT + 1), "return_token_strs": True}
            waiting = [asyncio.create_task(client.post("/tokenize", json=long)) for _ in range(40)]
            try:
                await asyncio.sleep(0.05)
                async with asyncio.timeout(15):
                    assert (await client.post("/tokenize", json={"prompt": "a"})).status_code == 200
                    assert (await client.post("/detokenize", json={"tokens": [5]})).status_code == 200
                    short = {"prompt": "a", "max_new_tokens": 1}
                    assert (await client.post("/generate", json=short)).status_code == 200
                    long_prompt = {"prompt": ["a b " * (LONG_TEXT // 64)] * 20, "max_new_tokens": 1}
                    assert (await client.post("/generate", json=long_prompt)).status_code == 413
                assert not any(task.done() for task in waiting)
            finally:
                go_on.set()
            assert {(await task).status_code for task in waiting} == {200}

    asyncio.run(story())
    assert max(most) == 1, "what many of them take is taken by one after the other"


def test_a_client_that_does_not_wait_for_a_load_keeps_nothing(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh.service.registry._read_cache.clear()

    async def story() -> None:
        async with api(fresh.app) as client:
            with slow(monkeypatch, "other") as go_on:
                body = {"prompt": "a", "max_new_tokens": 1, "checkpoint": "other"}
                leaving = [asyncio.create_task(client.post("/generate", json=body)) for _ in range(8)]
                await asyncio.sleep(0.05)
                for task in leaving:
                    task.cancel()
                await asyncio.wait(leaving)
                go_on.set()
                assert (await client.post("/generate", json=body)).status_code == 200

    asyncio.run(story())
    assert fresh.service.registry.pins == 0
    assert not fresh.service.client._loads._waiting


def test_lists_are_read_one_after_the_other(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh.service.registry._read_cache.clear()
    real, inside, most, read = folders.load, [0], [0], []

    def load(folder: Path) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        read.append(folder)
        try:
            return real(folder)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(folders, "load", load)

    async def story() -> list[int]:
        async with api(fresh.app) as client:
            answers = await asyncio.gather(*(client.get("/checkpoints") for _ in range(8)))
            return [answer.status_code for answer in answers]

    assert set(asyncio.run(story())) == {200}
    assert most == [1]
    assert len(read) == len(set(read)), "also of damaged folders none is read twice"
