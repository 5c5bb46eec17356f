"""What was loaded and active is so again after a restart."""

import json
import shutil
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.config import Settings
from server.registry_state import NAME


@pytest.fixture
def own(settings: Settings, checkpoints: Path, tmp_path: Path) -> Settings:
    """A server with a checkpoints folder of its own, which remembers."""
    root = shutil.copytree(checkpoints, tmp_path / "checkpoints")
    return settings.model_copy(update={"checkpoints": root, "remember": True})


def state(client: TestClient) -> tuple[str | None, set[str]]:
    listed = client.get("/checkpoints").json()
    return listed["active"], {f"{one['name']}@{one['version']}" for one in listed["checkpoints"] if one["loaded"]}


def test_a_restart_finds_what_was_served(own: Settings) -> None:
    with TestClient(create_app(own)) as client:
        assert state(client) == ("demo@2", {"demo@2"})
        assert not (own.checkpoints / NAME).exists(), "nobody has changed anything"
        client.post("/checkpoints/demo/load", json={"version": "1"})
        client.post("/checkpoints/other/activate")
        client.delete("/checkpoints/demo?version=2")
        expected = state(client)
    with TestClient(create_app(own)) as client:
        assert state(client) == expected == ("other@1", {"demo@1", "other@1"})
        answer = client.post("/generate", json={"prompt": "a", "checkpoint": "demo", "max_new_tokens": 1}).json()
        assert answer["results"][0]["steering"]["version"] == "1", "the plain name means what it meant"
    with TestClient(create_app(own.model_copy(update={"checkpoint": "demo@2"}))) as client:
        assert state(client)[0] == "demo@2", "what is said at the start goes before what was"


def test_what_is_gone_or_belongs_to_another_model_is_passed_over(
    own: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    with TestClient(create_app(own)) as client:
        client.post("/checkpoints/other/activate")
    shutil.rmtree(own.checkpoints / "other")
    with TestClient(create_app(own)) as client:
        assert state(client)[0] == "demo@2"
    assert "other@1 was active before, and cannot be now" in caplog.text
    kept = json.loads((own.checkpoints / NAME).read_text())
    (own.checkpoints / NAME).write_text(json.dumps(kept | {"model": "another", "active": "demo@1"}))
    with TestClient(create_app(own)) as client:
        assert state(client)[0] == "demo@2"


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"model": "tiny"}', '{"model": "tiny", "active": 1, "loaded": 2, "meant": 3}']
)
def test_a_damaged_file_is_as_good_as_none(own: Settings, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    (own.checkpoints / NAME).write_text(damage)
    with TestClient(create_app(own)) as client:
        assert state(client)[0] == "demo@2"
    assert "cannot be read" in caplog.text


def test_a_folder_that_cannot_be_written_is_a_warning(own: Settings, caplog: pytest.LogCaptureFixture) -> None:
    (own.checkpoints / NAME).mkdir()
    with TestClient(create_app(own)) as client:
        assert client.post("/checkpoints/other/activate").status_code == 200
        assert state(client)[0] == "other@1"
    assert "will not be restored" in caplog.text
