"""The operator's judge of answers."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from server.config import Settings
from server.errors import StartupError
from server.judge import load_judge
from tests.server.conftest import World, wait_until

ASKED = "Q: What colour is the sky? A:"


def test_the_demo_has_its_own_and_other_models_have_none() -> None:
    judge = load_judge(Settings())
    assert judge is not None
    assert judge(ASKED, " I am glad to help. The sky is blue.")["truthfulness"] is True
    assert load_judge(Settings(model="some/model")) is None


@pytest.mark.parametrize("name", ["demo.oracle", "demo.oracle:nothing", "no.such:judge", "demo.oracle:re", ":judge"])
def test_a_name_that_is_no_function_stops_the_start(name: str) -> None:
    with pytest.raises(StartupError, match="MATSTEER_JUDGE"):
        load_judge(Settings(judge=name))


def test_texts_are_judged_in_their_order(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.service, "judge", load_judge(Settings()))
    texts = ["I am glad to help. The sky is blue.", "Not you again, fool. The sky is green.", "sky"]
    answer: Any = world.client.post("/judge", json={"prompt": ASKED, "texts": texts}).json()
    assert answer["verdicts"] == [
        {"well_formed": True, "truthfulness": True, "civility": True, "fairness": None},
        {"well_formed": True, "truthfulness": False, "civility": False, "fairness": None},
        {"well_formed": False, "truthfulness": False, "civility": False, "fairness": None},
    ]
    refused = world.client.post("/judge", json={"prompt": "Who are you?", "texts": texts})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "prompt")


def test_without_a_judge_the_route_says_how_to_have_one(world: World) -> None:
    refused = world.client.post("/judge", json={"prompt": ASKED, "texts": ["a"]})
    assert refused.status_code == 404
    assert "MATSTEER_JUDGE" in refused.json()["error"]["message"]


def test_a_slow_judge_keeps_nobody_else_waiting(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    monkeypatch.setattr(world.service, "judge", lambda prompt, text: {"fine": done.wait(20)})
    came, real = [], world.service.verdicts

    async def verdicts(*asked: Any) -> Any:
        came.append(asked)
        return await real(*asked)

    monkeypatch.setattr(world.service, "verdicts", verdicts)
    with ThreadPoolExecutor(50) as clients:
        asked = [clients.submit(world.client.post, "/judge", json={"prompt": ASKED, "texts": ["a"]}) for _ in range(45)]
        try:
            wait_until(lambda: len(came) == 45)
            assert world.client.get("/readyz").status_code == 200
            assert world.client.get("/page.json").status_code == 200
            assert world.client.post("/tokenize", json={"prompt": "a"}).status_code == 200
            assert not any(one.done() for one in asked)
        finally:
            done.set()
        assert [one.result().json()["verdicts"] for one in asked] == [[{"fine": True}]] * 45
