"""Send the README's requests to a server and write the answers into it: `make readme`."""

import argparse
import json
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

RESULTS = ("<!-- results: written by make reproduce -->", "<!-- end of results -->")
ANSWERS = ("<!-- answers: written by make readme -->", "<!-- end of answers -->")
START_SECONDS = 120.0


@dataclass(frozen=True)
class Request:
    """A request that the README shows with curl."""

    path: str
    body: Any


def commands(readme: Path) -> list[str]:
    """Every command in the README's bash blocks, lines that go on joined."""
    blocks = re.findall(r"```bash\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    found: list[str] = []
    for block in blocks:
        open_quote = False
        for line in block.splitlines():
            if open_quote or (found and found[-1].endswith("\\")):
                found[-1] = found[-1].removesuffix("\\") + "\n" + line
            else:
                found.append(line)
            open_quote = found[-1].count("'") % 2 == 1
    return found


def requests(readme: Path) -> list[Request]:
    """The requests that the README sends with curl."""
    found = []
    for command in commands(readme):
        words = shlex.split(command)
        if words[0] == "curl":
            url = next(word for word in words if "localhost" in word)
            found.append(Request("/" + url.partition("/")[2], json.loads(words[words.index("-d") + 1])))
    return found


@contextmanager
def served(*arguments: str) -> Iterator[str]:
    """The address of a server of the demo, in a process of its own. Raises RuntimeError where it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "server.cli", "serve", "--port", str(port), "--log-level", "warning", *arguments]
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start (exit status {process.poll()})")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def shown(answer: dict[str, Any]) -> str:
    """Both arms as the README shows them."""
    lines = ["| | text | steered tokens |", "| --- | --- | ---: |"]
    for title, arm in (("steered", "results"), ("unsteered", "baseline")):
        result = answer[arm][0]
        lines.append(f"| **{title}** | {result['text'].strip()} | {result['steering']['steered_tokens']} |")
    return "\n".join(lines)


def replace_between(path: Path, markers: tuple[str, str], text: str) -> None:
    """Put `text` between two marker lines of a file. Raises ValueError where they are not there."""
    begin, end = markers
    old = path.read_text(encoding="utf-8")
    new, count = re.subn(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{text}\n{end}", old, flags=re.S)
    if count != 1:
        raise ValueError(f"{path} has no place between {begin} and {end}")
    path.write_text(new, encoding="utf-8")


def rewrite(description: str | None, write: Callable[[Path, Path], None]) -> None:
    """The command of a module that makes pages, and a part of the README, from what was measured before: `write` gets
    the folder of both, and the README."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--folder", type=Path, default=Path("docs/results"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    args = parser.parse_args()
    write(args.folder, args.readme)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").is_success
    except httpx.TransportError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    readme = parser.parse_args().readme
    request = requests(readme)[0]
    with served() as url:
        answer = httpx.post(url + request.path, json=request.body, timeout=60).raise_for_status().json()
    text = f"You get both answers (and their token ids, timing and a comparison):\n\n{shown(answer)}"
    replace_between(readme, ANSWERS, text)
    print(text)


if __name__ == "__main__":
    main()
