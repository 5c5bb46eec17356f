"""A proxy of the environment is named where it keeps a client from a server of this machine."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import pytest
from typer.testing import CliRunner

from server.cli import app
from server.client import ApiError, AsyncClient, Client
from server.proxies import proxy_hint

runner = CliRunner(env={"COLUMNS": "400"})
NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


class Refusing(BaseHTTPRequestHandler):
    """A proxy that does not know the way to this machine."""

    def do_GET(self) -> None:  # the name that http.server looks for
        self.send_response(503)
        self.end_headers()
        self.wfile.write(b"<html>The proxy cannot reach the host.</html>")

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HTTP_PROXY", f"http://me:secret@{where}")
        yield where
        server.shutdown()


@pytest.fixture
def dead_proxy(monkeypatch: pytest.MonkeyPatch) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("http_proxy", f"http://{where}")
    return where


def test_without_a_proxy_there_is_nothing_to_say() -> None:
    assert proxy_hint("http://127.0.0.1:8000") is None
    assert proxy_hint("nonsense") is None
    assert proxy_hint("http://[bad") is None


def test_the_variable_and_the_remedy_are_named_and_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://me:secret@proxy.example:1080")
    hint = proxy_hint("http://localhost:8000")
    assert hint == (
        "ALL_PROXY is set in the environment, so that the request went through the proxy proxy.example:1080. "
        "A server on this machine is not behind it: set NO_PROXY=localhost."
    )
    assert "If the server is not behind it, set NO_PROXY=models.example." in str(proxy_hint("http://models.example"))
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    assert proxy_hint("http://localhost:8000") is None


COMMANDS = [
    ["generate", "Q:", "--url"],
    ["compare", "Q:", "--arm", "a", "--url"],
    ["bench", "--requests", "1", "--url"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_the_commands_name_it(proxy: str, address: str, command: list[str]) -> None:
    result = runner.invoke(app, [*command, address])
    assert result.exit_code == 1
    assert f"HTTP_PROXY is set in the environment, so that the request went through the proxy {proxy}" in result.output
    assert "set NO_PROXY=127.0.0.1" in result.output
    assert "secret" not in result.output


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_the_commands_name_one_that_does_not_answer(dead_proxy: str, address: str, command: list[str]) -> None:
    result = runner.invoke(app, [*command, address])
    assert result.exit_code == 1
    assert f"went through the proxy {dead_proxy}" in result.output


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_socks_proxy_without_its_package_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, address: str, command: list[str]
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    result = runner.invoke(app, [*command, address])
    assert result.exit_code == 1
    assert "ALL_PROXY is set in the environment" in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_with_no_proxy_set_the_server_is_reached(proxy: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert runner.invoke(app, ["generate", "Q:", "--max-new-tokens", "2", "--url", address]).exit_code == 0


def test_the_clients_keep_httpxs_exceptions_and_add_a_note(dead_proxy: str, address: str) -> None:
    with Client(address) as client, pytest.raises(httpx.ConnectError) as caught:
        client.ready()
    assert dead_proxy in caught.value.__notes__[0]
    with Client(address) as client, pytest.raises(httpx.ConnectError) as caught:
        list(client.stream("Q:"))
    assert dead_proxy in caught.value.__notes__[0]

    async def ask() -> None:
        async with AsyncClient(address) as client:
            await client.ready()

    with pytest.raises(httpx.ConnectError) as caught:
        asyncio.run(ask())
    assert dead_proxy in caught.value.__notes__[0]


def test_a_page_of_the_proxy_is_not_taken_for_the_servers(proxy: str, address: str) -> None:
    with Client(address) as client, pytest.raises(ApiError, match=f"went through the proxy {proxy}"):
        client.ready()
