"""Faults of the whole server, each for real: whoever is concerned is told, and the next request is served.

Processes that are killed: `test_process.py`; what fails inside the engine: `test_faults.py`.
"""

import asyncio
import json
import math
import os
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.config import Settings
from tests.server.conftest import event_lines, free_port, wait_until
from tests.server.test_nginx import NGINX, nginx

ROOT = Path(__file__).parents[2]
KEY, LIMITED = "key-of-anybody", "key-with-a-limit"
KEYS = f'[anybody]\nkey = "{KEY}"\n[limited]\nkey = "{LIMITED}"\nrequests_per_minute = 2\n'
PROMPT = "Q: What colour is grass? A:"
LONG = {"prompt": PROMPT, "n": 64, "max_new_tokens": 80, "ignore_eos": True, "stream": True}
LONGER = {**LONG, "prompt": [PROMPT] * 4}  # for what is left, or stands still, before it is done
COPIES = 24
DEADLINE_S = 4
READS_ALL = 0b110  # the bits of CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, with which root reads what nobody may
VOTE = {
    "arms": [{"name": "baseline", "attributes": {}}, {"name": "kind", "attributes": {"kind": 1.0}}],
    "asked": {"prompt": "a"},
    "texts": ["one", "two"],
    "winner": 1,
    "shown_first": 0,
}
# The wall clock, moved by as many seconds as the file says that CLOCK names; other clocks are as they are.
CLOCK = """
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static volatile long *moved;
static long by(void) {
  if (!moved) moved = mmap(0, sizeof(long), PROT_READ, MAP_SHARED, open(getenv("CLOCK"), O_RDONLY), 0);
  return *moved;
}
int clock_gettime(clockid_t id, struct timespec *at) {
  int failed = syscall(SYS_clock_gettime, id, at);
  if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) at->tv_sec += by();
  return failed;
}
int gettimeofday(struct timeval *restrict at, void *restrict zone) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  at->tv_sec = now.tv_sec, at->tv_usec = now.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *at) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (at) *at = now.tv_sec;
  return now.tv_sec;
}
"""


@dataclass
class Server:
    """A server in a process of its own, whose log is in JSON."""

    process: "subprocess.Popen[str]"
    port: int
    folder: Path  # with `checkpoints` in it, the file `clock`, and the studies
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.url = f"http://127.0.0.1:{self.port}"
        self.headers = {"authorization": f"Bearer {KEY}"}
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False, headers=self.headers)
        self.checkpoints = self.folder / "checkpoints"
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)  # one after the other, as they come

    def said(self, words: str) -> bool:
        return any(words in line for line in self.lines)

    def requests(self, route: str, outcome: str) -> list[dict[str, Any]]:
        """The log's lines of such requests."""
        told = [json.loads(line) for line in self.lines if '"outcome"' in line]
        return [one for one in told if (one["route"], one["outcome"]) == (route, outcome)]

    def metric(self, name: str) -> float:
        found = re.search(rf"^matsteer_{name} (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        assert found, name
        return float(found[1])

    def text(self, **more: Any) -> str:
        """Of a request that has to be served, always with the same text."""
        body = {"prompt": PROMPT, "temperature": 0, "max_new_tokens": 8, "ignore_eos": True, **more}
        answer = self.client.post("/generate", json=body)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["results"][0]["text"]
        return text

    def refused(self, method: str, path: str, **body: Any) -> tuple[int, str, str]:
        answer = self.client.request(method, path, json=body or None)
        error = answer.json()["error"]
        return answer.status_code, error["type"], error["message"]

    def listed(self) -> dict[str, Any]:
        """GET /checkpoints: NAME@VERSION -> what it says."""
        answer = self.client.get("/checkpoints")
        assert answer.status_code == 200, answer.text
        return {f"{one['name']}@{one['version']}": one for one in answer.json()["checkpoints"]}

    def until_idle(self) -> None:
        """No text, no block and no checkpoint is held any more."""
        for name in ("num_requests_open", "kv_cache_blocks_used", "checkpoint_leases"):
            wait_until(lambda name=name: self.metric(name) == 0, 20)  # type: ignore[misc]

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """No file of the process can become longer: what a full disk is, but for the number of the error."""
        limits = resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            yield
        finally:
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, limits)

    def set_clock(self, seconds: int) -> None:
        """The wall clock says so much more than it is."""
        if not (self.folder / "clock.so").exists():
            pytest.skip("there is no C compiler (cc) to make a clock with")
        with (self.folder / "clock").open("r+b") as file:
            file.write(struct.pack("l", seconds))


@contextmanager
def started(settings: Settings, folder: Path, **environment: str) -> Iterator[Server]:
    """A server of its own folder of checkpoints, from its readiness to its end."""
    assert settings.checkpoints is not None
    if not (checkpoints := folder / "checkpoints").exists():
        shutil.copytree(settings.checkpoints, checkpoints)
    (folder / "clock").write_bytes(struct.pack("l", 0))
    (folder / "keys.toml").write_text(KEYS)
    clock = folder / "clock.so"
    if compiler := shutil.which("cc"):
        subprocess.run([compiler, "-shared", "-fPIC", "-o", clock, "-x", "c", "-"], input=CLOCK, text=True, check=True)
        environment |= {"LD_PRELOAD": str(clock), "CLOCK": str(folder / "clock")}
    port = free_port()
    command = [sys.executable, "-m", "server.cli", "serve", "--port", str(port), "--model", str(settings.model)]
    ordinary = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]  # before files, whoever this is
    if shutil.which("setpriv") and subprocess.run([*ordinary, "true"], capture_output=True).returncode == 0:
        command = [*ordinary, *command]
    options = {
        "CHECKPOINTS": str(checkpoints),
        "THREADS": "1",
        "LOG_FORMAT": "json",
        "STUDIES": str(folder / "studies.db"),
        "API_KEYS_FILE": str(folder / "keys.toml"),
    }
    environment = {f"MATSTEER_{name}": value for name, value in options.items()} | environment
    process = subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    made = Server(process, port, folder)
    try:
        wait_until(lambda: made.client.get("/readyz").status_code == 200, 100)
        yield made
    finally:
        made.client.close()
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(30)
        made._reader.join(10)
        assert process.stderr is not None
        process.stderr.close()


@pytest.fixture(scope="module")
def server(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with started(settings, tmp_path_factory.mktemp("whole")) as made:
        yield made
        assert [line for line in made.lines if "Traceback" in line] == []
        made.until_idle()


# --- a full disk ---


def test_a_full_disk_keeps_no_change_from_being_made(server: Server) -> None:
    """Only a restart would not know of it, which the log says; the next change is kept again."""
    state = server.checkpoints / ".served.json"
    server.client.post("/checkpoints/demo/activate", json={"version": "1"})
    kept = state.read_text()
    with server.full_disk():
        changed = server.client.post("/checkpoints/demo/activate", json={"version": "2"})
        assert (changed.status_code, changed.json()["version"]) == (200, "2")
        assert server.client.get("/readyz").json()["checkpoint"] == "demo@2"
        server.text()
        assert state.read_text() == kept, "half a file would be none"
    wait_until(lambda: server.said("what is served will not be restored after a restart"))
    assert server.client.post("/checkpoints/other/load").status_code == 200
    assert (json.loads(state.read_text())["active"], "other@1" in state.read_text()) == ("demo@2", True)
    assert sorted(server.checkpoints.glob(".*")) == [state]


def test_a_vote_that_cannot_be_written_is_refused_and_counts_when_it_is_sent_again(server: Server) -> None:
    def vote(number: int) -> dict[str, Any]:
        return {**VOTE, "id": f"vote-{number:04}"}

    path = "/studies/full/votes"
    assert server.client.post(path, json=vote(1)).json()["votes"] == 1
    with server.full_disk():
        for _ in range(2):
            status, kind, message = server.refused("POST", path, **vote(2))
            assert (status, kind) == (503, "storage_failed")
            assert message.startswith("The server's file of studies cannot be used: ")
        assert server.client.get("/studies").json()["studies"][0]["votes"] == 1, "what is there can be read"
        server.text()
    assert server.client.post(path, json=vote(2)).json()["votes"] == 2
    assert server.client.get("/studies/full/votes.csv").text.count("vote-000") == 2
    wait_until(lambda: server.said("the studies file (MATSTEER_STUDIES) cannot be used"))


FULL = """
import sys
from pathlib import Path
from server.errors import StorageFailed
from server.process.counting import count_together, reserve_files
from server.registry_state import RegistryState, read_state, write_state
from server.studies import Studies, Vote

def vote(number):
    arms = {"name": "a"}, {"name": "b"}
    return Vote(f"vote-{number:04}", arms, {}, ("x" * 2000, "y"), winner=1, shown_first=0)

folder = Path(sys.argv[1])
count_together(folder / "metrics")
reserve_files()
from prometheus_client import Counter
counter = Counter("some", "of many series", ["which"])
studies, number = Studies(folder / "studies.db"), 0
old, new = RegistryState("tiny", "a@1"), RegistryState("tiny", "b@2")
write_state(folder, old)
fillers = folder / "filler", folder / "rest"
fillers[0].write_bytes(b"x" * 2**18)
try:
    while True:
        studies.add("s", vote(number))
        number += 1
except StorageFailed as error:
    assert error.message.endswith("database or disk is full."), error.message
try:
    fillers[1].write_bytes(b"x" * 2**20)
except OSError:
    pass
write_state(folder, new)
assert read_state(folder, "tiny") == old
for series in range(3000):
    counter.labels(str(series)).inc()  # in a file that is mapped: where there is no space, this ends the process
assert studies.tally("s").votes == number > 3
for filler in fillers:
    filler.unlink()
write_state(folder, new)
assert read_state(folder, "tiny") == new
assert studies.add("s", vote(number)).votes == number + 1
"""


def on_a_disk_of(size: str, folder: Path) -> list[str]:
    """Before a command: one in memory is mounted at `folder`, for its process alone."""
    as_root = [] if os.getuid() == 0 else ["--user", "--map-root-user"]
    mount = f'mount -t tmpfs -o size={size} none "$1" || exit 77; shift; exec "$@"'
    inside = ["unshare", *as_root, "--mount", "sh", "-c", mount, "sh", str(folder)]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    return inside


def test_a_file_system_without_space_is_survived(tmp_path: Path) -> None:
    command = [*on_a_disk_of("3m", tmp_path), sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "what is served will not be restored" in done.stderr


@pytest.mark.timeout(300)  # several processes start
def test_fronts_without_space_to_count_in_do_not_start(settings: Settings, tmp_path: Path) -> None:
    command = [*on_a_disk_of("1m", tmp_path), sys.executable, "-m", "server.cli", "serve", "--front-workers", "2"]
    options = ["--port", str(free_port()), "--model", str(settings.model), "--checkpoints", str(settings.checkpoints)]
    environment = os.environ | {"TMPDIR": str(tmp_path), "MATSTEER_THREADS": "1", "MATSTEER_REMEMBER": "false"}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    (said,) = (line for line in done.stderr.splitlines() if "There is no space" in line)
    assert re.search(rf"There is no space for metrics in {tmp_path}/\S+/metrics \(TMPDIR\): No space left", said)
    assert "Traceback" not in done.stderr


# --- folders of checkpoints ---


def test_a_folder_that_goes_while_it_is_loaded_serves_on_and_is_told_of(server: Server, tmp_path: Path) -> None:
    before = server.text(checkpoint="other")
    away = shutil.move(server.checkpoints / "other", tmp_path / "away")
    assert server.text(checkpoint="other") == before
    told = server.listed()["other@1"]
    assert (told["loaded"], told["reason"][:18]) == (True, "Its folder is gone")
    assert server.client.get("/checkpoints/other").status_code == 200
    assert server.refused("POST", "/checkpoints/other/load")[:2] == (404, "unknown_checkpoint")
    assert server.text(checkpoint="other") == before, "what cannot be loaded again stays as it was"
    assert server.client.delete("/checkpoints/other").json()["unloaded"] == ["other@1"]
    body = {"prompt": "a", "checkpoint": "other"}
    assert server.refused("POST", "/generate", **body)[:2] == (404, "unknown_checkpoint")
    shutil.move(away, server.checkpoints / "other")
    assert server.text(checkpoint="other") == before


@pytest.mark.parametrize("what", ["shut/1", "shut/1/config.json", "shut/1/steering.safetensors", "shut", "."])
def test_what_may_not_be_read_is_said_and_can_be_loaded_when_it_may(server: Server, what: str) -> None:
    capabilities = re.search(r"CapEff:\s*(\w+)", Path(f"/proc/{server.process.pid}/status").read_text())
    if capabilities and int(capabilities[1], 16) & READS_ALL:
        pytest.skip("this user reads everything, and there is no setpriv to change that")
    folder, place = (
        shutil.copytree(server.checkpoints / "other", server.checkpoints / "shut"),
        server.checkpoints / what,
    )
    mode = place.stat().st_mode
    place.chmod(0)
    try:
        for method, path, body in (
            ("POST", "/generate", {"prompt": "a", "checkpoint": "shut"}),
            ("POST", "/checkpoints/shut/load", {}),
        ):
            status, kind, message = server.refused(method, path, **body)
            assert (status, kind) == (409, "unusable_checkpoint")
            assert "cannot be read: Permission denied" in message
            assert str(server.checkpoints) not in message
        listed = server.listed()
        assert ("Permission denied" in listed["shut@1"]["reason"]) if "/" in what else "shut@1" not in listed
        server.text()
    finally:
        place.chmod(mode)
    assert server.text(checkpoint="shut") == server.text(checkpoint="other")
    server.client.delete("/checkpoints/shut")
    shutil.rmtree(folder)


@pytest.mark.parametrize("what", ["other/1", "other", "other/1/steering.safetensors"])
def test_what_is_no_folder_any_more_is_no_checkpoint(server: Server, tmp_path: Path, what: str) -> None:
    before, place = server.text(checkpoint="other"), server.checkpoints / what
    server.client.delete("/checkpoints/other")
    away = shutil.move(place, tmp_path / "away")
    if what.endswith("tensors"):
        place.mkdir()
    else:
        place.write_text("a file")
    expected = (409, "unusable_checkpoint") if what.endswith("tensors") else (404, "unknown_checkpoint")
    assert server.refused("POST", "/generate", prompt="a", checkpoint="other")[:2] == expected
    server.listed()
    place.rmdir() if what.endswith("tensors") else place.unlink()
    shutil.move(away, place)
    assert server.text(checkpoint="other") == before


def test_a_folder_that_comes_and_goes_at_any_moment_is_there_or_is_not(server: Server, tmp_path: Path) -> None:
    """Between the look for it, its list and its files: everybody is told what there is, and nothing fails."""
    over, place, seen = threading.Event(), server.checkpoints / "coming", Counter[tuple[str, int]]()

    def come_and_go() -> None:
        while not over.is_set():
            shutil.copytree(server.checkpoints / "other", place)
            time.sleep(0.002)
            shutil.rmtree(place)
            time.sleep(0.001)

    def both() -> bool:
        return all(seen["/checkpoints/coming/load", status] for status in (200, 404))

    async def ask(client: httpx.AsyncClient, began: float) -> None:
        body = {"prompt": "a", "max_new_tokens": 1, "checkpoint": "coming@1"}
        while time.monotonic() - began < (1.5 if both() else 60):
            for method, path, sent in (
                ("GET", "/checkpoints", None),
                ("POST", "/checkpoints/coming/load", {"version": "1"}),
                ("POST", "/generate", body),
                ("DELETE", "/checkpoints/coming", None),
            ):
                seen[path, (await client.request(method, path, json=sent)).status_code] += 1

    async def story() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, headers=server.headers) as client:
            await asyncio.gather(*(ask(client, time.monotonic()) for _ in range(6)))

    changing = threading.Thread(target=come_and_go)
    changing.start()
    try:
        asyncio.run(story())
    finally:
        over.set()
        changing.join()
    statuses = {status for _, status in seen}
    assert statuses <= {200, 404, 409}, seen
    assert both(), seen
    assert {status for path, status in seen if path == "/checkpoints"} == {200}
    server.client.delete("/checkpoints/coming")


# --- many loads at once ---


def test_200_loads_at_once_are_each_told_the_truth_and_change_no_text(server: Server) -> None:
    names = [f"copy-{number}" for number in range(COPIES)]
    for name in names:
        shutil.copytree(server.checkpoints / "other", server.checkpoints / name)
    sound = [*(("other", "1"), ("demo", "1"), ("demo", "2")) * 24, *((name, "1") for name in names * 3)]
    expected = {("damaged", "1"): 409, ("foreign", "1"): 409, ("nobody", "1"): 404}
    loads = [*sound, *list(expected) * 19]
    versions = ("demo@1", "demo@2", "other@1")
    texts = {version: server.text(checkpoint=version, max_new_tokens=40) for version in versions}

    async def story() -> tuple[list[tuple[tuple[str, str], int]], list[tuple[str, str]]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits, headers=server.headers) as client:

            async def load(name: str, version: str) -> tuple[tuple[str, str], int]:
                answer = await client.post(f"/checkpoints/{name}/load", json={"version": version})
                return (name, version), answer.status_code

            async def text(version: str) -> tuple[str, str]:
                body = {"prompt": PROMPT, "temperature": 0, "max_new_tokens": 40, "ignore_eos": True}
                answer = await client.post("/generate", json={**body, "checkpoint": version})
                assert answer.status_code == 200, answer.text
                return version, answer.json()["results"][0]["text"]

            generated = [asyncio.create_task(text(version)) for version in versions * 4]
            loaded = await asyncio.gather(*(load(*one) for one in loads))
            return loaded, await asyncio.gather(*generated)

    assert len(loads) > 200
    loaded, generated = asyncio.run(story())
    assert [one for one in loaded if one[1] != expected.get(one[0], 200)] == []
    assert [version for version, text in generated if text != texts[version]] == []
    assert server.text(checkpoint="copy-0", max_new_tokens=40) == texts["other@1"]
    assert sum(one["loaded"] for one in server.listed().values()) == COPIES + 3
    for name in names:
        server.client.delete(f"/checkpoints/{name}")
        shutil.rmtree(server.checkpoints / name)


# --- a clock that jumps ---


@pytest.mark.parametrize("seconds", [86_400, -86_400])
def test_a_clock_that_jumps_moves_no_limit_and_no_duration(server: Server, seconds: int) -> None:
    def ask() -> httpx.Response:
        limited = {"authorization": f"Bearer {LIMITED}"}
        return server.client.post("/tokenize", json={"prompt": "a"}, headers=limited)

    def ended() -> list[dict[str, Any]]:
        return [*server.requests("/generate", "client_gone"), *server.requests("/generate", "ok")]

    before = len(ended())
    # Of a minute's two requests those that are left, and the next one is not due before the clock has jumped.
    while (answer := ask()).status_code != 429 or int(answer.headers["retry-after"]) < 15:
        time.sleep(0.01)
    over = threading.Event()

    def jump() -> None:
        while not over.is_set():
            server.set_clock(seconds)
            time.sleep(0.001)
            server.set_clock(0)
            time.sleep(0.001)

    jumping = threading.Thread(target=jump)
    try:
        with server.client.stream("POST", "/generate", json=LONG) as told:
            each = event_lines(told)
            next(each)
            server.set_clock(seconds)
            refused = ask()
            assert (refused.status_code, 0 < int(refused.headers["retry-after"]) <= 30) == (429, True)
            created = server.client.post("/generate", json={"prompt": "a", "max_new_tokens": 1}).json()["created"]
            assert abs(created - time.time() - seconds) < 60, "it is the server's clock that has jumped"
            assert server.client.get("/readyz").status_code == 200
            jumping.start()
            for _ in range(5):
                with server.client.stream("POST", "/generate", json=LONG) as left:
                    next(event_lines(left))
            rest = list(each)
    finally:
        over.set()
        jumping.join()
        server.set_clock(0)
    assert "event: done" in rest
    timing = json.loads(rest[rest.index("event: done") + 1].removeprefix("data: "))["results"][0]["timing"]
    assert 0 <= timing["queue_ms"] <= timing["ttft_ms"] <= timing["total_ms"] < 60_000
    wait_until(lambda: len(ended()) >= before + 7)
    for line in ended():
        assert 0 <= line.get("ttft_ms", 0) <= line["total_ms"] < 60_000, line
    for name in ("e2e_request_latency", "time_to_first_token", "request_queue_time"):
        assert 0 <= server.metric(f"{name}_seconds_sum") < 3600


@pytest.fixture(scope="module")
def second(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Another server, on which no request may take long."""
    more = {"DEADLINE_S": str(DEADLINE_S), "QUEUE_LIMIT": "2048", "MAX_REQUEST_ROWS": "1024"}
    folder = tmp_path_factory.mktemp("second")
    with started(settings, folder, **{f"MATSTEER_{name}": value for name, value in more.items()}) as made:
        yield made


def test_a_deadline_comes_when_it_is_due_though_the_clock_goes_back(second: Server) -> None:
    began, answers = time.monotonic(), []
    body = {**LONG, "prompt": ["a"] * 8, "n": 128, "stream": False}
    asking = threading.Thread(target=lambda: answers.append(second.client.post("/generate", json=body)))
    asking.start()
    wait_until(lambda: second.metric("num_requests_running") > 0)
    try:
        second.set_clock(-86_400)
        asking.join(30)
    finally:
        second.set_clock(0)
    assert DEADLINE_S <= time.monotonic() - began < 4 * DEADLINE_S
    assert [(one.status_code, one.json()["error"]["type"]) for one in answers] == [(504, "deadline_exceeded")]
    second.until_idle()


# --- what lies between a client and the server ---


class CuttingProxy:
    """Passes on what a client and the server say to each other, and cuts both off after so many bytes of one of them,
    or when it is told to."""

    def __init__(self, server: Server, *, sent: float, received: float, reset: bool) -> None:
        self._server, self._sent, self._received, self._reset = server, sent, received, reset
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        """One client."""
        address = ("127.0.0.1", self._server.port)
        with self._listener, self._listener.accept()[0] as client, socket.create_connection(address) as upstream:
            self._pass_on({client: (upstream, self._sent), upstream: (client, self._received)})
            if self._reset:
                for one in (client, upstream):
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _pass_on(self, ends: dict[socket.socket, tuple[socket.socket, float]]) -> None:
        while not self.cut.is_set():
            for source in select.select(list(ends), [], [], 0.02)[0]:
                target, left = ends[source]
                if not (data := source.recv(int(min(left, 4096)))):
                    return
                target.sendall(data)
                ends[source] = target, left - len(data)
                if left == len(data):
                    return

    def join(self) -> None:
        self._thread.join(20)
        assert not self._thread.is_alive()


@pytest.mark.parametrize("reset", [False, True], ids=["closes", "resets"])
@pytest.mark.parametrize(
    ("sent", "received"),
    [(math.inf, 9000), (math.inf, 100), (math.inf, math.inf), (700, math.inf)],
    ids=["in a stream", "in its headers", "before an answer", "in a body"],
)
def test_what_a_proxy_cuts_is_freed(server: Server, sent: float, received: float, reset: bool) -> None:
    before = len(server.requests("/generate", "client_gone"))
    proxy = CuttingProxy(server, sent=sent, received=received, reset=reset)
    told_to = sent == received
    body = {**LONGER, "stream": not told_to, "logit_bias": {str(token): 0.0 for token in range(100)}}
    failed = []

    def ask() -> None:
        try:
            httpx.post(f"{proxy.url}/generate", json=body, timeout=30, trust_env=False, headers=server.headers)
        except httpx.TransportError as error:
            failed.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    if told_to:
        wait_until(lambda: server.metric("num_requests_running") > 0)
        proxy.cut.set()
    asking.join(30)
    proxy.join()
    assert len(failed) == 1
    server.until_idle()
    wait_until(lambda: len(server.requests("/generate", "client_gone")) == before + 1)
    server.text()


# --- a server that is slow ---


@pytest.mark.skipif(NGINX is None, reason="there is no nginx (Debian: apt-get install nginx)")
def test_one_of_two_servers_that_stands_still_delays_only_what_it_has(
    server: Server, second: Server, tmp_path: Path
) -> None:
    """Behind nginx with the site of deploy/: the other one gets what comes, and what the first has is answered late."""
    short = {"prompt": "a", "max_new_tokens": 4}
    both = ("keepalive 64;", f"server 127.0.0.1:{second.port}; keepalive 64;")
    with nginx(tmp_path, f"{server.url} weight=100", both) as (_, url, certificate):
        verify = ssl.create_default_context(cafile=certificate)
        with httpx.Client(base_url=url, verify=verify, timeout=60, headers=server.headers) as client:
            wait_until(lambda: client.get("/readyz").status_code == 200)
            with client.stream("POST", "/generate", json=LONGER) as told:  # by its weight to the first
                each = event_lines(told)
                next(each)
                server.process.send_signal(signal.SIGSTOP)
                try:
                    assert {client.post("/generate", json=short).status_code for _ in range(12)} == {200}
                finally:
                    server.process.send_signal(signal.SIGCONT)
                assert "event: done" in list(each)
            assert {client.post("/generate", json=short).status_code for _ in range(4)} == {200}
    assert server.client.get("/readyz").status_code == 200
    assert server.text() == second.text()
