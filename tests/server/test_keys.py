"""Who has no key gets in nowhere, and an API key changes nothing where there is an admin key."""

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.config import Settings, load_settings
from server.errors import StartupError
from server.keys import ApiKeys

BODY = {"prompt": "a", "max_new_tokens": 1}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
USES = [
    ("POST", "/generate", BODY),
    ("POST", "/compare", BODY | {"arms": [{"name": "a"}]}),
    ("POST", "/score", {"prompt": "a", "continuations": ["b"]}),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "a"}),
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/responses", {"model": "tiny", "input": "a", "max_output_tokens": 1}),
    ("POST", "/tokenize", {"prompt": "a"}),
    ("POST", "/detokenize", {"tokens": [40]}),
    ("POST", "/judge", {"prompt": "Q: What colour is the sky? A:", "texts": ["b"]}),
    ("GET", "/studies", None),
    ("GET", "/tokenizer_info", None),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/tiny", None),
    ("GET", "/checkpoints", None),
    ("GET", "/checkpoints/demo", None),
]
CHANGES = [
    ("POST", "/checkpoints/demo/load", {}),
    ("POST", "/checkpoints/demo/activate", {}),
    ("DELETE", "/checkpoints/other", None),
]
OPEN = ["/health", "/healthz", "/readyz", "/metrics", "/", "/page.json", "/page/page.js", "/docs", "/openapi.json"]


@pytest.fixture(scope="module")
def serve(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TestClient]:
    """A client of a server with keys. The model is loaded once; the keys are looked at with every request."""
    studies = tmp_path_factory.mktemp("studies") / "studies.db"
    app = create_app(settings.model_copy(update={"judge": "demo.oracle:judge", "studies": studies}))

    def with_keys(**keys: Any) -> TestClient:
        service = app.state.service
        service.settings = Settings(
            **settings.model_dump(exclude={"api_key", "admin_key", "api_key_everywhere"}), **keys
        )
        service.keys = ApiKeys(service.settings)
        return client

    with TestClient(app) as client:
        yield with_keys


def status(client: TestClient, method: str, path: str, body: object, key: str | None, scheme: str = "Bearer") -> int:
    headers = {} if key is None else {"Authorization": f"{scheme} {key}"}
    response = client.request(method, path, json=body, headers=headers)
    if response.status_code in (401, 403):
        assert response.json()["error"]["type"] == {401: "unauthorized", 403: "forbidden"}[response.status_code]
        assert response.json()["error"]["code"] == {401: "invalid_api_key", 403: "forbidden"}[response.status_code]
        assert ("www-authenticate" in response.headers) is (response.status_code == 401)
    return response.status_code


@pytest.mark.parametrize(("method", "path", "body"), USES)
def test_using_needs_either_key(serve: Callable[..., TestClient], method: str, path: str, body: object) -> None:
    client = serve(api_key="sesame", admin_key="master")
    for wrong in (None, "", "sesam", "sesamee", "SESAME", "ключ"):
        if wrong is None or wrong.isascii():
            assert status(client, method, path, body, wrong) == 401
    assert status(client, method, path, body, "sesame", scheme="Basic") == 401
    assert status(client, method, path, body, "sesame") == 200
    assert status(client, method, path, body, "master") == 200


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
def test_changing_needs_the_admin_key(serve: Callable[..., TestClient], method: str, path: str, body: object) -> None:
    client = serve(api_key="sesame", admin_key="master")
    assert status(client, method, path, body, None) == 401
    assert status(client, method, path, body, "wrong") == 401
    assert status(client, method, path, body, "sesame") == 403
    assert status(client, method, path, body, "master") == 200
    client = serve(api_key="sesame")
    assert status(client, method, path, body, None) == 401
    assert status(client, method, path, body, "sesame") == 200
    client = serve(admin_key="master")
    assert status(client, method, path, body, None) == 401
    assert status(client, method, path, body, "master") == 200
    assert status(serve(), method, path, body, None) == 200


def test_without_an_api_key_anybody_may_use_it(serve: Callable[..., TestClient]) -> None:
    client = serve(admin_key="master")
    for method, path, body in USES:
        assert status(client, method, path, body, None) == 200


@pytest.mark.parametrize("path", OPEN)
def test_who_watches_needs_no_key(serve: Callable[..., TestClient], path: str) -> None:
    assert serve(api_key="sesame").get(path).status_code == 200


def test_a_setting_asks_for_the_key_everywhere_but_at_the_routes_of_health(serve: Callable[..., TestClient]) -> None:
    client = serve(api_key="sesame", admin_key="master", api_key_everywhere=True)
    for path in [*OPEN, "/docs/", "/nowhere", "/static-offline-docs/swagger-ui.css"]:
        watched = path in ("/health", "/healthz", "/readyz")
        assert (status(client, "GET", path, None, None) == 401) is not watched
        assert (status(client, "GET", path, None, "wrong") == 401) is not watched
        for key in ("sesame", "master"):
            assert status(client, "GET", path, None, key) == (404 if path == "/nowhere" else 200), path
    assert status(client, "POST", "/checkpoints/demo/load", {}, "sesame") == 403
    assert status(serve(api_key_everywhere=True), "GET", "/metrics", None, None) == 200, "there is no key"


@pytest.mark.parametrize("name", ["api_key", "admin_key"])
@pytest.mark.parametrize("key", ["ключ", "two words", " sesame", "sesame\n", "sésame", "a\tb", "\x7f"])
def test_a_key_that_no_header_can_carry_is_refused_at_the_start(name: str, key: str) -> None:
    with pytest.raises(StartupError, match=f"Bad setting {name} .*: it is sent in a header") as caught:
        load_settings(**{name: key})
    assert key not in caught.value.message, "a key is shown nowhere"


@pytest.mark.parametrize("key", ["sesame", "sk-proj_A.b~c+d/e==", "".join(map(chr, range(0x21, 0x7F)))])
def test_every_other_key_works_as_it_is(serve: Callable[..., TestClient], key: str) -> None:
    client = serve(api_key=key)
    assert status(client, "GET", "/v1/models", None, key) == 200
    assert status(client, "GET", "/v1/models", None, key[:-1]) == 401


@pytest.mark.parametrize(("method", "path", "body"), [use for use in USES + CHANGES if use[0] == "POST"])
def test_a_key_is_asked_for_before_the_body_is_looked_at(
    serve: Callable[..., TestClient], method: str, path: str, body: object
) -> None:
    client = serve(api_key="sesame")

    def chunks() -> Iterator[bytes]:
        for _ in range(3):
            yield b"this is no JSON"

    headers = {"Content-Type": "application/json", "Authorization": "Bearer wrong"}
    assert client.post(path, content=chunks(), headers=headers).status_code == 401
    headers["Authorization"] = "Bearer sesame"
    assert client.post(path, content=chunks(), headers=headers).status_code == 400


def test_keys_come_from_the_environment_and_are_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MATSTEER_API_KEY", "sesame")
    monkeypatch.setenv("MATSTEER_ADMIN_KEY", "")
    monkeypatch.setenv("MATSTEER_CHAT_TEMPLATE", "")
    settings = Settings()
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "sesame"
    assert settings.admin_key is settings.chat_template is None, (
        "an empty variable, as compose files leave it, sets nothing"
    )
    assert "sesame" not in repr(settings)


def test_openai_clients_send_the_key_as_they_always_do(serve: Callable[..., TestClient]) -> None:
    http = serve(api_key="sesame")
    for key, right in (("sesame", True), ("other", False)):
        client = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key=key, http_client=http, max_retries=0)
        if right:
            assert client.models.list().data
        else:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
