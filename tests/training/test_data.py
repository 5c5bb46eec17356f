"""Broken data is named by file and line; no question is ever on two sides of a split."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data import Sample, Split, check_leaks, load_data, split_samples
from training.data.jsonl import load_jsonl
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
    assert load_jsonl(path, "truthfulness") == [
        Sample("truthfulness", "Q: Sky? A:", " Blue", True, "Q: Sky? A:", None),
        Sample("civility", "", "It is so.", False, "7", Split.DEV),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "Q', "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"label": 1}', 'needs "prompt" and "completion", or "text"'),
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
        load_jsonl(path, "x")
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


@pytest.mark.parametrize("spec", ["data.jsonl", "=data.jsonl", "name=", ""])
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


def test_fractions_must_be_shares() -> None:
    with pytest.raises(DataError, match="sum to 1"):
        split_samples([make("g")], fractions=(0.5, 0.1, 0.5))
