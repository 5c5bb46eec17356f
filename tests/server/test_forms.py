"""What a checkpoint was trained on, and what was merged into the model, is said where it matters."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from server import assembly
from server.app import create_app
from server.config import Settings
from server.loading import load_model
from steering.checkpoint import base_model_info
from steering.pretrained import Adapter
from tests.server.conftest import columns, write

MESSAGES = [{"role": "user", "content": "What is red?"}]
FEW = {"max_new_tokens": 1, "temperature": 0}


@pytest.fixture
def forms(settings: Settings, model: Any, tmp_path: Path) -> Settings:
    """Checkpoints trained on conversations, on plain text, and before folders said on what."""
    info = base_model_info(model, "tiny", None)
    write(tmp_path, "chats", "1", info, columns(32, seed=1), form="chat")
    write(tmp_path, "texts", "1", info, columns(32, seed=2), form="plain")
    write(tmp_path, "older", "1", info, columns(32, seed=3))
    return settings.model_copy(update={"checkpoints": tmp_path, "checkpoint": "chats"})


def test_requests_of_the_other_form_are_remarked_on_once(forms: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with TestClient(create_app(forms)) as client, caplog.at_level(logging.WARNING, "server.service"):

        def said(*, route: str = "/generate", **body: Any) -> list[str]:
            caplog.clear()
            response = client.post(route, json=body)
            assert response.status_code == 200, response.text
            return caplog.messages

        assert not said(messages=MESSAGES, **FEW), "as it was trained"
        assert not said(prompt="Q: What?", attributes={}, **FEW), "unsteered"
        assert not said(prompt=[3, 4, 5], model="chats", max_tokens=1, route="/v1/completions"), "may be anything"
        assert said(prompt="Q: What?", **FEW) == [
            "checkpoint chats@1 was trained on conversations (messages), and a request steers plain text (prompt) with "
            "it: it may steer less there (said once)"
        ]
        assert not said(prompt="Q: What?", **FEW), "once"
        assert not said(prompt="Q: What?", checkpoint="texts", **FEW)
        (remark,) = said(messages=MESSAGES, model="texts", max_tokens=1, route="/v1/chat/completions")
        assert remark.startswith("checkpoint texts@1 was trained on plain text (prompt), and a request steers conv")
        assert not said(messages=MESSAGES, checkpoint="older", **FEW)
        assert not said(prompt="Q: What?", checkpoint="older", **FEW)


def test_a_merged_adapter_is_named_in_the_list_of_models(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = Adapter("org/my-lora", settings.model, Path())
    monkeypatch.setattr(assembly, "load_model", lambda settings: replace(load_model(settings), adapter=adapter))
    with TestClient(create_app(settings)) as client:
        models = client.get("/v1/models").json()["data"]
        assert {model["adapter"] for model in models} == {"org/my-lora (LoRA, merged into tiny)"}


def test_a_model_without_an_adapter_has_none_in_the_list(settings: Settings) -> None:
    with TestClient(create_app(settings)) as client:
        assert all(model["adapter"] is None for model in client.get("/v1/models").json()["data"])
