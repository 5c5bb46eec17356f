"""How servers end, each a real one: by themselves where the engine has failed for good, so that whoever runs them
starts them again; and in time when they are asked to, whatever clients and the engine do."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from server.config import Settings
from tests.server.conftest import BUSY, event_lines, wait_until
from tests.server.failing_server import BUG, DEAD, NAN, NO_MEMORY, STUCK
from tests.server.test_process import LONG, Processes, started

pytestmark = pytest.mark.timeout(300)  # several processes start, and import all that they need
STALL_S = 3  # of servers whose engine is to be stuck


@contextmanager
def failing(settings: Settings, tmp_path: Path, process: str, **environment: str) -> Iterator[Processes]:
    """See `tests/server/failing_server.py`."""
    options, module = ("--engine-process", process), ("tests.server.failing_server",)
    with started(settings, tmp_path, *options, module=module, **environment) as server:
        yield server


def ask(server: Processes, length: int) -> tuple[int, str]:
    """Status, and the error's type."""
    body = {"prompt": "a", "max_new_tokens": length, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=30, trust_env=False)
    return answer.status_code, answer.json()["error"]["type"]


@pytest.mark.parametrize(
    ("process", "fault", "told", "why"),
    [
        ("false", DEAD, (500, "generation_failed"), "the device failed: CUDA error"),
        ("true", BUG, (503, "engine_down"), "the engine's loop broke: 'a bug'"),
        ("false", STUCK, (503, "engine_down"), f"the current step has been running for more than {STALL_S} s"),
        ("true", STUCK, (503, "engine_down"), f"the current step has been running for more than {STALL_S} s"),
    ],
)
def test_a_server_whose_engine_has_failed_tells_its_clients_and_ends(
    settings: Settings, tmp_path: Path, process: str, fault: int, told: tuple[int, str], why: str
) -> None:
    """A step that fails, or is not finite, is no such failure."""
    stall_s = STALL_S if fault == STUCK else 300
    with failing(settings, tmp_path, process, MATSTEER_STALL_S=str(stall_s), MATSTEER_MAX_NUM_SEQS="64") as server:
        assert ask(server, NO_MEMORY) == (503, "out_of_memory")
        assert ask(server, NAN) == (500, "not_finite")
        assert server.client.get("/readyz").status_code == 200
        children = server.children()
        with server.client.stream("POST", "/generate", json={**LONG, "n": 120, "stream": True}) as stream:
            lines = event_lines(stream)
            next(lines)
            began = time.monotonic()
            assert ask(server, fault) == told
            event, data = [line for line in lines if line][-2:]
        assert server.supervisor.wait(20) == 1
        assert time.monotonic() - began < STALL_S + 2 + BUSY
        said = server.said.read_text()
    assert event == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["type"] in ("engine_down", told[1])
    assert "CRITICAL" in said
    assert f"the engine has failed, and {'its process' if process == 'true' else 'the server'} ends: {why}" in said
    assert not any(psutil.pid_exists(child.pid) for child in children)


@contextmanager
def hostile(server: Processes) -> Iterator[None]:
    """One client asks for a stream and reads none of it, one sends five bytes of a body, one sends nothing."""
    asked: dict[str, Any] = {"prompt": ["a"] * 8, "n": 16, "logprobs": 20, "stream": True}
    body = json.dumps(LONG | asked).encode()
    head = b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with ExitStack() as stack:
        for sent in (head % len(body) + body, head % len(body) + body[:5], b""):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
            client.sendall(sent)
        wait_until(lambda: server.metric("matsteer_num_requests_open") > 0)
        yield


@pytest.mark.parametrize(("process", "stuck"), [("false", True), ("true", False), ("true", True)])
def test_a_server_that_is_asked_to_end_has_ended_two_seconds_after_the_drain(
    settings: Settings, tmp_path: Path, process: str, stuck: bool
) -> None:
    drain_s, answers = 0.5, []
    with failing(settings, tmp_path, process, MATSTEER_DRAIN_S=str(drain_s)) as server, hostile(server):
        children = server.children()
        asking = threading.Thread(target=lambda: answers.append(ask(server, STUCK)))
        if stuck:
            asking.start()
            wait_until(lambda: "stuck" in server.said.read_text())
        began = time.monotonic()
        server.supervisor.terminate()
        status = server.supervisor.wait(30)
        took = time.monotonic() - began
        if stuck:
            asking.join(20)
    assert took < drain_s + 2 + BUSY
    by_force = "has not ended in time" in server.said.read_text()
    assert by_force or not stuck
    assert status == by_force
    assert answers == [(503, "engine_down")] * stuck
    assert not any(psutil.pid_exists(child.pid) for child in children)
