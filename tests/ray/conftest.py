"""Servers on Ray: what all of their replicas answer, and how they come to be as many as they should."""

import asyncio
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.processes import ready_replicas
from steering.checkpoint import load, save

ROOT = Path(__file__).parents[2]
BODY = {"prompt": "Q: What is the capital of Japan? A:", "temperature": 0, "max_new_tokens": 24, "ignore_eos": True}
STARTED_S = 300.0


@dataclass(frozen=True)
class Fleet:
    url: str
    pid: int  # of the command that serves
    size: int
    expected: dict[str, str]  # NAME@VERSION -> the text that it makes of BODY

    @classmethod
    def at(cls, url: str, pid: int, size: int) -> "Fleet":
        """Of replicas of the demo with the checkpoints of `folder`, once all of them are ready."""
        texts = {}
        for label in ("demo@v1", "demo@v2"):
            answer = httpx.post(f"{url}/generate", json={**BODY, "checkpoint": label}, timeout=60)
            assert answer.status_code == 200, answer.text
            texts[label] = answer.json()["results"][0]["text"]
        assert len(set(texts.values())) == 2
        found = cls(url, pid, size, texts)
        found.until_whole()
        return found

    def change(self, method: str, path: str, **body: Any) -> Any:
        response = httpx.request(method, f"{self.url}{path}", json=body or None, timeout=60)
        assert response.status_code == 200, response.text
        return response.json()

    def asks_all(self, count: int = 12) -> set[str]:
        """The versions that requests get, of which some go to each replica."""

        async def ask() -> set[str]:
            async with httpx.AsyncClient(timeout=60) as client:
                answers = await asyncio.gather(*(client.post(f"{self.url}/generate", json=BODY) for _ in range(count)))
                return {self.version(answer) for answer in answers}

        return asyncio.run(ask())

    def version(self, answer: httpx.Response) -> str:
        """NAME@VERSION that an answer names, which has to be what its text comes from."""
        assert answer.status_code == 200, answer.text
        result = answer.json()["results"][0]
        label = f"{result['steering']['checkpoint']}@{result['steering']['version']}"
        assert result["text"] == self.expected[label]
        return label

    def until_whole(self) -> None:
        """Waits for as many replicas as there were at the start, all ready."""
        until(lambda: len(ready_replicas()) == self.size)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + STARTED_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """demo@v1 as it is shipped, and demo@v2, whose vectors point the other way."""
    root = tmp_path_factory.mktemp("ray")
    first = root / "demo/v1"
    shutil.copytree(ROOT / "checkpoints/demo/v1", first)
    found = load(first)
    save(
        root / "demo/v2",
        name="demo",
        version="v2",
        method=found.config.method,
        base_model=found.config.base_model,
        columns=[replace(column, vector=-column.vector) for column in found.columns],
        normalize=found.config.normalize,
        positions=found.config.positions,
        training={},
        evaluation={},
        card="# demo\n",
    )
    return root
