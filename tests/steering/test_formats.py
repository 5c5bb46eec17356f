"""Foreign files become columns that do what the other tool does, and checkpoints become files that it reads."""

import json
import pickle
import sys
from dataclasses import replace

import gguf
import pytest
import safetensors.torch
import torch
from torch import nn

from steering import (
    BaseModelInfo,
    Checkpoint,
    Clamp,
    Gate,
    Positions,
    Site,
    SiteKind,
    base_model_info,
    gate_codes,
    save,
    steer,
    steered,
)
from steering.errors import FormatError
from steering.formats import Format, Hints, detect, read_foreign, write_foreign
from tests.steering.families import HIDDEN, LAYERS, VOCABULARY, column, tiny

RESIDUAL, OUTPUT = SiteKind.RESIDUAL, SiteKind.ATTN_OUTPUT
TASKS = ("truthfulqa", "toxigen", "bbq")
PLACE = Hints(layers=(1,), site=OUTPUT)
TOKENS = torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(5))
INFO = BaseModelInfo(id="tiny", revision=None, architecture="LlamaForCausalLM", hidden_size=HIDDEN, num_layers=LAYERS)


def constant(layer: int, kind=RESIDUAL, seed: int = 0, attribute: str = "honesty", width: int = HIDDEN):
    return column(Site(layer, kind), width, seed=seed, attribute=attribute, gate=Gate.CONSTANT, keep_norm=False)


def checkpoint(tmp_path, *columns, info=INFO) -> Checkpoint:
    return save(
        tmp_path / "demo" / "v1", name="demo", version="v1", method="caa", base_model=info, columns=columns,
        normalize=columns[0].keep_norm, positions=Positions.GENERATED, training={}, evaluation={}, card="",
    )  # fmt: skip


def export(tmp_path, made: Checkpoint, format: Format, attributes=None):
    path = tmp_path / f"exported.{format}"
    write_foreign(path, made, made.multipliers(attributes or made.attributes), format)
    return path


@torch.no_grad()
def steered_logits(model, columns, multipliers=None):
    with steered(model, columns, multipliers or [1.0] * len(columns), positions=Positions.ALL):
        return model(TOKENS).logits


class Published(nn.Module):
    """The module that MAT-Steer's training script saves, with its forward pass and its norm rescale."""

    def __init__(self, width: int, tasks: int):
        super().__init__()
        self.steering_vectors = nn.ParameterList([nn.Parameter(torch.randn(width)) for _ in range(tasks)])
        self.gating_weights = nn.ModuleList([nn.Linear(width, 1) for _ in range(tasks)])

    def forward(self, rows):
        moved = rows.clone()
        for vector, gate in zip(self.steering_vectors, self.gating_weights, strict=True):
            moved = moved + torch.sigmoid(gate(rows)) * vector
        return moved * rows.norm(dim=1, keepdim=True) / moved.norm(dim=1, keepdim=True)


@pytest.fixture
def published():
    torch.manual_seed(3)
    return Published(HIDDEN, len(TASKS))


def new_age(module) -> dict:
    return {
        "model_state_dict": module.state_dict(),
        "input_dim": HIDDEN,
        "num_attributes": len(TASKS),
        "task_names": list(TASKS),
    }


@torch.no_grad()
def test_a_checkpoint_of_mat_steer_does_what_its_own_module_does(published, tmp_path):
    torch.save(new_age(published), tmp_path / "llama3.1_8B_L1_mat_steer.pt")
    found = read_foreign(tmp_path / "llama3.1_8B_L1_mat_steer.pt", PLACE)
    assert [c.attribute for c in found.columns] == list(TASKS)
    assert {str(c.site) for c in found.columns} == {"1.attn_output"}
    assert found.positions is Positions.GENERATED
    rows = torch.randn(6, HIDDEN) * 3
    ours = steer(
        rows,
        torch.stack([c.vector for c in found.columns]),
        torch.stack([c.gate_weight for c in found.columns]),
        torch.tensor([c.gate_bias for c in found.columns]),
        gate_codes([c.gate for c in found.columns]),
        torch.tensor([c.keep_norm for c in found.columns]),
        torch.ones(6, len(TASKS)),
    )
    assert torch.allclose(ours, published(rows), atol=1e-5)


def test_the_older_files_of_mat_steer_are_bare_state_dicts(published, tmp_path):
    path = tmp_path / "llama3.1_8B_multi_qa.pth"
    state = published.state_dict() | {"gating_weights.0.bias": published.gating_weights[0].bias.detach().reshape(())}
    torch.save(state, path)
    with pytest.raises(FormatError, match="does not name its 3 attributes: name each with --attribute"):
        read_foreign(path, PLACE)
    found = read_foreign(path, replace(PLACE, attributes=TASKS))
    assert torch.equal(found.columns[2].gate_weight, published.gating_weights[2].weight[0])
    assert found.columns[0].gate_bias == float(published.gating_weights[0].bias.detach())


def test_layer_and_names_come_from_the_metadata_beside_the_file(published, tmp_path):
    torch.save(published.state_dict(), tmp_path / "mine.pt")
    metadata = {"layer": 2, "model_name": "llama3.1_8B", "datasets": list(TASKS), "hyperparams": {"sigma": 2.0}}
    (tmp_path / "mine_metadata.json").write_text(json.dumps(metadata))
    found = read_foreign(tmp_path / "mine.pt", Hints(site=OUTPUT))
    assert {c.site.layer for c in found.columns} == {2}
    assert [c.attribute for c in found.columns] == list(TASKS)
    assert found.source == {"metadata": metadata}
    with pytest.raises(FormatError, match="trained on layer 2, says its metadata, not on --layer 1"):
        read_foreign(tmp_path / "mine.pt", PLACE)


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        (Hints(site=OUTPUT), "does not say its layer: name it with --layer"),
        (Hints(layers=(1,)), "does not say its site: name it with --site attn_heads|attn_output"),
        (replace(PLACE, attributes=("a", "b")), "holds 3 attributes, but 2 were named: a, b"),
    ],
)
def test_what_a_file_of_mat_steer_does_not_say_is_asked_for(published, tmp_path, hints, message):
    torch.save(new_age(published), tmp_path / "mine.pt")
    with pytest.raises(FormatError) as error:
        read_foreign(tmp_path / "mine.pt", hints)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("gating_weights.1.bias"), "no gating_weights.1.bias"),
        (lambda s: s.pop("steering_vectors.2"), "gates of more tasks"),
        (lambda s: s.update({"other": torch.ones(1)}), "holds other, which no MAT-Steer state has"),
        (lambda s: s.update({"gating_weights.0.bias": torch.ones(3)}), "have 32, 32 and 3 numbers"),
        (lambda s: s.update({"steering_vectors.0": torch.ones(2, HIDDEN)}), r"must be a vector, not \[2, 32\]"),
        (lambda s: s.update({"steering_vectors.0": "x"}), "must be a vector, not str"),
        (lambda s: s.update({"steering_vectors.0": torch.full((HIDDEN,), torch.nan)}), "not finite"),
    ],
)
def test_a_broken_state_of_mat_steer_is_refused(published, tmp_path, change, message):
    state = dict(published.state_dict())
    change(state)
    torch.save({"model_state_dict": state, "task_names": list(TASKS)}, tmp_path / "mine.pt")
    with pytest.raises(FormatError, match=message):
        read_foreign(tmp_path / "mine.pt", PLACE)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_code_in_a_pickle_is_not_run(tmp_path):
    torch.save({"model_state_dict": {"steering_vectors.0": Bomb(tmp_path / "boom")}}, tmp_path / "new.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    for name in ("new.pt", "old.pt"):
        with pytest.raises(FormatError, match="is code, and is not run"):
            read_foreign(tmp_path / name, PLACE)
    assert not (tmp_path / "boom").exists()


@pytest.fixture
def vector(tmp_path):
    """A control vector as repeng writes it, for blocks 1 and 2."""
    path = tmp_path / "honesty.gguf"
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", 2)
    for layer in (2, 1):
        writer.add_tensor(f"direction.{layer}", torch.full((HIDDEN,), 0.5 * layer).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def test_a_control_vector_is_added_to_the_outputs_of_the_blocks_that_it_names(vector):
    found = read_foreign(vector, Hints())
    assert [(c.attribute, str(c.site)) for c in found.columns] == [("honesty", "1.residual"), ("honesty", "2.residual")]
    assert (found.model_hint, found.positions) == ("llama", Positions.ALL)
    model = tiny("llama")
    added = [
        model.model.layers[layer].register_forward_hook(lambda _, __, out, layer=layer: out + 0.5 * layer)
        for layer in (1, 2)
    ]
    theirs = model(TOKENS).logits
    for hook in added:
        hook.remove()
    assert torch.allclose(steered_logits(model, found.columns), theirs, atol=1e-5)


def test_attributes_are_merged_into_one_direction_a_layer(tmp_path):
    made = checkpoint(
        tmp_path, constant(1, seed=1), constant(1, seed=2, attribute="calm"), constant(2, seed=3, attribute="calm")
    )
    path = export(tmp_path, made, Format.GGUF, {"honesty": 2.0, "calm": -0.5})
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    one, two, three = (c.vector for c in made.columns)
    assert list(tensors) == ["direction.1", "direction.2"]
    assert torch.allclose(tensors["direction.1"], 2 * one - 0.5 * two)
    assert torch.allclose(tensors["direction.2"], -0.5 * three)
    assert bytes(reader.fields["general.architecture"].parts[-1]) == b"controlvector"
    assert bytes(reader.fields["controlvector.model_hint"].parts[-1]) == b"llama"
    assert int(reader.fields["controlvector.layer_count"].parts[-1][0]) == 2


@pytest.mark.parametrize("format", [Format.GGUF, Format.PYVENE, Format.SAFETENSORS])
def test_what_is_exported_is_imported_again_bit_for_bit(tmp_path, format):
    made = checkpoint(tmp_path, constant(1, seed=1), constant(2, seed=2))
    again = read_foreign(export(tmp_path, made, format), Hints(attributes=("honesty",)))
    assert detect(tmp_path / f"exported.{format}") is format
    assert [(c.attribute, c.site, c.gate, c.keep_norm) for c in again.columns] == [
        (c.attribute, c.site, c.gate, c.keep_norm) for c in made.columns
    ]
    for old, new in zip(made.columns, again.columns, strict=True):
        assert torch.equal(old.vector, new.vector)


@pytest.mark.parametrize(
    ("columns", "format", "message"),
    [
        ([column(Site(1, RESIDUAL))], Format.GGUF, "has a sigmoid gate, which opens more or less for each activation"),
        ([column(Site(1, RESIDUAL))], Format.PYVENE, "has a sigmoid gate"),
        ([column(Site(1, RESIDUAL), gate=Gate.LINEAR, keep_norm=False)], Format.GGUF, "has a linear gate"),
        ([column(Site(1, RESIDUAL), gate=Gate.CONSTANT)], Format.GGUF, "keeps the norm"),
        ([replace(constant(1), clamp=Clamp(2.0))], Format.GGUF, "clamps a projection"),
        ([constant(1, OUTPUT)], Format.GGUF, "acts on residual, the output of a block, not at 1.attn_output"),
        ([constant(0)], Format.GGUF, "llama.cpp never steers the block with index 0"),
        ([constant(1)], Format.MAT, "can be written as gguf, pyvene, safetensors, not as mat"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(tmp_path, columns, format, message):
    made = checkpoint(tmp_path, *columns)
    with pytest.raises(FormatError, match=message):
        export(tmp_path, made, format)
    assert not list(tmp_path.glob("*exported*"))


def test_a_gated_column_that_is_not_used_is_no_obstacle(tmp_path):
    gated = column(Site(1, RESIDUAL), attribute="calm", keep_norm=False)
    made = checkpoint(tmp_path, constant(2, seed=1), gated)
    path = export(tmp_path, made, Format.GGUF, {"honesty": 1.0})
    assert [str(c.site) for c in read_foreign(path, Hints()).columns] == ["2.residual"]
    with pytest.raises(FormatError, match="every multiplier is 0"):
        write_foreign(tmp_path / "none.gguf", made, [0.0, 0.0], Format.GGUF)


def test_without_the_library_a_control_vector_says_what_to_install(vector, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(FormatError, match=r"pip install 'gguf>=0\.17'"):
        read_foreign(vector, Hints())


def test_a_gguf_file_cut_anywhere_is_refused(vector):
    data = vector.read_bytes()
    for length in range(4, len(data), 7):
        vector.write_bytes(data[:length])
        with pytest.raises(FormatError):
            read_foreign(vector, Hints())


@pytest.mark.parametrize(
    ("architecture", "name", "tensor", "message"),
    [
        ("llama", "direction.1", torch.ones(4), "architecture 'llama', not a control vector"),
        ("controlvector", "bias.1", torch.ones(4), "holds 'bias.1'"),
        ("controlvector", "direction.x", torch.ones(4), "holds 'direction.x'"),
        ("controlvector", "direction.1", torch.ones(4, dtype=torch.int32), "must be a vector of F32 or F16, not I32"),
        ("controlvector", "direction.1", torch.ones(2, 4), r"not F32 of shape \[2, 4\]"),
    ],
)
def test_other_gguf_files_are_refused(tmp_path, architecture, name, tensor, message):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", architecture)
    writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match=message):
        read_foreign(tmp_path / "x.gguf", Hints())


def test_a_place_is_not_asked_for_where_the_file_names_it(vector):
    with pytest.raises(FormatError, match="says itself where it acts: leave out --layer 1"):
        read_foreign(vector, PLACE)


def test_one_safetensors_file_holds_all_that_a_checkpoint_does(tmp_path):
    mixed = [
        column(Site(1, OUTPUT), seed=1, attribute="calm"),
        column(Site(2, SiteKind.ATTN_HEADS), 16, seed=2, attribute="honesty"),
        column(Site(2, RESIDUAL), seed=3, attribute="honesty", gate=Gate.LINEAR),
    ]
    made = checkpoint(tmp_path, *mixed)
    again = read_foreign(export(tmp_path, made, Format.SAFETENSORS, {"calm": 2.5}), Hints(attributes=("a", "b")))
    assert [c.attribute for c in again.columns] == ["a", "b", "b"]
    assert [c.default_multiplier for c in again.columns] == [2.5, 0.0, 0.0]
    for old, new in zip(mixed, again.columns, strict=True):
        assert (old.site, old.gate, old.keep_norm, old.gate_bias) == (new.site, new.gate, new.keep_norm, new.gate_bias)
        assert torch.equal(old.vector, new.vector)
        assert torch.equal(old.gate_weight, new.gate_weight)
    assert again.source["was"]["name"] == "demo"


def test_bare_tensors_are_gated_where_they_have_gates(tmp_path):
    vectors = torch.randn(2, HIDDEN)
    safetensors.torch.save_file({"vectors": vectors}, tmp_path / "plain.safetensors")
    with pytest.raises(FormatError, match="holds 2 columns: name each with --attribute"):
        read_foreign(tmp_path / "plain.safetensors", PLACE)
    named = replace(PLACE, attributes=("a", "b"))
    plain = read_foreign(tmp_path / "plain.safetensors", named).columns
    assert [(c.gate, c.keep_norm) for c in plain] == [(Gate.CONSTANT, False)] * 2
    tensors = {"vectors": vectors, "gate_weights": vectors + 1, "gate_biases": torch.tensor([1.0, 2.0])}
    safetensors.torch.save_file(tensors, tmp_path / "gated.safetensors")
    gated = read_foreign(tmp_path / "gated.safetensors", named).columns
    assert [(c.gate, c.keep_norm, c.gate_bias) for c in gated] == [(Gate.SIGMOID, True, 1.0), (Gate.SIGMOID, True, 2.0)]
    safetensors.torch.save_file({"weights": vectors}, tmp_path / "other.safetensors")
    other = read_foreign(tmp_path / "other.safetensors", named).columns
    assert [(c.attribute, str(c.site)) for c in other] == [("a", "1.attn_output"), ("b", "1.attn_output")]
    safetensors.torch.save_file(tensors | {"weights": vectors + 2}, tmp_path / "more.safetensors")
    with pytest.raises(FormatError, match="must hold vectors, gate_weights, gate_biases, or vectors alone"):
        read_foreign(tmp_path / "more.safetensors", PLACE)


def test_what_is_nothing_of_all_this_is_refused(tmp_path):
    made = checkpoint(tmp_path, constant(1))
    (tmp_path / "text.pt").write_text("hello")
    torch.save(["a", "b"], tmp_path / "words.pt")
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "demo" / "v1", "is a checkpoint folder already"),
        (tmp_path / "empty", "holds no intkey"),
        (tmp_path / "nowhere", "there is no file"),
        (tmp_path / "text.pt", "text.pt"),
        (tmp_path / "words.pt", "is no list of numbers"),
    ):
        with pytest.raises(FormatError, match=message):
            read_foreign(path, PLACE)
    assert made.config.name == "demo"


def test_the_info_of_these_tests_is_that_of_the_model():
    assert base_model_info(tiny("llama"), "tiny", None) == INFO
