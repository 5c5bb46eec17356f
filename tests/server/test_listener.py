"""How the server comes to its address, and how it ends."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.config import Settings
from server.errors import StartupError
from server.listener import DrainingServer, run
from server.sockets import address_of, listen
from tests.server.conftest import BUSY, World, event_lines, free_port, wait_until


def test_an_address_that_is_taken_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            StartupError, match=rf"cannot listen on 127.0.0.1 port {port}: Address already in use\. "
        ) as e:
            listen(Settings(port=port))
    assert "another port with --port (MATSTEER_PORT); for make serve: `make serve PORT=8001`" in e.value.message
    assert "\n" not in e.value.message


def test_the_slower_of_two_that_start_at_once_ends_with_the_same_sentence(settings: Settings) -> None:
    app = create_app(settings)
    with listen(Settings(port=free_port())) as bound:
        taken = socket.socket()  # bound and not listening yet, as while a model is loaded
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(bound.getsockname())
        taken.listen()
        with taken, pytest.raises(StartupError, match=r"Address already in use\. Another server has this port"):
            run(app, bound, drain_s=1)
    assert app.state.service.engine.trouble, "nothing of it goes on"


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("0.0.0.0", "http://127.0.0.1:{}"),
        ("127.0.0.1", "http://127.0.0.1:{}"),
        ("::", "http://[::1]:{}"),
        ("::1", "http://[::1]:{}"),
    ],
)
def test_the_address_that_is_shown_can_be_opened(host: str, shown: str) -> None:
    port = free_port()
    try:
        bound = listen(Settings(host=host, port=port))
    except StartupError as error:
        pytest.skip(error.message)  # a machine without IPv6
    with bound:
        assert address_of(bound) == shown.format(port)


@pytest.mark.parametrize("key", [None, "a-secret"])
def test_the_start_ends_with_where_to_go(
    settings: Settings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    kept = settings.model_dump(exclude={"api_key", "admin_key"})
    with caplog.at_level("INFO", "server.listener"), serving(Settings(**kept, api_key=key), 1) as (_, _, url):
        wait_until(lambda: "ready at" in caplog.text)  # it answers a moment before it says so
        (said,) = [record.getMessage() for record in caplog.records if "ready at" in record.getMessage()]
        assert said.splitlines()[0] == f"ready at {url}"
        assert all(f"{url}{path}" in said for path in ("/", "/docs", "/v1"))
        command = said.splitlines()[-1].partition("try")[2].strip()
        assert ("Authorization: Bearer $MATSTEER_API_KEY" in command) is (key is not None)
        assert "a-secret" not in said
        environment = {"PATH": os.environ["PATH"], "NO_PROXY": "*", "MATSTEER_API_KEY": key or ""}
        done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["baseline"][0]["text"] is not None


@pytest.mark.parametrize("host", ["no.such.host.invalid", "", "x" * 300])
def test_a_host_that_is_none_is_one_sentence(host: str) -> None:
    with pytest.raises(StartupError, match="cannot listen on") as caught:
        listen(Settings(host=host))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", True), ("127.0.0.1", False), ("localhost", False)])
def test_an_address_that_others_can_reach_is_warned_of(
    caplog: pytest.LogCaptureFixture, host: str, warned: bool
) -> None:
    with listen(Settings(host=host, port=free_port())):
        assert ("can be reached from other machines" in caplog.text) is warned


def test_what_stays_for_good_is_not_looked_at_by_the_garbage_collector(
    fresh: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen: list[int] = []
    monkeypatch.setattr(DrainingServer, "run", lambda *_, **__: frozen.append(gc.get_freeze_count()))
    try:
        with socket.socket() as bound:
            run(fresh.app, bound, drain_s=1)
    finally:
        gc.unfreeze()
    assert frozen[0] > 10_000


class Slow:
    """Every step of the runner takes a while; `inside` is set once the first one runs."""

    def __init__(self, runner: Any) -> None:
        self.inside = threading.Event()
        self._real = runner.execute_async
        runner.execute_async = self

    def __call__(self, *batch: Any) -> Any:
        self.inside.set()
        time.sleep(0.03)
        return self._real(*batch)


@contextmanager
def serving(
    settings: Settings, drain_s: float, *, send: int | None = None
) -> Iterator[tuple[DrainingServer, Slow, str]]:
    """`send`: bytes that the system takes of what a client does not read."""
    app = create_app(settings)
    slow = Slow(app.state.service.engine._runner)
    bound = listen(settings.model_copy(update={"port": free_port()}))
    if send is not None:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send)
    server = DrainingServer(app, drain_s=drain_s)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        wait_until(lambda: server.started, 20)
        yield server, slow, f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        bound.close()
        assert not thread.is_alive()
        assert app.state.service.engine.trouble


@pytest.mark.parametrize(("drain_s", "status"), [(20, 200), (0.2, 503)])
def test_a_shutdown_lets_running_requests_finish_for_a_while(settings: Settings, drain_s: float, status: int) -> None:
    answers: list[httpx.Response] = []
    with serving(settings, drain_s) as (server, slow, url):
        body = {"prompt": "a", "max_new_tokens": 40, "ignore_eos": True, "n": 1 if status == 200 else 128}
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/generate", json=body, timeout=30, trust_env=False))
        )
        asking.start()
        assert slow.inside.wait(10)
        server.should_exit = True
        asking.join(20)
    assert [answer.status_code for answer in answers] == [status]
    if status == 503:
        assert answers[0].json()["error"]["type"] == "engine_down"
    else:
        assert answers[0].json()["results"][0]["usage"]["completion_tokens"] == 40


def test_a_draining_server_is_not_ready_and_takes_nothing_new(fresh: World) -> None:
    fresh.service.engine.drain()
    ready = fresh.client.get("/readyz")
    assert ready.status_code == 503
    assert "draining" in ready.json()["error"]["message"]
    assert fresh.refused(prompt="a")[0] == 503
    assert fresh.client.get("/healthz").status_code == 200


@pytest.mark.timeout(300)  # a process starts, and imports all that it needs
@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_asked_to_end_finishes_and_ends_with_0(settings: Settings, asked: signal.Signals) -> None:
    port = free_port()
    command = [sys.executable, "-m", "server.cli", "serve", "--port", str(port), "--model", str(settings.model)]
    server = subprocess.Popen(
        [*command, "--checkpoints", str(settings.checkpoints)],
        env=os.environ | {"MATSTEER_REMEMBER": "false"},
        stderr=subprocess.PIPE,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: httpx.get(f"{url}/readyz", trust_env=False).status_code == 200, 250)
        body = {"prompt": "a", "max_new_tokens": 60, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/generate", json=body, timeout=30, trust_env=False) as told:
            lines = event_lines(told)
            next(lines)
            server.send_signal(asked)
            assert "event: done" in list(lines)
        _, said = server.communicate(timeout=20)
    finally:
        server.kill()
    assert server.returncode == 0, said
    assert "Traceback" not in said


@pytest.mark.parametrize("client", ["who does not read", "who does not send", "who says nothing"])
def test_no_client_can_hold_up_the_end(settings: Settings, client: str) -> None:
    """One asks for a stream and reads none of it, or sends five bytes of a body, or nothing at all."""
    with serving(settings, 0.1) as (server, slow, url), socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        held.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        body = json.dumps(
            {"prompt": ["a"] * 8, "n": 16, "max_new_tokens": 90, "ignore_eos": True, "logprobs": 20, "stream": True}
        ).encode()
        head = b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        if client != "who says nothing":
            held.sendall(head % len(body) + (body if client == "who does not read" else body[:5]))
        if client == "who does not read":
            assert slow.inside.wait(10)
            wait_until(lambda: any(one.flow.write_paused for one in server.server_state.connections))
        else:
            wait_until(lambda: bool(server.server_state.connections))
        began = time.monotonic()
        server.should_exit = True
    assert time.monotonic() - began < 0.1 + 2 + BUSY


@pytest.mark.timeout(300)
def test_a_thread_that_does_not_end_is_not_waited_for(settings: Settings) -> None:
    code = (
        "import sys, threading, time\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from server.app import create_app\n"
        "from server.config import Settings\n"
        "from server.listener import run\nfrom server.sockets import listen\n"
        "app = create_app(Settings(model=sys.argv[1], remember=False, drain_s=0))\n"
        "ThreadPoolExecutor().submit(time.sleep, 60)\n"
        "run(app, listen(Settings(port=int(sys.argv[2]))), drain_s=0)\n"
    )
    port = free_port()
    server = subprocess.Popen([sys.executable, "-c", code, str(settings.model), str(port)], stderr=subprocess.PIPE)
    try:
        wait_until(lambda: httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False).status_code == 200, 250)
        began = time.monotonic()
        server.terminate()
        _, said = server.communicate(timeout=20)
    finally:
        server.kill()
    assert time.monotonic() - began < 0 + 2 + BUSY
    assert server.returncode == 1
    assert b"a thread has not ended in time" in said


def test_the_heap_is_frozen_only_while_it_serves() -> None:
    """What stays frozen at the end of the process is a leak to Triton's binding, which says so at length."""
    pytest.importorskip("triton")
    code = (
        "import gc, triton\nfrom server.heap import heap_frozen\nwith heap_frozen():\n    assert gc.get_freeze_count()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stderr == ""
