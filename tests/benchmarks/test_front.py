"""The front's benchmark on a small scale: its fake engine behind the real front, and its clients."""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from benchmarks.front import MODEL, TEXT, FakeEngine, clients, text_of
from benchmarks.processes import Running
from server.app import app_of
from server.config import Settings
from server.engine.text_builder import Decoders
from server.front import load_tokenizer, open_judging, service_of
from server.process.client import ProcessClient
from server.process.host import listen
from server.tokenizer import Codec
from tests.server.conftest import listening


@pytest.fixture
def path() -> Iterator[Path]:
    """Of a socket: it may have 107 characters."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "engine"


@pytest.mark.parametrize("interval", [1, 8])
def test_every_client_gets_the_whole_text_at_the_engines_pace(interval: int, path: Path) -> None:
    settings = Settings(model=str(MODEL), model_name="fake", max_model_len=2**20, stream_interval=interval)
    tokenizer = load_tokenizer(settings, alone=False)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    streams, tokens, rate = 3, len(ids) + 5, 2000
    fake = FakeEngine(rate, ids)
    codec = Codec(tokenizer, vocab=fake.facts.vocab, context=fake.facts.context)
    client = ProcessClient(path, fake.facts, Decoders.of(codec.decode, codec.decode_all))

    @asynccontextmanager
    async def engine() -> AsyncIterator[None]:
        """In this process, which changes nothing of what it is told."""
        async with await listen(fake, path):
            await client.connect()
            yield
            await client.disconnect()

    app = app_of(service_of(settings, codec, client, open_judging(settings)), engine, None)
    with listening(app, begins=True) as url:
        started = time.monotonic()
        answers = asyncio.run(clients(Running(url, 0), streams, tokens))
        assert time.monotonic() - started > streams * (tokens - 1) / rate
    whole = tokenizer.decode([*ids, *ids[:5]])
    assert [text_of(answer) for answer in answers] == [whole] * streams
    chunks = {answer.count(b"\r\ndata: ") for answer in answers}
    assert min(chunks) > tokens / 2 if interval == 1 else max(chunks) < tokens / 2, chunks
