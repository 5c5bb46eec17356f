"""Bad settings end the start with one sentence that names them."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

from server.assembly import open_service
from server.config import OLD_NAMES, OTHER_VARIABLES, Settings, StepLimits, load_settings, unknown_variables
from server.errors import StartupError
from server.loading import load_model

ROOT = Path(__file__).parents[2]


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
        ("MAX_NUM_SEQS", "1"),
        ("MAX_BATCH_ROWS", "1"),
        ("STEP_TOKENS", "many"),
        ("CACHE_MIB", "-1"),
        ("GPU_MEMORY_UTILIZATION", "0"),
        ("GPU_MEMORY_UTILIZATION", "1.5"),
        ("CPU_KV_CACHE_SHARE", "2"),
        ("BLOCK_SIZE", "0"),
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


@pytest.mark.parametrize(
    "given",
    [
        {"api_key": 7770777},
        {"api_key": ["7770777"]},
        {"admin_key": 7770777},
        {"api_keys": {"alice": "7770777"}},
        {"api_keys": 7770777},
        {"api_keys_file": {"alice": {"key": "7770777"}}},
        {"api_key_everywhere": "7770777"},
        {"api_key_max_rows": "7770777!"},
    ],
)
def test_what_is_given_for_a_key_is_not_shown_whatever_is_wrong_with_it(given: dict[str, Any]) -> None:
    """As an argument of Ray's `serve run`, or in its config file, a value may be of any type."""
    (name,) = given
    with pytest.raises(StartupError, match=f"Bad setting {name} ") as caught:
        load_settings(**given)
    assert "777" not in caught.value.message
    assert "Input " in caught.value.message, "what is wrong is told"


@pytest.mark.parametrize("name", ["API_KEY_EVERYWHERE", "API_KEY_MAX_ROWS", "API_KEY_REQUESTS_PER_MINUTE"])
def test_a_key_in_a_variable_beside_its_own_is_not_shown(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"MATSTEER_{name}", "sk-7770777")
    with pytest.raises(StartupError, match=f"MATSTEER_{name}") as caught:
        load_settings()
    assert "777" not in caught.value.message


def test_a_setting_that_does_not_exist_is_refused() -> None:
    with pytest.raises(StartupError, match="no setting called 'colour'"):
        load_settings(colour="red")
    with pytest.raises(StartupError, match=r"no setting called 'prot'\. Is MATSTEER_PORT meant\?"):
        load_settings(prot=9000)


OLD = [
    ("max_batch_rows", "max_num_seqs", 7),
    ("step_tokens", "max_num_batched_tokens", 700),
    ("cache_mib", "kv_cache_mib", 70),
]


@pytest.mark.parametrize(("old", "new", "value"), OLD)
def test_a_setting_can_be_given_by_its_old_name(
    monkeypatch: pytest.MonkeyPatch, old: str, new: str, value: int
) -> None:
    assert getattr(load_settings(**{old: value}), new) == value
    assert getattr(Settings(**{old: value}), new) == value
    assert getattr(load_settings(**{old: value, new: value}), new) == value, "both, and the same"
    monkeypatch.setenv(f"MATSTEER_{old.upper()}", str(value))
    assert getattr(load_settings(), new) == value
    assert getattr(Settings(), new) == value
    assert getattr(load_settings(**{new: value + 1}), new) == value + 1, "the command line goes first"
    assert getattr(load_settings(**{old: value + 1}), new) == value + 1


@pytest.mark.parametrize(("old", "new", "value"), OLD)
def test_an_old_and_a_new_name_that_differ_are_an_error_that_names_both(
    monkeypatch: pytest.MonkeyPatch, old: str, new: str, value: int
) -> None:
    with pytest.raises(StartupError, match=f"{new} is {value}, but {old}, its old name, is {value + 1}"):
        load_settings(**{old: value + 1, new: value})
    monkeypatch.setenv(f"MATSTEER_{old.upper()}", str(value))
    monkeypatch.setenv(f"MATSTEER_{new.upper()}", str(value + 1))
    with pytest.raises(StartupError, match=f"MATSTEER_{new.upper()} is {value + 1}, but MATSTEER_{old.upper()}"):
        load_settings()


def test_errors_name_a_setting_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartupError, match=r"Bad setting max_num_seqs \(MATSTEER_MAX_NUM_SEQS\): 1"):
        load_settings(max_num_seqs=1)
    with pytest.raises(StartupError, match=r"Bad setting max_batch_rows \(MATSTEER_MAX_BATCH_ROWS\): 1"):
        load_settings(max_batch_rows=1)
    with pytest.raises(StartupError, match="step_tokens is 8, but must be at least max_num_seqs, 32"):
        load_settings(step_tokens=8, max_num_seqs=32)
    monkeypatch.setenv("MATSTEER_MAX_BATCH_ROWS", "64")
    with pytest.raises(StartupError, match="max_num_batched_tokens is 16, but must be at least max_batch_rows, 64"):
        load_settings(max_num_batched_tokens=16)


@pytest.mark.parametrize(
    ("given", "cpu", "cuda"),
    [
        ({}, (32, 512), (256, 8192)),
        ({"max_num_seqs": 600}, (600, 600), (600, 8192)),
        ({"max_num_batched_tokens": 16}, (16, 16), (16, 16)),
        ({"max_num_seqs": 7, "max_num_batched_tokens": 64}, (7, 64), (7, 64)),
    ],
)
def test_how_much_a_step_computes_is_up_to_the_device_unless_it_is_set(
    given: dict[str, int], cpu: tuple[int, int], cuda: tuple[int, int]
) -> None:
    settings = Settings(**given)
    assert settings.step_limits("cpu") == StepLimits(*cpu)
    assert settings.step_limits("cuda") == StepLimits(*cuda)


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
    monkeypatch.setattr("server.config._demo_model", lambda: tmp_path / "demo/model")
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


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"checkpoint": "nope"}, "'nope' cannot be used: There is no checkpoint 'nope'. There are .*demo"),
        ({"checkpoint": "demo@v9"}, "There is no checkpoint 'demo@v9'. Of 'demo' there are v1"),
        ({"judge": "nowhere:judge"}, "MATSTEER_JUDGE"),
        ({"studies": "nowhere/votes.db"}, "MATSTEER_STUDIES"),
        ({"api_keys_file": "nowhere.toml"}, "MATSTEER_API_KEYS_FILE"),
    ],
)
def test_what_cannot_be_used_is_told_before_the_model_is_loaded(setting: dict[str, str], said: str) -> None:
    with pytest.raises(StartupError, match=said):
        open_service(load_settings(model="no/such-model", **setting))


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
    assert Settings(model="models/Tiny-Q4_1.gguf").served_name == "Tiny-Q4_1"
    assert Settings(model="org/name", model_name="mine").served_name == "mine"


def test_a_variable_that_is_no_setting_is_told_with_the_near_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("MATSTEER_")]:
        monkeypatch.delenv(name)
    for known in ("MATSTEER_PORT", "matsteer_host", "MATSTEER_STEP_TOKENS", "MATSTEER_URL", "MATSTEER_TORCH", "STEER"):
        monkeypatch.setenv(known, "1")
    assert unknown_variables() == []
    monkeypatch.setenv("MATSTEER_PROT", "9000")
    monkeypatch.setenv("MATSTEER_MAX_SEQS", "9")
    monkeypatch.setenv("MATSTEER_QWERTZ", "9")
    assert unknown_variables() == [
        "MATSTEER_MAX_SEQS is in the environment, but no setting has that name. Is MATSTEER_MAX_NUM_SEQS meant?",
        "MATSTEER_PROT is in the environment, but no setting has that name. Is MATSTEER_PORT meant?",
        "MATSTEER_QWERTZ is in the environment, but no setting has that name.",
    ]


def test_every_variable_of_the_compose_file_is_known() -> None:
    named = set(re.findall(r"MATSTEER_([A-Z_]+)", (ROOT / "docker-compose.yml").read_text(encoding="utf-8")))
    assert {name.lower() for name in named} <= {*Settings.model_fields, *OLD_NAMES, *OTHER_VARIABLES}


def test_a_wheel_serves_the_checkpoints_of_the_working_folder_or_else_the_demos(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert Settings().checkpoints == ROOT / "checkpoints", "a clone serves its own"
    packages, here = tmp_path / "site-packages", tmp_path / "here"
    demo = packages / "demo" / "checkpoints"
    (here / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr("server.config._installed", lambda name: packages / name)
    monkeypatch.chdir(here)
    assert Settings().checkpoints == here / "checkpoints", "there is nothing else"
    demo.mkdir(parents=True)
    assert Settings().checkpoints == demo, "a folder of this name without any checkpoint is somebody else's"
    (here / "checkpoints" / "mine" / "v1").mkdir(parents=True)
    (here / "checkpoints" / "mine" / "v1" / "config.json").touch()
    assert Settings().checkpoints == here / "checkpoints"
