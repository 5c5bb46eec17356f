"""The check of a GPU, on a CPU at a tiny shape: every part, and what becomes of parts that are lost."""

import ast
import asyncio
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI, Request, Response

from benchmarks.contenders import Ours
from benchmarks.gpu import over_http
from benchmarks.gpu.__main__ import main, measure
from benchmarks.gpu.checks import engine, kept, told
from benchmarks.gpu.clients import Clients
from benchmarks.gpu.drive import prompts, step_beside, step_seconds, streamed
from benchmarks.gpu.figures import Figure, Report
from benchmarks.gpu.plan import FULL, PARTS, Part
from benchmarks.gpu.worker import Options, PartFailed, Skipped, Worker, named
from benchmarks.gpu.world import World
from benchmarks.processes import Running
from benchmarks.workload import llama
from server.app import create_app
from server.config import PREFIX, Settings
from server.engine.cuda_graphs import CudaGraphs, capture_sizes
from steer_ops import PAGED_ATTENTION_DECODE
from tests.benchmarks import light_parts
from tests.server.conftest import listening, wait_until

ROOT = Path(__file__).parents[2]
COMPILED = PAGED_ATTENTION_DECODE.has_kernel(torch.device("cpu"), torch.float32)
needs_kernel = pytest.mark.skipif(not COMPILED, reason="nothing can be compiled here")
# What each part says at least, and whether something is wanted of it.
FIGURES = {
    "rates": {
        "a large copy, read and written": False,
        "a large product": False,
        "attention of 64 tokens, Triton's against Flash": False,
    },
    "engine": {
        "operations with a kernel": True,
        "of the attention, in the model's own sizes": True,
        "layers left as they were": True,
        "CUDA graphs": True,
        "captures and first steps": False,
    },
    "decode": {"1 x 16, of the floor": True, "4 x 48, of the floor": False},
    "prefill": {"32 tokens in one step, of the matrix rate": False, "64 tokens in one step, of the matrix rate": True},
    "steering": {
        "1 rows steered, against no column": True,
        "4 rows steered, against no column": True,
        "8 configurations against 1": True,
    },
    "arms": {
        "a second arm beside one, 1 A/B": True,
        "a second arm beside one, 2 A/B": True,
        "3 arms over 100 tokens, against one": False,
        "3 arms over 100 tokens, the last one's first token": False,
    },
    "mixed": {
        "4 x 128 beside a prompt of 8 tokens, against alone": True,
        "1 x 200 beside a prompt of 8 tokens, against alone": False,
    },
    "waiting": {"first token behind 200 tokens, p50": False},
    "arrivals": {
        "requests at once": False,
        "at 80% of that, first token, p50": False,
        "at 80% of that, first token, p99": False,
        "at 80% of that, between tokens, p50": False,
        "at 80% of that, between tokens, p99": False,
        "at 80% of that, between tokens, p99 against a step": True,
    },
    "memory": {"a token held in the cache": False},
    "generate": {
        "transformers.generate, 1 rows: the engine is faster": True,
        "transformers.generate, 2 rows: the engine is faster": True,
    },
    "extraction": {"activations of TruthfulQA-sized data": False},
    "fit": {"a fit of MAT-Steer, an epoch": False},
    "http": {
        "the first request against the next nine": True,
        "1 clients, of the engine alone": False,
        "2 clients, of the engine alone": True,
        "2 clients, 2 fronts, of the engine alone": False,
    },
    "parallel": {
        "1 clients, 2 processes against 1": False,
        "2 clients, 2 processes against 1": False,
        "greedy texts of 2 processes like those of 1": False,
    },
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("scratch")
    world = World(Options("cpu", "tiny", folder, folder / "log"))
    yield world
    world.release("steered", "plain", "model")


async def stop(app: FastAPI) -> None:
    async with app.router.lifespan_context(app):
        pass


cached: list[float] = []  # of each server that has ended: tokens of prompts that it did not have to read


@contextmanager
def served_here(command: Sequence[str], *, environment: Mapping[str, str], timeout: float) -> Iterator[Running]:
    """The same server, in this process."""
    assert command[1:] == ["-m", "server.cli", "serve"]
    settings: Any = {name.removeprefix(PREFIX).lower(): value for name, value in environment.items()}
    app = create_app(Settings(**settings, threads=1))
    try:
        with listening(app) as url:
            yield Running(url, 0)
            told = httpx.get(f"{url}/metrics", timeout=60).text
            cached.append(float(re.findall(r"^\S*prefix_cache_hits\S* (\S+)$", told, re.MULTILINE)[0]))
    finally:
        asyncio.run(stop(app))


@pytest.mark.timeout(300)  # servers start, of several processes
@pytest.mark.parametrize("part", FIGURES)
def test_a_part_measures_what_the_plan_says(part: str, tiny: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(over_http, "running", served_here)
    monkeypatch.setattr("os.cpu_count", lambda: 4)  # clients in two processes
    cached.clear()
    found = list(named(PARTS[part].function)(tiny))
    assert {one.name: bool(one.wanted) for one in found} == FIGURES[part]
    assert all(math.isfinite(one.value) for one in found), found
    assert all(one.value > 0 for one in found if part not in ("engine", "steering", "arms", "mixed")), found
    if part == "http":
        assert cached == [0, 0], "the engine alone reads every prompt, too"
    if part == "parallel":
        assert found[-1].value == 100, "in float32 no token is decided by rounding"


def test_every_part_of_the_plan_is_tried_here() -> None:
    assert set(PARTS) == {*FIGURES, "tests", "pyvene"}
    assert all(callable(named(part.function)) for part in PARTS.values())


@pytest.mark.skipif(find_spec("pyvene") is not None, reason="pyvene is installed")
def test_pyvene_is_skipped_where_it_is_not_installed(tiny: World) -> None:
    with pytest.raises(Skipped, match="pyvene is not installed"):
        list(named(PARTS["pyvene"].function)(tiny))


def test_the_machine_is_described(tiny: World) -> None:
    assert {"device", "model", "torch", "transformers", "processor", "command"} <= set(tiny.described())


def test_what_is_wanted_does_not_wait_for_what_is_only_told() -> None:
    wanted = [part for part in PARTS if part in ("tests", "pyvene") or any(FIGURES[part].values())]
    told = [part for part in PARTS if part not in wanted]
    assert [*PARTS] == ["tests", "rates", *wanted[1:], *(part for part in told if part != "rates")]


@needs_kernel
def test_kernels_and_layers_that_are_not_used_are_seen(tiny: World) -> None:
    found = {one.name: one for one in engine(tiny)}
    assert found["of the attention, in the model's own sizes"].note == "without: write, gather, copy, varlen, prefill"
    assert found["layers left as they were"].note == "2 LlamaDecoderLayer", "CPUs have no kernel for the addition"
    model = llama("tiny", tiny.dtype)
    assert kept(model) == {"LlamaDecoderLayer": 2, "LlamaAttention": 2, "LlamaMLP": 2, "LlamaRMSNorm": 5}


@needs_kernel
def test_graphs_that_are_given_up_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Ours("tiny", torch.float32, 2)
    ours.close()
    runner = ours.runner
    for gives_up in (False, True):
        if gives_up:
            monkeypatch.setattr(CudaGraphs, "_record", lambda graphs, metadata: 1 / 0)
        runner.allocate(16, 16, graph_rows=8)
        runner.capture_graphs()
        assert runner.num_graphs == (0 if gives_up else len(capture_sizes(8)))


def test_the_full_sizes_fit_into_the_cache_and_the_context() -> None:
    for rows, context, _ in FULL.decode:
        assert rows <= FULL.rows
        assert context + FULL.new // 2 <= FULL.context
        assert rows * (context + FULL.new) <= FULL.cache
    assert FULL.arm_prompt + FULL.arms * FULL.new <= FULL.cache
    assert FULL.long <= FULL.context
    assert max(tokens for tokens, _ in FULL.prompts) <= FULL.step


# --- parts that are lost ----------------------------------------------------------------------------


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options("cpu", "tiny", tmp_path, tmp_path / "log", world="tests.benchmarks.light_parts:World")


def run(worker: Worker, name: str, seen: Callable[[], None] = lambda: None) -> tuple[list[float], str]:
    """The values of a part's figures, and why it failed. `seen` is called after each figure."""
    values: list[float] = []
    try:
        for figure in worker.figures(f"tests.benchmarks.light_parts:{name}", 60):
            values.append(figure.value)
            seen()
    except PartFailed as failed:
        return values, str(failed)
    return values, ""


def test_a_part_that_crashes_hangs_or_fails_loses_itself_alone(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[float] = []

    def hangs() -> None:
        """Its time is up in a moment, and its process is left alone until it has said where it is."""
        passed.append(59.9)

    def dumped(seconds: float) -> None:
        wait_until(lambda: 'light_parts.py", line' in options.log.read_text().rpartition(":hang")[2])

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(passed), sleep=dumped)
    monkeypatch.setattr("benchmarks.gpu.worker.time", clock)
    with Worker(options) as worker:
        assert run(worker, "count") == ([1], "")
        first = worker.machine
        assert run(worker, "count") == ([2], ""), "parts share what was made before"
        assert run(worker, "crash") == ([1], "its process was ended by SIGABRT")
        assert run(worker, "count") == ([1], "")
        assert worker.machine != first
        assert run(worker, "fail") == ([1], "ValueError: the device is gone")
        assert run(worker, "count") == ([1], "")
        assert run(worker, "hang", hangs) == ([1], "it took longer than 60 s; the log says where it was")
        assert run(worker, "count") == ([1], "")
    log = options.log.read_text()
    assert "seen in the log" in log
    assert "ValueError: the device is gone" in log
    assert 'light_parts.py", line' in log.split(":hang")[1], "where it was"


def test_a_part_that_cannot_be_measured_leaves_its_process_alone(options: Options) -> None:
    with Worker(options) as worker:
        run(worker, "count")
        with pytest.raises(Skipped, match="nothing to measure"):
            run(worker, "skip")
        with pytest.raises(Skipped, match="no_such_package is not installed"):
            run(worker, "lacking")
        assert run(worker, "count") == ([2], "")


@pytest.mark.parametrize("name", ["lacking_late", "lacking_ours", "lacking_inside"])
def test_a_part_that_lacks_something_else_than_a_package_fails(options: Options, name: str) -> None:
    with Worker(options) as worker:
        assert "No module named" in run(worker, name)[1]


def test_a_process_that_dies_between_two_parts_is_replaced(options: Options) -> None:
    with Worker(options) as worker:
        assert run(worker, "count") == ([1], "")
        assert worker._process is not None
        worker._process.kill()
        worker._process.join()
        assert run(worker, "count") == ([1], "")


def test_whatever_one_part_does_the_next_one_is_measured(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("broken", "count"):
        monkeypatch.setitem(PARTS, name, Part(f"tests.benchmarks.light_parts:{name}", 60, ""))
    report = Report(options.scratch / "out", judged=True)
    with Worker(options) as worker:
        for name in ("broken", "count"):
            measure(name, worker, report, end=math.inf)
    assert report.troubles == {"broken": "ValueError: nobody can read this"}
    assert [(part, one.name) for part, one in report.figures] == [("count", "asked")]


def test_nothing_is_skipped_because_nothing_can_be_measured(options: Options) -> None:
    with Worker(replace(options, world="tests.benchmarks.light_parts:Lacking")) as worker:
        assert run(worker, "count") == ([], "ModuleNotFoundError: No module named 'no_such_package'")


def test_what_came_before_a_failure_is_written(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS, "crash", Part("tests.benchmarks.light_parts:crash", 60, ""))
    monkeypatch.setitem(PARTS, "late", Part("tests.benchmarks.light_parts:count", 60, ""))
    report = Report(options.scratch / "out", judged=True)
    with Worker(options) as worker:
        measure("crash", worker, report, end=math.inf)
        measure("late", worker, report, end=0.0)
    report.write()
    written = json.loads((options.scratch / "out.json").read_text())
    assert [(one["part"], one["name"], one["value"]) for one in written["figures"]] == [("crash", "before", 1)]
    assert written["failed"] == {"crash": "its process was ended by SIGABRT", "late": "no time was left"}


# --- the table --------------------------------------------------------------------------------------


def test_figures_are_judged_where_something_is_wanted(tmp_path: Path) -> None:
    report = Report(tmp_path / "gpu", True, frozenset({"pyvene"}), machine={"device": "a card"})
    report.add("decode", Figure("a", 81.23, "%", at_least=80))
    report.add("decode", Figure("b", 79.9, "%", at_least=80))
    report.add("steering", Figure("c", -0.4, "%", "a | b", at_most=2))
    report.add("steering", Figure("d", math.nan, "%", at_most=2))
    report.add("rates", Figure("e", 4123.4, "GB/s"))
    report.skipped |= {"pyvene": "it is not installed", "http": "nor is this"}
    assert report.missing == ["http"]
    assert report.missed == ["decode: b", "steering: d"]
    report.write()
    assert (tmp_path / "gpu.md").read_text().splitlines()[2:] == [
        "- device: a card",
        "",
        "| part | what | measured | wanted |  | note |",
        "| --- | --- | ---: | ---: | --- | --- |",
        "| decode | a | 81.2 % | >= 80 % | ok |  |",
        "| decode | b | 79.9 % | >= 80 % | missed |  |",
        "| steering | c | -0.4 % | <= 2 % | ok | a / b |",
        "| steering | d | nan % | <= 2 % | missed |  |",
        "| rates | e | 4,123 GB/s |  |  |  |",
        "| pyvene |  |  |  | skipped | it is not installed |",
        "| http |  |  |  | missing | nor is this |",
    ]
    report.judged = False
    assert report.missed == report.missing == []
    assert {row[4] for row in report.rows()} == {"", "skipped"}


def test_what_pytest_says_is_counted() -> None:
    assert told("x", 0, "...\n8 passed, 1 skipped in 2.0s").value == 0
    assert told("x", 0, "\n3 skipped in 1.0s", skips=True).note == "3 skipped in 1.0s"
    with pytest.raises(RuntimeError, match="no test ran: 3 skipped"):
        told("x", 0, "\n3 skipped in 1.0s")
    failed = told("x", 1, "FAILED a\n== 2 failed, 7 passed, 1 error in 3.1s ==")
    assert (failed.value, failed.missed, failed.note) == (3, True, "2 failed, 7 passed, 1 error in 3.1s")
    with pytest.raises(RuntimeError, match="pytest ended with status 4: no such file"):
        told("x", 4, "no such file")
    with pytest.raises(RuntimeError, match="status 4: No module named 'uvicorn'"):
        told("x", 4, "E  ModuleNotFoundError: No module named 'uvicorn'\n\nof conftest.py")


def test_the_command_writes_a_table_and_fails_where_a_part_does(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("count", "fail", "skip"):
        monkeypatch.setitem(PARTS, name, Part(f"tests.benchmarks.light_parts:{name}", 60, ""))
    monkeypatch.setattr("benchmarks.gpu.__main__.Options", partial(Options, world=options.world))
    out = options.scratch / "new" / "gpu"
    given = ["--check", "--device", "cpu", "--shape", "tiny", "--commit", "abc", "--out", str(out)]
    assert main([*given, "--parts", "count,skip,count"]) == 0
    written = json.loads(out.with_suffix(".json").read_text())
    assert [(one["part"], one["value"]) for one in written["figures"]] == [("count", 1), ("count", 2)]
    assert written["machine"]["commit"] == "abc"
    assert written["machine"]["process"] > 0
    table = capsys.readouterr().out.split("\n\n")[-2].splitlines()
    assert [row.split()[0] for row in table] == ["part", "count", "count", "skip"]
    assert main([*given, "--parts", "count,fail"]) == 1
    assert main([*given[1:], "--parts", "count,fail"]) == 0
    with pytest.raises(SystemExit):
        main([*given, "--parts", "counts"])
    assert "there is no part 'counts'" in capsys.readouterr().err


def test_what_is_wanted_and_skipped_fails_a_check(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, optional in (("skip", False), ("may_skip", True)):
        monkeypatch.setitem(PARTS, name, Part("tests.benchmarks.light_parts:skip", 60, "", optional))
    monkeypatch.setattr("benchmarks.gpu.__main__.Options", partial(Options, world=options.world))
    monkeypatch.chdir(options.scratch)
    assert main(["--check", "--parts", "may_skip"]) == 0
    assert main(["--check", "--parts", "skip"]) == 1
    assert main(["--parts", "skip"]) == 0
    assert main(["--check", "--parts", "skip,may_skip", "--shape", "tiny"]) == 0
    written = {str(path) for path in Path().rglob("*.json")}
    assert written == {"runs/gpu-may_skip.json", "runs/gpu-skip.json", "runs/gpu-tiny-skip-may_skip.json"}


def test_the_committed_table_is_of_all_parts(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gpu.__main__.PARTS", {"count": Part("tests.benchmarks.light_parts:count", 60, "")})
    monkeypatch.setattr("benchmarks.gpu.__main__.Options", partial(Options, world=options.world))
    monkeypatch.chdir(options.scratch)
    assert main([]) == 0
    assert main(["--device", "cpu"]) == 0
    written = {str(path) for path in Path().rglob("*.json")}
    assert written == {"benchmarks/results/gpu.json", "runs/gpu-8B.json"}


def test_where_nothing_can_be_measured_one_sentence_is_said_and_no_table_is_written(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.gpu.__main__.Options", partial(Options, world=f"{light_parts.__name__}:Lacking"))
    monkeypatch.chdir(options.scratch)
    assert main([]) == 1
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("nothing can be measured here: ModuleNotFoundError: No module named 'no_such_package' (")
    assert [path.name for path in options.scratch.rglob("gpu*")] == ["gpu.log"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(options: Options) -> None:
    with pytest.raises(RuntimeError, match=r"torch \S+ finds no GPU; --device cpu"):
        World(replace(options, device="cuda"))


# --- what is compared -------------------------------------------------------------------------------


@contextmanager
def answering(count: int) -> Iterator[tuple[str, list[int], set[Any]]]:
    """A server that answers its request 0 when `count` have come; which came in turn, and from which addresses."""
    came: list[int] = []
    addresses: set[Any] = set()
    all_here = asyncio.Event()
    app = FastAPI()

    @app.post("/v1/completions")
    async def answer(body: dict[str, int], request: Request) -> Response:
        came.append(body["number"])
        addresses.add(request.client)
        if len(came) == count:
            all_here.set()
        if body["number"] == 0:
            await asyncio.wait_for(all_here.wait(), 20)
        return Response('data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n', media_type="text/event-stream")

    with listening(app) as url:
        yield url, came, addresses


def test_clients_take_the_requests_in_turn_whoever_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    with answering(6) as (url, came, _), Clients(url, 2) as clients:
        assert clients.closed_loop([{"number": number} for number in range(6)], 2).requests == 6
    assert [number for number in came if number] == [1, 2, 3, 4, 5], "the client of request 0 has none of them"


def test_a_first_request_loads_nothing_and_each_has_a_connection_of_its_own() -> None:
    with answering(0) as (url, came, addresses), Clients(url, 1) as clients:
        before = clients._pool.submit(light_parts.loaded).result()
        assert len(clients.one_by_one([{"number": number} for number in range(1, 4)])) == 3
        assert clients._pool.submit(light_parts.loaded).result() == before
    assert (came, len(addresses)) == ([1, 2, 3], 3)


def test_a_closed_loop_asks_in_turn_and_the_engine_is_told_how_often_it_read_beside_decoding(tiny: World) -> None:
    ours = tiny.steered
    seen = streamed(ours, prompts("tiny", 6, 8, 4), clients=2)
    assert seen.asked == sorted(seen.asked)
    work = prompts("tiny", 2, 8, 12)
    step_seconds(ours, work)
    before = ours.engine.stats.computed_tokens
    seconds, share = step_beside(ours, work, prompts("tiny", 12, 5, 1, seed=1))
    read, rest = divmod(ours.engine.stats.computed_tokens - before - 2 * 12, 5)
    assert (round(11 * share), rest) == (read - 1, 0)
    assert seconds > 0


# --- what it needs ----------------------------------------------------------------------------------

# PyTorch brings jinja2, typer brings rich.
NEEDED = {
    "jinja2",
    "torch",
    "transformers",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "psutil",
    "httpx",
    "typer",
    "rich",
}
OURS = ("benchmarks", "server", "steer_ops", "steering", "training")


def imports(path: Path) -> Iterator[str]:
    """Modules that are imported when this one is."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)


def foreign(*roots: str) -> set[str]:
    """Packages that are imported when these modules of ours are."""
    waiting = [*roots]
    read: set[Path] = set()
    found: set[str] = set()
    while waiting:
        parts = waiting.pop().split(".")
        for place in [ROOT.joinpath(*parts[:end]) for end in range(1, len(parts) + 1)]:
            path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            if path in read or not path.exists():
                continue
            read.add(path)
            for name in imports(path):
                if name.split(".")[0] in OURS:
                    waiting.append(name)
                else:
                    found.add(name.split(".")[0])
    return found - set(sys.stdlib_module_names)


def test_the_engine_is_measured_without_the_servers_packages() -> None:
    parts = ("rates", "generation", "others", "fitting", "checks", "clients")
    found = foreign("benchmarks.gpu.__main__", "benchmarks.gpu.world", *(f"benchmarks.gpu.{name}" for name in parts))
    assert "torch" in found
    assert found <= NEEDED


def test_http_is_skipped_before_a_model_is_written_where_the_server_lacks_a_package(
    tiny: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = foreign("server.cli", "server.app", "server.process.supervisor", "server.process.workers")
    found -= {"anyio", "pydantic", "pydantic_core", "starlette"}  # FastAPI brings these
    assert found - NEEDED | {"httptools"} == {*over_http.PACKAGES}, "uvicorn imports httptools"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "fastapi_offline" else find_spec(name))
    monkeypatch.setattr(over_http, "write_folder", lambda *args: pytest.fail("a model is written"))
    for part in ("http", "parallel"):
        with pytest.raises(Skipped, match="fastapi-offline is not installed"):
            list(named(PARTS[part].function)(World(Options("cpu", "tiny", tiny.scratch / part, tiny.log))))
