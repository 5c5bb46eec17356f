"""Checkpoints come and go over HTTP while requests run."""

import asyncio
from typing import Any

import pytest

from steering.checkpoint import load
from tests.server.conftest import World
from tests.server.reference import greedy
from tests.server.test_engine import api

PROMPT = "Q: What colour is the sky? A:"


def changed(world: World, method: str, path: str, **body: Any) -> Any:
    response = world.client.request(method, path, json=body or None)
    assert response.status_code == 200, response.text
    return response.json()


def test_activating_changes_what_requests_get_that_name_none(fresh: World) -> None:
    assert fresh.post(prompt="a", max_new_tokens=2)["results"][0]["steering"]["version"] == "2"
    answer = changed(fresh, "POST", "/checkpoints/demo/activate", version="1")
    assert answer["version"] == "1"
    steering = fresh.post(prompt="a", max_new_tokens=2)["results"][0]["steering"]
    assert (steering["version"], steering["sha256"]) == ("1", answer["sha256"])
    assert fresh.client.get("/readyz").json()["checkpoint"] == "demo@1"
    assert changed(fresh, "POST", "/checkpoints/demo/activate")["version"] == "2", "the newest"


def test_a_checkpoint_is_loaded_and_unloaded(fresh: World) -> None:
    def loaded() -> set[str]:
        listed = fresh.client.get("/checkpoints").json()["checkpoints"]
        return {f"{one['name']}@{one['version']}" for one in listed if one["loaded"]}

    assert loaded() == {"demo@2"}
    changed(fresh, "POST", "/checkpoints/other/load")
    changed(fresh, "POST", "/checkpoints/demo/load", version="1")
    assert loaded() == {"demo@2", "other@1", "demo@1"}
    assert changed(fresh, "DELETE", "/checkpoints/demo?version=1") == {"unloaded": ["demo@1"]}
    assert changed(fresh, "DELETE", "/checkpoints/other") == {"unloaded": ["other@1"]}
    assert loaded() == {"demo@2"}
    assert fresh.post(prompt="a", checkpoint="other", max_new_tokens=2)["results"][0]["steering"]["steered_tokens"] == 2


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("DELETE", "/checkpoints/demo", None, 409),
        ("DELETE", "/checkpoints/nobody", None, 404),
        ("POST", "/checkpoints/nobody/load", None, 404),
        ("POST", "/checkpoints/demo/load", {"version": "9"}, 404),
        ("POST", "/checkpoints/demo/load", {"version": "../1"}, 404),
        ("POST", "/checkpoints/..%2Fdemo/load", None, 404),
        ("POST", "/checkpoints/demo/load", {"version": 1}, 422),
        ("POST", "/checkpoints/demo/load", {"versoin": "1"}, 422),
        ("POST", "/checkpoints/damaged/activate", None, 409),
        ("POST", "/checkpoints/foreign/activate", None, 409),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(
    fresh: World, method: str, path: str, body: Any, status: int
) -> None:
    before = fresh.client.get("/checkpoints").json()
    response = fresh.client.request(method, path, json=body)
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]
    assert fresh.client.get("/checkpoints").json() == before


def test_running_requests_end_on_what_they_began_with(fresh: World, model: Any, checkpoints: Any) -> None:
    """Swaps all the while: every text is wholly one version's, and comparisons have their columns."""
    columns = {version: load(checkpoints / "demo" / version).columns for version in ("1", "2")}
    mix = {"kind": 1.5, "true": -1.0}
    ids = fresh.service.codec.encode(PROMPT, "prompt")
    expected = {version: greedy(model, ids, columns[version], mix, new=40, eos=None) for version in columns}
    body = {"prompt": PROMPT, "attributes": mix, "temperature": 0, "max_new_tokens": 40, "ignore_eos": True}

    async def together() -> list[Any]:
        swaps = 0
        async with api(fresh.app) as client:

            async def swap() -> None:
                nonlocal swaps
                for i in range(30):
                    answer = await client.post("/checkpoints/demo/activate", json={"version": "12"[i % 2]})
                    assert answer.status_code == 200
                    gone = await client.delete(f"/checkpoints/demo?version={'21'[i % 2]}")
                    assert gone.status_code == 200
                    swaps += 1
                    await asyncio.sleep(0.01)

            async def ask(i: int) -> Any:
                while swaps < i:
                    await asyncio.sleep(0.001)
                return await client.post("/generate", json=body | {"baseline": i % 2 == 0})

            answers = await asyncio.gather(swap(), *(ask(i) for i in range(24)))
            return list(answers[1:])

    seen = set()
    for answer in asyncio.run(together()):
        assert answer.status_code == 200, answer.text
        (result,) = answer.json()["results"]
        version = result["steering"]["version"]
        seen.add(version)
        assert result["token_ids"] == expected[version]
        assert result["steering"]["steered_tokens"] == 40
    assert seen == {"1", "2"}, "nothing was swapped under way"
    assert fresh.service.registry.pins == 0
    fresh.service.engine.call(fresh.service.registry._bank.check).result(10)
