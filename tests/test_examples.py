"""Every example that shows an effect shows one: what it compares differs, on the demo that is served."""

import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from demo.readme import commands, requests, served
from server.cli import app, compare, generate
from server.web import home

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with served() as url, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def examples(http: httpx.Client) -> dict[str, Any]:
    """The example of every body, as /docs and docs/api.md show it."""
    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    return {name: schema["examples"][0] for name, schema in schemas.items() if "examples" in schema}


def send(http: httpx.Client, path: str, body: Any) -> Any:
    """The answer; the same one every time."""
    first, second = (http.post(path, json=body) for _ in range(2))
    assert first.status_code == 200, first.text
    one, other = first.json(), second.json()
    for answer in (one, other):
        answer.pop("id", None)
    assert texts(one) == texts(other), "no example depends on luck"
    return one


def texts(answer: Any) -> list[str]:
    """Every text of an answer, of whatever route."""
    if isinstance(answer, dict):
        own = [answer["text"]] if isinstance(answer.get("text"), str) and "token_id" not in answer else []
        own += [answer["content"]] if isinstance(answer.get("content"), str) else []
        return own + [text for value in answer.values() for text in texts(value)]
    return [text for value in answer for text in texts(value)] if isinstance(answer, list) else []


def differ(found: list[str]) -> bool:
    return len(found) > 1 and len(set(found)) == len(found)


def test_the_example_of_generate_shows_two_answers(http: httpx.Client, examples: dict[str, Any]) -> None:
    assert differ(texts(send(http, "/generate", examples["GenerateRequest"])))


def test_the_example_of_compare_shows_an_answer_for_each_arm(http: httpx.Client, examples: dict[str, Any]) -> None:
    assert differ(texts(send(http, "/compare", examples["CompareRequest"])))


def test_the_example_of_score_prefers_what_is_true_by_steering(http: httpx.Client, examples: dict[str, Any]) -> None:
    body = examples["ScoreRequest"]
    lead = {}
    for name, attributes in (("steered", body["attributes"]), ("unsteered", {})):
        true, false = send(http, "/score", body | {"attributes": attributes})["scores"]
        lead[name] = true["logprob"] - false["logprob"]
    assert lead["steered"] > lead["unsteered"] + 0.5


@pytest.mark.parametrize(
    ("path", "name"), [("/v1/completions", "CompletionRequest"), ("/v1/chat/completions", "ChatCompletionRequest")]
)
def test_the_examples_for_openais_clients_differ_from_the_base_model(
    http: httpx.Client, examples: dict[str, Any], path: str, name: str
) -> None:
    steered, base = send(http, path, examples[name]), send(http, path, examples[name] | {"model": "demo-model"})
    assert differ(texts(steered) + texts(base))


def test_the_readme_shows_two_answers(http: httpx.Client) -> None:
    request = requests(README)[0]
    assert differ(texts(send(http, request.path, request.body)))


def test_the_command_that_the_start_shows_works_in_a_shell(http: httpx.Client) -> None:
    command = home.curl(str(http.base_url), {"truthfulness": 1.0}, asks_for_key=True)
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    assert differ(texts(json.loads(done.stdout)))


def test_the_python_example_of_the_readme_shows_three_answers(
    http: httpx.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    seen = []
    for _ in range(2):
        exec(compile(code.replace("http://127.0.0.1:8000", str(http.base_url).rstrip("/")), "README", "exec"), {})
        seen.append(capsys.readouterr().out.splitlines())
    assert seen[0] == seen[1]
    assert differ(seen[0])


def shown_commands() -> list[list[str]]:
    """Every `matsteer generate` and `compare` of the README and of --help."""
    found = [shlex.split(command)[1:] for command in commands(README)]
    for command in (generate, compare):
        example = str(command.__doc__).partition("Example: matsteer ")[2]
        found.append(shlex.split(" ".join(example.split())))
    return [words for words in found if words[0] in ("generate", "compare")]


@pytest.mark.parametrize("words", shown_commands(), ids=" ".join)
def test_the_commands_that_are_shown_show_different_answers(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    answers: list[Any] = []
    monkeypatch.setattr("server.terminal.generate.show_arms", lambda _, answer: answers.append(answer.model_dump()))
    result = CliRunner().invoke(app, [*words, "--url", str(http.base_url)])
    assert result.exit_code == 0, result.output
    assert differ(texts(answers[0]))
