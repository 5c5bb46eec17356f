"""A model opens, or a sentence says what is wrong with it and what to do; its own code never runs unasked."""

import importlib.util
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from steering.errors import ModelError
from steering.pretrained import open_config, open_pretrained
from tests.broken_models import RAN, adapter, change_json
from tests.gguf_models import write_gguf
from tests.training.helpers import make_llama, make_tokenizer

CPU = torch.device("cpu")
PEFTS_OWN = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def test_a_folder_opens_frozen_and_in_evaluation_mode(sound_model: Path) -> None:
    opened = open_pretrained(str(sound_model), device=CPU)
    assert not opened.model.training
    assert not any(weight.requires_grad for weight in opened.model.parameters())
    assert opened.tokenizer("Q: What").input_ids
    assert opened.adapter is None
    assert open_pretrained(str(sound_model), device=CPU, dtype=torch.bfloat16).model.dtype is torch.bfloat16
    assert open_config(str(sound_model)).model_type == "llama"


def test_what_is_no_usable_model_is_one_sentence(broken_model: tuple[str, str]) -> None:
    id, said = broken_model
    with pytest.raises(ModelError, match=said) as caught:
        open_pretrained(id, device=CPU)
    assert str(caught.value).startswith(f"The model {id!r} cannot be loaded: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("id", ["/no/such/folder", "./nowhere", "~/nowhere", "a/b/c", ""])
def test_a_folder_that_is_not_there_is_named(id: str) -> None:
    with pytest.raises(ModelError, match=r"There is no model folder|No model is named"):
        open_pretrained(id, device=CPU)


def test_a_name_that_no_file_system_takes_is_one_sentence() -> None:
    with pytest.raises(ModelError, match=r"a{300}' cannot be loaded: a{300} cannot be read \(File name too long\)\."):
        open_pretrained("a" * 300, device=CPU)


def test_code_of_the_folder_does_not_run_unasked_whatever_is_answered(model_with_code: Path) -> None:
    for opens in (lambda id: open_pretrained(id, device=CPU), open_config):
        with pytest.raises(ModelError, match=r"only with --trust-remote-code \(or MATSTEER_TRUST_REMOTE_CODE=true\)"):
            opens(str(model_with_code))
    assert not Path(RAN).exists()
    assert sys.stdin.read() == "y\n" * 9, "nobody was asked"


def test_code_of_the_folder_runs_where_it_is_trusted(model_with_code: Path) -> None:
    opened = open_pretrained(str(model_with_code), device=CPU, trust_remote_code=True)
    assert type(opened.model).__name__ == "MysteryModel"
    assert Path(RAN).exists()


def test_code_beside_an_architecture_that_is_known_stays_unused(model_with_code: Path) -> None:
    change_json(model_with_code / "config.json", model_type="llama")
    change_json(model_with_code / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokens.Mystery", None]})
    (model_with_code / "tokens.py").write_text((model_with_code / "modeling_mystery.py").read_text())
    assert type(open_pretrained(str(model_with_code), device=CPU).model).__name__ == "LlamaForCausalLM"
    assert not Path(RAN).exists()


def test_an_adapter_without_peft_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    adapter()(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # as some tools copy it there
    said = (
        r"it is a LoRA adapter for org/base, and merging it needs the package peft \(extra `lora`\): pip install peft"
    )
    with pytest.raises(ModelError, match=said):
        open_pretrained(str(tmp_path), device=CPU)


@pytest.fixture
def lora(sound_model: Path, tmp_path: Path) -> tuple[Path, Any]:
    """A folder with an adapter that changes what the model says, and the model with it."""
    peft = pytest.importorskip("peft")
    base = open_pretrained(str(sound_model), device=CPU).model
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, settings).eval()
    model.save_pretrained(tmp_path / "adapter")
    change_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(sound_model))
    return tmp_path / "adapter", model


@PEFTS_OWN
@torch.no_grad()
def test_an_adapter_is_merged_into_its_base_model(
    lora: tuple[Path, Any],
    sound_model: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, adapted = lora
    ids = torch.arange(1, 20)[None]
    with caplog.at_level(logging.INFO, "steering.pretrained"):
        opened = open_pretrained(str(folder), device=CPU)
    assert type(opened.model).__name__ == "LlamaForCausalLM"
    assert caplog.messages == [f"merged the LoRA adapter {folder} into the weights of {sound_model}"]
    assert str(opened.adapter) == "adapter (LoRA, merged into model)"
    torch.testing.assert_close(opened.model(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    plain = open_pretrained(str(sound_model), device=CPU).model(ids).logits
    assert float((opened.model(ids).logits - plain).abs().max()) > 0.1
    assert open_config(str(folder)).model_type == "llama"


@PEFTS_OWN
@torch.no_grad()
def test_an_adapter_of_the_hub_is_merged_too_unless_it_is_pickled(
    lora: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, adapted = lora
    monkeypatch.setattr(
        "steering.pretrained._hub_file", lambda _, name, __: path if (path := folder / name).is_file() else None
    )
    opened = open_pretrained("me/my-lora", device=CPU)
    assert str(opened.adapter) == "me/my-lora (LoRA, merged into model)"
    ids = torch.arange(1, 20)[None]
    torch.testing.assert_close(opened.model(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"'me/my-lora' cannot be loaded: the adapter's weights, .* \(pickles are not"):
        open_pretrained("me/my-lora", device=CPU)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="lies beside the weights of a model"):
        open_pretrained("me/my-lora", device=CPU)


@PEFTS_OWN
def test_what_is_wrong_with_an_adapter_or_its_base_is_said(lora: tuple[Path, Any]) -> None:
    folder, _ = lora
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"adapter' cannot be loaded: the adapter cannot be merged: "):
        open_pretrained(str(folder), device=CPU)
    change_json(folder / "adapter_config.json", base_model_name_or_path="/gone")
    with pytest.raises(ModelError, match="this is wrong with its base model: There is no model folder '/gone'"):
        open_pretrained(str(folder), device=CPU)
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(folder))
    with pytest.raises(ModelError, match="is an adapter itself; merge that one into its own base model first"):
        open_pretrained(str(folder), device=CPU)


@PEFTS_OWN
def test_an_adapter_with_its_own_tokenizer_brings_it(lora: tuple[Path, Any], sound_model: Path) -> None:
    folder, _ = lora
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(sound_model / name, folder)
    change_json(folder / "tokenizer_config.json", chat_template="{{ messages[0].content }}")
    assert open_pretrained(str(folder), device=CPU).tokenizer.chat_template == "{{ messages[0].content }}"
    assert json.loads((sound_model / "tokenizer_config.json").read_text()).get("chat_template") is None


# GGUF files.

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def test_a_gguf_file_is_the_model_that_it_was_made_of(tmp_path: Path) -> None:
    model, tokenizer = make_llama(hidden_size=32, bos_token_id=0), make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    file = write_gguf(model, tokenizer, tmp_path / "tiny-f32.gguf")
    ids = torch.tensor([tokenizer("Q: What do cows say? A:").input_ids])
    for id in (str(file), str(tmp_path)):  # a folder with nothing else in it
        opened = open_pretrained(id, device=CPU)
        torch.testing.assert_close(opened.model(ids).logits, model(ids).logits)
        assert opened.tokenizer("Q: What do cows say? A:").input_ids == ids[0].tolist()
        assert opened.tokenizer.chat_template == TEMPLATE
        assert opened.model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert not any(weight.requires_grad for weight in opened.model.parameters())
        assert open_config(id).hidden_size == 32


def test_quantized_weights_are_dequantized_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = make_llama(hidden_size=32), make_tokenizer()
    file = write_gguf(model, tokenizer, tmp_path / "tiny-Q8_0.gguf", quantized=True)
    with caplog.at_level(logging.INFO):
        opened = open_pretrained(str(file), device=CPU, dtype=torch.bfloat16)
    assert "tiny-Q8_0.gguf: its quantized weights, if any, were dequantized to bfloat16" in caplog.text
    for name, weight in model.state_dict().items():
        found = opened.model.state_dict()[name]
        assert found.dtype is torch.bfloat16
        torch.testing.assert_close(found.float(), weight, rtol=0.02, atol=0.02)


def test_a_model_of_a_gguf_file_can_be_saved(tmp_path: Path) -> None:
    file = write_gguf(make_llama(hidden_size=32), make_tokenizer(), tmp_path / "tiny.gguf", quantized=True)
    opened = open_pretrained(str(file), device=CPU)
    opened.model.save_pretrained(tmp_path / "saved")
    opened.tokenizer.save_pretrained(tmp_path / "saved")
    again = open_pretrained(str(tmp_path / "saved"), device=CPU)
    for name, weight in opened.model.state_dict().items():
        assert weight.equal(again.model.state_dict()[name])


def test_a_gguf_file_without_the_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(make_llama(), make_tokenizer(), tmp_path / "tiny.gguf")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(ModelError, match=r"needs the package gguf \(extra `gguf`\): pip install gguf"):
        open_pretrained(str(file), device=CPU)


def test_a_control_vector_is_no_model(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "vector.gguf", "controlvector")
    writer.add_tensor("direction.1", torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="controlvector is not supported"):
        open_pretrained(str(tmp_path / "vector.gguf"), device=CPU)
