"""The engine in a process of its own: the same answers, and what becomes of all when one of the processes ends."""

import asyncio
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server import errors
from server.config import Settings
from server.engine.sequence import Event, Failed, SamplingParams
from server.engine.text_builder import Decoders
from server.engine_client import EngineRequest, Prompt
from server.engine_core import EngineCore
from server.process.client import ProcessClient
from server.process.host import listen
from server.process.messages import Error
from server.registry import Registry
from server.tokenizer import Decode
from server.types import CheckpointRef
from tests.server.conftest import World, event_lines, free_port, wait_until

pytestmark = pytest.mark.timeout(300)  # several processes start, and import all that they need
SERVE = ("server.cli", "serve")
FRONTS = 2
LONG = {"prompt": "a", "max_new_tokens": 90, "ignore_eos": True}
OWN = ("id", "created", "timing", "request_id")  # fields that differ between two answers to one request


@dataclass
class Processes:
    """A server of several processes."""

    supervisor: subprocess.Popen[str]
    url: str
    said: Path

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def children(self) -> list[psutil.Process]:
        """The engine and the fronts."""
        return [one for one in psutil.Process(self.supervisor.pid).children() if is_engine_or_front(one)]

    @property
    def engine(self) -> psutil.Process:
        (engine,) = (one for one in self.children() if not one.net_connections("tcp"))
        return engine

    def fronts(self) -> list[psutil.Process]:
        """Those that take connections."""
        return [one for one in self.children() if one.net_connections("tcp")]

    def front_of(self, local_port: int) -> psutil.Process:
        """The front that a client's connection is with."""
        (front,) = (
            one for one in self.children() for with_client in one.net_connections("tcp")
            if with_client.raddr and with_client.raddr.port == local_port
        )  # fmt: skip
        return front

    def metric(self, name: str, **labels: str) -> float:
        """As whichever front answers tells it."""
        text = httpx.get(f"{self.url}/metrics", timeout=60, trust_env=False).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return sum(one.value for one in samples if one.name == name and labels.items() <= one.labels.items())


def is_engine_or_front(process: psutil.Process) -> bool:
    """Of the supervisor's children that live: multiprocessing has one of its own."""
    try:
        return "resource_tracker" not in " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # or ended, and the supervisor does not know yet
        return False


@contextmanager
def started(
    settings: Settings, tmp_path: Path, *options: str, module: tuple[str, ...] = SERVE, **environment: str
) -> Iterator[Processes]:
    """A server, from its readiness to its end."""
    port, said = free_port(), tmp_path / "said"
    command = [sys.executable, "-m", *module, "--port", str(port), "--model", str(settings.model)]
    command += ["--checkpoints", str(settings.checkpoints), "--threads", "1", "--engine-process", "true", *options]
    with said.open("w") as stderr:
        process = subprocess.Popen(
            command, env=os.environ | {"MATSTEER_REMEMBER": "false"} | environment, stderr=stderr, text=True
        )
    made = Processes(process, f"http://127.0.0.1:{port}", said)
    try:
        wait_until(lambda: made.client.get("/readyz").status_code == 200, seconds=250)
        yield made
    finally:
        made.client.close()
        left = (
            [process.pid, *(child.pid for child in psutil.Process(process.pid).children())]
            if process.poll() is None
            else []
        )
        process.kill()
        process.wait(20)
        for pid in left[1:]:  # whoever is left sees that the supervisor is gone
            wait_until(lambda pid=pid: not psutil.pid_exists(pid))  # type: ignore[misc]


@pytest.fixture(scope="module")
def processes(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    folder = tmp_path_factory.mktemp("processes")
    options = "--front-workers", str(FRONTS), "--max-num-seqs", "2"
    with started(settings, folder, *options, MATSTEER_STUDIES=str(folder / "votes.db")) as made:
        yield made


def alike(one: Any, other: Any) -> bool:
    """Whether two answers are the same but for their own fields, and for the rounding of numbers."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(name in OWN or alike(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-4)
    return bool(one == other)


def events(text: str) -> list[Any]:
    """A stream's events, and the data of each, text by text: those of several mix."""
    found = re.findall(r"^(?:event: (\w+)\n)?data: (.*)$", text, re.MULTILINE)
    told = [[name, data if data == "[DONE]" else json.loads(data)] for name, data in found]
    return sorted(told[:-1], key=lambda event: _text(event[1])) + told[-1:]


def _text(data: Any) -> int:
    index: int = data["choices"][0]["index"] if data.get("choices") else data.get("index", 0)
    return index


PROMPT = "Q: What colour is the sky? A:"
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"temperature": 0, "max_new_tokens": 24}),
    ("/generate", {"prompt": [PROMPT, "a"], "n": 3, "seed": 5, "max_new_tokens": 24, "baseline": True}),
    ("/generate", {"seed": 2, "max_new_tokens": 12, "trace": True, "logprobs": 3, "ignore_eos": True}),
    ("/generate", {"attributes": {"kind": 1.5}, "checkpoint": "demo@1", "seed": 3, "max_new_tokens": 9}),
    ("/generate", {"attributes": {}, "seed": 3, "max_new_tokens": 0}),
    ("/compare", {"seed": 4, "max_new_tokens": 16, "arms": [{"name": "a", "attributes": {}}, {"name": "b"}]}),
    ("/score", {"continuations": [" The sky", " is green."], "attributes": {"true": 1}}),
    ("/v1/completions", {"model": "tiny", "echo": True, "logprobs": 2, "max_tokens": 5, "seed": 1}),
    ("/v1/chat/completions", {"model": "demo", "max_tokens": 9, "seed": 1, "logprobs": True, "top_logprobs": 2}),
    ("/v1/responses", {"model": "demo", "input": "a", "max_output_tokens": 9, "temperature": 0}),
    ("/tokenize", {}),
    ("/generate", {"checkpoint": "none"}),
    ("/generate", {"checkpoint": "damaged"}),
    ("/generate", {"attributes": {"nothing": 1}}),
    ("/generate", {"prompt": "a " * 200}),
    ("/generate", {"n": 64, "baseline": True, "max_new_tokens": 1, "checkpoint": "demo@2", "seed": 1}),
    ("/v1/completions", {"model": "no-such-model"}),
]


@pytest.mark.parametrize("number", range(len(BODIES)))
def test_answers_are_those_of_one_process(processes: Processes, world: World, number: int) -> None:
    path, more = BODIES[number]
    asked = {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": PROMPT}
    body = more if "input" in more else asked | more
    one, other = world.client.post(path, json=body), processes.client.post(path, json=body)
    assert other.status_code == one.status_code
    assert alike(other.json(), one.json()), (other.text, one.text)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
@pytest.mark.parametrize("more", [{}, {"logprobs": 2}, {"stop": ["e"]}, {"n": 3, "stop": ["o", "zz"], "min_tokens": 4}])
def test_streams_are_those_of_one_process(processes: Processes, world: World, path: str, more: dict[str, Any]) -> None:
    length = "max_tokens" if path.startswith("/v1") else "max_new_tokens"
    body = {"prompt": PROMPT, "seed": 7, length: 40, "stream": True, "ignore_eos": True, **more}
    if path.startswith("/v1"):
        body |= {"model": "demo"}
    one, other = (client.post(path, json=body) for client in (world.client, processes.client))
    assert other.status_code == one.status_code == 200
    assert alike(events(other.text), events(one.text)), (other.text, one.text)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_a_text_at_once_and_as_in_one_process(
    processes: Processes, world: World, stream: bool
) -> None:
    body = {"prompt": PROMPT, "seed": 11, "max_new_tokens": 80, "ignore_eos": True}
    whole = world.post(**body)["results"][0]
    stop = whole["text"][4:6]
    asked = {**body, "stop": [stop], "stream": stream, "trace": True}
    one, other = (client.post("/generate", json=asked).text for client in (world.client, processes.client))
    if stream:
        assert alike(events(other), events(one)), (other, one)
    else:
        assert alike(json.loads(other), json.loads(one)), (other, one)
    length = len(re.findall('"token_id"', other)) + len(PROMPT)

    def ends_early() -> bool:
        """The front has to find it in time, which it may be kept from."""
        before = processes.metric("matsteer_computed_tokens_total")
        processes.client.post("/generate", json=asked)
        wait_until(lambda: processes.metric("matsteer_num_requests_open") == 0)
        return processes.metric("matsteer_computed_tokens_total") - before < length

    wait_until(ends_early)


def test_what_one_front_changes_all_of_them_know(processes: Processes) -> None:
    def of_new_connection() -> str | None:
        with httpx.Client(base_url=processes.url, timeout=60, trust_env=False) as client:
            active: str | None = client.get("/checkpoints").json()["active"]
            assert client.get("/readyz").json()["checkpoint"] == active
            return active

    answers: list[httpx.Response] = []
    streams = [
        threading.Thread(target=lambda: answers.append(processes.client.post("/generate", json={**LONG, "n": 4})))
        for _ in range(4)
    ]
    for one in streams:
        one.start()
    for version in ("1", "2"):
        changed = processes.client.post("/checkpoints/demo/activate", json={"version": version})
        assert changed.status_code == 200, changed.text
        assert {of_new_connection() for _ in range(8)} == {f"demo@{version}"}
    for one in streams:
        one.join()
    assert [answer.status_code for answer in answers] == [200] * 4
    for answer in answers:
        (version,) = {result["steering"]["version"] for result in answer.json()["results"]}
    assert processes.client.post("/checkpoints/other/load").json()["name"] == "other"
    assert processes.client.delete("/checkpoints/other").json()["unloaded"] == ["other@1"]
    refused = processes.client.delete("/checkpoints/demo")
    assert (refused.status_code, refused.json()["error"]["type"]) == (409, "checkpoint_in_use")


def test_fronts_have_no_pytorch(processes: Processes) -> None:
    def loaded(process: psutil.Process) -> bool:
        return any("libtorch" in one.path for one in process.memory_maps())

    assert loaded(processes.engine)
    assert not any(map(loaded, processes.fronts()))


def test_every_front_tells_what_all_have_counted(processes: Processes) -> None:
    before = processes.metric("matsteer_http_requests_total", route="/tokenize")
    for _ in range(12):
        httpx.post(f"{processes.url}/tokenize", json={"prompt": "a"}, timeout=60, trust_env=False)

    def counted() -> float:
        return processes.metric("matsteer_http_requests_total", route="/tokenize") - before

    wait_until(lambda: counted() == 12)  # the last one is counted a moment after its answer
    assert {counted() for _ in range(6)} == {12}


def test_a_client_that_goes_ends_its_texts_in_the_engine(processes: Processes) -> None:
    with processes.client.stream("POST", "/generate", json={**LONG, "n": 120, "stream": True}) as told:
        lines = event_lines(told)
        next(lines)
        assert processes.metric("matsteer_num_requests_open") > 0
    wait_until(
        lambda: processes.metric("matsteer_num_requests_open") == 0 == processes.metric("matsteer_checkpoint_leases")
    )


@contextmanager
def streaming(
    processes: Processes, *, n: int = 120, not_of: int | None = None
) -> Iterator[tuple[Iterator[str], psutil.Process]]:
    """The lines of a stream of `n` texts that has begun, and the front that sends it, another one than `not_of`."""
    for _ in range(40):  # the system chooses, by the client's port
        with (
            httpx.Client(base_url=processes.url, timeout=60, trust_env=False) as client,
            client.stream("POST", "/generate", json={**LONG, "n": n, "stream": True}) as told,
        ):
            front = processes.front_of(told.extensions["network_stream"].get_extra_info("client_addr")[1])
            if front.pid != not_of:
                lines = event_lines(told)
                next(lines)
                yield lines, front
                return
    raise AssertionError("all connections are with one front")


def test_a_front_that_cannot_take_the_place_of_another_takes_nobody_along(processes: Processes) -> None:
    """It is started again until it can."""
    before, folder = len(processes.children()), processes.said.parent
    for file in folder.glob("votes.db*"):
        file.unlink()
    (folder / "votes.db").mkdir()
    with streaming(processes, n=6) as (lines, front):
        other = next(one for one in processes.fronts() if one.pid != front.pid)
        other.kill()
        wait_until(lambda: "cannot start: The studies file" in processes.said.read_text())
        assert "event: done" in lines
    for _ in range(8):
        assert httpx.post(f"{processes.url}/generate", json={"prompt": "a"}, timeout=60, trust_env=False).is_success
    (folder / "votes.db").rmdir()
    wait_until(lambda: len(processes.children()) == before and not psutil.pid_exists(other.pid))
    wait_until(lambda: len(processes.fronts()) == FRONTS)
    assert processes.supervisor.poll() is None


def test_a_front_that_is_killed_takes_nobody_along(processes: Processes) -> None:
    """Its texts end in the engine, another front takes its place, and the other goes on."""
    with streaming(processes) as (lines, front), streaming(processes, n=6, not_of=front.pid) as (others, other):
        engine, before = processes.engine, len(processes.children())
        front.kill()
        with pytest.raises(httpx.HTTPError):
            list(lines)
        assert "event: done" in others
    wait_until(lambda: len(processes.children()) == before and not psutil.pid_exists(front.pid))
    wait_until(lambda: len(processes.fronts()) == FRONTS)
    wait_until(
        lambda: processes.metric("matsteer_num_requests_open") == 0 == processes.metric("matsteer_checkpoint_leases")
    )
    assert processes.engine.pid == engine.pid
    assert psutil.pid_exists(other.pid)
    for _ in range(8):  # of whichever front
        assert httpx.post(f"{processes.url}/generate", json={"prompt": "a"}, timeout=60, trust_env=False).is_success
    assert "its requests with it: another one starts" in processes.said.read_text()


@pytest.mark.parametrize(("asked", "drain_s"), [(signal.SIGTERM, "20"), (signal.SIGINT, "0.2")])
def test_a_server_that_is_asked_to_end_drains(
    settings: Settings, tmp_path: Path, asked: signal.Signals, drain_s: str
) -> None:
    with started(settings, tmp_path, MATSTEER_DRAIN_S=drain_s, MATSTEER_MAX_NUM_SEQS="2") as server:
        body = {**LONG, "n": 120 if drain_s == "0.2" else 2, "stream": True}
        with server.client.stream("POST", "/generate", json=body) as told:
            lines = event_lines(told)
            next(lines)
            server.supervisor.send_signal(asked)
            if asked == signal.SIGINT:  # as a terminal does
                for child in server.children():
                    child.send_signal(asked)
            last = [line for line in lines if line][-2:]
        status, said = server.supervisor.wait(20), server.said.read_text()
    assert status == (drain_s == "0.2" and "has not ended in time" in said), said
    assert last[0] == ("event: error" if drain_s == "0.2" else "event: done")
    if drain_s == "0.2":
        assert json.loads(last[1].removeprefix("data: "))["error"]["type"] == "engine_down"
    assert "Traceback" not in server.said.read_text()


def test_an_engine_that_is_killed_ends_all_with_a_message(settings: Settings, tmp_path: Path) -> None:
    """Who waits and who reads a stream is told; a server that is started again goes on with what was active."""
    own = settings.model_copy(update={"checkpoints": shutil.copytree(settings.checkpoints, tmp_path / "checkpoints")})
    remember = {"MATSTEER_REMEMBER": "true"}
    with started(own, tmp_path, **remember) as server:
        assert server.client.post("/checkpoints/demo/activate", json={"version": "1"}).status_code == 200
        answers: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: answers.append(server.client.post("/generate", json={**LONG, "n": 120}))
        )
        with streaming(server) as (lines, _):
            asking.start()
            wait_until(lambda: server.metric("matsteer_num_requests_open") > 120)
            children = server.children()
            server.engine.kill()
            event, data = [line for line in lines if line][-2:]
        asking.join(20)
        assert server.supervisor.wait(20) == 1
        said = server.said.read_text()
    message = "The engine stopped: the engine's process has ended."
    assert [(answer.status_code, answer.json()["error"]["message"]) for answer in answers] == [(503, message)]
    error = json.loads(data.removeprefix("data: "))["error"]
    assert (event, error["type"], error["message"]) == ("event: error", "engine_down", message)
    assert "the engine's process has ended (killed by signal 9): the server ends" in said
    assert "Traceback" not in said
    assert not any(psutil.pid_exists(child.pid) for child in children)
    with started(own, tmp_path, "--engine-process", "false", **remember) as again:
        assert again.client.get("/readyz").json()["checkpoint"] == "demo@1"
        assert again.client.post("/generate", json={"prompt": "a", "max_new_tokens": 1}).status_code == 200


ORPHAN = """
import multiprocessing, threading, time
from pathlib import Path
from tqdm.auto import tqdm
from server.config import Settings
from server.process.workers import run_engine

def hold():  # as tqdm's own thread does for a moment
    with tqdm.get_lock():
        held.set()
        time.sleep(600)

held, bar = threading.Event(), tqdm(total=2)
threading.Thread(target=hold, daemon=True).start()
held.wait()
ours, theirs = multiprocessing.Pipe()
ours.close()
run_engine(theirs, Settings(model="/nowhere"), Path("engine"), lambda settings: None)
"""


def test_an_engine_whose_parent_has_gone_ends_whatever_its_threads_hold() -> None:
    ended = subprocess.run([sys.executable, "-c", ORPHAN], stderr=subprocess.PIPE, text=True, timeout=200)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr


def test_what_hinders_the_engine_is_one_sentence(settings: Settings, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server.cli", "serve", "--port", str(free_port()), "--engine-process", "true"]
    ended = subprocess.run([*command, "--model", str(tmp_path)], capture_output=True, text=True, timeout=280)
    assert ended.returncode == 1
    assert ended.stderr.startswith("matsteer: "), ended.stderr
    assert ended.stderr.count("\n") == 1


def test_an_error_is_the_same_on_the_other_side() -> None:
    for error in (
        errors.QueueFull("full", retry_after_s=3),
        errors.Refused("no", 415),
        errors.UnknownAttribute("none", param="attributes.x"),
        errors.StartupError("a sentence"),
    ):
        there = Error.of(error).to_exception()
        assert type(there) is type(error)
        assert vars(there) == vars(error)
        assert (str(there), there.headers) == (str(error), error.headers)


def test_several_fronts_need_an_engine_of_its_own() -> None:
    with pytest.raises(ValueError, match="front_workers is 2"):
        Settings(front_workers=2, engine_process="false")


@contextmanager
def path_for_socket() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:  # a short path: Unix sockets take no long ones
        yield Path(folder) / "engine"


@asynccontextmanager
async def connected(world: World, path: Path, decode: Decode) -> AsyncIterator[ProcessClient]:
    """A client of the world's engine, through a socket."""
    core = world.service.client
    assert isinstance(core, EngineCore)
    async with await listen(core, path):
        client = ProcessClient(path, core.facts, Decoders.of(decode))
        await client.connect()
        yield client
        await client.disconnect()


def request(name: str, *, checkpoint: str | None = None) -> EngineRequest:
    prompts = (Prompt((5, 6, 7), 1, 80), Prompt((8, 9), 2, 80))
    sampling = SamplingParams(ignore_eos=True)
    return EngineRequest(name, prompts, ((CheckpointRef(checkpoint),),), sampling, stream=True)


def test_tokens_that_are_no_text_fail_their_request_and_end_in_the_engine(world: World) -> None:
    calls = itertools.count()

    def decode(ids: Any) -> str:
        if next(calls) > 30:
            raise ValueError("no text")
        return "x" * len(ids)

    async def story(path: Path) -> list[Event]:
        told: list[Event] = []
        async with connected(world, path, decode) as client:
            await client.submit(request("undecodable"), told.append)
            while sum(isinstance(event, Failed) for event in told) < 2 or world.service.engine.open_sequences:
                await asyncio.sleep(0.01)
            client.close("undecodable")
            while world.service.registry.pins:
                await asyncio.sleep(0.01)
        return told

    with path_for_socket() as path:
        told = asyncio.run(asyncio.wait_for(story(path), 60))
    failed = [event for event in told if isinstance(event, Failed)]
    assert sorted(event.sequence.index for event in failed) == [0, 1], "one last event each"
    assert {event.error.type for event in failed} == {"generation_failed"}


def test_a_call_that_nobody_waits_for_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its checkpoint is being loaded, and when it has been taken."""
    world.client.delete("/checkpoints/other")
    loading, go_on = threading.Event(), threading.Event()
    load = Registry.load

    def slowly(self: Registry, *arguments: Any) -> Any:
        loading.set()
        go_on.wait(20)
        return load(self, *arguments)

    monkeypatch.setattr(Registry, "load", slowly)

    async def story(path: Path) -> None:
        async with connected(world, path, lambda ids: "x") as client:
            calls = [asyncio.create_task(client.submit(request("late", checkpoint="other"), lambda event: None))]
            assert await asyncio.to_thread(loading.wait, 20)
            calls += [
                asyncio.create_task(client.submit(request(f"gone-{number}"), lambda event: None)) for number in range(8)
            ]
            for number, call in enumerate(calls):
                await asyncio.sleep(0.002 * number)
                call.cancel()
            go_on.set()
            await asyncio.gather(*calls, return_exceptions=True)
            for number in range(8):
                client.close(f"gone-{number}")  # of a request that was taken before
                client.cancel(f"gone-{number}")
            while world.service.registry.pins or world.service.engine.open_sequences:
                await asyncio.sleep(0.01)
            assert not client._requests
            assert not client._replies

    with path_for_socket() as path:
        asyncio.run(asyncio.wait_for(story(path), 60))
