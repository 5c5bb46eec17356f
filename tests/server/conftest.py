"""A tiny real model with a real tokenizer, checkpoints for it, and a real server: built once, in seconds."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from server.app import create_app
from server.config import Settings
from server.engine.engine import Engine
from server.engine.model_runner import ModelRunner
from server.event_lines import EventLines
from server.service import Service
from steering.checkpoint import BaseModelInfo, base_model_info, save
from steering.column import Column
from steering.types import Gate, Positions, Site

BUSY = 5.0  # seconds that a process may be kept waiting on a machine that has more to do
CONTEXT = 96
END = "<|end|>"
CORPUS = [
    "Q: What colour is the sky? A: The sky is blue.",
    "Q: What colour is grass? A: Grass is green, of course.",
    "Q: Where does a bear live? A: A bear lives in the forest.",
    "Ünïcödé wörds: naïve café, 東京, 🙂 and 🚀.",
]
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE: a character outside ASCII is several tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=320, special_tokens=[END], initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
    fast.chat_template = CHAT
    return fast


def tiny_llama(vocab: int, *, hidden: int = 32, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.25,  # wide enough for texts that differ, and for logits without ties
        eos_token_id=0,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "tiny"
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(model_folder: Path) -> Any:
    """The same weights, never steered: the reference."""
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


def columns(width: int, *, seed: int, strength: float = 3.0) -> list[Column]:
    random = torch.Generator().manual_seed(seed)

    def column(attribute: str, gate: Gate, *, keep_norm: bool = True) -> Column:
        return Column(
            attribute=attribute,
            site=Site.parse("1.attn_output"),
            gate=gate,
            vector=strength * torch.randn(width, generator=random),
            gate_weight=torch.randn(width, generator=random),
            gate_bias=0.1,
            keep_norm=keep_norm,
            range=(-2.0, 2.0),
        )

    return [column("kind", Gate.SIGMOID), column("true", Gate.SIGMOID), column("fair", Gate.CONSTANT)]


def write(root: Path, name: str, version: str, info: BaseModelInfo, made: list[Column], **training: Any) -> Path:
    folder = root / name / version
    save(
        folder,
        name=name,
        version=version,
        method="mat",
        base_model=info,
        columns=made,
        normalize=True,
        positions=Positions.GENERATED,
        training={"seed": 1, **training},
        evaluation={"kind": 0.9},
        card=f"# {name}\n",
    )
    return folder


@pytest.fixture(scope="session")
def checkpoints(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """demo@1, demo@2, other@1 for the model; foreign@1 for another one; damaged@1 for none."""
    root = tmp_path_factory.mktemp("checkpoints")
    info = base_model_info(model, "tiny", None)
    write(root, "demo", "1", info, columns(32, seed=1))
    write(root, "demo", "2", info, columns(32, seed=2))
    write(root, "other", "1", info, columns(32, seed=3))
    wide = base_model_info(tiny_llama(64, hidden=64), "wide", None)
    write(root, "foreign", "1", wide, columns(64, seed=4))
    (write(root, "damaged", "1", info, columns(32, seed=5)) / "steering.safetensors").write_bytes(b"not tensors")
    return root


@dataclass(frozen=True)
class World:
    """A running server."""

    app: FastAPI
    client: TestClient

    @property
    def service(self) -> Service:
        service: Service = self.app.state.service
        return service

    def post(self, **body: Any) -> Any:
        """The answer to a request that must succeed."""
        response = self.client.post("/generate", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def refused(self, **body: Any) -> tuple[int, dict[str, Any]]:
        """Status and error of a request that must not."""
        response = self.client.post("/generate", json=body)
        assert response.status_code >= 400, response.text
        error: dict[str, Any] = response.json()["error"]
        return response.status_code, error


@pytest.fixture(scope="session")
def settings(model_folder: Path, checkpoints: Path) -> Settings:
    return Settings(model=str(model_folder), checkpoints=checkpoints, device="cpu", threads=1, remember=False)


@pytest.fixture(scope="session")
def world(settings: Settings) -> Iterator[World]:
    app = create_app(settings)
    with TestClient(app) as client:
        yield World(app, client)


def event_lines(told: httpx.Response) -> Iterator[str]:
    """The lines of a stream, as they come."""
    lines = EventLines()
    return (line for text in told.iter_text() for line in lines.feed(text))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_until(ready: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if ready():
                return
        except (httpx.HTTPError, psutil.Error):
            pass
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.02)


def hold_steps(runner: ModelRunner, patch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Steps of the runner begin once the second event is set; the first one is, as soon as one is to begin."""
    real, inside, go_on = runner.execute_async, threading.Event(), threading.Event()

    def held(*batch: Any) -> Any:
        inside.set()
        assert go_on.wait(20)
        return real(*batch)

    patch.setattr(runner, "execute_async", held)
    return inside, go_on


async def held_until_queued(engine: Engine, sequences: int) -> None:
    """No step begins from now on until so many sequences wait for one: the next one has them all."""
    go_on = threading.Event()
    engine.call(lambda: go_on.wait(60))
    while engine._queued < sequences:
        await asyncio.sleep(0.005)
    go_on.set()


@contextmanager
def listening(app: FastAPI, *, begins: bool = False) -> Iterator[str]:
    """The address of an app, which runs already, or `begins` and ends with it, behind a real socket."""
    lifespan: Literal["on", "off"] = "on" if begins else "off"
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan=lifespan))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def address(world: World) -> Iterator[str]:
    """The same server behind a real socket."""
    with listening(world.app) as url:
        yield url


@pytest.fixture
def fresh(settings: Settings) -> Iterator[World]:
    """A server of a test's own, to break."""
    app = create_app(settings)
    with TestClient(app) as client:
        yield World(app, client)


@pytest.fixture(scope="session")
def spelling(model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(params=["told at once", "told while the next step runs"])
def overlaps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, and as on a GPU."""
    overlaps = request.param != "told at once"
    monkeypatch.setattr(ModelRunner, "overlaps", property(lambda runner: overlaps))
