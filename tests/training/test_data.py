"""Broken data is named by file and line; no question is ever on two sides of a split."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data import Form, Sample, Split, Turn, check_leaks, load_data, split_samples
from training.data.samples import question_sample
from training.data.splits import SPLITS, dump_splits, group_id, read_splits, split_as_trained
from training.errors import DataError


def write(folder: Path, *lines: str) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_rows_become_samples(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '{"prompt": "Q: Sky? A:", "completion": " Blue", "label": true}',
        "",
        '{"text": "It is so.", "label": 0, "attribute": "civility", "group": 7, "split": "dev"}',
    )
    assert load_data([f"truthfulness={path}"]) == [
        Sample("truthfulness", "Q: Sky? A:", " Blue", True, "Q: Sky? A:", None),
        Sample("civility", "", "It is so.", False, "7", Split.DEV),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "Q', "not valid JSON"),
        ('{"text": "a", "label": ' + "1" * 5000 + "}", "not valid JSON (Exceeds the limit"),
        ("[1]", "expected a JSON object, got list"),
        ('{"promt": "Q", "completion": " a", "label": true}', 'there is no field "promt"; did you mean "prompt"?'),
        ('{"text": "a", "Label": true}', 'there is no field "Label"; did you mean "label"?'),
        ('{"text": "a", "label": 1, "splits": "dev"}', 'there is no field "splits"; did you mean "split"?'),
        ('{"text": "a", "label": 1, "weight": 2}', 'there is no field "weight"; there are text, prompt, completion'),
        ('{"text": "a", "label": 1, "label": 0}', '"label" is there twice'),
        ('{"text": "a", "completion": "b", "label": 1}', '"text" and "completion" are two ways to say one thing'),
        ('{"text": "a", "prompt": "b", "label": 1}', '"prompt" goes with "completion", not with "text"'),
        ('{"text": "a \\ud83d", "label": 1}', '"text" holds half of a surrogate pair'),
        ('{"text": "a", "label": 1, "group": "\\udc00"}', '"group" holds half of a surrogate pair'),
        ('{"text": "a", "label": "true"}', "got 'true'"),
        ('{"label": 1}', 'needs "prompt" and "completion", or "text", or "messages"'),
        ('{"text": "", "label": 1}', '"text" must be a non-empty string'),
        ('{"prompt": 3, "completion": "a", "label": 1}', '"prompt" must be a string, got 3'),
        ('{"prompt": "a", "completion": " ", "label": 1}', '"completion" must be a non-empty string'),
        ('{"text": "a"}', '"label" must be true, false, 1 or 0, got None'),
        ('{"text": "a", "label": "yes"}', "got 'yes'"),
        ('{"text": "a", "label": 2}', "got 2"),
        ('{"text": "a", "label": 0.5}', "got 0.5"),
        ('{"text": "a", "label": 1, "group": ""}', '"group" must be'),
        ('{"text": "a", "label": 1, "group": true}', '"group" must be'),
        ('{"text": "a", "label": 1, "attribute": null}', '"attribute" must be'),
        ('{"text": "a", "label": 1, "split": "valid"}', "\"split\" must be train, dev or test, got 'valid'"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line(tmp_path: Path, line: str, complaint: str) -> None:
    path = write(tmp_path, '{"text": "a", "label": 1}', line)
    with pytest.raises(DataError) as caught:
        load_data([f"x={path}"])
    assert str(caught.value).startswith(f"{path}:2: ")
    assert complaint in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read: No such file"):
        load_data([f"x={tmp_path / 'gone.jsonl'}"])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no samples"):
        load_data([f"x={tmp_path / 'empty.jsonl'}"])
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        load_data([f"x={tmp_path / 'binary.jsonl'}"])
    (tmp_path / "latin.jsonl").write_bytes('{"text": "café", "label": 1}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl is not UTF-8 text"):
        load_data([f"x={tmp_path / 'latin.jsonl'}"])


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.csv", "data.tsv", "data.jsonl.gz", "data.txt"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a Git LFS pointer.*`git lfs pull`"),
        (b"PAR1\x15\x04", "is a Parquet table: make JSON lines of it"),
        (b"PK\x03\x04", "is a zip archive or a spreadsheet"),
        ('{"text": "a", "label": 1}'.encode("utf-16"), "is UTF-16, not UTF-8 text"),
        (
            gzip.compress(b'{"text": "a"}')[:-8],
            "is a gzip archive: give it a name that ends in .gz|is not a whole gzip file",
        ),
    ],
    ids=["pointer", "parquet", "zip", "utf-16", "gzip"],
)
def test_files_of_another_kind_are_said_to_be_what_they_are(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} ({said})"):
        load_data([f"x={tmp_path / name}"])


PLAIN = [
    Sample("truthfulness", "Q: Sky? A:", " Blue", True, "Q: Sky? A:", None),
    Sample("civility", "", 'It is "so".', False, "7", Split.DEV),
]


@pytest.mark.parametrize(("name", "comma"), [("data.csv", ","), ("data.tsv", "\t")])
@pytest.mark.parametrize("yes", ["true", "TRUE", "True", "1", " true "])
@pytest.mark.parametrize("no", ["false", "False", "0"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_tables_say_true_and_false_in_words(
    tmp_path: Path, name: str, comma: str, yes: str, no: str, end: str, mark: str
) -> None:
    rows = [
        ["prompt", "completion", "text", "label", "attribute", "group", "split"],
        ["Q: Sky? A:", " Blue", "", yes, "", "", ""],
        ["", "", '"It is ""so""."', no, "civility", "7", "dev"],
    ]
    (tmp_path / name).write_bytes((mark + "".join(comma.join(row) + end for row in rows)).encode())
    assert load_data([f"truthfulness={tmp_path / name}"]) == PLAIN


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("text,label\na,yes\n", ":2: \"label\" must be true, false, 1 or 0, got 'yes'"),
        ("text,label\na,2\n", ":2: \"label\" must be true, false, 1 or 0, got '2'"),
        ("text,label\na,1.0\n", ":2: \"label\" must be true, false, 1 or 0, got '1.0'"),
        ("text,label\na,\n", ":2: \"label\" must be true, false, 1 or 0, got ''"),
        ("text,split,label\na,valid,1\n", ":2: \"split\" must be train, dev or test, got 'valid'"),
        ("text,lable\na,1\n", ':2: there is no field "lable"; did you mean "label"?'),
        (",text,label\n0,a,1\n", ':2: there is no field ""; there are text'),
        ("text,label,label\na,1,0\n", ':1: the header names "label" twice'),
        ("messages,label\nhello,1\n", ':2: "messages" must be a list'),
        ("text,label\n", "holds no samples"),
        ("", "holds no samples"),
    ],
)
def test_what_a_table_does_not_say_in_these_words_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "data.csv").write_text(content)
    with pytest.raises(DataError) as caught:
        load_data([f"x={tmp_path / 'data.csv'}"])
    assert said in str(caught.value)


def test_one_object_over_several_lines_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps({"text": "a", "label": True}, indent=2))
    assert [sample.text for sample in load_data([f"x={tmp_path / 'one.json'}"])] == ["a"]
    (tmp_path / "one.json").write_text(json.dumps({"data": [{"text": "a", "label": True}]}, indent=2))
    with pytest.raises(DataError, match=r'one\.json:1: there is no field "data"'):
        load_data([f"x={tmp_path / 'one.json'}"])


def test_names_that_are_no_text_are_refused() -> None:
    with pytest.raises(DataError, match="the terminal's own encoding"):
        load_data(["x\udcff=data.jsonl"])


def chat(*turns: tuple[str, str], **fields: object) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return json.dumps({"messages": messages, "label": True} | fields)


ASKED, ANSWERED = ("user", "Sky?"), ("assistant", " Blue.")


def test_conversations_are_samples_whose_answer_is_the_last_turn(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        chat(ASKED, ANSWERED),
        chat(("system", "Be brief."), ASKED, ANSWERED, ("user", "Sea?"), ("assistant", "Blue"), label=0, split="dev"),
    )
    first, second = load_data([f"x={path}"])
    assert first == Sample("x", "Sky?", "Blue.", True, "Sky?", None, (Turn(*ASKED),))
    assert first.form is Form.CHAT
    assert second.turns == (Turn("system", "Be brief."), Turn(*ASKED), Turn(*ANSWERED), Turn("user", "Sea?"))
    assert (second.completion, second.label, second.split) == ("Blue", False, Split.DEV)
    assert second.group == second.prompt == "system: Be brief.\nuser: Sky?\nassistant:  Blue.\nuser: Sea?"


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ("Sky?", '"messages" must be a list'),
        ([{"role": "assistant", "content": "Blue"}], '"messages" must be a list of a user\'s turn'),
        ([{"role": "user", "content": "a"}] * 2, 'the last of "messages" must be the assistant'),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}], "which is not empty"),
        ([{"role": "user", "content": "a"}, "b"], "messages[1] must be an object with role and content, got 'b'"),
        ([{"role": "nurse", "content": "a"}, {}], 'messages[0]: "role" must be one of system, developer, user'),
        ([{"role": "user", "content": ["a"]}, {}], "messages[0]: \"content\" must be a string, got ['a']"),
        ([{"role": "user", "contents": "a"}, {}], 'there is no field "contents"; did you mean "content"?'),
        ([{"role": "user", "content": "\ud83d"}, {}], '"messages" holds half of a surrogate pair'),
    ],
)
def test_a_broken_conversation_is_named(tmp_path: Path, messages: object, complaint: str) -> None:
    path = write(tmp_path, json.dumps({"messages": messages, "label": 1}))
    with pytest.raises(DataError) as caught:
        load_data([f"x={path}"])
    assert str(caught.value).startswith(f"{path}:1: ")
    assert complaint in str(caught.value)


def test_prompts_become_turns_of_a_user_where_that_is_asked(tmp_path: Path) -> None:
    path = write(tmp_path, '{"prompt": "Sky?", "completion": " Blue.", "label": true}')
    (sample,) = load_data([f"x={path}"], chat=True)
    assert (sample.turns, sample.completion) == ((Turn("user", "Sky?"),), "Blue.")
    (row,) = load_data([f"x={write(tmp_path, chat(ASKED, ANSWERED))}"])
    assert sample == row, "two ways to write one conversation"


def test_a_known_data_sets_question_is_asked_without_what_plain_text_needs_around_it() -> None:
    sample = question_sample("x", " Sky? ", "Blue. ", True, group="g").as_chat()
    assert (sample.turns, sample.completion) == ((Turn("user", "Sky?"),), "Blue.")


def test_what_has_no_prompt_is_no_conversation(tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": "The sky is blue.", "label": true}')
    with pytest.raises(DataError, match=r"data\.jsonl:1: --chat makes the prompt a user's turn, and this text has no"):
        load_data([f"x={path}"], chat=True)


def test_conversations_beside_plain_texts_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, chat(ASKED, ANSWERED), '{"prompt": "Sea?", "completion": " Blue.", "label": true}')
    with pytest.raises(DataError, match="with --chat the prompts become turns of a user too"):
        load_data([f"x={path}"])
    assert {sample.form for sample in load_data([f"x={path}"], chat=True)} == {Form.CHAT}


def test_all_broken_rows_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    broken = [f'{{"text": "a{n}", "label": {n}}}' for n in range(2, 27)]
    path = write(tmp_path, '{"text": "a", "label": 1}', *broken, "{")
    with pytest.raises(DataError) as caught:
        load_data([f"x={path}"])
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path} has 26 problems:"
    assert lines[1] == f'  {path}:2: "label" must be true, false, 1 or 0, got 2.'
    assert len(lines) == 22
    assert lines[-1] == "  and 6 more"


def test_a_text_with_both_labels_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = ['{"text": "yes", "label": 1, "group": 1}', '{"text": "yes", "label": 0, "group": 2}']
    path = write(tmp_path, *rows, '{"text": "yes", "label": 0, "attribute": "other"}', '{"text": "Yes", "label": 0}')
    assert [(s.attribute, s.text) for s in load_data([f"x={path}"])] == [("other", "yes"), ("x", "Yes")]
    assert caplog.messages == ["x: texts that have both labels are left out: 1, as 'yes'."]


@pytest.mark.parametrize("spec", ["data.jsonl", "=data.jsonl", "name=", "", "name=bbq:"])
def test_data_is_given_as_name_and_path(spec: str) -> None:
    with pytest.raises(DataError, match="NAME=PATH"):
        load_data([spec])


def make(group: str, attribute: str = "t", text: str = "", split: Split | None = None) -> Sample:
    return Sample(attribute, f"{group} {text}", " a", True, group, split)


def test_groups_are_shared_out_four_one_five() -> None:
    samples = [make(f"g{n // 2}", text=str(n)) for n in range(200)]
    placed = split_samples(samples, seed=3)
    assert {split: sum(s.split is split for s in placed) for split in Split} == {
        Split.TRAIN: 80,
        Split.DEV: 20,
        Split.TEST: 100,
    }
    assert [s.text for s in placed] == [s.text for s in samples]


def test_every_attribute_gets_its_shares() -> None:
    samples = [make(f"a{n}", "a") for n in range(10)] + [make(f"b{n}", "b") for n in range(100)]
    placed = split_samples(samples)
    assert sum(s.split is Split.DEV for s in placed if s.attribute == "a") == 1
    assert sum(s.split is Split.DEV for s in placed if s.attribute == "b") == 10


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from("ab")), min_size=1, max_size=40),
    st.integers(0, 5),
    st.randoms(),
)
def test_the_split_depends_on_groups_and_seed_alone(rows: list[tuple[int, str]], seed: int, rng: object) -> None:
    samples = [make(f"g{group}", attribute, str(n)) for n, (group, attribute) in enumerate(rows)]
    placed = {s.group: s.split for s in split_samples(samples, seed=seed)}
    shuffled = list(samples)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert {s.group: s.split for s in split_samples(shuffled, seed=seed)} == placed


def test_an_explicit_split_wins_for_its_whole_group() -> None:
    placed = split_samples([make("g", text="1", split=Split.DEV), make("g", text="2"), make("h")])
    assert [s.split for s in placed[:2]] == [Split.DEV, Split.DEV]


def test_leaks_are_refused() -> None:
    with pytest.raises(DataError, match="Group 'g' is in two splits, dev and test"):
        split_samples([make("g", split=Split.DEV), make("g", split=Split.TEST)])
    same = [Sample("t", "Q:", " a", True, "g", Split.TRAIN), Sample("t", "q: ", "A", False, "h", Split.TEST)]
    with pytest.raises(DataError, match=r"The text 'q: A' is in two splits, train and test \(groups 'g' and 'h'\)"):
        check_leaks(same)


def test_groups_that_share_a_text_are_split_as_one() -> None:
    chain = [Sample("t", "", f"text {n // 2}", True, f"g{(n + 1) // 2}") for n in range(40)]
    placed = split_samples([*chain, *(make(f"h{n}") for n in range(20))])
    assert len({s.split for s in placed[:40]}) == 1
    assert {s.group for s in placed[:40]} == {f"g{n}" for n in range(21)}
    apart = [Sample("t", "", "a", True, "g", Split.TRAIN), Sample("t", "", "A ", True, "h", Split.TEST)]
    with pytest.raises(DataError, match="Groups 'g' and 'h' share a text and are in two splits, train and test"):
        split_samples(apart)


SHARED = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from("ab"), st.integers(0, 14), st.sampled_from([None, Split.TEST])),
    min_size=1,
    max_size=40,
)


@settings(deadline=None)
@given(SHARED, st.integers(0, 3))
def test_no_group_and_no_text_is_in_two_splits(rows: list[tuple[int, str, int, Split | None]], seed: int) -> None:
    samples = [
        Sample(attribute, "", f"text {text}", True, f"g{group}", split) for group, attribute, text, split in rows
    ]
    placed = split_samples(samples, seed=seed)
    for key in (lambda s: s.group, lambda s: (s.attribute, s.text)):
        splits: dict[object, set[Split | None]] = {}
        for sample in placed:
            splits.setdefault(key(sample), set()).add(sample.split)
        assert all(len(found) == 1 for found in splits.values())
    assert all(after.split is Split.TEST for before, after in zip(samples, placed, strict=True) if before.split)


def test_where_a_data_set_has_its_own_test_part_the_rest_is_train_and_dev() -> None:
    own = [make(f"t{n}", split=Split.TEST) for n in range(5)]
    placed = split_samples([*own, *(make(f"g{n}") for n in range(50)), *(make(f"h{n}", "other") for n in range(10))])
    count = {
        (name, split.value): sum(s.attribute == name and s.split is split for s in placed)
        for name in ("t", "other")
        for split in Split
    }
    assert count == {
        ("t", "train"): 40, ("t", "dev"): 10, ("t", "test"): 5,
        ("other", "train"): 4, ("other", "dev"): 1, ("other", "test"): 5,
    }  # fmt: skip


def test_a_checkpoint_keeps_its_splits_whatever_the_seed_order_and_company(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    samples = [make(f"g{n}", text=str(k)) for n in range(30) for k in range(2)]
    trained = split_samples(samples, seed=1)
    (tmp_path / SPLITS).write_bytes(dump_splits(trained, seed=1))
    before = {s.group: s.split for s in trained}
    assert read_splits(tmp_path) == {group_id(group): split for group, split in before.items()}
    later = split_as_trained([*(make(f"new{n}") for n in range(20)), *reversed(samples)], tmp_path, seed=7)
    assert {s.group: s.split for s in later if s.group in before} == before
    assert {s.split for s in later if s.group not in before} == set(Split)
    assert caplog.messages == [
        "20 groups of t were not there when the checkpoint was trained: they are split by seed 7."
    ]
    tied = [Sample("t", "", samples[0].text, True, "renamed"), *samples]
    assert split_as_trained(tied, tmp_path, seed=7)[0].split is before["g0"]


def test_without_saved_splits_the_seed_decides_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = [make(f"g{n}") for n in range(10)]
    assert split_as_trained(samples, tmp_path, seed=3) == split_samples(samples, seed=3)
    assert len(caplog.messages) == 1
    assert "has no splits.json" in caplog.messages[0]
    split_as_trained(split_samples(samples), tmp_path)
    assert len(caplog.messages) == 1


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"format_version": 2, "splits": {}}', '{"format_version": 1, "splits": {"a": {"x": []}}}'],
)
def test_splits_that_cannot_be_read_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / SPLITS).write_text(content)
    with pytest.raises(DataError, match=r"splits\.json does not hold the splits of a checkpoint"):
        split_as_trained([make("g")], tmp_path)


def test_fractions_must_be_shares() -> None:
    with pytest.raises(DataError, match="sum to 1"):
        split_samples([make("g")], fractions=(0.5, 0.1, 0.5))
