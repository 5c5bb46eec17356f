"""Conversations from the file to the checkpoint: trained, measured and served in the form that the model chats in."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from steering import checkpoint as checkpoints
from tests.training.helpers import make_llama, make_tokenizer
from training.cli import app

BEGIN = "<|begin|>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def dump(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that chats, and one that does not; the same data as conversations, as prompts, and rendered already."""
    folder = tmp_path_factory.mktemp("world")
    for name, template in (("model", TEMPLATE), ("plain-model", None)):
        tokenizer = make_tokenizer(BEGIN)
        tokenizer.chat_template = template
        make_llama().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows: dict[str, list[dict[str, Any]]] = {"messages": [], "prompts": [], "rendered": []}
    for n in range(20):
        for label, answer in ((True, f"good {n}"), (False, f"bad {n}")):
            known = {"label": label, "group": n}
            turns = [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": answer}]
            rows["messages"].append({"messages": turns, **known})
            rows["prompts"].append({"prompt": f"What is {n}?", "completion": f" {answer}", **known})
            asked = f"{BEGIN}user: What is {n}?<|end|>assistant: "
            rows["rendered"].append({"prompt": asked, "completion": answer, **known})
    for name, found in rows.items():
        dump(folder / f"{name}.jsonl", found)
    dump(folder / "questions.jsonl", [{"prompt": f"Where is {n}?", "split": ("dev", "test")[n % 2]} for n in range(6)])
    (folder / "judges_of_chats.py").write_text(
        "def judge(prompt, text):\n    return {'asked plainly': prompt.startswith('Where')}\n"
    )
    return folder


def run(command: str, *arguments: str, model: str = "model") -> Result:
    return CliRunner().invoke(app, [command, "--model", model, *arguments])


def done(command: str, *arguments: str, model: str = "model") -> str:
    result = run(command, *arguments, model=model)
    assert result.exit_code == 0, result.output
    return result.output


PLACE = ["--layer", "1", "--site", "residual"]
WAYS = {"messages": [], "prompts": ["--chat"], "rendered": []}


def test_conversations_prompts_and_rendered_texts_have_the_same_activations(here: Path) -> None:
    for name, option in WAYS.items():
        done("extract", "--data", f"tone={name}.jsonl", *option, *PLACE, "--out", name)
    found = [load_file(here / name / "shard-00000.safetensors") for name in WAYS]
    for other in found[1:]:
        assert all(bool((found[0][key] == other[key]).all()) for key in found[0])
    forms = [json.loads((here / name / "manifest.json").read_text())["plan"]["form"] for name in WAYS]
    assert forms == ["chat", "chat", "plain"]


@pytest.mark.parametrize(("name", "form"), [("messages", "chat"), ("prompts", "chat"), ("rendered", "plain")])
def test_the_checkpoint_and_its_card_say_what_it_was_trained_on(here: Path, name: str, form: str) -> None:
    data = ["--data", f"tone={name}.jsonl", *WAYS[name]]
    done("train", *data, *PLACE, "--method", "caa", "--out", "checkpoints/mine")
    assert checkpoints.load(here / "checkpoints/mine/v1").config.training["form"] == form
    card = (here / "checkpoints/mine/v1/README.md").read_text()
    assert ("Trained on conversations" in card) == ('"messages": [{"role": "user"' in card) == (form == "chat")
    assert ("Trained on plain text" in card) == ('"prompt": "..."' in card) == (form == "plain")


def test_choices_are_scored_as_answers_in_the_conversation(here: Path) -> None:
    results = []
    for name, option in WAYS.items():
        data = ["--data", f"tone={name}.jsonl", *option]
        done("train", *data, *PLACE, "--method", "caa", "--out", f"checkpoints/{name}")
        results.append(checkpoints.load(here / "checkpoints" / name / "v1").config.evaluation["arms"])
    assert results[0] == results[1] == results[2]


def test_data_of_the_other_form_are_remarked_on_at_an_evaluation(here: Path) -> None:
    done(
        "train",
        "--data",
        "tone=messages.jsonl",
        *PLACE,
        "--method",
        "caa",
        "--out",
        "checkpoints/mine",
        "--no-evaluate",
    )
    evaluate = ["--checkpoint", "checkpoints/mine", "--data", "tone=prompts.jsonl"]
    assert "note: the checkpoint was trained on chat data, and these are plain" in done("evaluate", *evaluate)
    assert "note:" not in done("evaluate", *evaluate, "--chat")


def test_stored_activations_are_evaluated_on_data_of_their_form(here: Path) -> None:
    done("extract", "--data", "tone=messages.jsonl", *PLACE, "--out", "acts")
    fit = ["--activations", "acts", "--data", "tone=prompts.jsonl", *PLACE, "--method", "caa", "--out", "checkpoints/x"]
    refused = run("train", *fit)
    assert refused.exit_code == 2
    assert "acts was extracted from chat data, and --data are plain" in refused.output
    done("train", *fit, "--chat")
    assert checkpoints.load(here / "checkpoints/x/v1").config.training["form"] == "chat"


JUDGE = ["--judge", "judges_of_chats:judge", "--prompts", "questions.jsonl", "--max-new-tokens", "4"]


@pytest.mark.parametrize(
    ("model", "option", "form"),
    [
        ("model", [], "chat"),
        ("model", ["--plain-prompts"], "plain"),
        ("plain-model", [], "plain"),
    ],
)
def test_judged_answers_go_through_the_template_where_there_is_one(
    here: Path, model: str, option: list[str], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.evaluation import generation

    read: list[str] = []
    encode = generation.encode_prompt

    def seen(tokenizer: Any, prompt: str, turns: Any = ()) -> tuple[int, ...]:
        ids = encode(tokenizer, prompt, turns)
        read.append(tokenizer.decode(ids))
        return ids

    monkeypatch.setattr(generation, "encode_prompt", seen)
    data = ["--data", "tone=rendered.jsonl"]
    sweep = [*data, *PLACE, "--method", "caa", "--multipliers", "1", "--out", "swept", *JUDGE, *option]
    done("sweep", *sweep, model=model)
    done("train", *data, *PLACE, "--method", "caa", "--out", "checkpoints/x", *JUDGE, *option, model=model)
    done("evaluate", "--checkpoint", "checkpoints/x", "--baseline", *JUDGE, *option, "--out", "judged", model=model)
    stored = json.loads((here / "judged/evaluation.json").read_text())
    assert stored["settings"]["form"] == form
    assert stored["arms"][0]["metrics"]["asked plainly"]["value"] == 1, "the judge sees the prompt as it was written"
    asked = "user: Where is {}?<|end|>assistant: " if form == "chat" else "Where is {}?"
    assert set(read) == {BEGIN + asked.format(n) for n in range(6)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["extract", "--data", "tone=messages.jsonl", *PLACE, "--out", "x"], "has no chat template"),
        (["train", "--data", "tone=prompts.jsonl", "--chat", *PLACE, "--out", "checkpoints/x"], "has no chat template"),
        (["evaluate", "--checkpoint", "checkpoints/x", "--chat", *JUDGE], "--chat says how --data are read"),
        (
            ["sweep", "--data", "tone=prompts.jsonl", *PLACE, "--out", "x", "--plain-prompts"],
            "--plain-prompts is for the prompts of a --judge",
        ),
        (
            ["train", "--method", "actadd", "--pair", "a", "b", "--chat", "--layer", "1", "--out", "checkpoints/x"],
            "--chat says how --data are read",
        ),
    ],
)
def test_what_cannot_be_a_conversation_is_one_sentence(here: Path, arguments: list[str], said: str) -> None:
    done("train", "--data", "tone=prompts.jsonl", *PLACE, "--method", "caa", "--out", "checkpoints/x", "--no-evaluate")
    result = run(*arguments, model="plain-model")
    assert result.exit_code == 2, result.output
    assert said in result.output.replace("\n", " ")


def test_a_file_of_prompts_with_another_field_is_named(here: Path) -> None:
    (here / "own.jsonl").write_text('{"promt": "Where?"}\n')
    judge = ["--judge", "judges_of_chats:judge", "--prompts", "own.jsonl"]
    result = run("sweep", "--data", "tone=prompts.jsonl", *PLACE, "--out", "x", *judge)
    assert result.exit_code == 2
    assert 'own.jsonl:1: there is no field "promt"; did you mean "prompt"?' in result.output
