"""The server serves every method's checkpoint, and mixes them in one batch and in one request."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from server.app import create_app
from server.config import Settings
from steering import Column, steered
from steering import checkpoint as checkpoints
from tests.training.every_method import RECIPES, read_everywhere, store_all

PROMPT, NEW = "Q: What colour is the sky? A:", 12
ROWS: list[dict[str, float]] = [
    {"iti": 15.0, "ablation": 1.0},
    {"held": 2.0, "mat": 1.0, "clamp": 1.0, "reps": 0.5},
    {"mat": 2.0, "caa": -0.7, "zeroed": 1.0, "meaned": 1.0, "control": 0.4, "actadd": 1.0, "probe": -1.0},
]


@pytest.fixture(scope="module")
def stored(
    llama: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, checkpoints.Checkpoint]]:
    folder = tmp_path_factory.mktemp("served")
    llama.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    made = store_all(llama, tokenizer, read_everywhere(llama, tokenizer), folder / "checkpoints")
    return folder, made


@pytest.fixture(scope="module")
def client(stored: tuple[Path, dict[str, checkpoints.Checkpoint]]) -> Iterator[TestClient]:
    folder, _ = stored
    settings = Settings(
        model=str(folder / "model"), checkpoints=folder / "checkpoints", device="cpu", threads=1, remember=False
    )
    with TestClient(create_app(settings)) as client:
        for name in RECIPES:
            assert client.post(f"/checkpoints/{name}/load").status_code == 200
        yield client


def by_transformers(llama: Any, tokenizer: Any, columns: Sequence[Column], multipliers: Sequence[float]) -> list[int]:
    """The greedy continuation under plain hooks: one prompt alone."""
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.no_grad(), steered(llama, columns, multipliers):
        out = llama.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
    new: list[int] = out[0, ids.shape[1] :].tolist()
    return new


def test_one_batch_steers_each_arm_by_another_method(
    llama: Any, tokenizer: Any, client: TestClient, stored: tuple[Path, dict[str, checkpoints.Checkpoint]]
) -> None:
    arms = [{"name": "unsteered", "attributes": {}}, *({"name": name, "checkpoint": name} for name in RECIPES)]
    body = {"prompt": PROMPT, "arms": arms, "temperature": 0, "max_new_tokens": NEW}
    answer = client.post("/compare", json=body)
    assert answer.status_code == 200, answer.text
    plain, *found = [arm["results"][0]["token_ids"] for arm in answer.json()["arms"]]
    for (name, checkpoint), ids in zip(stored[1].items(), found, strict=True):
        defaults = [column.default_multiplier for column in checkpoint.columns]
        assert ids == by_transformers(llama, tokenizer, checkpoint.columns, defaults), name
    assert sum(ids != plain for ids in found) >= len(found) - 1


@pytest.mark.parametrize("row", ROWS)
def test_one_request_mixes_checkpoints_of_different_methods(
    llama: Any,
    tokenizer: Any,
    client: TestClient,
    stored: tuple[Path, dict[str, checkpoints.Checkpoint]],
    row: dict[str, float],
) -> None:
    steering = [{"checkpoint": name, "attributes": {"truthfulness": value}} for name, value in row.items()]
    body = {"prompt": PROMPT, "steering": steering, "temperature": 0, "max_new_tokens": NEW, "trace": True}
    answer = client.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    (result,) = answer.json()["results"]
    columns = [column for name in row for column in stored[1][name].columns]
    multipliers = [value for name, value in row.items() for _ in stored[1][name].columns]
    assert result["token_ids"] == by_transformers(llama, tokenizer, columns, multipliers)
