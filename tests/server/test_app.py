"""Operations, checkpoints and the page at /."""

import gzip
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.config import Settings
from server.registry import Registry
from tests.server.conftest import World


def test_health_and_readiness(world: World) -> None:
    assert world.client.get("/healthz").json() == {"status": "ok"}
    assert world.client.get("/health").json() == {"status": "ok"}
    ready = {"status": "ready", "model": "tiny", "checkpoint": "demo@2", "note": None}
    assert world.client.get("/readyz").json() == ready
    assert world.client.get("/checkpoints").json()["note"] is None


def test_the_api_is_described(world: World) -> None:
    schema = world.client.get("/openapi.json").json()
    one = "/checkpoints/{name}"
    routes = {"/generate", "/compare", "/score", "/checkpoints", one, f"{one}/load", f"{one}/activate"}
    openai = {"/v1/models", "/v1/models/{name}", "/v1/completions", "/v1/chat/completions", "/v1/responses"}
    others = {"/judge", "/studies", "/studies/{name}/votes", "/studies/{name}/votes.csv"}
    tokens = {"/tokenize", "/detokenize", "/tokenizer_info"}
    assert set(schema["paths"]) == {*routes, *openai, *tokens, *others, "/health", "/healthz", "/readyz", "/metrics"}
    page = world.client.get("/docs").text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert any(source.endswith(".js") for source in sources)
    assert all(source.startswith("/") and world.client.get(source).status_code == 200 for source in sources)


def test_the_page_needs_nothing_from_elsewhere_and_runs_no_script_within_it(world: World) -> None:
    page = world.client.get("/")
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert all("src=" in script for script in re.findall(r"<script[^>]*>", page.text))
    assert "style=" not in page.text
    sources = re.findall(r'(?:src|href)="(\./page/[^"]+)"', page.text)
    assert {Path(source).suffix for source in sources} == {".js", ".css", ".svg"}
    sizes = []
    for source in sources:
        file = world.client.get(source.removeprefix("."))
        assert (file.status_code, file.headers["x-content-type-options"]) == (200, "nosniff")
        assert world.client.get(source[1:], headers={"If-None-Match": file.headers["etag"]}).status_code == 304
        sizes.append(len(gzip.compress(file.content)))
    assert sum(sizes) < 300_000
    assert world.client.get("/page/nothing.js").json()["error"]["type"] == "not_found"


def test_the_page_is_told_what_it_can_ask_for(world: World) -> None:
    told = world.client.get("/page.json").json()
    assert (told["model"], told["asks_for_key"], told["chat"], told["judged"], told["studies"]) == (
        "tiny", False, True, False, False,
    )  # fmt: skip


def test_a_request_id_is_kept_when_plain_and_made_otherwise(world: World) -> None:
    assert world.client.get("/healthz", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = world.client.get("/healthz", headers={"X-Request-Id": "a b<c>"}).headers["x-request-id"]
    assert re.fullmatch(r"req-[0-9a-f]{16}", made)


def test_every_request_is_one_line_in_the_log(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "server.access"):
        world.client.get("/nowhere")
    assert [record.name for record in caplog.records].count("server.access") == 1
    assert "GET /nowhere 404" in caplog.text


def test_the_list_says_which_checkpoints_can_be_used_and_why_not(world: World) -> None:
    listed = world.client.get("/checkpoints").json()
    assert listed["active"] == "demo@2"
    found = {(entry["name"], entry["version"]): entry for entry in listed["checkpoints"]}
    assert set(found) == {("demo", "1"), ("demo", "2"), ("other", "1"), ("foreign", "1"), ("damaged", "1")}
    demo = found["demo", "2"]
    assert [demo[state] for state in ("active", "loaded", "loadable")] == [True] * 3
    assert list(demo["attributes"]) == ["kind", "true", "fair"]
    assert demo["attributes"]["kind"] == {"default": 1.0, "range": [-2.0, 2.0], "sites": ["1.attn_output"]}
    assert not found["foreign", "1"]["loadable"]
    assert "hidden_size 64" in found["foreign", "1"]["reason"]
    assert "sha256" in found["damaged", "1"]["reason"]
    assert not found["damaged", "1"]["reason"].startswith("/")


def test_one_checkpoint_lists_its_versions_with_their_evaluation(world: World) -> None:
    answer = world.client.get("/checkpoints/demo").json()
    assert [version["version"] for version in answer["versions"]] == ["1", "2"]
    assert answer["versions"][0]["evaluation"] == {"kind": 0.9}


@pytest.mark.parametrize("name", ["nowhere", "demo@1", "%2e%2e", "..%2fdemo", "demo%00"])
def test_a_name_that_is_no_checkpoint_is_a_404(world: World, name: str) -> None:
    response = world.client.get(f"/checkpoints/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["message"]


def test_without_a_checkpoint_the_model_is_served_unsteered(settings: Settings, tmp_path: Path) -> None:
    with TestClient(create_app(settings.model_copy(update={"checkpoints": tmp_path}))) as client:
        assert client.get("/readyz").json()["checkpoint"] is None
        assert client.get("/").status_code == 200
        body = {"prompt": "Q:", "max_new_tokens": 3, "baseline": True}
        answer = client.post("/generate", json=body).json()
        assert answer["results"][0]["steering"]["checkpoint"] is None
        refused = client.post("/generate", json={**body, "attributes": {"kind": 1}})
        assert (refused.status_code, refused.json()["error"]["param"]) == (404, "attributes")


def test_several_checkpoints_and_none_active_is_told_with_what_activates_one(
    settings: Settings, checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("calm", "honest"):
        shutil.copytree(checkpoints / "other", tmp_path / name)
    with (
        caplog.at_level("WARNING"),
        TestClient(create_app(settings.model_copy(update={"checkpoints": tmp_path}))) as client,
    ):
        listed = client.get("/checkpoints").json()
        assert listed["active"] is None
        assert listed["note"] == (
            "No checkpoint is active, so requests that name none are not steered. There are calm, honest: POST "
            "/checkpoints/calm/activate makes one active, and so does --checkpoint calm (MATSTEER_CHECKPOINT) at the "
            "start."
        )
        assert f"{listed['note']} The folder is {tmp_path}." in caplog.text
        ready = client.get("/readyz").json()
        assert (ready["checkpoint"], ready["status"]) == (None, "ready")
        assert "GET /checkpoints tells more" in ready["note"]
        assert client.post("/checkpoints/calm/activate").status_code == 200
        assert client.get("/checkpoints").json()["note"] is None
        assert client.get("/readyz").json()["note"] is None


def test_no_checkpoint_at_all_and_none_that_fits_are_told(
    settings: Settings, checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level("WARNING"),
        TestClient(create_app(settings.model_copy(update={"checkpoints": tmp_path}))) as client,
    ):
        assert "There is no checkpoint, so nothing is steered" in client.get("/checkpoints").json()["note"]
        assert "--checkpoints (MATSTEER_CHECKPOINTS) names its folder" in caplog.text
        shutil.copytree(checkpoints / "foreign", tmp_path / "foreign")
        assert "none of those in the folder can be used on this model" in client.get("/checkpoints").json()["note"]


def test_a_checkpoint_is_pinned_while_it_is_used(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = Registry.acquire

    def acquire(self: Registry, *what: Any) -> Any:
        loaded = real(self, *what)
        seen.append(self.pins)
        return loaded

    monkeypatch.setattr(Registry, "acquire", acquire)
    world.post(prompt="Q:", max_new_tokens=2, n=2)
    assert seen == [1]
    assert world.service.registry.pins == 0


def test_a_checkpoint_that_appears_is_listed_and_can_be_used(
    settings: Settings, checkpoints: Path, tmp_path: Path
) -> None:
    shutil.copytree(checkpoints / "demo" / "1", tmp_path / "demo" / "1")
    with TestClient(create_app(settings.model_copy(update={"checkpoints": tmp_path}))) as client:
        body = {"prompt": "Q:", "max_new_tokens": 2}
        shutil.copytree(checkpoints / "demo" / "2", tmp_path / "demo" / "2")
        assert len(client.get("/checkpoints").json()["checkpoints"]) == 2
        plain = client.post("/generate", json=body | {"checkpoint": "demo"}).json()
        assert plain["results"][0]["steering"]["version"] == "1", "a running server stays on its version"
        named = client.post("/generate", json=body | {"checkpoint": "demo@2"}).json()
        assert named["results"][0]["steering"]["version"] == "2"
