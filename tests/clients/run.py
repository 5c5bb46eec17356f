"""Try clients of OpenAI's API on the demo's server: `python -m tests.clients.run [NAME...]`, or `make test-clients`.

Each client has an environment of its own in runs/clients, made once and kept, with the newest version that the package
index has; pip's own settings hold (PIP_CONSTRAINT, PIP_INDEX_URL, ...). Two things are run in it: the example of its
section in docs/clients.md, and its script, use_NAME.py. `--write` puts the table of all into that page, with what was
found last for those that are not named.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from demo.readme import replace_between, served
from tests.clients.checks import COLUMNS

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "runs/clients"
PAGE = ROOT / "docs/clients.md"
WRITTEN = ("<!-- clients: written by make test-clients -->", "<!-- end of clients -->")
ADDRESS = "http://127.0.0.1:8000"  # in the page's examples
SHOWS = {"lm-eval": "|acc "}  # in the output of a client's example; elsewhere what the steered model answers
SECONDS = 900.0
CLIENTS = {  # what pip installs
    "openai": ["openai"],
    "litellm": ["litellm"],
    "langchain-openai": ["langchain-openai"],
    "llama-index": ["llama-index-llms-openai-like"],
    "llm": ["llm"],
    "pydantic-ai": ["pydantic-ai-slim[openai]"],
    "dspy": ["dspy"],
    "haystack": ["haystack-ai"],
    "smolagents": ["smolagents[openai]"],
    "autogen": ["autogen-agentchat", "autogen-ext[openai]"],
    "lm-eval": ["lm-eval[api]"],
    "curl": [],
}
MARKS = {"passed": "yes", "failed": "**no**", "not possible": "-", "": ""}


@dataclass
class Tried:
    """What came of a client's checks: (result, reason) by the check's name."""

    client: str
    version: str
    checks: dict[str, Sequence[str]] = field(default_factory=dict)

    def row(self) -> str:
        columns = ("example", *COLUMNS)
        marks = [MARKS[self.checks.get(name, ("", ""))[0]] for name in columns]
        also = [name for name, (result, _) in self.checks.items() if result == "passed" and name not in columns]
        return f"| [{self.client}](#{self.client}) | {self.version} | {' | '.join(marks)} | {'; '.join(also)} |"

    def reasons(self, result: str) -> list[str]:
        return [f"{self.client}, {name}: {why}" for name, (found, why) in self.checks.items() if found == result]


def last(client: str) -> Tried:
    """What was found when the client was tried last. Raises FileNotFoundError."""
    return Tried(**json.loads((CACHE / client / "tried.json").read_text()))


def example(client: str) -> tuple[str, str]:
    """The language and the text of the example in a client's section. Raises ValueError where there is none."""
    section = re.search(rf"^## {re.escape(client)}$(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.M | re.S)
    found = re.search(r"```(python|bash)\n(.*?)```", section[1], re.S) if section else None
    if found is None:
        raise ValueError(f"docs/clients.md has no section '## {client}' with an example")
    return found[1], found[2]


def script(client: str) -> Path:
    return Path(__file__).parent / f"use_{client.replace('-', '_')}.py"


def environment(client: str, *, fresh: bool) -> Path:
    """The client's own environment, installed where it is not there yet. Raises CalledProcessError."""
    folder, wanted = CACHE / client, "\n".join(CLIENTS[client])
    stamp = folder / "installed.txt"
    if not fresh and stamp.exists() and stamp.read_text() == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True, capture_output=True, text=True)
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if CLIENTS[client]:
        subprocess.run([*pip, *CLIENTS[client]], check=True, capture_output=True, text=True)
    stamp.write_text(wanted)
    return folder


def version(client: str, folder: Path) -> str:
    if not CLIENTS[client]:
        return subprocess.run([client, "--version"], check=True, capture_output=True, text=True).stdout.split()[1]
    names = [re.split(r"[\[=<>~!]", package)[0] for package in CLIENTS[client]]
    code = "import sys, importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in sys.argv[1:]), sep=', ')"
    found = subprocess.run([folder / "bin/python", "-c", code, *names], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def tried(client: str, url: str, *, fresh: bool) -> Tried:
    try:
        folder = environment(client, fresh=fresh)
    except subprocess.CalledProcessError as error:
        last = [line for line in (error.stderr or "").splitlines() if line.strip()][-1:]
        return Tried(client, "", {"example": ("failed", f"it cannot be installed: {' '.join(last)}")})
    found = Tried(client, version(client, folder))
    found.checks["example"] = _example(client, folder, url)
    status, output, errors = _run([folder / "bin/python", script(client)], folder, url)
    for line in output.splitlines():
        if line.startswith('{"check"'):
            told = json.loads(line)
            found.checks[told["check"]] = (told["result"], told["why"])
    if status or not found.checks.keys() >= set(COLUMNS):
        found.checks["the script"] = ("failed", f"it ended with {status}: {errors.strip()[-300:]}")
    (folder / "log.txt").write_text(output + errors)
    (folder / "tried.json").write_text(json.dumps(asdict(found)))
    return found


def _example(client: str, folder: Path, url: str) -> tuple[str, str]:
    language, text = example(client)
    command = [folder / "bin/python", "-c"] if language == "python" else ["bash", "-euc"]
    status, output, errors = _run([*command, text.replace(ADDRESS, url)], folder, url)
    shows = SHOWS.get(client, "Tokyo")
    if status == 0 and shows in output:
        return "passed", ""
    return "failed", f"it ended with {status}, and should show {shows!r}: {(output + errors).strip()[-300:]}"


def _run(command: Sequence[str | Path], folder: Path, url: str) -> tuple[int | str, str, str]:
    """Exit status, output and errors, with the client's programs first in the path and a home folder of its own."""
    home = folder / "home"
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI_", "PYTHON"))}
    own = {
        "MATSTEER_URL": url,
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "PYTHONDONTWRITEBYTECODE": "1",
        # What they would ask of other machines: prices, models, usage statistics
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "HAYSTACK_TELEMETRY_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
    }
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=kept | own, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no end in {SECONDS:.0f} s", "", ""
    return done.returncode, done.stdout, done.stderr


def report(rows: Sequence[Tried]) -> str:
    """All of it in Markdown."""
    header = ["client", "version", "example", *COLUMNS, "also"]
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}", *(row.row() for row in rows)]
    for title, result in (("Not possible with the client", "not possible"), ("Did not pass", "failed")):
        if reasons := [f"- {reason}" for row in rows for reason in row.reasons(result)]:
            lines += ["", f"{title}:", "", *reasons]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clients.run", description=__doc__.splitlines()[0])
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"of {', '.join(CLIENTS)}; absent: all")
    parser.add_argument("--fresh", action="store_true", help="install anew, the newest versions")
    parser.add_argument("--write", action="store_true", help="the table into docs/clients.md")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in CLIENTS]:
        parser.error(f"there is no client {', '.join(unknown)}; there are {', '.join(CLIENTS)}")
    names = given.names or [*CLIENTS]
    if given.write and (never := [one for one in {*CLIENTS} - {*names} if not (CACHE / one / "tried.json").exists()]):
        parser.error(f"the page lists all clients, and these were never tried: {', '.join(sorted(never))}")
    rows = []
    with served() as url:
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows.append(tried(name, url, fresh=given.fresh))
    print(report(rows))
    if given.write:
        found = {row.client: row for row in rows}
        replace_between(PAGE, WRITTEN, report([found.get(name) or last(name) for name in CLIENTS]))
    return 1 if any(row.reasons("failed") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
