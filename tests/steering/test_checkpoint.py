import json
import math
import os
import pickle
import shutil
import tracemalloc
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from steering import (
    BaseModelInfo,
    CheckpointError,
    CheckpointMismatch,
    Clamp,
    ColumnError,
    Gate,
    NotFound,
    Positions,
    Reading,
    Site,
    SiteKind,
    base_model_info,
    checkpoint,
    find,
    list_checkpoints,
    load,
    save,
    verify_against,
    verify_sites,
)
from steering.checkpoint_config import MAX_COLUMNS
from tests.steering.families import column, tiny

OUTPUT, HEADS, RESIDUAL = (Site(1, k) for k in (SiteKind.ATTN_OUTPUT, SiteKind.ATTN_HEADS, SiteKind.RESIDUAL))
BASE = BaseModelInfo(id="demo/model", revision=None, architecture="LlamaForCausalLM", hidden_size=8, num_layers=3)


def three():
    return [
        column(OUTPUT, 8, seed=1, attribute="truthfulness", default_multiplier=1.5),
        column(OUTPUT, 8, seed=2, attribute="civility", gate=Gate.CONSTANT),
        column(RESIDUAL, 8, seed=3, attribute="fairness", gate=Gate.LINEAR),
    ]


def write(folder: Path, columns=None, **changes):
    given = {
        "name": "demo",
        "version": "v1",
        "method": "mat",
        "base_model": BASE,
        "columns": three() if columns is None else columns,
        "normalize": True,
        "positions": Positions.GENERATED,
        "training": {"seed": 0},
        "evaluation": {},
        "card": "# Demo\n",
    }
    return save(folder, **(given | changes))


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "demo" / "v1"
    write(made)
    return made


def edit(folder: Path, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]):
    """Other tensors, with the hash to go with them."""
    data = safetensors.torch.save(tensors)
    (folder / "steering.safetensors").write_bytes(data)
    edit(folder, sha256=sha256(data).hexdigest())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load((folder / "steering.safetensors").read_bytes())


def same(columns, others) -> bool:
    plain = ("attribute", "site", "gate", "gate_bias", "keep_norm", "default_multiplier", "range", "clamp", "reads")
    return len(columns) == len(others) and all(
        all(getattr(a, name) == getattr(b, name) for name in plain)
        and torch.equal(a.vector, b.vector)
        and torch.equal(a.gate_weight, b.gate_weight)
        for a, b in zip(columns, others, strict=True)
    )


def test_what_was_saved_is_loaded(folder):
    loaded = load(folder)
    assert same(loaded.columns, three())
    assert loaded.config.base_model == BASE
    assert loaded.config.positions is Positions.GENERATED
    assert loaded.attributes == {"truthfulness": 1.5, "civility": 1.0, "fairness": 1.0}
    assert list(loaded.attributes) == ["truthfulness", "civility", "fairness"]


def test_a_clamp_is_kept_and_told_only_where_there_is_one(tmp_path):
    columns = [*three()[:2], replace(three()[2], clamp=Clamp(2.5, -0.75))]
    write(tmp_path / "c" / "v1", columns=columns)
    assert same(load(tmp_path / "c" / "v1").columns, columns)
    told = json.loads((tmp_path / "c" / "v1" / "config.json").read_text())["columns"]
    assert [column.get("clamp") for column in told] == [None, None, {"value": 2.5, "origin": -0.75}]
    assert "clamp" not in told[0]


def test_what_a_gate_reads_is_kept(tmp_path):
    earlier = Site(0, SiteKind.RESIDUAL)
    columns = [
        replace(three()[0], reads=Reading(earlier)),
        replace(three()[0], attribute="b", gate=Gate.COSINE, reads=Reading(earlier, latched=True)),
    ]
    write(tmp_path / "c" / "v1", columns=columns)
    assert same(load(tmp_path / "c" / "v1").columns, columns)
    told = json.loads((tmp_path / "c" / "v1" / "config.json").read_text())["columns"]
    assert told[1]["reads"] == {"layer": 0, "site": "residual", "latched": True}
    with pytest.raises(CheckpointError, match="latched gate, which is known from the last prompt token on"):
        write(tmp_path / "c" / "v2", columns=columns, positions=Positions.ALL)
    edit(tmp_path / "c" / "v1", columns=[told[0] | {"reads": {"layer": 2, "site": "residual"}}, told[1]])
    with pytest.raises(CheckpointError, match=r"reads 2\.residual, which a forward pass does not meet before"):
        load(tmp_path / "c" / "v1")


def test_the_folder_is_what_the_format_says(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "steering.safetensors"]
    assert (folder / "README.md").read_text() == "# Demo\n"
    assert {name: tuple(t.shape) for name, t in tensors_of(folder).items()} == {
        "vectors": (3, 8),
        "gate_weights": (3, 8),
        "gate_biases": (3,),
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["format_version"] == 1
    assert config["sha256"] == sha256((folder / "steering.safetensors").read_bytes()).hexdigest()
    assert config["columns"][1] == {
        "attribute": "civility",
        "layer": 1,
        "site": "attn_output",
        "gate": "constant",
        "default_multiplier": 1.0,
        "range": [-40.0, 40.0],
    }


def test_saving_the_same_twice_gives_the_same_bytes(folder, tmp_path):
    write(tmp_path / "again")
    for name in ("config.json", "steering.safetensors", "README.md"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_columns_of_different_widths_are_grouped_by_site_kind(tmp_path):
    mixed = [column(HEADS, 6, seed=1), column(OUTPUT, 8, seed=2), column(Site(2, SiteKind.ATTN_HEADS), 6, seed=3)]
    assert same(write(tmp_path / "mixed", mixed).columns, mixed)
    assert {name: tuple(t.shape) for name, t in tensors_of(tmp_path / "mixed").items()} == {
        "attn_heads.vectors": (2, 6),
        "attn_heads.gate_weights": (2, 6),
        "attn_heads.gate_biases": (2,),
        "attn_output.vectors": (1, 8),
        "attn_output.gate_weights": (1, 8),
        "attn_output.gate_biases": (1,),
    }


def test_one_attribute_may_have_columns_at_many_layers(tmp_path):
    many = [column(Site(layer, SiteKind.RESIDUAL), 8, seed=layer) for layer in range(3)]
    made = write(tmp_path / "many", [*many, column(OUTPUT, 8, attribute="civility")])
    assert made.attributes == {"truthfulness": 1.0, "civility": 1.0}
    assert made.multipliers({"truthfulness": 2.0}) == (2.0, 2.0, 2.0, 0.0)
    with pytest.raises(ColumnError, match="there is no attribute 'honesty'; there are truthfulness, civility"):
        made.multipliers({"honesty": 1.0})


def test_numbers_that_json_has_not_are_written_as_null_and_other_types_as_plain_ones(tmp_path):
    training = {
        "loss": math.nan,
        "best": (math.inf, np.float32(0.5), torch.tensor(2)),
        "path": Path("data"),
        "gate": Gate.SIGMOID,
        3: np.array([1, 2]),
    }
    config = json.loads((write(tmp_path / "x", training=training) and tmp_path / "x" / "config.json").read_text())
    assert config["training"] == {"loss": None, "best": [None, 0.5, 2], "path": "data", "gate": "sigmoid", "3": [1, 2]}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"name": "../up"}, "name"),
        ({"name": ""}, "name"),
        ({"version": "a/b"}, "version"),
        ({"version": "v1\n"}, "version"),
        ({"normalize": False}, "keep_norm True, normalize is False"),
        ({"columns": []}, "columns"),
        ({"columns": [column(OUTPUT, 9)]}, "width 9, the base model 8"),
        ({"columns": [column(Site(3, SiteKind.RESIDUAL), 8)]}, "layer 3 is beyond the 3"),
        ({"columns": [column(OUTPUT, 8), column(RESIDUAL, 8, default_multiplier=2.0)]}, "two default multipliers"),
        ({"columns": [column(OUTPUT, 8), column(OUTPUT, 9)]}, "different widths"),
        ({"training": {"model": object()}}, r"training\.model is a object"),
        ({"training": {"rows": [[]] * 2**17}}, r"config\.json has more than 131072 lists and objects"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, changes, named):
    with pytest.raises(CheckpointError, match=named):
        write(tmp_path / "bad", **changes)
    assert not (tmp_path / "bad").exists()


# Corruption


def truncate(folder):
    path = folder / "steering.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(folder):
    path = folder / "steering.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def garble(folder):
    (folder / "steering.safetensors").write_bytes(b"\xff" * 100)
    edit(folder, sha256=sha256(b"\xff" * 100).hexdigest())


def pickled(folder):
    data = pickle.dumps({"vectors": [1.0]})
    (folder / "steering.safetensors").write_bytes(data)
    edit(folder, sha256=sha256(data).hexdigest())


def torch_saved(folder):
    path = folder / "steering.safetensors"
    torch.save(tensors_of(folder), path)
    edit(folder, sha256=sha256(path.read_bytes()).hexdigest())


def changed(**parts):
    return lambda folder: rewrite(
        folder, tensors_of(folder) | {k: make(tensors_of(folder)) for k, make in parts.items()}
    )


def without(name):
    return lambda folder: rewrite(folder, {k: t for k, t in tensors_of(folder).items() if k != name})


def no_number(tensors):
    tensors["vectors"][0, 0] = math.nan
    return tensors["vectors"]


def column_changed(**changes):
    def change(folder):
        columns = json.loads((folder / "config.json").read_text())["columns"]
        edit(folder, columns=[columns[0] | changes, *columns[1:]])

    return change


def dropped(name):
    def drop(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != name}))

    return drop


def config_text(text):
    return lambda folder: (folder / "config.json").write_text(text)


def nan_in_config(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": NaN'))


def link_out(name):
    def link(folder):
        shutil.move(folder / name, folder.parent.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent.parent / "elsewhere")

    return link


CORRUPTIONS = {
    "truncated": (truncate, "sha256 differs"),
    "a bit flipped": (flip_a_bit, "sha256 differs"),
    "garbage": (garble, "not a safetensors file"),
    "a pickle": (pickled, "not a safetensors file"),
    "a torch file": (torch_saved, "not a safetensors file"),
    "too few vectors": (
        changed(vectors=lambda t: t["vectors"][:2].clone()),
        r"vectors has shape \[2, 8\], not \[3, 8\]",
    ),
    "vectors of another rank": (changed(vectors=lambda t: t["vectors"].flatten()), "vectors has shape"),
    "a scalar": (changed(vectors=lambda t: torch.tensor(1.0)), "vectors has shape"),
    "gates of another width": (
        changed(gate_weights=lambda t: t["gate_weights"][:, :7].clone()),
        "gate_weights has shape",
    ),
    "biases as a matrix": (changed(gate_biases=lambda t: t["gate_biases"][:, None].clone()), "gate_biases has shape"),
    "a width that is not the model's": (
        changed(vectors=lambda t: t["vectors"][:, :7].clone(), gate_weights=lambda t: t["gate_weights"][:, :7].clone()),
        "width 7, the base model 8",
    ),
    "half precision": (changed(vectors=lambda t: t["vectors"].half()), "float16, not float32"),
    "not a number": (changed(vectors=no_number), "vectors holds values that are not finite"),
    "numbers near the end of float32": (
        changed(vectors=lambda t: t["vectors"].sign() * 3e38),
        "the norm of vector of column .* must be at most",
    ),
    "a tensor missing": (without("gate_biases"), "the tensors are"),
    "a tensor too many": (changed(extra=lambda t: torch.zeros(1)), "the tensors are"),
    "no tensors": (lambda folder: (folder / "steering.safetensors").unlink(), "has no steering.safetensors"),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        r"not a complete checkpoint: it has no config\.json",
    ),
    "not JSON": (config_text("{"), "is not JSON"),
    "not UTF-8": (lambda folder: (folder / "config.json").write_bytes(b'{"\xff"}'), "is not JSON"),
    "deep JSON": (config_text("[" * 100_000), "is not JSON"),
    "a list": (config_text("[]"), "is refused"),
    "NaN in the config": (nan_in_config, "NaN is not a JSON number"),
    "another format": (lambda folder: edit(folder, format_version=2), "format_version 2; only 1 can be read"),
    "an odd format": (lambda folder: edit(folder, format_version="1"), "format_version '1'"),
    "no format": (dropped("format_version"), "format_version: Field required"),
    "a field missing": (dropped("normalize"), "normalize: Field required"),
    "a field unknown": (lambda folder: edit(folder, extra=1), "extra: Extra inputs are not permitted"),
    "a column field unknown": (column_changed(colour="red"), r"columns\.0\.colour"),
    "an unknown gate": (column_changed(gate="softmax"), r"columns\.0\.gate"),
    "an unknown site": (column_changed(site="lm_head"), r"columns\.0\.site"),
    "a layer as text": (column_changed(layer="1"), r"columns\.0\.layer"),
    "a layer too far": (column_changed(layer=3), "layer 3 is beyond the 3"),
    "a default out of range": (column_changed(default_multiplier=50.0), "outside its range"),
    "a range upside down": (column_changed(range=[4.0, -4.0]), "outside its range"),
    "an empty attribute": (column_changed(attribute=""), "attribute must be"),
    "a name that is a path": (lambda folder: edit(folder, name="../x"), "name"),
    "a hash that is none": (lambda folder: edit(folder, sha256="0"), "sha256"),
    "tensors linked from outside": (link_out("steering.safetensors"), "symbolic link out of its folder"),
    "a config linked from outside": (link_out("config.json"), "symbolic link out of its folder"),
}


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_a_corrupt_checkpoint_is_refused_with_a_sentence(folder, what):
    corrupt, named = CORRUPTIONS[what]
    corrupt(folder)
    with pytest.raises(CheckpointError, match=named) as refused:
        load(folder)
    assert "\n" not in str(refused.value).strip()


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        load(tmp_path / "nothing")


def test_nothing_is_ever_unpickled(folder, monkeypatch):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(folder / "sprung"),)

    torch.save({"vectors": Trap()}, folder / "steering.safetensors")
    edit(folder, sha256=sha256((folder / "steering.safetensors").read_bytes()).hexdigest())
    with pytest.raises(CheckpointError):
        load(folder)
    assert not (folder / "sprung").exists()


# Atomicity


@pytest.mark.parametrize("at", range(3))
def test_a_crash_between_renames_leaves_no_checkpoint_that_looks_complete(folder, monkeypatch, at):
    replace, done = Path.replace, []

    def crash(path, target):
        if len(done) == at:
            raise OSError("power cut")
        done.append(target.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(CheckpointError, match="cannot be written: power cut"):
        write(folder, [column(OUTPUT, 8, seed=77)])
    assert done == ["steering.safetensors", "README.md", "config.json"][:at]
    assert list_checkpoints(folder.parent.parent) == []
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]


def test_a_crash_while_writing_leaves_the_checkpoint_that_was_there(folder, monkeypatch):
    def full(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="disk full"):
        write(folder, [column(OUTPUT, 8, seed=77)])
    assert same(load(folder).columns, three())


def test_a_version_can_be_written_again(folder):
    again = write(folder, [column(OUTPUT, 8, seed=77)])
    assert same(load(folder).columns, again.columns)
    assert len(again.columns) == 1


def test_other_files_in_the_folder_stay(folder):
    (folder / "evaluation.png").write_bytes(b"plot")
    write(folder)
    assert (folder / "evaluation.png").read_bytes() == b"plot"


# Finding


@pytest.fixture
def root(tmp_path):
    for name, version in [("demo", "v2"), ("demo", "v10"), ("demo", "v1.9"), ("other", "1")]:
        write(tmp_path / "root" / name / version, name=name, version=version)
    return tmp_path / "root"


def test_versions_are_ordered_as_people_read_them(root):
    assert [(name, version) for name, version, _ in list_checkpoints(root)] == [
        ("demo", "v1.9"),
        ("demo", "v2"),
        ("demo", "v10"),
        ("other", "1"),
    ]
    assert find(root, "demo") == root / "demo" / "v10"
    assert find(root, "demo", "v2") == root / "demo" / "v2"


def test_incomplete_and_oddly_named_folders_are_passed_over(root):
    (root / "demo" / "v10" / "config.json").unlink()
    shutil.copytree(root / "other" / "1", root / ".hidden" / "1")
    shutil.copytree(root / "other" / "1", root / "other" / "a b")
    (root / "file").write_text("")
    assert [version for _, version, _ in list_checkpoints(root)] == ["v1.9", "v2", "1"]


def test_a_root_that_is_not_there_holds_nothing(tmp_path):
    assert list_checkpoints(tmp_path / "nothing") == []


@pytest.mark.parametrize("depth", ["name", "version", "config"])
def test_a_symbolic_link_out_of_the_root_is_not_followed(root, tmp_path, depth):
    write(tmp_path / "outside" / "v1", name="outside")
    if depth == "name":
        (root / "outside").symlink_to(tmp_path / "outside")
    else:
        (root / "outside").mkdir()
        if depth == "version":
            (root / "outside" / "v1").symlink_to(tmp_path / "outside" / "v1")
        else:
            (root / "outside" / "v1").mkdir()
            (root / "outside" / "v1" / "config.json").symlink_to(tmp_path / "outside" / "v1" / "config.json")
    assert "outside" not in [name for name, _, _ in list_checkpoints(root)]
    with pytest.raises(NotFound):
        find(root, "outside")


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("nothing", None),
        ("demo", "v3"),
        ("..", None),
        ("demo", ".."),
        ("demo/v2", None),
        ("", None),
        ("/etc", None),
        ("demo", ""),
        ("demo\n", None),
        ("*", None),
        ("demo", "v?"),
    ],
)
def test_what_is_not_there_is_not_found(root, name, version):
    with pytest.raises(NotFound, match="there is no checkpoint"):
        find(root, name, version)


# Fitting a model


def test_a_model_describes_itself():
    info = base_model_info(tiny("llama"), "some/model", "main")
    assert info == BaseModelInfo(
        id="some/model", revision="main", architecture="LlamaForCausalLM", hidden_size=32, num_layers=3
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architecture": "GPT2LMHeadModel"}, "architecture LlamaForCausalLM, but demo/model has architecture GPT2"),
        ({"hidden_size": 16}, "hidden_size 8, but demo/model has hidden_size 16"),
        ({"num_layers": 2}, "num_layers 3, but demo/model has num_layers 2"),
    ],
)
def test_another_base_model_is_a_mismatch_that_says_why(folder, changes, named):
    checkpoint = load(folder)
    verify_against(checkpoint, BASE.model_copy(update={"id": "a/copy", "revision": "x"}))
    with pytest.raises(CheckpointMismatch, match=named):
        verify_against(checkpoint, BASE.model_copy(update=changes))


def test_columns_must_be_as_wide_as_the_sites_of_the_model(tmp_path):
    model = tiny("qwen3")
    info = base_model_info(model, "qwen", None)
    verify_sites(write(tmp_path / "fits", [column(HEADS, 48)], base_model=info), model)
    with pytest.raises(CheckpointMismatch, match=r"width 32, but site 1\.attn_heads of the model has width 48"):
        verify_sites(write(tmp_path / "not", [column(HEADS, 32)], base_model=info), model)


def test_what_is_too_large_is_refused_before_it_is_read(folder):
    for name, size in ((checkpoint.TENSORS, 2**30), (checkpoint.CONFIG, 39 * 10**6)):
        sound = (folder / name).read_bytes()
        with (folder / name).open("r+b") as file:
            file.truncate(size)  # sparse: it takes no room
        tracemalloc.start()
        with pytest.raises(CheckpointError, match=rf"{name} has {size} bytes; it can have \d+ at most"):
            load(folder)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()
        (folder / name).write_bytes(sound)
    assert load(folder)


def filled(before, member, after):
    """JSON with as many of a member as a config.json has room for; N in it is another number each time."""
    count = (checkpoint.MAX_CONFIG - 2**12) // (len(member.replace("N", "123456")) + 1)
    return before + ",".join(member.replace("N", f"{number:06}") for number in range(count)) + after


def columns_of(folder, **changes):
    return [one | changes for one in json.loads((folder / "config.json").read_text())["columns"]]


LARGE = {
    "columns without anything": (
        "columns",
        lambda folder: filled("[", "{}", "]"),
        "more than 131072 lists and",
    ),
    "many without anything": ("columns", lambda folder: f"[{'{},' * 100_000}{{}}]", r"columns\.0\.attribute: Field"),
    "too many columns": (
        "columns",
        lambda folder: json.dumps(columns_of(folder)[:1] * (MAX_COLUMNS + 1)),
        f"columns: List should have at most {MAX_COLUMNS} items",
    ),
    "unknown fields": ("more", lambda folder: filled("{}, ", '"N":1', ""), "an object in it has more than 64 fields"),
    "a clamp of unknown fields": (
        "columns",
        lambda folder: filled('[{"clamp":{', '"N":1', "}}]"),
        "an object in it has more",
    ),
    "a format that is a list": ("format_version", lambda folder: f"[{'[],' * 100_000}1]", r"format_version \[\[\], \["),
    "a long name": ("name", lambda folder: json.dumps("x" * 2**21), "name: String should match pattern"),
    "a long attribute": (
        "columns",
        lambda folder: json.dumps(columns_of(folder, attribute="x" * 2**20)[:2]),
        r"columns\.0\.attribute: String should have at most 64",
    ),
}


@pytest.mark.parametrize("what", LARGE)
def test_a_large_config_is_refused_in_a_few_words(folder, what):
    field, made, named = LARGE[what]
    fields = json.loads((folder / "config.json").read_text())
    value = made(folder)
    rest = json.dumps({name: one for name, one in fields.items() if name != field})
    (folder / "config.json").write_text(f'{{"{field}": {value}, {rest[1:]}')
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=named) as refused:
            load(folder)
        assert tracemalloc.get_traced_memory()[1] < 100 * 2**20, "an error that is described takes a kilobyte"
    finally:
        tracemalloc.stop()
    assert len(str(refused.value)) < 1000


def test_what_would_be_too_large_to_be_loaded_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_CONFIG", 100)
    with pytest.raises(CheckpointError, match=r"config.json would have \d+ bytes, over 100"):
        write(tmp_path / "mine" / "1")
    assert not (tmp_path / "mine").exists()


def test_a_folder_whose_files_go_while_it_is_listed_is_not_there(folder, monkeypatch):
    real = os.listdir

    def goes(path):
        found = real(path)
        if path == folder.parent:
            shutil.rmtree(folder)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", goes)
        assert list_checkpoints(folder.parent.parent) == []
    shutil.rmtree(folder.parent)
    assert list_checkpoints(folder.parent.parent) == []
    assert checkpoint.unreadable(folder.parent.parent, folder.parent.name) is None


def test_links_in_a_circle_are_no_checkpoint(folder):
    for file in (checkpoint.CONFIG, checkpoint.TENSORS):
        (folder / file).rename(folder / "kept")
        (folder / file).symlink_to(folder / file)
        with pytest.raises(CheckpointError):
            load(folder)
        assert (list_checkpoints(folder.parent.parent) == []) == (file == checkpoint.CONFIG)
        (folder / file).unlink()
        (folder / "kept").rename(folder / file)


def test_a_folder_is_being_written_until_its_config_is_there(folder, monkeypatch):
    root, name, version = folder.parent.parent, folder.parent.name, folder.name
    assert not checkpoint.is_being_written(root, name, version)
    seen = []
    real = Path.replace

    def watched(self, target):
        seen.append([checkpoint.is_being_written(root, name, one) for one in (version, None)])
        return real(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    write(folder)
    assert seen
    assert all(map(all, seen))
    assert not checkpoint.is_being_written(root, name, version)
    assert not checkpoint.is_being_written(root, "..", "*")
