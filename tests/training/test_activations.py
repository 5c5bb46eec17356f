"""What is extracted is what the model computes at the positions that a generation would steer."""

import copy
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import training.activations.extraction as extraction
from steering import Site, SiteKind, site_module
from tests.training.helpers import make_llama, make_tokenizer
from training.activations import Pool
from training.activations.extraction import extract, extract_to, extract_under
from training.activations.store import Activations, load_activations, save_activations, write_shard
from training.activations.tokenization import encode
from training.data import Sample, Split, split_samples
from training.errors import ActivationError, DataError, FitError

SITES = (
    Site(2, SiteKind.RESIDUAL),
    Site(1, SiteKind.ATTN_OUTPUT),
    Site(0, SiteKind.ATTN_HEADS),
    Site(1, SiteKind.MLP_OUTPUT),
)


def one_by_one(model: Any, tokenizer: Any, sample: Sample, site: Site) -> tuple[torch.Tensor, int, int]:
    """The hidden states of one sample, unpadded and without leaving early: [tokens, D]; start and end."""
    module, side = site_module(model, site)
    seen = []

    def read(module: Any, args: Any, output: Any) -> None:
        value = args[0] if side == "input" else output
        seen.append(value[0] if isinstance(value, tuple) else value)

    handle = module.register_forward_hook(read)
    encoded = encode(tokenizer, sample.prompt, sample.completion)
    with torch.no_grad():
        model(torch.tensor([encoded.ids]))
    handle.remove()
    return seen[0][0], encoded.start, encoded.end


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pools_equal_a_plain_loop(
    name: str, tokenizer: Any, samples: list[Sample], request: pytest.FixtureRequest
) -> None:
    model = copy.deepcopy(request.getfixturevalue(name)).double()
    sites = SITES if name == "llama" else SITES[1:]
    found = {pool: extract(model, tokenizer, samples, sites, pool=pool, max_rows=5) for pool in Pool}
    for site in sites:
        for index, sample in enumerate(samples):
            states, start, end = one_by_one(model, tokenizer, sample, site)
            expected = {
                Pool.MEAN: states[start:end].mean(0, keepdim=True),
                Pool.LAST: states[end:],
                Pool.TOKENS: states[start:end],
                Pool.FIRST: states[start : start + 1],
            }
            for pool, activations in found.items():
                rows = activations.values[site][activations.samples == index]
                torch.testing.assert_close(rows, expected[pool].float(), rtol=1e-6, atol=1e-6)


def test_residual_is_what_transformers_calls_hidden_states(llama: Any, tokenizer: Any, samples: list[Sample]) -> None:
    site = Site(0, SiteKind.RESIDUAL)
    found = extract(llama, tokenizer, samples[:1], [site], pool=Pool.LAST)
    ids = torch.tensor([tokenizer(samples[0].text)["input_ids"]])
    with torch.no_grad():
        states = llama(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found.values[site][0], states[1][0, -1], rtol=1e-4, atol=1e-5)


def test_rows_know_their_sample(llama: Any, tokenizer: Any, samples: list[Sample]) -> None:
    placed = split_samples(samples)
    found = extract(llama, tokenizer, placed, SITES[:1], pool=Pool.TOKENS)
    for row, index in enumerate(found.samples.tolist()):
        sample = placed[index]
        assert found.attributes[row] == sample.attribute
        assert bool(found.labels[row]) == sample.label
        assert found.groups[row] == sample.group
        assert found.splits[row] is sample.split
    assert found.samples.tolist() == sorted(found.samples.tolist())


def test_no_hook_outlives_the_extraction(tokenizer: Any, samples: list[Sample]) -> None:
    model = make_llama()
    extract(model, tokenizer, samples, SITES)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards as they are written; the third ends in a KeyboardInterrupt instead."""
    names: list[str] = []

    def counted(path: Path, values: dict[Site, torch.Tensor], owner: torch.Tensor) -> None:
        names.append(path.name)
        if len(names) == 3:
            raise KeyboardInterrupt
        write_shard(path, values, owner)

    monkeypatch.setattr(extraction, "write_shard", counted)
    return names


def test_an_interrupted_extraction_goes_on_with_the_next_shard(
    llama: Any, tokenizer: Any, samples: list[Sample], tmp_path: Path, written: list[str]
) -> None:
    whole = extract(llama, tokenizer, samples, SITES)
    with pytest.raises(KeyboardInterrupt):
        extract(llama, tokenizer, samples, SITES, out=tmp_path, shard_size=10)
    assert not (tmp_path / "manifest.json").exists()
    with pytest.raises(ActivationError, match=r"manifest\.json is missing"):
        load_activations(tmp_path)
    resumed = extract(llama, tokenizer, samples, SITES, out=tmp_path, shard_size=10)
    assert len(written) == 3 + 2  # two of four shards were there
    for site in SITES:
        torch.testing.assert_close(resumed.values[site], whole.values[site], rtol=1e-3, atol=1e-4)
    again = extract(llama, tokenizer, samples, SITES, out=tmp_path, shard_size=10)
    assert len(written) == 5
    assert torch.equal(again.values[SITES[0]], resumed.values[SITES[0]])
    assert again.attributes == resumed.attributes


def test_shards_of_other_sizes_are_not_taken_for_ours(
    llama: Any, tokenizer: Any, samples: list[Sample], tmp_path: Path, written: list[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        extract(llama, tokenizer, samples, SITES, out=tmp_path, shard_size=10)
    assert extract_to(tmp_path, llama, tokenizer, samples, SITES, shard_size=16) == 32
    assert len(written) == 3 + 2
    whole = extract(llama, tokenizer, samples, SITES)
    for found in (load_activations(tmp_path), extract(llama, tokenizer, samples, SITES, out=tmp_path, shard_size=7)):
        torch.testing.assert_close(found.values[SITES[0]], whole.values[SITES[0]], rtol=1e-3, atol=1e-4)


def test_a_broken_shard_is_computed_again(
    llama: Any, tokenizer: Any, samples: list[Sample], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = extract(llama, tokenizer, samples, SITES, out=tmp_path, shard_size=16)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "shard-00001.safetensors").write_bytes(b"nothing")
    again = extract(llama, tokenizer, samples, SITES, out=tmp_path, shard_size=16)
    assert "shard-00001.safetensors cannot be read" in caplog.text
    assert torch.equal(again.values[SITES[0]], whole.values[SITES[0]])


def test_the_same_work_is_not_done_twice(tokenizer: Any, samples: list[Sample], tmp_path: Path) -> None:
    """What decides it is the weights, the texts, the sites and the pooling: no name, label or split."""
    model = make_llama()
    first = extract_under(tmp_path, model, tokenizer, samples, SITES)
    calls = _fail_on_call(model, 1)
    model.config._name_or_path = "elsewhere"
    relabelled = [replace(sample, label=not sample.label, split=Split.DEV, attribute="other") for sample in samples]
    again = extract_under(tmp_path, model, tokenizer, relabelled, SITES)
    assert not calls
    assert torch.equal(again.values[SITES[0]], first.values[SITES[0]])
    assert again.labels.tolist() == [not label for label in first.labels.tolist()]
    assert (set(again.attributes), set(again.splits)) == ({"other"}, {Split.DEV})
    assert again.source != first.source
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] *= 1.0001
    with pytest.raises(KeyboardInterrupt):
        extract_under(tmp_path, model, tokenizer, samples, SITES)


def test_no_more_than_one_shard_is_kept_while_writing(
    llama: Any, tokenizer: Any, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def watched(path: Path, values: dict[Site, torch.Tensor], owner: torch.Tensor) -> None:
        assert all(reference() is None for reference in alive)
        alive.extend(weakref.ref(tensor) for tensor in values.values())
        write_shard(path, values, owner)

    monkeypatch.setattr(extraction, "write_shard", watched)
    assert extract_to(tmp_path, llama, tokenizer, samples, SITES, shard_size=4) == 32
    assert len(alive) == 8 * len(SITES)


def test_the_forward_pass_ends_with_the_last_site(llama: Any, tokenizer: Any, samples: list[Sample]) -> None:
    ran: list[int] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
        for number, module in enumerate([layer.mlp for layer in llama.model.layers] + [llama.lm_head])
    ]
    try:
        extract(llama, tokenizer, samples[:1], [Site(1, SiteKind.ATTN_OUTPUT), Site(0, SiteKind.ATTN_HEADS)])
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_pooled_in_float32(dtype: torch.dtype, tokenizer: Any, samples: list[Sample]) -> None:
    model = make_llama().to(dtype)
    found = extract(model, tokenizer, samples[:1], SITES)
    tokens = extract(model, tokenizer, samples[:1], SITES, pool=Pool.TOKENS)
    for site in SITES:
        assert found.values[site].dtype is torch.float32
        assert torch.equal(tokens.values[site].to(dtype).float(), tokens.values[site])
        torch.testing.assert_close(found.values[site], tokens.values[site].mean(0, keepdim=True), rtol=1e-6, atol=1e-6)


def _fail_on_call(model: Any, number: int) -> list[int]:
    calls: list[int] = []

    def count(module: Any, args: Any) -> None:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt

    model.register_forward_pre_hook(count)
    return calls


def test_a_folder_of_another_extraction_is_refused(
    llama: Any, tokenizer: Any, samples: list[Sample], tmp_path: Path
) -> None:
    extract(llama, tokenizer, samples, SITES, out=tmp_path)
    for model, rows, pool in ((make_llama(seed=1), samples, Pool.MEAN), (llama, samples[1:], Pool.MEAN),
                              (llama, samples, Pool.LAST)):  # fmt: skip
        with pytest.raises(ActivationError, match="another model, data set"):
            extract(model, tokenizer, rows, SITES, out=tmp_path, pool=pool)


def test_a_model_that_has_been_saved_is_the_same_model(samples: list[Sample], tokenizer: Any, tmp_path: Path) -> None:
    model = make_llama()
    extract(model, tokenizer, samples, SITES, out=tmp_path / "activations")
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for again in (model, loaded):
        extract(again, tokenizer, samples, SITES, out=tmp_path / "activations")  # or it would be refused


def test_stored_activations_come_back(llama: Any, tokenizer: Any, samples: list[Sample], tmp_path: Path) -> None:
    found = extract(llama, tokenizer, split_samples(samples), SITES, pool=Pool.TOKENS)
    save_activations(found, tmp_path)
    loaded = load_activations(tmp_path)
    for name in ("attributes", "groups", "splits", "pool"):
        assert getattr(loaded, name) == getattr(found, name)
    for site in SITES:
        assert torch.equal(loaded.values[site], found.values[site])
    assert torch.equal(loaded.labels, found.labels)
    assert torch.equal(loaded.samples, found.samples)


def test_broken_files_are_named(llama: Any, tokenizer: Any, samples: list[Sample], tmp_path: Path) -> None:
    extract(llama, tokenizer, samples, SITES, out=tmp_path)
    (tmp_path / "shard-00000.safetensors").write_bytes(b"nothing")
    with pytest.raises(ActivationError, match=r"shard-00000\.safetensors cannot be read"):
        load_activations(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ActivationError, match=r"manifest\.json cannot be read"):
        load_activations(tmp_path)


def test_contrasts_are_the_two_sides_of_a_split(llama: Any, tokenizer: Any, samples: list[Sample]) -> None:
    placed = split_samples(samples)
    found = extract(llama, tokenizer, placed, SITES)
    contrasts = found.contrasts(SITES[0], Split.TRAIN)
    assert list(contrasts) == ["truthfulness", "civility"]
    chosen = [i for i, s in enumerate(placed) if s.attribute == "civility" and s.label and s.split is Split.TRAIN]
    assert torch.equal(contrasts["civility"].positive, found.values[SITES[0]][chosen])
    with pytest.raises(FitError, match=r"No activations were extracted at site 7\.residual"):
        found.contrasts(Site(7, SiteKind.RESIDUAL))
    with pytest.raises(FitError, match="has 0 positive and 0 negative activations in train"):
        found.contrasts(SITES[0], Split.TRAIN, ["fairness"])


def test_samples_that_are_too_long_keep_their_answer(samples: list[Sample], caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, model = make_tokenizer(), make_llama(max_position_embeddings=20)
    found = extract(model, tokenizer, samples[:2], SITES[:1], pool=Pool.TOKENS)
    assert "longer than 20 tokens" in caplog.text
    assert len(found)


def test_nothing_to_extract_is_an_error(llama: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no samples"):
        extract(llama, tokenizer, [], SITES)


def test_rows_must_match() -> None:
    values = {SITES[0]: torch.zeros(2, 4)}
    with pytest.raises(ActivationError, match="3 attributes but 2 rows"):
        Activations(values, ("a",) * 3, torch.zeros(3), ("g",) * 3, (None,) * 3, torch.arange(3))
