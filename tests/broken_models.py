"""Folders that are no usable model, each with what has to be said about it: for all that opens models."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.helpers import make_llama, make_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 99\n"


def write_model(folder: Path) -> Path:
    """A tiny sound one."""
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def change_json(path: Path, **changes: Any) -> None:
    """None takes a field away."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@dataclass(frozen=True)
class Broken:
    """How a sound folder is broken, and a regular expression for the sentence."""

    make: Callable[[Path], Any]
    said: str
    place: str = ""  # inside the folder


def emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def moved_down(folder: Path) -> None:
    (folder / "inside").mkdir()
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(folder / "inside" / path.name)


def only_gguf(folder: Path) -> None:
    emptied(folder)
    (folder / "tiny-q4_0.gguf").write_bytes(b"GGUF")


def part_of_gguf(folder: Path) -> None:
    emptied(folder)
    (folder / "tiny-00001-of-00002.gguf").write_bytes(b"GGUF")


def several_gguf(folder: Path) -> None:
    emptied(folder)
    for name in ("b.gguf", "a.gguf"):
        (folder / name).write_bytes(b"GGUF")


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def without_a_layer(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.2." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def shard_lost(folder: Path) -> None:
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "model.safetensors").unlink()


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", **changes)


def write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


def adapter(*, beside: bool = False, weights: str = "adapter_model.safetensors", **said: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        if not beside:
            emptied(folder)
        content = {"peft_type": "LORA", "base_model_name_or_path": "org/base"} | said
        (folder / "adapter_config.json").write_text(json.dumps(content))
        (folder / weights).write_bytes(b"weights")

    return make


T5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "dataset": "c4"}
CODE = {"AutoConfig": "configuration_mystery.MysteryConfig", "AutoModelForCausalLM": "modeling_mystery.MysteryModel"}

BROKEN = {
    "empty": Broken(emptied, "the folder is empty"),
    "a weights file": Broken(lambda _: None, "it is a file of weights; name the folder", "model.safetensors"),
    "a gguf file": Broken(only_gguf, r"cannot be loaded: \S", "tiny-q4_0.gguf"),
    "a part of a gguf file": Broken(part_of_gguf, "it is one part of several of a GGUF file.*--merge"),
    "several gguf files": Broken(several_gguf, r"it holds several GGUF files; name one of a\.gguf, b\.gguf"),
    "another file": Broken(lambda _: None, "it is a file, not a model's folder", "config.json"),
    "gguf in a folder": Broken(only_gguf, r"cannot be loaded: \S"),
    "no config": Broken(lambda folder: (folder / "config.json").unlink(), r"there is no config\.json in it\."),
    "config further down": Broken(moved_down, r"there is no config\.json in it, but in .*inside\."),
    "config is a pointer": Broken(write("config.json", POINTER), r"config\.json is a Git LFS pointer.*git lfs pull"),
    "config is no JSON": Broken(write("config.json", "{"), r"config\.json is not valid JSON"),
    "config is a list": Broken(write("config.json", "[]"), r"config\.json must hold a JSON object, not a list"),
    "no model_type": Broken(config(model_type=None), r"config\.json has no model_type"),
    "unknown model_type": Broken(config(model_type="mystery"), "mystery"),
    "encoder-decoder": Broken(config(**T5), "it is an encoder-decoder"),
    "no language model": Broken(config(model_type="wav2vec2"), "its type, wav2vec2, is no causal language model"),
    "no tokenizer": Broken(without_tokenizer, r"there is no tokenizer in it; copy tokenizer\.json"),
    "tokenizer is a pointer": Broken(write("tokenizer.json", POINTER), r"tokenizer\.json is a Git LFS pointer"),
    "tokenizer is broken": Broken(write("tokenizer.json", "{}"), "its tokenizer cannot be opened: KeyError"),
    "weights are a pointer": Broken(write("model.safetensors", POINTER), r"model\.safetensors is a Git LFS pointer"),
    "weights are cut off": Broken(cut_off, r"model\.safetensors is broken or was cut off \(.*\); copy or download it"),
    "weights are pickled": Broken(pickled, r"its weights are pickled \(pytorch_model\.bin\), and pickles can run code"),
    "no weights": Broken(lambda folder: (folder / "model.safetensors").unlink(), "there are no weights in it"),
    "a shard is lost": Broken(shard_lost, r"model-00001-of-00002\.safetensors is missing, which model.*index\.json"),
    "a layer is lost": Broken(without_a_layer, r"its files lack weights .*model\.layers\.2\.\S+ and \d+ more"),
    "another width": Broken(
        config(intermediate_size=48), r"model\.layers\.0\.mlp\.\w+\.weight is 16 x 32 in its files and 16 x 48 by"
    ),
    "quantized": Broken(config(quantization_config=GPTQ), r"its weights are quantized \(gptq\): "),
    "own code": Broken(
        config(model_type="mystery", auto_map=CODE), "code of its own, which is run only with --trust-re"
    ),
    "adapter beside weights": Broken(adapter(beside=True), "a LoRA adapter .* lies beside the weights of a model"),
    "adapter without base": Broken(adapter(base_model_name_or_path=None), "does not name the adapter's base model"),
    "another adapter": Broken(adapter(peft_type="PROMPT_TUNING"), "an adapter of the type PROMPT_TUNING; only LORA"),
    "pickled adapter": Broken(adapter(weights="adapter_model.bin"), r"adapter_model\.safetensors, are missing"),
}


@pytest.fixture(scope="session")
def sound_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("sound") / "model")


@pytest.fixture(params=BROKEN)
def broken_model(request: pytest.FixtureRequest, sound_model: Path, tmp_path: Path) -> tuple[str, str]:
    """What is named as the model, and what has to be said."""
    broken = BROKEN[request.param]
    folder = shutil.copytree(sound_model, tmp_path / "model")
    broken.make(folder)
    return str(folder / broken.place), broken.said


RAN = "ran.txt"


@pytest.fixture
def model_with_code(sound_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of an architecture that its folder's own code defines; that code leaves `ran.txt` in the working
    directory. Whoever is asked whether it may run says yes."""
    from io import StringIO

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    monkeypatch.setattr("sys.stdin", StringIO("y\n" * 9))
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(sound_model, tmp_path / "model")
    change_json(folder / "config.json", model_type="mystery", architectures=["MysteryModel"], auto_map=CODE)
    ran = f"from pathlib import Path\nPath({RAN!r}).write_text('ran')\n"
    (folder / "configuration_mystery.py").write_text(
        f"{ran}from transformers import LlamaConfig\nclass MysteryConfig(LlamaConfig):\n    model_type = 'mystery'\n"
    )
    (folder / "modeling_mystery.py").write_text(
        f"{ran}from transformers import LlamaForCausalLM\nfrom .configuration_mystery import MysteryConfig\n"
        "class MysteryModel(LlamaForCausalLM):\n    config_class = MysteryConfig\n"
    )
    return folder
