"""Models that are opened, and those that are refused."""

from pathlib import Path

import pytest
import torch

from server.assembly import open_cached_runner
from server.config import Settings, load_settings
from server.errors import StartupError
from server.loading import LoadedModel, _dtype, load_model
from tests.broken_models import RAN
from tests.server.test_architectures import tiny


def test_what_is_no_usable_model_ends_the_start_with_one_sentence(broken_model: tuple[str, str]) -> None:
    id, said = broken_model
    with pytest.raises(StartupError, match=said) as caught:
        load_model(Settings(model=id, device="cpu", threads=1))
    assert "\n" not in caught.value.message


def test_code_of_a_folder_runs_where_it_is_trusted_alone(
    model_with_code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"model": str(model_with_code), "device": "cpu", "threads": 1}
    with pytest.raises(StartupError, match="only with --trust-remote-code"):
        load_model(load_settings(**options))
    assert not Path(RAN).exists()
    monkeypatch.setenv("MATSTEER_TRUST_REMOTE_CODE", "true")
    assert type(load_model(load_settings(**options)).model).__name__ == "MysteryModel"


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)]
)
def test_a_gpu_without_bfloat16_computes_in_float16(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with caplog.at_level("INFO"):
        assert _dtype("auto", torch.device("cuda")) is dtype
    assert ("Tesla T4 computes in float16" in caplog.text) == (dtype is torch.float16)
    assert _dtype("float32", torch.device("cuda")) is torch.float32


@pytest.mark.parametrize("where", ["server.loading.exchange_layers", "server.engine.model_runner.ModelRunner.forward"])
def test_a_model_for_which_there_is_no_memory_ends_the_start_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried a lot.\nMore.")

    monkeypatch.setattr(where, fail)
    loaded = LoadedModel(tiny("llama"), None, torch.device("cpu"), frozenset(), 96, 61)
    with pytest.raises(StartupError, match=r"no memory on cpu to serve the model 'm': CUDA out of memory\.") as caught:
        open_cached_runner(Settings(model="m", device="cpu", threads=1), loaded)
    assert "\n" not in caught.value.message
