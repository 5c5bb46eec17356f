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
    said = "note: the checkpoint was trained on conversations, and the questions of tone are plain text (--chat)."
    assert said in done("evaluate", *evaluate)
    assert "note:" not in done("evaluate", *evaluate, "--chat")


def test_a_note_says_how_the_judged_prompts_are_asked(here: Path) -> None:
    fit = [*PLACE, "--method", "caa", "--no-evaluate"]
    done("train", "--data", "tone=messages.jsonl", *fit, "--out", "checkpoints/chats")
    done("train", "--data", "tone=prompts.jsonl", *fit, "--out", "checkpoints/texts")
    judge = ["--judge", "judges_of_chats:judge", "--max-new-tokens", "4", "--checkpoint"]
    data = ["--data", "tone=prompts.jsonl"]
    # With a template the judge's prompts are a user's turns, whatever form the data have.
    assert "note: the checkpoint" not in done("evaluate", *judge, "checkpoints/chats", *data)
    said = "note: the checkpoint was trained on plain text, and the judge's prompts are conversations (--plain-prompts)"
    assert said in done("evaluate", *judge, "checkpoints/texts", *data)
    assert said in done("evaluate", *judge, "checkpoints/texts", "--prompts", "questions.jsonl")
    assert "note: the checkpoint" not in done("evaluate", *judge, "checkpoints/texts", *data, "--plain-prompts")
    said = "note: the checkpoint was trained on conversations, and the judge's prompts are plain text (--chat-prompts)"
    assert said in done("evaluate", *judge, "checkpoints/chats", *data, "--plain-prompts")
    said = "the questions of tone are conversations (leave out --chat and --prompting chat)."
    assert said in done("evaluate", "--checkpoint", "checkpoints/texts", *data, "--chat")


def test_stored_activations_are_evaluated_on_data_of_their_form(here: Path) -> None:
    done("extract", "--data", "tone=messages.jsonl", *PLACE, "--out", "acts")
    fit = ["--activations", "acts", "--data", "tone=prompts.jsonl", *PLACE, "--method", "caa", "--out", "checkpoints/x"]
    refused = run("train", *fit)
    assert refused.exit_code == 2
    assert "acts was extracted from chat data, and --data are plain" in refused.output
    done("train", *fit, "--chat")
    assert checkpoints.load(here / "checkpoints/x/v1").config.training["form"] == "chat"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Everything that was continued for a judge, as text."""
    from training.evaluation import generation

    found: list[str] = []
    encode = generation.encode_prompt

    def seen(tokenizer: Any, *asked: Any) -> tuple[int, ...]:
        ids = encode(tokenizer, *asked)
        found.append(tokenizer.decode(ids))
        return ids

    monkeypatch.setattr(generation, "encode_prompt", seen)
    return found


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
    here: Path, model: str, option: list[str], form: str, read: list[str]
) -> None:
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


OTHER = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{{ mood }}{% endif %}"
)


def other(here: Path, kwargs: str = '{"mood": "calm"}') -> list[str]:
    (here / "other.jinja").write_text(OTHER)
    return ["--chat-template", "other.jinja", "--chat-template-kwargs", kwargs]


def test_another_template_and_its_variables_make_the_texts(here: Path) -> None:
    rows = [json.loads(line) for line in (here / "messages.jsonl").read_text().splitlines()]
    known = [
        {
            "prompt": f"{BEGIN}<user>{row['messages'][0]['content']}<answer>calm",
            "completion": row["messages"][1]["content"],
            "label": row["label"],
            "group": row["group"],
        }
        for row in rows
    ]
    dump(here / "known.jsonl", known)
    done("extract", "--data", "tone=known.jsonl", *PLACE, "--out", "known")
    for model in ("model", "plain-model"):
        done("extract", "--data", "tone=messages.jsonl", *other(here), *PLACE, "--out", f"by-{model}", model=model)
        values, expected = (load_file(here / name / "shard-00000.safetensors") for name in (f"by-{model}", "known"))
        assert all(bool((values[key] == expected[key]).all()) for key in expected)
        about = json.loads((here / f"by-{model}" / "manifest.json").read_text())["plan"]["chat_template"]
        assert (about["file"], about["kwargs"]) == ("other.jinja", {"mood": "calm"})


def test_the_card_says_which_template_it_was(here: Path) -> None:
    done("train", "--data", "tone=messages.jsonl", *other(here), *PLACE, "--method", "caa", "--out", "checkpoints/mine")
    training = checkpoints.load(here / "checkpoints/mine/v1").config.training
    assert training["chat_template"]["kwargs"] == {"mood": "calm"}
    card = (here / "checkpoints/mine/v1/README.md").read_text()
    assert f"the chat template `other.jinja` (sha256 `{training['chat_template']['sha256'][:12]}`)" in card
    assert '"chat_template_kwargs": {"mood": "calm"}, "checkpoint": "mine@v1"' in card


@pytest.mark.parametrize(
    ("options", "model", "said"),
    [
        (["--chat-template", "gone.jinja"], "model", "The chat template 'gone.jinja' cannot be read: No such file"),
        (["--chat-template-kwargs", "[1]"], "model", "it takes a JSON object"),
        (["--chat-template-kwargs", "mood=calm"], "model", "it takes a JSON object"),
        (["--chat-template-kwargs", '{"mood": 1}'], "model", "The model's chat template has no variable 'mood'."),
        (["--chat-template-kwargs", '{"tokenize": true}'], "model", "'tokenize' is no variable"),
        (["--chat-template-kwargs", '{"mood": 1}'], "plain-model", "the model's tokenizer has none"),
        ([], "plain-model", "has no chat template; --chat-template FILE gives it one"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_sentence(here: Path, options: list[str], model: str, said: str) -> None:
    for command in ("extract", "train", "sweep"):
        result = run(command, "--data", "tone=messages.jsonl", *options, *PLACE, "--out", "checkpoints/x", model=model)
        assert result.exit_code == 2, result.output
        assert said in " ".join(result.output.replace("│", " ").split())


def test_a_template_is_tried_once_however_many_rows_there_are(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steering.chat_template import ChatTemplate

    tried: list[None] = []
    try_out = ChatTemplate._try_out
    monkeypatch.setattr(ChatTemplate, "_try_out", lambda self: (tried.append(None), try_out(self))[1])
    done("train", "--data", "tone=messages.jsonl", *PLACE, "--method", "caa", "--out", "checkpoints/mine")
    assert len(tried) == 1


def test_a_sweep_under_another_template_is_measured_anew(here: Path, read: list[str]) -> None:
    sweep = ["--data", "tone=rendered.jsonl", *PLACE, "--method", "caa", "--multipliers", "1", "--out", "swept", *JUDGE]
    for options, times in (([], 1), ([], 1), (other(here), 2), (other(here, '{"mood": "loud"}'), 3)):
        done("sweep", *sweep, *options)
        assert len({text.split("Where")[1].split("?")[1] for text in read}) == times


def test_judged_prompts_may_be_conversations(here: Path, read: list[str]) -> None:
    system = {"role": "system", "content": "Be kind."}
    asked = [{"role": "user", "content": "Where?"}]
    answered = [*asked, {"role": "assistant", "content": "Here."}]
    dump(
        here / "mixed.jsonl",
        [
            {"messages": [system, *asked]},
            {"messages": answered, "label": True, "group": 1},
            {"messages": [*answered, *asked]},
            {"prompt": "When?"},
        ],
    )
    (here / "judges_of_mixed.py").write_text(
        "seen = []\n\ndef judge(prompt, text):\n    seen.append(prompt)\n    return {'asked': True}\n"
    )
    done("train", "--data", "tone=rendered.jsonl", *PLACE, "--method", "caa", "--out", "checkpoints/x", "--no-evaluate")
    judged = ["--judge", "judges_of_mixed:judge", "--prompts", "mixed.jsonl", "--max-new-tokens", "2"]
    done("evaluate", "--checkpoint", "checkpoints/x", *judged, "--no-baseline")
    assert list(dict.fromkeys(read)) == [  # those that are shown token by token are read again
        f"{BEGIN}system: Be kind.<|end|>user: Where?<|end|>assistant: ",
        f"{BEGIN}user: Where?<|end|>assistant: ",
        f"{BEGIN}user: Where?<|end|>assistant: Here.<|end|>user: Where?<|end|>assistant: ",
        f"{BEGIN}user: When?<|end|>assistant: ",
    ]
    from importlib import import_module

    assert import_module("judges_of_mixed").seen == [
        "system: Be kind.\nuser: Where?",
        "Where?",
        "user: Where?\nassistant: Here.\nuser: Where?",
        "When?",
    ]
    refused = run("evaluate", "--checkpoint", "checkpoints/x", *judged, "--plain-prompts")
    assert refused.exit_code == 2
    assert "--plain-prompts is for texts, and some of the prompts are conversations" in refused.output
    refused = run("evaluate", "--checkpoint", "checkpoints/x", *judged, model="plain-model")
    assert refused.exit_code == 2
    assert "has no chat template" in refused.output


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, '"messages" must be a list of a user\'s turn, perhaps more, got []'),
        ({"messages": [{"role": "assistant", "content": "Here."}]}, '"messages" must have a turn of the user'),
        ({"messages": [{"role": "user", "content": " "}]}, '"messages" must have a turn of the user'),
        ({"messages": [{"role": "user", "content": "a"}], "prompt": "a"}, '"prompt" and "messages" are two ways'),
    ],
)
def test_a_conversation_that_asks_nothing_is_named(here: Path, row: dict[str, Any], said: str) -> None:
    dump(here / "own.jsonl", [row])
    judge = ["--judge", "judges_of_chats:judge", "--prompts", "own.jsonl"]
    result = run("sweep", "--data", "tone=prompts.jsonl", *PLACE, "--out", "x", *judge)
    assert result.exit_code == 2
    assert f"own.jsonl:1: {said}" in result.output
