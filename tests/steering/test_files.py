"""A file that is something else is called what it is, wherever one is opened: vectors, checkpoints, models, texts."""

from pathlib import Path

import pytest

from server.config import Settings
from server.errors import StartupError
from server.loading import load_model
from steering.checkpoint import load
from steering.errors import CheckpointError
from steering.files import mistaken_for
from tests.training.helpers import make_llama, make_tokenizer
from training.data import load_data
from training.errors import DataError, TrainingError
from training.models import load_base

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
DEMO = Path(__file__).parents[2] / "checkpoints/demo/v1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_files_that_may_be_what_they_are_taken_for_are_not_remarked_upon(folder: Path, tmp_path: Path) -> None:
    assert all(mistaken_for(file) is None for file in [*folder.iterdir(), *DEMO.iterdir()])
    for text in ('{"prompt": "<html>"}', "prompt,label\nNot found,true\n", "a"):
        (tmp_path / "text").write_text(text)
        assert mistaken_for(tmp_path / "text") is None
    assert mistaken_for(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "model.safetensors",
            POINTER,
            "model.safetensors is a Git LFS pointer, not the file itself: `git lfs pull`",
        ),
        ("tokenizer.json", POINTER, "tokenizer.json is a Git LFS pointer"),
        ("model.safetensors", b"", "model.safetensors is an empty file"),
        ("config.json", b"<!DOCTYPE html>", "config.json is an HTML page"),
        ("tokenizer.json", None, "there is no tokenizer in it; copy tokenizer.json"),
    ],
)
def test_a_model_folder_with_a_file_that_is_none_is_one_sentence(
    folder: Path, name: str, data: bytes | None, message: str
) -> None:
    if data is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data)
    with pytest.raises(StartupError) as served:
        load_model(Settings(model=str(folder), device="cpu", threads=1))
    with pytest.raises(TrainingError) as trained:
        load_base(str(folder), device="cpu")
    for said in (served.value.message, str(trained.value)):
        assert message in said
        assert "\n" not in said


def test_a_checkpoint_that_git_lfs_has_not_fetched_says_so(tmp_path: Path) -> None:
    for file in DEMO.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "steering.safetensors").write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"steering\.safetensors is a Git LFS pointer"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("facts.jsonl", POINTER, r"facts\.jsonl is a Git LFS pointer"),
        ("facts.csv", POINTER, r"facts\.csv is a Git LFS pointer"),
        ("facts.jsonl.gz", POINTER, r"facts\.jsonl\.gz is a Git LFS pointer"),
        ("facts.parquet", b"PAR1" + bytes(20), r"facts\.parquet is a Parquet table: make JSON lines of it"),
        ("facts.json", b"<!doctype html><p>Not found", r"facts\.json is an HTML page"),
        ("facts.jsonl", b"\x1f\x8b" + bytes(20), "is a gzip archive: give it a name that ends in .gz"),
    ],
)
def test_data_that_is_none_is_called_what_it_is(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_data([f"truth={tmp_path / name}"])
