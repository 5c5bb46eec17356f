"""Several API keys: each has a name, limits and a share of its own, and nobody is told what it is."""

import gc
import hashlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from server import keys as keys_module
from server.app import create_app
from server.config import Settings, load_settings
from server.errors import InvalidField, RateLimited, StartupError
from server.keys import ApiKey, ApiKeys
from tests.server.conftest import World, wait_until
from tests.server.test_logs import logged

SECRETS = {"alice": "sk-alice-7e57", "bob": "sk-bob-7e57", "root": "sk-root-7e57"}
BODY = {"prompt": "a", "max_new_tokens": 1}


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {SECRETS.get(name, name)}"}


class Clock:
    """Time that a test turns."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "keys.toml"
    hashed = hashlib.sha256(SECRETS["bob"].encode()).hexdigest()
    file.write_text(f'[alice]\nkey = "{SECRETS["alice"]}"\n\n[bob]\nsha256 = "{hashed}"\nmax_rows = 4\n')
    return file


def use(world: World, **settings: Any) -> World:
    """The same server with other keys."""
    given = {"api_key": None, "admin_key": None, "api_keys": None, "api_keys_file": None} | settings
    service = world.service
    service.settings = Settings(**service.settings.model_dump(exclude=set(given)), **given)
    service.keys = ApiKeys(service.settings)
    return world


def status(world: World, name: str | None, path: str = "/generate", body: Any = BODY) -> int:
    return world.client.post(path, json=body, headers=bearer(name) if name else {}).status_code


# --- whose a key is ---


def test_keys_of_a_file_and_of_the_environment_are_known_by_their_names(file: Path) -> None:
    keys = ApiKeys(
        Settings(api_key="plain", admin_key="master", api_keys=f"carol=k1 dave=k2=\n{'x' * 64}=k3", api_keys_file=file)
    )
    found = {
        secret: keys.find(secret) for secret in ("plain", "master", "k1", "k2=", "k3", *SECRETS.values(), "", "k2")
    }
    names = {secret: key.name if key else None for secret, key in found.items()}
    assert names == {
        "plain": "default", "master": "admin", "k1": "carol", "k2=": "dave", "k3": "x" * 64,
        SECRETS["alice"]: "alice", SECRETS["bob"]: "bob", SECRETS["root"]: None, "": None, "k2": None,
    }  # fmt: skip
    assert [secret for secret, key in found.items() if key and key.admin] == ["master"]
    assert not any(secret in repr(found) for secret in ("plain'", *SECRETS.values()) if secret not in str(list(found)))


def test_each_key_is_good_for_requests_and_an_admin_key_of_the_file_for_changes(fresh: World, file: Path) -> None:
    file.write_text(file.read_text() + f'[root]\nkey = "{SECRETS["root"]}"\nadmin = true\n')
    use(fresh, api_keys_file=file)
    assert [status(fresh, name) for name in ("alice", "bob", "root", "mallory", None)] == [200, 200, 200, 401, 401]
    load = "/checkpoints/demo/load"
    assert [status(fresh, name, load, {}) for name in ("alice", "root", "mallory")] == [403, 200, 401]
    assert fresh.client.get("/page.json").json()["asks_for_key"] is True


def test_a_file_that_changes_is_read_again_and_one_that_breaks_changes_nothing(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ApiKeys(Settings(api_keys_file=file))

    def names() -> list[str]:
        keys.read_again()
        return [name for name, secret in SECRETS.items() if keys.find(secret)]

    assert names() == ["alice", "bob"]
    file.write_text(f'[root]\nkey = "{SECRETS["root"]}"\n')
    assert names() == ["root"], "a key that is taken out is good for nothing from then on"
    with caplog.at_level(logging.INFO, "server.keys"):
        file.write_text("[root\nkey =")
        assert names() == names() == ["root"]
        assert caplog.text.count("is not TOML") == 1
        for strange in ("a = " + "[" * 20_000, "a = " + "9" * 5000):
            file.write_text(strange)
            assert names() == names() == ["root"]
        file.unlink()
        assert names() == names() == ["root"]
        assert caplog.text.count("No such file") == 1
        os.mkfifo(file)
        assert names() == names() == ["root"], "a pipe that nobody writes to is not opened"
        assert caplog.text.count("is not a file") == 1
        file.unlink()
        file.write_text(f'[alice]\nkey = "{SECRETS["alice"]}"\n')
        assert names() == ["alice"]
        assert "read again: alice" in caplog.text
    assert not any(secret in caplog.text for secret in SECRETS.values())


def test_a_file_that_could_not_be_read_for_a_moment_is_tried_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ApiKeys(Settings(api_keys_file=file))
    file.write_text(f'[root]\nkey = "{SECRETS["root"]}"\n')
    with monkeypatch.context() as failing:
        failing.setattr("server.keys.read_keys", lambda file: throw(StartupError("too many open files")))
        keys.read_again()
        assert keys.find(SECRETS["alice"])
    keys.read_again()
    assert keys.find(SECRETS["alice"]) is None, "it has been taken out"
    assert keys.find(SECRETS["root"])


def throw(error: Exception) -> None:
    raise error


def test_a_file_is_looked_at_once_a_second_and_no_longer_than_somebody_has_its_keys(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.keys.LOOK_EVERY_S", 0.02)
    looked: list[threading.Thread] = []
    real = Path.stat

    def stat(self: Path, **how: Any) -> os.stat_result:
        if self == file:
            looked.append(threading.current_thread())
        return real(self, **how)

    monkeypatch.setattr(Path, "stat", stat)
    keys = ApiKeys(Settings(api_keys_file=file))
    began = time.monotonic()
    looked.clear()
    wait_until(lambda: len(looked) >= 3)
    assert time.monotonic() - began >= 2 * 0.02
    for _ in range(1000):
        keys.find("nobody's")
    assert threading.current_thread() not in looked, "no request does"
    (watching,) = set(looked)
    del keys
    gc.collect()
    watching.join(10)
    assert not watching.is_alive()


def test_requests_are_answered_with_the_old_keys_while_the_file_is_read(
    fresh: World, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.keys.LOOK_EVERY_S", 0.01)
    use(fresh, api_keys_file=file)
    reading, go_on, real = threading.Event(), threading.Event(), keys_module.read_keys

    def slow(file: Path) -> Any:
        reading.set()
        assert go_on.wait(20)
        return real(file)

    monkeypatch.setattr("server.keys.read_keys", slow)
    file.write_text(f'[root]\nkey = "{SECRETS["root"]}"\n')
    try:
        assert reading.wait(10)
        assert [status(fresh, name) for name in ("alice", "root")] == [200, 401]
    finally:
        go_on.set()
    wait_until(lambda: status(fresh, "root") == 200)
    assert status(fresh, "alice") == 401


def test_from_the_first_admin_key_on_changes_need_one_whatever_becomes_of_the_file(
    fresh: World, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = file.read_text()
    admin = f'{plain}[root]\nkey = "{SECRETS["root"]}"\nadmin = true\n'
    use(fresh, api_keys_file=file)

    def changes(text: str) -> list[int]:
        file.write_text(text)
        fresh.service.keys.read_again()
        return [status(fresh, name, "/checkpoints/demo/load", {}) for name in ("alice", "root", None)]

    assert changes(plain) == [200, 401, 401], "where there has been none, any key is enough"
    assert changes(admin) == [403, 200, 401]
    assert changes(plain) == [403, 401, 401]
    assert caplog.text.count("there is no admin key any more") == 1
    assert changes(admin.replace("admin = true", "admin = false")) == [403, 403, 401]
    refused = fresh.client.post("/checkpoints/demo/load", json={}, headers=bearer("alice")).json()["error"]
    assert "file of API keys has none any more" in refused["message"]
    assert [status(fresh, name) for name in ("alice", "root")] == [200, 200]
    assert changes(admin) == [403, 200, 401]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it holds no key"),
        ("x = 1", "x: Input should be"),
        ("[a]", "a: it needs either 'key' or 'sha256'"),
        ("[a]\nkey = 'sesame'\nsha256 = '%s'" % ("0" * 64), "a: it needs either"),
        ("[a]\nkey = 'two sesames'", "a: a key is sent in a header"),
        ("[a]\nsha256 = 'sesame'", "a.sha256: String should match"),
        ("[a]\nkey = 'sesame'\nrequests_per_minute = 0", "a.requests_per_minute: Input should be greater"),
        ("[a]\nkey = 'sesame'\nrpm = 3", "a.rpm: Extra inputs"),
        ("[a]\nkey = 17", "a.key: Input should be a valid string"),
        ("['a b']\nkey = 'sesame'", "'a b' cannot be a key's name"),
        ("[a]\nkey = 'sesame'\n[b]\nkey = 'sesame'", "'a' and 'b' are the same"),
        ("[default]\nkey = 'sesame'", "have the same name"),
        ("key = sesame", "it is not TOML"),
        ("\udce9", "it is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_sentence_without_a_secret(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(StartupError) as caught:
        ApiKeys(Settings(api_keys_file=file, api_key="other"))
    assert said in caught.value.message
    assert "sesame" not in caught.value.message.replace("two sesames", "")


def test_a_file_that_is_not_there_ends_the_start_before_a_model_is_loaded(settings: Settings, tmp_path: Path) -> None:
    nowhere = settings.model_copy(update={"api_keys_file": tmp_path / "none.toml", "model": str(tmp_path)})
    with pytest.raises(StartupError, match=r"MATSTEER_API_KEYS_FILE.*cannot be read: No such file"):
        create_app(nowhere)


@pytest.mark.parametrize("given", ["sesame", "a=sesame a=other", "a b=sesame=", "=sesame", "a=", "a/b=sesame"])
def test_keys_of_the_environment_that_cannot_be_used_are_a_sentence_without_them(
    monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setenv("MATSTEER_API_KEYS", given)
    with pytest.raises(StartupError, match="Bad setting api_keys") as caught:
        load_settings()
    assert "sesame" not in caught.value.message


def test_an_empty_variable_of_the_environment_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEYS", "API_KEYS_FILE", "API_KEY_REQUESTS_PER_MINUTE", "API_KEY_MAX_ROWS"):
        monkeypatch.setenv(f"MATSTEER_{name}", "")
    assert not load_settings().asks_for_key


# --- what it may have ---


def test_the_rate_of_a_key_is_its_own_and_comes_back_with_time() -> None:
    clock = Clock()
    keys = ApiKeys(Settings(api_keys="alice=a bob=b", api_key_requests_per_minute=3), clock)
    alice, bob = keys.find("a"), keys.find("b")
    for _ in range(3):
        keys.take_request(alice)
    with pytest.raises(RateLimited, match="may send 3 requests a minute") as caught:
        keys.take_request(alice)
    assert caught.value.headers == {"Retry-After": "20"}
    keys.take_request(bob)
    clock.now += 20
    keys.take_request(alice)
    with pytest.raises(RateLimited):
        keys.take_request(alice)
    clock.now += 3600
    for _ in range(3):
        keys.take_request(alice)
    with pytest.raises(RateLimited):
        keys.take_request(alice)


def test_texts_under_way_are_counted_until_they_end() -> None:
    keys = ApiKeys(Settings(api_keys="alice=a"))
    alice = ApiKey("alice", b"", max_rows=4)
    with pytest.raises(InvalidField, match="asks for 5 texts; this API key may have 4"):
        keys.take_rows(alice, 5)
    first, second = keys.take_rows(alice, 3), keys.take_rows(alice, 1)
    with pytest.raises(RateLimited, match="it has 4, and 1 more"):
        keys.take_rows(alice, 1)
    first()
    keys.take_rows(alice, 3)
    second()
    keys.take_rows(None, 10**6)
    keys.take_rows(ApiKey("bob", b""), 10**6)


def test_too_many_requests_are_refused_before_their_body_is_read_as_openais_clients_know_it(fresh: World) -> None:
    use(fresh, api_keys="alice=sk-alice-7e57 bob=sk-bob-7e57", api_key_requests_per_minute=2)
    for _ in range(3):
        assert fresh.client.get("/v1/models", headers=bearer("alice")).status_code == 200, "what reads nothing is free"
    assert [status(fresh, "alice") for _ in range(2)] == [200, 200]
    refused = fresh.client.post("/generate", content=b"not JSON", headers=bearer("alice"))
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    client = openai.OpenAI(
        base_url=f"{fresh.client.base_url}/v1", api_key=SECRETS["alice"], http_client=fresh.client, max_retries=0
    )
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model="tiny", prompt="a", max_tokens=1)
    assert caught.value.code == "rate_limit_exceeded"
    assert status(fresh, "bob") == 200


@pytest.mark.parametrize("stream", [False, True])
def test_rows_of_a_key_are_given_back_whatever_becomes_of_its_request(fresh: World, stream: bool) -> None:
    use(fresh, api_keys="alice=sk-alice-7e57", api_key_max_rows=4)
    usage = fresh.service.keys._usage
    for body in ({"n": 4}, {"n": 2, "baseline": True}, {"n": 5}, {"checkpoint": "none"}, {"n": 3, "logprobs": 2}):
        answer = fresh.client.post("/generate", json=BODY | body | {"stream": stream}, headers=bearer("alice"))
        assert answer.status_code == {5: 422}.get(body.get("n"), 404 if "checkpoint" in body else 200), answer.text
        wait_until(lambda: usage["alice"].rows == 0)
    scored = {"prompt": "a", "continuations": ["b", "c", "d", "e"]}
    assert status(fresh, "alice", "/score", scored) == 200
    assert status(fresh, "alice", "/score", scored | {"continuations": ["b"] * 5}) == 422
    assert usage["alice"].rows == 0
    fresh.service.engine.submit = lambda *_: 1 / 0  # type: ignore[method-assign,assignment]
    assert status(fresh, "alice") == 500
    assert usage["alice"].rows == 0


# --- where it is seen ---


def test_a_key_is_in_logs_by_its_name_and_nowhere_by_itself(fresh: World, file: Path) -> None:
    use(fresh, api_keys_file=file, api_keys="carol=sk-carol-7e57", admin_key="sk-root-7e57", api_key="sk-plain-7e57")
    fresh.service.settings = fresh.service.settings.model_copy(update={"log_prompts": True})
    everywhere = []
    with logged(log_format="json") as log, logged() as text:
        for name in ("alice", "bob", "sk-carol-7e57", "root", "sk-plain-7e57", "sk-wrong-7e57"):
            for path, body in (("/generate", BODY), ("/v1/completions", {"model": "tiny", "prompt": "a"}), ("/x", {})):
                everywhere.append(fresh.client.post(path, json=body, headers=bearer(name)))
            everywhere.append(fresh.client.post("/checkpoints/demo/load", json={}, headers=bearer(name)))
        for path in ("/metrics", "/page.json", "/openapi.json", "/readyz", "/"):
            everywhere.append(fresh.client.get(path))
    names = [line.get("api_key") for line in log.requests() if line["route"] == "/generate"]
    assert names == ["alice", "bob", "carol", "admin", "default", None]
    assert "key alice)" in text.text
    for said in (log.text, text.text, *(f"{one.text} {one.headers}" for one in everywhere)):
        assert "7e57" not in said
        assert "7e57" not in said.encode().decode("unicode_escape", errors="replace")


# --- pages of other origins ---


@pytest.fixture(scope="module")
def shared(settings: Settings) -> Iterator[TestClient]:
    given = {"cors_allow_origins": "https://app.example.org, http://localhost:3000", "api_keys": "alice=sk-alice-7e57"}
    app = create_app(Settings(**settings.model_dump(exclude=set(given)), **given))
    with TestClient(app) as client:
        yield client


PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/generate", "/checkpoints/demo/activate"])
def test_a_page_of_an_origin_that_is_named_may_ask_first_without_a_key(shared: TestClient, path: str) -> None:
    for origin in ("https://app.example.org", "http://localhost:3000"):
        asked = shared.options(path, headers=PREFLIGHT | {"Origin": origin})
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == origin
        assert "POST" in asked.headers["access-control-allow-methods"]
        assert {"authorization", "x-stainless-os"} <= set(
            asked.headers["access-control-allow-headers"].lower().replace(" ", "").split(",")
        )
    other = shared.options(path, headers=PREFLIGHT | {"Origin": "https://evil.example.org"})
    assert other.status_code == 400
    assert "access-control-allow-origin" not in other.headers


def test_every_answer_can_be_read_there_errors_included(shared: TestClient) -> None:
    origin = {"Origin": "https://app.example.org"}
    for headers, wanted in (({}, 401), (bearer("alice"), 200)):
        answer = shared.post("/generate", json=BODY, headers=origin | headers)
        assert answer.status_code == wanted
        assert answer.headers["access-control-allow-origin"] == origin["Origin"]
        exposed = answer.headers["access-control-expose-headers"].lower()
        assert all(name in exposed for name in ("x-request-id", "retry-after", "www-authenticate"))
    assert "access-control-allow-origin" not in shared.get("/readyz", headers={"Origin": "https://evil.org"}).headers


def test_no_page_of_another_origin_may_ask_unless_the_settings_say_so(world: World) -> None:
    asked = world.client.options("/generate", headers=PREFLIGHT | {"Origin": "https://app.example.org"})
    assert asked.status_code == 405
    assert not [name for name in asked.headers if name.startswith("access-control")]


@pytest.mark.parametrize("given", ["app.example.org", "https://a.org/path", "https://a.org,b", "null"])
def test_what_is_no_origin_is_refused_at_the_start(given: str) -> None:
    with pytest.raises(StartupError, match=r"is no origin, as in https://app.example.org"):
        load_settings(cors_allow_origins=given)
