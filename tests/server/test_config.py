"""Bad settings end the start with one sentence that names them."""

from pathlib import Path

import pytest

from server.assembly import open_service
from server.config import Settings, load_settings
from server.errors import StartupError
from server.opening.model import load_model


def test_the_environment_sets_what_the_command_line_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MATSTEER_PORT", "9000")
    monkeypatch.setenv("MATSTEER_HOST", "0.0.0.0")
    settings = load_settings(host="127.0.0.2", model=None)
    assert (settings.host, settings.port) == ("127.0.0.2", 9000)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "http"),
        ("PORT", "0"),
        ("DEVICE", "tpu"),
        ("DTYPE", "int3"),
        ("MAX_BATCH_ROWS", "1"),
        ("STALL_S", "-1"),
        ("STALL_S", "nan"),
        ("LOG_LEVEL", "loud"),
        ("CHECKPOINT", "@"),
    ],
)
def test_a_bad_value_is_one_sentence_with_the_setting_and_the_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"MATSTEER_{name}", value)
    with pytest.raises(StartupError) as caught:
        load_settings()
    assert "\n" not in caught.value.message
    assert name.lower() in caught.value.message
    assert value in caught.value.message


def test_a_setting_that_does_not_exist_is_refused() -> None:
    with pytest.raises(StartupError, match="no setting called 'colour'"):
        load_settings(colour="red")


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1  # type: ignore[misc]


@pytest.mark.parametrize("model", ["/no/such/folder", "./nowhere", "nobody/nothing"])
def test_a_model_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StartupError) as caught:
        load_model(Settings(model=model, checkpoints=tmp_path))
    assert model in caught.value.message
    assert "\n" not in caught.value.message


def test_a_missing_demo_model_says_how_to_choose_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("server.config._shipped", lambda name: tmp_path / name)
    with pytest.raises(StartupError, match="--model ID_OR_PATH"):
        load_model(Settings())


def test_a_folder_without_a_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="cannot be loaded"):
        load_model(Settings(model=str(tmp_path)))


@pytest.mark.parametrize(("checkpoint", "why"), [("nowhere", "no checkpoint"), ("foreign", "hidden_size")])
def test_a_checkpoint_that_cannot_be_active_ends_the_start(settings: Settings, checkpoint: str, why: str) -> None:
    with pytest.raises(StartupError, match=why):
        open_service(settings.model_copy(update={"checkpoint": checkpoint}))


def test_a_checkpoints_folder_that_is_not_there_ends_the_start(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="no checkpoints folder"):
        open_service(settings.model_copy(update={"checkpoints": tmp_path / "none"}))


def test_an_architecture_that_cannot_be_steered_ends_the_start(tmp_path: Path, spelling: object) -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, is_decoder=True
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    spelling.save_pretrained(tmp_path)  # type: ignore[attr-defined]
    with pytest.raises(StartupError, match="cannot be steered: BertLMHeadModel"):
        open_service(Settings(model=str(tmp_path), threads=1, device="cpu"))


def test_the_served_name_is_the_id_or_the_folder(tmp_path: Path) -> None:
    (tmp_path / "demo" / "model").mkdir(parents=True)
    assert Settings(model=str(tmp_path / "demo" / "model")).served_name == "demo-model"
    assert Settings(model=str(tmp_path / "demo")).served_name == "demo"
    assert Settings(model="org/name").served_name == "org/name"
    assert Settings(model="org/name", model_name="mine").served_name == "mine"
