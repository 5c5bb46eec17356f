"""The server behind a real nginx with deploy/nginx.conf: `make test-proxy`. Left out where there is no nginx."""

import os
import shutil
import signal
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.config import Settings
from server.engine.engine import Engine
from tests.server.conftest import event_lines, free_port, wait_until
from tests.server.test_listener import serving
from tests.server.test_logs import Log, hold, logged

SITE = Path(__file__).parents[2] / "deploy" / "nginx.conf"
PROMPT = "Q: What colour is grass? A:"
LONG = {"prompt": PROMPT, "max_new_tokens": 70, "ignore_eos": True}
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="there is no nginx (Debian: apt-get install nginx)")


class Proxy:
    """A running nginx, and a client of it."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, certificate: Path, engine: Engine) -> None:
        self.process = process
        self.engine = engine
        transport = httpx.HTTPTransport(
            verify=ssl.create_default_context(cafile=certificate), local_address="127.0.0.2"
        )
        self.client = httpx.Client(base_url=url, transport=transport, timeout=30)

    def tokens(self) -> Iterator[None]:
        """Each token of a stream, as it comes."""
        with self.client.stream("POST", "/generate", json=LONG | {"stream": True}) as response:
            assert response.status_code == 200
            for line in event_lines(response):
                if line == "event: token":
                    yield

    def kill(self) -> None:
        """At once, with its worker."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        self.process.kill()
        for worker in children.split():
            os.kill(int(worker), signal.SIGKILL)


@contextmanager
def nginx(
    folder: Path, server: str, *changes: tuple[str, str]
) -> Iterator[tuple["subprocess.Popen[bytes]", str, Path]]:
    """nginx with the site of deploy/, but for its port, its certificate and its upstream, and `changes`."""
    certificate, key, port = folder / "cert.pem", folder / "key.pem", free_port()
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", *names]
    subprocess.run([*make, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    site = SITE.read_text(encoding="utf-8")
    for old, new in (
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("127.0.0.1:8000", server.removeprefix("http://")),
        ("/etc/ssl/certs/example.org.pem", str(certificate)),
        ("/etc/ssl/private/example.org.key", str(key)),
        *changes,
    ):
        assert site.count(old) == 1, old
        site = site.replace(old, new)
    (folder / "site.conf").write_text(site, encoding="utf-8")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    user = "user root;" if os.getuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"{user} daemon off; worker_processes 1; pid {folder}/pid; error_log stderr;"
        f"events {{}} http {{ access_log off; {temporary} include {folder}/site.conf; }}",
        encoding="utf-8",
    )
    process = subprocess.Popen(
        [str(NGINX), "-p", str(folder), "-c", str(folder / "nginx.conf")], stderr=subprocess.DEVNULL
    )
    try:
        yield process, f"https://localhost:{port}", certificate
    finally:
        process.terminate()
        process.wait()


@contextmanager
def proxied(settings: Settings, folder: Path, *changes: tuple[str, str]) -> Iterator[Proxy]:
    with (
        serving(settings.model_copy(update={"forwarded_allow_ips": "127.0.0.1"}), 1) as (server, slow, url),
        nginx(folder, url, *changes) as (process, address, certificate),
    ):
        server._service.engine._runner.execute_async = slow._real  # steps as fast as they are
        proxy = Proxy(process, address, certificate, server._service.engine)
        wait_until(lambda: answers(proxy.client))
        yield proxy
        proxy.client.close()


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def proxy(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with proxied(settings, tmp_path_factory.mktemp("nginx")) as running:
        yield running


def check_stream(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token arrives before the fourth one after it is computed."""
    ahead, execute = threading.Semaphore(4), proxy.engine._runner.execute_async

    def step(*batch: Any) -> Any:
        assert ahead.acquire(timeout=20)
        return execute(*batch)

    monkeypatch.setattr(proxy.engine._runner, "execute_async", step)
    arrived = 0
    for _ in proxy.tokens():
        arrived += 1
        ahead.release()
    assert arrived == 70


def test_tokens_come_one_by_one(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    check_stream(proxy, monkeypatch)


def test_tokens_come_one_by_one_through_an_nginx_that_gathers(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's own header says that a stream is not to be gathered."""
    with proxied(settings, tmp_path, ("proxy_buffering off;", "proxy_buffering on;")) as proxy:
        check_stream(proxy, monkeypatch)


def test_the_client_is_the_one_that_nginx_saw(proxy: Proxy) -> None:
    with logged(log_format="json") as log:
        answer = proxy.client.get("/readyz", headers={"X-Forwarded-For": "6.6.6.6", "X-Request-Id": "mine"})
        assert answer.headers["x-request-id"] == "mine"
        assert (log.request()["client"], log.request()["request_id"]) == ("127.0.0.2", "mine")


def test_metrics_are_not_for_everybody(proxy: Proxy) -> None:
    assert proxy.client.get("/metrics").status_code == 403


def generated(log: Log) -> list[dict[str, Any]]:
    return [line for line in log.requests() if line["route"] == "/generate"]


def gone(proxy: Proxy) -> bool:
    return proxy.engine.open_sequences == proxy.engine.status.used_blocks == 0


def test_a_client_that_leaves_ends_its_request_behind_the_proxy(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(proxy.engine, monkeypatch, 5)
    with logged(log_format="json") as log:
        tokens = proxy.tokens()
        next(tokens)
        assert not gone(proxy)
        tokens.close()  # type: ignore[attr-defined]
        wait_until(lambda: gone(proxy))
        assert log.request()["outcome"] == "client_gone"
    assert log.request()["completion_tokens"] < 60


@pytest.mark.parametrize("stream", [True, False])
def test_a_proxy_that_cuts_ends_the_request(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """It waits no longer than 0.3 s for an answer, or is killed in the middle of a stream."""
    changes = [] if stream else [("proxy_read_timeout 610s;", "proxy_read_timeout 300ms;")]
    with proxied(settings, tmp_path, *changes) as proxy, logged(log_format="json") as log:
        hold(proxy.engine, monkeypatch, 10)
        if stream:
            tokens = proxy.tokens()
            for _ in range(5):
                next(tokens)
            proxy.kill()
            with pytest.raises(httpx.TransportError):
                list(tokens)
        else:
            assert proxy.client.post("/generate", json=LONG | {"n": 2}).status_code == 504
        wait_until(lambda: gone(proxy))
        wait_until(lambda: bool(generated(log)))
    assert [line["outcome"] for line in generated(log)] == ["client_gone"]
