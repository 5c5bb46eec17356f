"""A model in two processes (gloo, on the CPU): the same answers as in one, and what becomes of both when one ends."""

import json
import multiprocessing
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
import transformers
from starlette.testclient import TestClient

from server.app import create_app
from server.assembly import open_service
from server.config import Settings
from server.engine.model_runner import InFlightStep, ModelRunner
from server.errors import StartupError
from server.loading import check_tensor_parallel
from server.parallel.leader import Leader
from steering.checkpoint import base_model_info
from steering.column import Column
from steering.sharding import why_not_sharded
from steering.types import Gate, Reading, Site
from tests.server.conftest import World, columns, tiny_llama, wait_until, write
from tests.server.shards import compare_with_whole
from tests.server.test_process import LONG, PROMPT, alike, events, started

pytestmark = pytest.mark.timeout(300)  # a second process starts, and imports all that it needs


def heads_columns() -> list[Column]:
    """At the input of an attention's output projection, of which each process has its own heads; gates that read it."""
    random = torch.Generator().manual_seed(7)

    def column(attribute: str, site: str, **more: Any) -> Column:
        vector, weight = (scale * torch.randn(32, generator=random) for scale in (10, 1))
        given: dict[str, Any] = {"gate": Gate.SIGMOID, "keep_norm": True, "gate_bias": 2.0, "range": (-2.0, 2.0)}
        return Column(
            attribute=attribute, site=Site.parse(site), vector=vector, gate_weight=weight, **given | more
        )  # fmt: skip

    heads = Site.parse("1.attn_heads")
    return [
        column("head", "1.attn_heads"),
        column("late", "2.residual", reads=Reading(heads, latched=True)),
        column("mlp", "2.mlp_output", gate=Gate.LINEAR, reads=Reading(heads)),
    ]


@pytest.fixture(scope="module")
def folder(checkpoints: Path, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sharded") / "checkpoints"
    shutil.copytree(checkpoints, root)
    write(root, "heads", "1", base_model_info(model, "tiny", None), heads_columns())
    write(root, "demo", "3", base_model_info(model, "tiny", None), columns(32, seed=9))
    return root


@pytest.fixture(scope="module")
def one(settings: Settings, folder: Path) -> Iterator[World]:
    app = create_app(settings.model_copy(update={"checkpoints": folder}))
    with TestClient(app) as client:
        yield World(app, client)


@pytest.fixture(scope="module")
def two(settings: Settings, folder: Path, one: World) -> Iterator[World]:
    app = create_app(settings.model_copy(update={"checkpoints": folder, "tensor_parallel_size": 2}))
    with TestClient(app) as client:
        (shard,) = (child for child in multiprocessing.active_children() if child.name == "shard 1")
        yield World(app, client)
    assert shard.exitcode == 0


BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"temperature": 0, "max_new_tokens": 24, "attributes": {}}),
    ("/generate", {"temperature": 0, "max_new_tokens": 24, "logprobs": 3, "trace": True}),
    ("/generate", {"prompt": [PROMPT, "a"], "n": 3, "seed": 5, "max_new_tokens": 24, "baseline": True}),
    ("/generate", {"temperature": 0, "max_new_tokens": 24, "checkpoint": "heads", "trace": True, "baseline": True}),
    ("/generate", {"temperature": 0, "max_new_tokens": 9, "checkpoint": "heads", "attributes": {"head": -1.5}}),
    ("/generate", {"seed": 3, "max_new_tokens": 20, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "top_p": 0.9}),
    ("/generate", {"seed": 3, "max_new_tokens": 20, "steering": [{"checkpoint": "heads"}, {"checkpoint": "other"}]}),
    ("/compare", {"seed": 4, "max_new_tokens": 16, "arms": [{"name": "a", "attributes": {}}, {"name": "b"}]}),
    ("/score", {"continuations": [" The sky", " is green."], "attributes": {"true": 1}}),
    ("/v1/completions", {"model": "tiny", "echo": True, "logprobs": 2, "max_tokens": 5, "seed": 1}),
]


@pytest.mark.parametrize("number", range(len(BODIES)))
def test_answers_are_those_of_one_process(one: World, two: World, number: int) -> None:
    path, more = BODIES[number]
    body = {"prompt": PROMPT} | more
    alone, together = (world.client.post(path, json=body) for world in (one, two))
    assert together.status_code == alone.status_code == 200, together.text
    assert alike(together.json(), alone.json()), (together.text, alone.text)


def test_columns_at_heads_steer(two: World) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_new_tokens": 9, "checkpoint": "heads"}
    texts = {
        two.post(**body, attributes=attributes)["results"][0]["text"]
        for attributes in ({}, {"head": 1}, {"late": 1}, {"mlp": 1})
    }
    assert len(texts) == 4, "the test steers too weakly to prove anything"


def test_texts_with_different_steering_share_passes(one: World, two: World) -> None:
    """More texts than there are places, so that some wait; each with its own multipliers."""
    arms = [
        {"name": str(index), "attributes": {"kind": index / 8 - 1, "fair": 1 - index / 8}} for index in range(16)
    ] + [{"name": "heads", "checkpoint": "heads"}, {"name": "plain", "attributes": {}}]
    body = {"prompt": PROMPT, "temperature": 0, "max_new_tokens": 30, "n": 2, "arms": arms}
    alone, together = (world.client.post("/compare", json=body).json() for world in (one, two))
    assert alike(together, alone), (together, alone)
    assert two.service.engine.stats.largest_batch == 32


def test_streams_are_those_of_one_process(one: World, two: World) -> None:
    body = {"prompt": PROMPT, "seed": 7, "max_new_tokens": 40, "stream": True, "ignore_eos": True, "n": 3}
    alone, together = (world.client.post("/generate", json=body) for world in (one, two))
    assert together.status_code == 200
    assert alike(events(together.text), events(alone.text)), (together.text, alone.text)


def test_a_checkpoint_comes_and_goes_in_all_processes(one: World, two: World) -> None:
    """And the columns that come after it are not mistaken for it, nor is a refused one anywhere."""
    body = {"prompt": PROMPT, "temperature": 0, "max_new_tokens": 20, "checkpoint": "demo"}
    texts = []
    for version in ("1", "2", "3"):
        for world in (one, two):
            assert world.client.post("/checkpoints/foreign/load").status_code == 409
            changed = world.client.post("/checkpoints/demo/activate", json={"version": version})
            assert changed.status_code == 200, changed.text
        alone, together = (world.post(**body)["results"][0] for world in (one, two))
        assert together["text"] == alone["text"]
        assert together["steering"]["version"] == version
        texts.append(together["text"])
    assert len(set(texts)) == 3, "the test steers too weakly to prove anything"


def test_a_pass_is_begun_before_the_tokens_of_the_one_before_are_known(
    one: World, two: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs: the other process gets them from device to device."""
    arms = [{"name": "a"}, {"name": "b", "checkpoint": "heads"}, {"name": "c", "attributes": {}}]
    body = {"prompt": PROMPT, "seed": 5, "n": 4, "max_new_tokens": 30, "presence_penalty": 0.3, "arms": arms}
    alone = one.client.post("/compare", json=body).json()
    begun: list[int] = []
    next_ids = InFlightStep.next_ids
    monkeypatch.setattr(InFlightStep, "next_ids", lambda *given: begun.append(1) or next_ids(*given))
    monkeypatch.setattr(ModelRunner, "overlaps", property(lambda runner: True))
    together = two.client.post("/compare", json=body).json()
    assert alike(together, alone), (together, alone)
    assert len(begun) > 20


def test_a_prompt_is_found_in_the_cache(one: World, two: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a block of it that is not full, which is copied."""
    copied: list[int] = []
    copy = Leader.copy
    monkeypatch.setattr(Leader, "copy", lambda leader, copies: copied.append(len(copies)) or copy(leader, copies))
    body = {"prompt": PROMPT * 2, "temperature": 0, "max_new_tokens": 12, "attributes": {"kind": 1}, "n": 2}
    before = two.service.engine.status.cached_tokens
    first, again = (two.post(**body)["results"][0]["text"] for _ in range(2))
    assert again == first == one.post(**body)["results"][0]["text"]
    assert two.service.engine.status.cached_tokens > before
    assert copied


def test_every_architecture_with_a_plan_has_the_logits_of_the_whole_model(tmp_path: Path) -> None:
    """Both processes are started here: all models one after the other, in the same two."""
    compare_with_whole(tmp_path)


def test_a_shard_that_is_killed_ends_all_with_a_message(settings: Settings, tmp_path: Path) -> None:
    with started(settings, tmp_path, "--tensor-parallel-size", "2") as server:
        (engine,) = (one for one in server.children() if one.children())
        (shard,) = (one for one in engine.children() if "resource_tracker" not in " ".join(one.cmdline()))
        answers: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: answers.append(server.client.post("/generate", json={**LONG, "n": 120}))
        )
        asking.start()
        wait_until(lambda: server.metric("matsteer_num_requests_open") > 0)
        shard.kill()
        asking.join(20)
        assert server.supervisor.wait(20) == 1
        said = server.said.read_text()
    assert [answer.status_code for answer in answers] == [503]
    assert "shard 1 of the model has ended (killed by signal 9): this process ends" in said
    assert "the engine's process has ended (exit status 1): the server ends" in said


def test_a_server_that_is_told_to_end_leaves_nothing_behind(settings: Settings, tmp_path: Path) -> None:
    """Nor does one that was killed, once the next one has started."""
    (tmp_path / "matsteer-run-killed").mkdir()

    def folders() -> list[Path]:
        return list(tmp_path.glob("matsteer-run-*"))

    with started(settings, tmp_path, "--tensor-parallel-size", "2", TMPDIR=str(tmp_path)) as server:
        assert "matsteer-run-killed" not in {path.name for path in folders()}
        assert len(folders()) == 2, "of the supervisor, and of the processes of the model"
        everybody = psutil.Process(server.supervisor.pid).children(recursive=True)
        server.supervisor.terminate()
        assert server.supervisor.wait(30) == 0
        psutil.wait_procs(everybody, 20)  # of multiprocessing, too, which says what is left
        assert "leaked" not in server.said.read_text()
    assert folders() == []


# --- what is refused ------------------------------------------------------------------------------


def test_heads_that_cannot_be_shared_equally_are_refused(settings: Settings) -> None:
    with pytest.raises(
        StartupError, match="tensor_parallel_size is 3, and its 4 attention heads cannot be shared equally by 3"
    ):
        open_service(settings.model_copy(update={"tensor_parallel_size": 3}))
    config = tiny_llama(64).config
    assert why_not_sharded(config, 4) == "its 2 heads of keys and values cannot be shared equally by 4"
    assert why_not_sharded(config, 2) is None


def test_models_that_cannot_be_sharded_are_refused(settings: Settings, tmp_path: Path) -> None:
    assert "no tensor-parallel plan" in (why_not_sharded(transformers.GPT2Config(), 2) or "")
    quantized = tiny_llama(64).config
    quantized.quantization_config = {"quant_method": "fp8"}
    assert why_not_sharded(quantized, 2) == "its weights are quantized"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    said = {"base_model_name_or_path": settings.model, "peft_type": "LORA"}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    sharded = settings.model_copy(update={"tensor_parallel_size": 2, "model": str(adapter)})
    with pytest.raises(StartupError, match="tensor_parallel_size is 2, and it is a LoRA adapter"):
        check_tensor_parallel(sharded)
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(StartupError, match="tensor_parallel_size is 2, and it is a GGUF file"):
        check_tensor_parallel(sharded.model_copy(update={"model": str(tmp_path / "model.gguf")}))


def test_shards_need_gpus_of_their_own(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded = settings.model_copy(update={"tensor_parallel_size": 2})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(StartupError, match="tensor_parallel_size: 2: this machine has 1 CUDA devices"):
        check_tensor_parallel(sharded.model_copy(update={"device": "cuda"}))
    with pytest.raises(StartupError, match=r"tensor_parallel_size: 2: with device cpu the GPUs .* hidden"):
        check_tensor_parallel(sharded)


@pytest.mark.parametrize("more", [{"engine_process": "false"}, {"ray": True}, {"device": "cuda:1"}])
def test_settings_that_shards_cannot_have_are_refused(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(more))} is .*, but tensor_parallel_size is 2"):
        Settings(tensor_parallel_size=2, **more)
