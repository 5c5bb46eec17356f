"""A baked model is an ordinary folder whose logits are those of the run-time hook at every position."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from steering import Checkpoint, Gate, Positions, Site, SiteKind, base_model_info, save, site_width, steered
from steering.errors import CheckpointMismatch, FormatError
from tests.steering.families import COMMON, column, tiny
from tests.training.helpers import make_llama, make_tokenizer
from training.bake import bake, write_biases
from training.cli import app
from training.errors import BakeError
from training.models import Base

ATTENTION = [SiteKind.ATTN_HEADS, SiteKind.ATTN_OUTPUT]
MLP = [SiteKind.MLP_OUTPUT, SiteKind.RESIDUAL]
EVERY = [*ATTENTION, *MLP]
BAKED = {
    "llama": EVERY,
    "gpt2": EVERY,
    "gpt_neox": EVERY,
    "phi": EVERY,
    "granite": EVERY,
    "smollm3": EVERY,
    "starcoder2": EVERY,
    "qwen3": ATTENTION,
    "gemma": ATTENTION,
    "gemma2": ATTENTION,
    "gemma3": ATTENTION,
    "olmo2": ATTENTION,
    "cohere2": ATTENTION,
}
REFUSED = {
    "qwen2": EVERY,
    "mistral": EVERY,
    "phi3": EVERY,
    "mixtral": EVERY,
    "qwen3": MLP,
    "gemma": MLP,
    "gemma2": MLP,
    "gemma3": MLP,
    "cohere2": MLP,
    "olmo2": MLP,
    "qwen3_moe": MLP,
}


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of its own: baking changes it."""
    if family == "phi":
        torch.manual_seed(0)
        return transformers.PhiForCausalLM(transformers.PhiConfig(**COMMON)).eval().to(dtype)
    return copy.deepcopy(tiny(family)).to(dtype)


def constant(model: Any, site: Site, seed: int, **settings: Any) -> Any:
    given = {"attribute": f"a{seed % 2}", "gate": Gate.CONSTANT, "keep_norm": False} | settings
    return column(site, site_width(model, site.kind), seed=seed, **given)


def checkpoint_of(model: Any, folder: Path, *columns: Any) -> Checkpoint:
    return save(
        folder / "honesty" / "v1", name="honesty", version="v1", method="iti",
        base_model=base_model_info(model, "tiny", None), columns=columns, normalize=columns[0].keep_norm,
        positions=Positions.GENERATED, training={}, evaluation={}, card="",
    )  # fmt: skip


def base_of(model: Any) -> Base:
    return Base(model, make_tokenizer(), "tiny", None)


def tokens_of(model: Any) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(tokens_of(model)).logits
    return found


def hooked(model: Any, checkpoint: Checkpoint, multipliers: tuple[float, ...]) -> torch.Tensor:
    with steered(model, checkpoint.columns, multipliers, positions=Positions.ALL):
        return logits(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", BAKED)
def test_a_baked_folder_has_the_logits_of_the_hook(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = model_of(family, dtype)
    sites = [Site(layer, kind) for layer in (0, 2) for kind in BAKED[family]]
    checkpoint = checkpoint_of(model, tmp_path, *(constant(model, site, seed) for seed, site in enumerate(sites)))
    attributes = {"a0": 1.5, "a1": -0.5}
    plain, expected = logits(model), hooked(model, checkpoint, checkpoint.multipliers(attributes))
    baked = bake(base_of(model), checkpoint, tmp_path / "out", attributes)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    assert type(loaded) is type(model)
    assert float((expected - plain).abs().max()) > 0.1
    # Most norms, and all rotary angles, are computed in float32 whatever the model's dtype.
    exact = dtype is torch.float64 and family == "gpt2"
    assert torch.allclose(logits(loaded), expected, rtol=0, atol=1e-12 if exact else 2e-4)
    assert baked.sites == tuple(sorted(sites))
    assert baked.apart < 1e-3


@pytest.mark.parametrize(("family", "kind"), [(family, kind) for family, kinds in REFUSED.items() for kind in kinds])
def test_what_no_bias_can_do_is_refused_and_nothing_is_written(family: str, kind: SiteKind, tmp_path: Path) -> None:
    model = model_of(family)
    before = logits(model)
    checkpoint = checkpoint_of(model, tmp_path, constant(model, Site(1, kind), 0))
    with pytest.raises(BakeError, match=f"{type(model).__name__}.*1.{kind}|1.{kind}.*{type(model).__name__}") as error:
        bake(base_of(model), checkpoint, tmp_path / "out")
    assert "matsteer serve" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["honesty"]
    assert torch.equal(logits(model), before)


def test_the_bias_is_the_projection_of_the_displacement_of_the_heads(tmp_path: Path) -> None:
    """honest_llama's script writes the displacement itself, which is in the space of the heads."""
    model = make_llama(num_attention_heads=4, head_dim=6)
    site = Site(1, SiteKind.ATTN_HEADS)
    checkpoint = checkpoint_of(model, tmp_path, constant(model, site, 0))
    weight = model.model.layers[1].self_attn.o_proj.weight.detach().double()
    baked = bake(base_of(model), checkpoint, tmp_path / "out", {"a0": 15.0})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = weight @ (15.0 * checkpoint.columns[0].vector.double())
    attention = loaded.model.layers[1].self_attn
    assert torch.allclose(attention.o_proj.bias.double(), expected, atol=1e-4)
    others = [p for n, p in loaded.named_parameters() if n.endswith("bias") and p is not attention.o_proj.bias]
    assert len(others) == 3 * 4 - 1
    assert not any(bool(bias.any()) for bias in others)
    assert (baked.switched, loaded.config.attention_bias) == ({"attention_bias": True}, True)


@torch.no_grad()
def test_a_baked_model_writes_what_the_steered_one_writes(tmp_path: Path) -> None:
    model = make_llama()
    checkpoint = checkpoint_of(model, tmp_path, constant(model, Site(1, SiteKind.RESIDUAL), 0, scale=2.0))
    prompt = torch.tensor([[5, 9, 17, 30]])
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(prompt, **settings)
    with steered(model, checkpoint.columns, [1.0], positions=Positions.ALL):
        expected = model.generate(prompt, **settings)
    bake(base_of(model), checkpoint, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.generate(prompt, **settings), expected)
    assert not torch.equal(expected, plain)


def test_biases_that_are_there_already_stay(tmp_path: Path) -> None:
    model = model_of("phi")
    own = model.model.layers[1].mlp.fc2.bias
    torch.nn.init.normal_(own)
    before, added = own.detach().clone(), torch.randn(32).double()
    assert write_biases(model, {Site(1, SiteKind.MLP_OUTPUT): added}) == {}
    assert torch.allclose(own.detach(), before + added.float(), atol=1e-6)


def test_half_precision_stays_half_precision(tmp_path: Path) -> None:
    model = make_llama().bfloat16()
    checkpoint = checkpoint_of(model, tmp_path, constant(model, Site(1, SiteKind.RESIDUAL), 0, scale=3.0))
    bake(base_of(model), checkpoint, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_a_block_that_does_something_else_with_its_mlp_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_llama(mlp_bias=True)
    block = model.model.layers[1]
    block.mlp.register_forward_hook(lambda _, __, output: 3 * output)
    checkpoint = checkpoint_of(model, tmp_path, constant(model, Site(1, SiteKind.RESIDUAL), 0))
    with pytest.raises(BakeError, match="do not do what the runtime hook does: logits differ by"):
        bake(base_of(model), checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate": Gate.SIGMOID}, "sigmoid gate"),
        ({"gate": Gate.LINEAR}, "linear gate"),
        ({"keep_norm": True}, "keeps the norm"),
    ],
)
def test_only_constant_columns_are_baked(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = make_llama()
    checkpoint = checkpoint_of(model, tmp_path, constant(model, Site(1, SiteKind.RESIDUAL), 0, **settings))
    with pytest.raises(FormatError, match=f"a bias adds one vector to every activation, but .*{message}"):
        bake(base_of(model), checkpoint, tmp_path / "out")


def test_another_model_and_a_folder_that_exists_are_refused(tmp_path: Path) -> None:
    model = make_llama()
    checkpoint = checkpoint_of(model, tmp_path, constant(model, Site(1, SiteKind.RESIDUAL), 0))
    with pytest.raises(CheckpointMismatch, match="num_layers"):
        bake(base_of(make_llama(num_hidden_layers=2)), checkpoint, tmp_path / "out")
    with pytest.raises(BakeError, match="exists already"):
        bake(base_of(model), checkpoint, tmp_path)


def test_a_multiplier_that_no_request_may_use_is_refused(tmp_path: Path) -> None:
    model = make_llama()
    checkpoint = checkpoint_of(model, tmp_path, constant(model, Site(1, SiteKind.RESIDUAL), 0))
    name = checkpoint.columns[0].attribute
    with pytest.raises(BakeError, match=f"multiplier of '{name}' must be from -?[0-9.]+ to [0-9.]+, got 1e\\+30"):
        bake(base_of(model), checkpoint, tmp_path / "out", {name: 1e30})
    assert not (tmp_path / "out").exists()


def test_the_command_writes_a_folder_with_everything_in_it(tmp_path: Path) -> None:
    model = make_llama()
    model.bfloat16().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    columns = (constant(model, Site(1, SiteKind.ATTN_OUTPUT), 0), constant(model, Site(2, SiteKind.RESIDUAL), 1))
    checkpoint_of(model, tmp_path, *columns)
    arguments = ["bake", "--model", str(tmp_path / "model"), "--checkpoint", str(tmp_path / "honesty")]
    result = CliRunner().invoke(app, [*arguments, "--set", "a0=20", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "biases for 1.attn_output, at every position" in result.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype is torch.bfloat16
    assert torch.equal(loaded.model.layers[1].self_attn.o_proj.bias.detach(), (20 * columns[0].vector).bfloat16())
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Q: What").input_ids
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("base_model: ", "| a0 | 1.attn_output | 20 |", "every position", "`attention_bias`", "honesty@v1"):
        assert part in card
    assert "a1" not in card
    again = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert again.exit_code == 2
    assert "exists already" in again.output
