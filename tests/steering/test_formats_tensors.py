"""Vectors as people keep them act where plain hooks at the source's own place do; what is none is called what it is."""

import io
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from steering import Positions, SiteKind, steered
from steering.errors import FormatError
from steering.formats import Counting, Format, Hints, ModelShape, detect, read_foreign
from tests.steering.families import HEAD_WIDTH, HEADS, HIDDEN, LAYERS, VOCABULARY, tiny

TOKENS = torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(5))
RESIDUAL, OUTPUT, HEAD_SITE = SiteKind.RESIDUAL, SiteKind.ATTN_OUTPUT, SiteKind.ATTN_HEADS
SHAPE = ModelShape("LlamaForCausalLM", LAYERS, HEADS * HEAD_WIDTH)
HINTS = Hints(model=SHAPE)
PLACE = Hints(layers=(1,), site=RESIDUAL, attributes=("honesty",), model=SHAPE)
V = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1))
HERE = {"layers": (1,), "site": RESIDUAL}
HOLED = V.index_fill(0, torch.tensor([3, 4]), torch.nan)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
STACK = torch.randn(LAYERS, HIDDEN, generator=torch.Generator().manual_seed(2))
STATES = torch.randn(LAYERS + 1, HIDDEN, generator=torch.Generator().manual_seed(3))


def write_pt(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


@torch.no_grad()
def logits(model, columns):
    with steered(model, columns, [1.0] * len(columns), positions=Positions.ALL):
        return model(TOKENS).logits


@torch.no_grad()
def hooked(model, *hooks):
    """Logits with `hooks`: (module, "input" or "output", vector), added with nothing but PyTorch."""

    def add_to_output(vector):
        return lambda _, __, out: (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector

    def add_to_input(vector):
        def hook(_, inputs, kwargs):
            if inputs:
                return (inputs[0] + vector, *inputs[1:]), kwargs
            return inputs, kwargs | {"hidden_states": kwargs["hidden_states"] + vector}

        return hook

    handles = [
        module.register_forward_hook(add_to_output(vector))
        if side == "output"
        else module.register_forward_pre_hook(add_to_input(vector), with_kwargs=True)
        for module, side, vector in hooks
    ]
    try:
        return model(TOKENS).logits
    finally:
        for handle in handles:
            handle.remove()


def block(model, layer):
    return model.model.layers[layer]


# A key, the options that go with it, the site that it is, and where a plain hook adds the same.
KEYS = [
    ("1", {"site": RESIDUAL}, "1.residual", lambda m: [(block(m, 1), "output", V)]),
    ("-1", {"site": RESIDUAL}, "2.residual", lambda m: [(block(m, 2), "output", V)]),
    ("layer_1", {"site": RESIDUAL}, "1.residual", lambda m: [(block(m, 1), "output", V)]),
    ("Layer 1", {"site": OUTPUT}, "1.attn_output", lambda m: [(block(m, 1).self_attn, "output", V)]),
    ("honesty_layer_1", {"site": RESIDUAL}, "1.residual", lambda m: [(block(m, 1), "output", V)]),
    ("1.mlp_output", {}, "1.mlp_output", lambda m: [(block(m, 1).mlp, "output", V)]),
    ("direction.1", {"site": RESIDUAL}, "1.residual", lambda m: [(block(m, 1), "output", V)]),
    ("model.layers.1", {}, "1.residual", lambda m: [(block(m, 1), "output", V)]),
    ("model.layers[1]", {}, "1.residual", lambda m: [(block(m, 1), "output", V)]),
    ("model.layers.1", {"site": RESIDUAL}, "1.residual", lambda m: [(block(m, 1), "output", V)]),
    ("model.layers.1", {"site": OUTPUT}, "1.attn_output", lambda m: [(block(m, 1).self_attn, "output", V)]),
    ("model.layers.1.mlp", {}, "1.mlp_output", lambda m: [(block(m, 1).mlp, "output", V)]),
    ("model.layers.1.self_attn", {}, "1.attn_output", lambda m: [(block(m, 1).self_attn, "output", V)]),
    (
        "model.layers.1.self_attn.o_proj.input",
        {},
        "1.attn_heads",
        lambda m: [(block(m, 1).self_attn.o_proj, "input", V)],
    ),
    ("model.layers.1.residual", {}, "1.residual", lambda m: [(block(m, 1), "output", V)]),
    ("blocks.1.hook_resid_post", {}, "1.residual", lambda m: [(block(m, 1), "output", V)]),
    ("blocks.2.hook_resid_pre", {}, "1.residual", lambda m: [(block(m, 2), "input", V)]),
    (  # what is read by the MLP's norm, and what goes past it
        "blocks.1.hook_resid_mid",
        {},
        "1.attn_output",
        lambda m: [(block(m, 1).post_attention_layernorm, "input", V), (block(m, 1), "output", V)],
    ),
    ("blocks.1.hook_attn_out", {}, "1.attn_output", lambda m: [(block(m, 1).self_attn, "output", V)]),
    ("blocks.1.hook_mlp_out", {}, "1.mlp_output", lambda m: [(block(m, 1).mlp, "output", V)]),
    ("blocks.1.attn.hook_z", {}, "1.attn_heads", lambda m: [(block(m, 1).self_attn.o_proj, "input", V)]),
    ("hidden_states.2", {}, "1.residual", lambda m: [(block(m, 1), "output", V)]),
    ("2", {"site": RESIDUAL, "counting": Counting.HIDDEN_STATES}, "1.residual", lambda m: [(block(m, 1), "output", V)]),
    ("-2", {"counting": Counting.HIDDEN_STATES}, "1.residual", lambda m: [(block(m, 1), "output", V)]),
]


@pytest.mark.parametrize(("key", "options", "site", "hooks"), KEYS, ids=[f"{key[0]} {key[2]}" for key in KEYS])
def test_a_name_acts_where_a_plain_hook_at_its_place_does(tmp_path, key, options, site, hooks):
    shaped = V.reshape(HEADS, HEAD_WIDTH) if key.endswith("hook_z") else V
    path = write_pt(tmp_path / "honesty.pt", {key: shaped})
    assert detect(path) is Format.TENSORS
    found = read_foreign(path, replace(HINTS, **options))
    assert [(c.attribute, str(c.site)) for c in found.columns] == [("honesty", site)]
    model = tiny("llama")
    assert torch.allclose(logits(model, found.columns), hooked(model, *hooks(model)), atol=1e-5)
    assert not torch.allclose(logits(model, found.columns), hooked(model), atol=1e-2)
    layer = int(site.partition(".")[0])
    assert len(read_foreign(path, replace(HINTS, layers=(layer,), **options)).columns) == 1, "--layer may say it again"


def test_entries_of_hidden_states_are_what_hugging_face_returns_under_these_numbers():
    model = tiny("llama")
    with torch.no_grad():
        states = model(TOKENS, output_hidden_states=True).hidden_states
    seen = []
    handle = block(model, 1).register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    model(TOKENS)
    handle.remove()
    assert len(states) == LAYERS + 1
    assert torch.allclose(states[2], seen[0], atol=1e-6), "entry l + 1 is the output of block l"
    assert torch.allclose(states[LAYERS], model.model.norm(hooked_output(model, LAYERS - 1)), atol=1e-5)


@torch.no_grad()
def hooked_output(model, layer):
    seen = []
    handle = block(model, layer).register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    model(TOKENS)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ["v.pt", "v.pth", "v.bin", "v.npy", "v.npz", "v.safetensors", "v.json"])
@pytest.mark.parametrize("shape", [(HIDDEN,), (1, HIDDEN), (1, 1, HIDDEN)])
def test_a_bare_tensor_acts_where_the_options_say(tmp_path, name, shape):
    path, vector = tmp_path / name, V.reshape(shape)
    {
        ".npy": lambda: np.save(path, vector.numpy()),
        ".npz": lambda: np.savez(path, vector.numpy()),
        ".safetensors": lambda: safetensors.torch.save_file({"anything": vector}, path),
        ".json": lambda: write_json(path, vector.tolist()),
    }.get(path.suffix, lambda: torch.save(vector, path))()
    (column,) = read_foreign(path, PLACE).columns
    assert (column.attribute, str(column.site), column.keep_norm) == ("honesty", "1.residual", False)
    assert torch.allclose(column.vector, V)
    with pytest.raises(FormatError, match="does not say its layer: name it with --layer"):
        read_foreign(path, replace(PLACE, layers=()))
    with pytest.raises(FormatError, match=r"does not say its site: name it with --site attn_heads\|attn_output"):
        read_foreign(path, replace(PLACE, site=None))
    with pytest.raises(FormatError, match="one layer, but --layer names 1, 2"):
        read_foreign(path, replace(PLACE, layers=(1, 2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_point_type_is_taken(tmp_path, dtype):
    (column,) = read_foreign(write_pt(tmp_path / "v.pt", V.to(dtype)), PLACE).columns
    assert torch.equal(column.vector, V.to(dtype).float())


def test_a_stack_has_a_row_for_every_block(tmp_path):
    path = write_pt(tmp_path / "v.pt", STACK)
    every = read_foreign(path, replace(PLACE, layers=()))
    assert [str(c.site) for c in every.columns] == ["0.residual", "1.residual", "2.residual"]
    assert all(torch.equal(c.vector, row) for c, row in zip(every.columns, STACK, strict=True))
    (one,) = read_foreign(path, PLACE).columns
    assert torch.equal(one.vector, STACK[1])
    model = tiny("llama")
    theirs = hooked(model, *((block(model, layer), "output", STACK[layer]) for layer in range(LAYERS)))
    assert torch.allclose(logits(model, every.columns), theirs, atol=1e-5)
    with pytest.raises(FormatError, match=r"holds no vector for layer 7; it has 0 \(row 0\), 1"):
        read_foreign(path, replace(PLACE, layers=(7,)))


def test_a_stack_with_a_row_more_is_that_of_hidden_states(tmp_path):
    path = write_pt(tmp_path / "v.pt", STATES)
    found = read_foreign(path, replace(PLACE, layers=()))
    assert [str(c.site) for c in found.columns] == ["0.residual", "1.residual"]
    assert all(torch.equal(c.vector, row) for c, row in zip(found.columns, STATES[1:3], strict=True))
    assert found.notes == (
        "left out: row 0 is the embedding, before the first block",
        "left out: row 3 has passed the final norm, which the output of the last block has not",
    )
    with pytest.raises(FormatError, match="holds no vector for layer 2"):
        read_foreign(path, replace(PLACE, layers=(2,)))
    with pytest.raises(FormatError, match="row 0 is at residual, not at --site attn_output"):
        read_foreign(path, replace(PLACE, layers=(), site=OUTPUT))
    with pytest.raises(FormatError, match="holds 4 vectors of 32 numbers, and the model has 3 layers"):
        read_foreign(path, replace(PLACE, layers=(), counting=Counting.BLOCKS))


def test_a_part_of_the_layers_is_named(tmp_path):
    path = write_pt(tmp_path / "v.pt", STACK[:2])
    with pytest.raises(FormatError, match=r"name the layer of each row, as in --layer 10-11"):
        read_foreign(path, PLACE)
    found = read_foreign(path, replace(PLACE, layers=(0, 2)))
    assert [str(c.site) for c in found.columns] == ["0.residual", "2.residual"]
    assert torch.equal(found.columns[1].vector, STACK[1])


def test_heads_are_taken_side_by_side(tmp_path):
    heads = torch.randn(LAYERS, HEADS, HEAD_WIDTH)
    place = replace(PLACE, site=HEAD_SITE)
    (one,) = read_foreign(write_pt(tmp_path / "v.pt", heads), place).columns
    assert torch.equal(one.vector, heads[1].reshape(-1))
    (one,) = read_foreign(write_pt(tmp_path / "w.pt", heads[2]), place).columns
    assert torch.equal(one.vector, heads[2].reshape(-1))


DESCRIBED = [
    ({"vector": V, "layer": 1}, {}),
    ({"vector": V, "layer": "1", "site": "residual"}, {"site": None}),
    ({"vector": V, "layer": torch.tensor(1)}, {"layers": ()}),
    ({"direction": V, "layer_idx": 2}, {"counting": Counting.HIDDEN_STATES}),
    ({"steering_vector": V, "hook_point": "blocks.2.hook_resid_pre"}, {"site": None, "layers": ()}),
    ({"vector": V.tolist(), "layers": [1]}, {"layers": ()}),
]


@pytest.mark.parametrize(("content", "options"), DESCRIBED)
def test_a_vector_may_have_its_layer_beside_it(tmp_path, content, options):
    (column,) = read_foreign(write_pt(tmp_path / "v.pt", content), replace(PLACE, **options)).columns
    assert str(column.site) == "1.residual"
    assert torch.allclose(column.vector, V)


def test_a_layer_that_contradicts_the_option_is_refused(tmp_path):
    path = write_pt(tmp_path / "v.pt", {"vector": V, "layer": 2})
    with pytest.raises(FormatError, match=r"says layer 2 \(block 2\), not --layer 1"):
        read_foreign(path, PLACE)
    path = write_pt(tmp_path / "w.pt", {"blocks.2.hook_resid_post": V})
    with pytest.raises(FormatError, match=r"holds no vector for layer 1; it has 2 \(blocks.2.hook_resid_post\)"):
        read_foreign(path, PLACE)


def test_the_metadata_of_safetensors_counts(tmp_path):
    safetensors.torch.save_file({"v": V}, tmp_path / "v.safetensors", {"format": "pt", "layer": "1", "model": "x"})
    found = read_foreign(tmp_path / "v.safetensors", replace(PLACE, layers=()))
    assert [str(c.site) for c in found.columns] == ["1.residual"]
    assert found.source == {"said": {"model": "x"}}
    assert found.notes == ("kept in config.json, and not applied: model 'x'",)


BY_LAYER = {0: STACK[0], 2: STACK[2]}


@pytest.mark.parametrize(
    "content",
    [
        BY_LAYER,
        {f"layer_{n}": v for n, v in BY_LAYER.items()},
        {"directions": BY_LAYER, "model_type": "llama", "explained_variances": {0: 0.5, 2: 0.7}},  # activation-steering
        {f"blocks.{n}.hook_resid_post": v for n, v in BY_LAYER.items()},
        {f"hidden_states.{n + 1}": v for n, v in BY_LAYER.items() if n == 0} | {"model.layers.2": STACK[2]},
        {"calm": {0: V}, "honesty": BY_LAYER},
    ],
)
def test_a_dict_of_layers_is_a_column_for_each(tmp_path, content):
    place = replace(PLACE, layers=())
    found = read_foreign(write_pt(tmp_path / "v.pt", content), place)
    assert [(c.attribute, str(c.site)) for c in found.columns] == [("honesty", "0.residual"), ("honesty", "2.residual")]
    assert all(torch.equal(c.vector, v) for c, v in zip(found.columns, BY_LAYER.values(), strict=True))
    assert [str(c.site) for c in read_foreign(tmp_path / "v.pt", replace(place, layers=(2,))).columns] == ["2.residual"]
    if "calm" in content:
        assert found.notes == ("left out: calm",)
        both = read_foreign(tmp_path / "v.pt", replace(place, attributes=("calm", "honesty")))
        assert [c.attribute for c in both.columns] == ["calm", "honesty", "honesty"]


def test_json_has_layers_as_text(tmp_path):
    path = write_json(tmp_path / "v.json", {str(n): v.tolist() for n, v in BY_LAYER.items()})
    assert [str(c.site) for c in read_foreign(path, replace(PLACE, layers=())).columns] == ["0.residual", "2.residual"]


def test_vectors_without_layers_are_chosen_by_name(tmp_path):
    path = write_pt(tmp_path / "v.pt", {"mean": V, "direction_of_truth": STACK[0]})
    with pytest.raises(FormatError, match=r"holds mean, direction_of_truth: none of them names a layer .* --attribute"):
        read_foreign(path, PLACE)
    found = read_foreign(path, replace(PLACE, attributes=("direction_of_truth",)))
    assert torch.equal(found.columns[0].vector, STACK[0])
    assert found.notes == ("left out: mean",)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"blocks.0.hook_resid_pre": V}, {}, "blocks.0.hook_resid_pre is the embedding, before the first block"),
        ({"blocks.1.attn.hook_q": V}, {}, "is at no site of ours; of TransformerLens's hooks these are: hook_"),
        ({"blocks.1.hook_attn_out": V}, {"site": RESIDUAL}, "is at attn_output, not at --site residual"),
        ({"hidden_states.3": V}, {}, "has passed the final norm"),
        ({"hidden_states.9": V}, {}, "no entry of the model's hidden_states"),
        ({"hidden_states.1": V}, {"counting": Counting.BLOCKS}, "counts hidden_states, as its name says"),
        ({"model.layers.1.input_layernorm": V}, {}, "is at no site of ours"),
        ({"model.layers.1": V, "blocks.1.hook_resid_post": V}, {}, "holds two vectors of 'honesty' for 1.residual"),
        ({"-7": V}, {"site": RESIDUAL}, "-7 is no layer of the model"),
        ({"1": V.to(torch.int64)}, {"site": RESIDUAL}, "1 in .* must be floating-point numbers, not int64"),
        ({"1": V.to(torch.complex64)}, {"site": RESIDUAL}, "must be floating-point numbers, not complex64"),
        ({"1": torch.randn(2, HIDDEN)}, {"site": RESIDUAL}, r"1 in .* must be a vector, not of shape \[2, 32\]"),
        ({"1": HOLED}, {"site": RESIDUAL}, "1 in .* holds 2 values of 32 that are not finite"),
        (V / 0, HERE, "holds 32 values of 32 that are not finite"),
        (V * 0, HERE, "holds nothing but zeros: its vectors would steer nothing"),
        (torch.randn(2, 3, HIDDEN), HERE, r"a stack \[layers, width\], not of shape \[2, 3, 32\]"),
        (torch.tensor(1.0), HERE, "holds one number, not a vector"),
        (torch.randn(9, HIDDEN), {"site": RESIDUAL}, "holds 9 vectors of 32 numbers, and the model has 3 layers"),
        ({"vector": V, "layer": "last"}, HERE, "layer in .* must be a whole number, or a list .* not 'last'"),
        ({"vector": V, "layer": [0, 1]}, {"site": RESIDUAL}, "is one vector, but 2 layers are named beside it"),
        ({"lr": 0.1}, {}, "none of them names a layer"),
        ({}, {}, "holds nothing"),
        (None, {}, "holds no vectors, but nothing"),
        ([V, V[:3]], {}, "list of tensors of several shapes"),
    ],
)  # fmt: skip
def test_what_cannot_be_placed_is_refused(tmp_path, content, options, message):
    with pytest.raises(FormatError, match=message):
        read_foreign(write_pt(tmp_path / "v.pt", content), replace(HINTS, attributes=("honesty",), **options))


@pytest.mark.parametrize(
    ("architecture", "hook"),
    [
        ("Gemma2ForCausalLM", "hook_attn_out"),
        ("Olmo2ForCausalLM", "hook_mlp_out"),
        ("GraniteForCausalLM", "hook_attn_out"),
        ("GPTNeoXForCausalLM", "hook_resid_mid"),
    ],
)
def test_a_hook_that_lies_behind_a_norm_or_beside_the_mlp_is_at_no_site(tmp_path, architecture, hook):
    path = write_pt(tmp_path / "v.pt", {f"blocks.1.{hook}": V})
    with pytest.raises(FormatError, match=f"is at no site of {architecture}"):
        read_foreign(path, Hints(model=replace(SHAPE, architecture=architecture)))


def test_zeros_among_others_are_left_out_and_told(tmp_path):
    stack = STACK.clone()
    stack[0] = 0
    found = read_foreign(write_pt(tmp_path / "v.pt", stack), replace(PLACE, layers=()))
    assert [str(c.site) for c in found.columns] == ["1.residual", "2.residual"]
    assert found.notes == ("left out, because the vector is zero: honesty at 0.residual",)


class ControlVector:
    """A class of another package, pickled as an object."""

    def __init__(self):
        self.directions = {1: V}


def pickled(content: object) -> bytes:
    return pickle.dumps(content, protocol=2)


def table() -> bytes:
    return b"PAR1" + bytes(40) + b"PAR1"


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("v.pt", POINTER, "is a Git LFS pointer, not the file itself"),
        ("v.safetensors", POINTER, "is a Git LFS pointer"),
        ("v.npy", POINTER, "is a Git LFS pointer"),
        ("v.parquet", table(), "is a Parquet table"),
        ("v.pt", table(), "is a Parquet table"),
        ("v.pt", b"\n<!DOCTYPE html><html>Sign in</html>", "is an HTML page, as a web server answers"),
        ("v.pt", b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is an XML page"),
        ("v.safetensors", b"Entry not found", "a web server's answer in place of a file, 'Entry not found'"),
        ("v.pt", b"", "is an empty file"),
        ("v.json", b"", "is an empty file"),
        ("v.pt", bytes(600), "begins with 512 zero bytes"),
        ("v.pt", b"\x1f\x8b" + bytes(9), "is a gzip archive: unpack it first"),
        ("v.h5", b"\x89HDF\r\n\x1a\n" + bytes(9), "is an HDF5 file"),
        ("v.json", b"{'1': [1]}", "is no sound JSON"),
        ("v.safetensors", b"abc", "is not a safetensors file"),
        ("v.pt", pickled(ControlVector()), "is code, and is not run; it asks for .*ControlVector"),
        ("v.pt", pickled({1: V.numpy()}), "is code, and is not run; it asks for numpy.* save its arrays as tensors"),
        ("v.pt", b"hello, these are no tensors", "v.pt"),
        ("v.pt", b"hi", "v.pt is no sound file of PyTorch's$"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_vectors_is_called_what_it_is(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FormatError, match=message) as caught:
        read_foreign(tmp_path / name, PLACE)
    assert "\n" not in str(caught.value)


def test_arrays_of_objects_are_pickles_too(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "v.npy").write_bytes(buffer.getvalue())
    np.savez(tmp_path / "v.npz", a=np.array([None], dtype=object))
    for name in ("v.npy", "v.npz"):
        with pytest.raises(FormatError, match="holds Python objects, not numbers: they are a pickle"):
            read_foreign(tmp_path / name, PLACE)


@pytest.mark.parametrize("dtype", ["<i8", "bool", "<U3", "<c8"])
def test_arrays_of_something_else_are_refused(tmp_path, dtype):
    np.save(tmp_path / "v.npy", np.zeros(HIDDEN, dtype=dtype))
    with pytest.raises(FormatError, match="must be floating-point numbers, not"):
        read_foreign(tmp_path / "v.npy", PLACE)


@pytest.mark.parametrize("dtype", [">f4", "<f2", "<f8"])
def test_arrays_of_every_floating_point_type_are_taken(tmp_path, dtype):
    np.save(tmp_path / "v.npy", V.numpy().astype(dtype))
    (column,) = read_foreign(tmp_path / "v.npy", PLACE).columns
    assert torch.allclose(column.vector, V, atol=2e-3)


@pytest.mark.parametrize("name", ["v.pt", "v.npz", "v.safetensors"])
def test_a_file_cut_anywhere_is_refused(tmp_path, name):
    path = tmp_path / name
    {
        "v.pt": lambda: torch.save(V, path),
        "v.npz": lambda: np.savez(path, V.numpy()),
        "v.safetensors": lambda: safetensors.torch.save_file({"v": V}, path),
    }[name]()
    data = path.read_bytes()
    for length in range(1, len(data) - 1, 61):
        path.write_bytes(data[:length])
        with pytest.raises(FormatError):
            read_foreign(path, PLACE)


def test_a_module_is_not_needed_to_read_parameters(tmp_path):
    parameters = {"1": nn.Parameter(V)}
    (column,) = read_foreign(write_pt(tmp_path / "v.pt", parameters), replace(PLACE, layers=())).columns
    assert not column.vector.requires_grad
