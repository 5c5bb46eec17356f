"""The page in a real browser, on real servers of the demo: `make test-page`. Skipped where there is no Chromium."""

import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from demo.readme import served

ROOT = Path(__file__).parents[2]
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
QUIET = [  # what a browser would do besides
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ADMIN, KEY = "master", "sesame"
REFUSED = "Failed to load resource"  # the browser's own line for a status of 400 and more


@contextmanager
def server(*arguments: str, **settings: str) -> Iterator[str]:
    """The address of a server of the demo. One thread: tests share their machine."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("MATSTEER_")]:
            patch.delenv(name)
        for name, value in settings.items():
            patch.setenv(f"MATSTEER_{name.upper()}", value)
        patch.setenv("PYTHONPATH", str(ROOT))
        with served("--threads", "1", *arguments) as url:
            yield url


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """demo@v1 as it is shipped, and demo@v2, the same under another version."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for version in ("v1", "v2"):
        shutil.copytree(ROOT / "checkpoints/demo/v1", folder / "demo" / version)
    config = folder / "demo/v2/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"version": "v2"}, indent=2))
    return folder


@pytest.fixture(scope="session")
def url(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with two versions, an admin key, and a file for studies."""
    studies = str(tmp_path_factory.mktemp("studies") / "studies.db")
    with server(
        "--checkpoints", str(checkpoints), "--checkpoint", "demo@v1", admin_key=ADMIN, studies=studies, remember="false"
    ) as address:
        yield address


@pytest.fixture(scope="session")
def guarded() -> Iterator[str]:
    """A server that asks for its key, and that computes two texts at once while one more may wait."""
    with server("--queue-limit", "1", "--max-num-seqs", "2", api_key=KEY) as address:
        yield address


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: make test-page does it"
    )
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as running:
        root = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = running.chromium.launch(executable_path=CHROMIUM, args=[*QUIET, *root])
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page, what it asked its server, and what its console said."""

    page: Any
    asked: list[tuple[str, str, Any]] = field(default_factory=list)  # method, path, body
    said: list[str] = field(default_factory=list)

    def bodies(self, path: str) -> list[Any]:
        return [body for _, asked, body in self.asked if asked == path]

    @contextmanager
    def answered(self) -> Iterator[None]:
        """Until every arm has answered what the block asks: the verdicts come last."""
        with self.page.expect_response(lambda response: response.url.endswith("/judge")):
            yield

    def run(self) -> None:
        with self.answered():
            self.page.get_by_role("button", name="Run", exact=True).click()

    def arm(self, name: str) -> Any:
        return self.page.get_by_role("article", name=f"Arm {name}", exact=True)

    def text(self, name: str) -> str:
        """The answer of an arm as it is shown, without marks."""
        tokens = self.arm(name).locator(".tok:not(.unseen)").all_text_contents()
        return "".join(tokens).strip()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Opens a page of a person who comes for the first time; at the end its console must have said nothing."""
    contexts, pages = [], []

    def open_page(address: str, width: int = 1440, height: int = 900, context: Any = None, **options: Any) -> Opened:
        if context is None:
            context = browser.new_context(viewport={"width": width, "height": height}, **options)
            context.set_default_timeout(30_000)
            contexts.append(context)
        opened = Opened(context.new_page())
        opened.page.on("request", lambda request: opened.asked.append(_request(request)))
        opened.page.on("console", lambda message: opened.said.append(message.text))
        opened.page.on("pageerror", lambda error: opened.said.append(str(error)))
        opened.page.goto(address)
        pages.append(opened)
        return opened

    yield open_page
    said = [line for opened in pages for line in opened.said if REFUSED not in line]
    for context in contexts:
        context.close()
    assert said == []


def _request(request: Any) -> tuple[str, str, Any]:
    path = "/" + request.url.split("/", 3)[3].split("#")[0]
    return request.method, path, json.loads(request.post_data) if request.post_data else None


def compare(url: str, body: Any) -> Any:
    """What the server answers to what the page has asked, without a page."""
    asked = {name: value for name, value in body.items() if name != "stream"}
    answer = httpx.post(f"{url}/compare", json=asked, timeout=60, trust_env=False)
    assert answer.status_code == 200, answer.text
    return {arm["name"]: arm | arm["results"][0] for arm in answer.json()["arms"]}


@pytest.fixture
def at(url: str, open_page: Any) -> Opened:
    """The page, with its arms."""
    opened: Opened = open_page(url)
    opened.page.locator(".arm").nth(1).wait_for()
    return opened


ENOUGH = 3000  # bytes: a few tokens of each arm


class Cable:
    """A connection to a server that can be cut: a proxy on a port of its own."""

    def __init__(self, url: str) -> None:
        self._target = ("127.0.0.1", int(url.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self.enough = ENOUGH
        self.flows = threading.Event()  # cleared: what follows `enough` of a stream waits
        self.flows.set()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Ends every connection that there is; new ones can be made."""
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.flows.set()

    def close(self) -> None:
        self._listener.close()
        self.cut()
        for end in self._ends:
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._ends += [client, server]
            threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        sent, events = 0, False
        with suppress(OSError):
            while data := source.recv(1024):
                if sent > self.enough:
                    self.flows.wait(60)
                events = events or (answers and b"text/event-stream" in data)
                sink.sendall(data)
                sent += len(data) if events else 0
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def cable(url: str) -> Iterator[Cable]:
    cable = Cable(url)
    yield cable
    cable.close()
