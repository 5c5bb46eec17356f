"""A conversation in the terminal."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from server.cli import app
from server.terminal.chat import Conversation
from tests.server.conftest import World

runner = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1", "MATSTEER_THREADS": "1"})
SHORT = ["--max-new-tokens", "4"]


def talk(lines: list[str], *arguments: str) -> Result:
    return runner.invoke(app, ["chat", *SHORT, *arguments], input="\n".join(lines) + "\n")


def answer(world: World, messages: list[dict[str, str]], **fields: Any) -> str:
    body = {"messages": messages, "max_new_tokens": 4, "temperature": 0, **fields}
    text: str = world.post(**body)["results"][0]["text"]
    return text


def test_a_conversation_remembers_what_was_said(world: World, address: str) -> None:
    said = [{"role": "user", "content": "What colour?"}]
    first = answer(world, said)
    second = answer(world, [*said, {"role": "assistant", "content": first}, {"role": "user", "content": "And grass?"}])
    result = talk(["What colour?", "And grass?"], "--url", address)
    assert result.exit_code == 0, result.output
    answers = result.output.split("steered: ")[1:]
    assert [one.split("\nyou: ")[0] for one in answers] == [first, second]


def test_arms_go_on_and_off_by_a_command(world: World, address: str) -> None:
    said = [{"role": "user", "content": "What colour?"}]
    steered, plain = answer(world, said, attributes={"kind": 2.0}), answer(world, said, attributes={})
    assert steered != plain
    both = talk(["/set kind=2", "/baseline on", "What colour?"], "--url", address).output
    assert f"steered: {steered}\nbaseline: {plain}\n" in both
    lines = ["/baseline on", "/steered off", "What colour?", "/steered on", "/baseline off", "/undo", "/set kind=2"]
    one = talk([*lines, "What colour?"], "--url", address).output
    assert f"baseline: {plain}\n" in one
    assert f"steered: {steered}\n" in one
    assert one.count("baseline: ") == 1


def test_commands_are_told_and_mistakes_do_not_end_it(address: str) -> None:
    lines = [
        "/help",
        "/steered off",
        "/set kind=much",
        "/set kind",
        "/sing",
        "/undo",
        "/set nonsense=1",
        "a",
        "/reset",
        "/quit",
        "b",
    ]
    result = talk(lines, "--url", address)
    assert result.exit_code == 0
    for told in (
        "/baseline on|off",
        "one of the two has to be on",
        "/set takes NAME=NUMBER, as in truthfulness=1.5, not kind=much\n",
        "as in truthfulness=1.5, not kind\n",
        "there is no command '/sing'; /help lists them",
        "nothing has been said",
        "multipliers: nonsense=1",
        "has no attribute 'nonsense'",
        "a new conversation",
    ):
        assert told in result.output
    assert result.output.count("you: ") == 10, "nothing is read after /quit"


def test_a_model_is_loaded_for_a_conversation(model_folder: Path, checkpoints: Path, tmp_path: Path) -> None:
    place = ["--model", str(model_folder), "--checkpoints", str(checkpoints), "--checkpoint", "demo@1"]
    file = tmp_path / "empty.jinja"
    result = talk(["What colour?"], *place, "--set", "kind=1", "--system", "Be kind.", "--baseline")
    assert result.exit_code == 0, result.output
    assert "steered: " in result.output
    assert "baseline: " in result.output
    file.write_text("")
    refused = talk(["a"], *place, "--chat-template", str(file))
    assert refused.exit_code == 1
    assert "This model has no chat template" in refused.output


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--url", "http://127.0.0.1:9"], 1, "There is no mat-steer at http://127.0.0.1:9"),
        (["--url", "http://127.0.0.1:9", "--chat-template", "x"], 2, "the server at --url has its own"),
        (["--model", "/no/model"], 1, "There is no model folder '/no/model'"),
        (["--set", "kind"], 2, "NAME=NUMBER"),
    ],
)
def test_what_cannot_begin_says_why(arguments: list[str], status: int, message: str) -> None:
    result = talk(["a"], *arguments)
    assert result.exit_code == status
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(("command", "more"), [("generate", []), ("compare", ["--arm", "plain"])])
def test_a_single_question_goes_through_the_template(world: World, address: str, command: str, more: list[str]) -> None:
    attributes = {"attributes": {}} if command == "compare" else {}
    expected = answer(world, [{"role": "user", "content": "What colour?"}], **attributes)
    result = runner.invoke(app, [command, "What colour?", "--chat", *SHORT, *more, "--url", address])
    assert result.exit_code == 0, result.output
    shown = "".join(result.output.replace("│", " ").split())
    assert "".join(expected.split()) in shown


def test_the_conversation_goes_on_from_the_steered_answer() -> None:
    conversation = Conversation({"temperature": 0.0, "seed": None}, {"kind": 1.0}, "Be kind.")
    conversation.said("a", "b")
    body = conversation.body("c")
    assert json.loads(json.dumps(body)) == {
        "temperature": 0.0,
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        "attributes": {"kind": 1.0},
        "baseline": False,
    }


def printable(text: str) -> str:
    return "".join(letter for letter in text if letter.isprintable() and letter not in " │")


def test_variables_of_the_template_go_along(
    world: World, address: str, model_folder: Path, checkpoints: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mood.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ mood }}:")
    kwargs = ["--chat-template-kwargs", '{"mood": "calm"}']
    place = ["--model", str(model_folder), "--checkpoints", str(checkpoints), "--checkpoint", "demo@1"]
    place += ["--set", "kind=0", "--chat-template", str(file), *SHORT]
    answered = world.post(prompt="What colour?calm:", attributes={}, max_new_tokens=4, temperature=0)
    expected = answered["results"][0]["text"]
    said = runner.invoke(app, ["generate", "What colour?", "--chat", *kwargs, *place])
    assert said.exit_code == 0, said.output
    assert printable(expected) in printable(said.output)
    assert printable(expected) in printable(talk(["What colour?"], *kwargs, *place).output)
    refused = talk(["a"], *kwargs, "--url", address)
    assert "The model's chat template has no variable 'mood'" in refused.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a", "--chat-template-kwargs", '{"a": 1}'], "--chat-template-kwargs is for --chat"),
        (["generate", "a", "--chat", "--chat-template-kwargs", "a=1"], "it takes a JSON object"),
        (["compare", "a", "--arm", "b", "--chat-template", "x", "--url", "http://127.0.0.1:9"], "has its own"),
    ],
)
def test_an_option_of_chats_says_what_it_needs(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
