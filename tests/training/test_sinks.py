"""Attention sinks, positions whose norm is far beyond that of the others, do not shape what is fitted."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from steering import Site, SiteKind
from tests.training.helpers import make_llama, make_tokenizer
from tests.training.planted import NAME, labelled
from training.activations import SINK, Pool
from training.activations.extraction import extract
from training.activations.store import Activations
from training.data import Sample, Split
from training.errors import DataError, FitError
from training.methods.caa import CaaConfig
from training.methods.cast import fit_condition
from training.methods.control import group_differences
from training.methods.fit import Recipe, fit
from training.methods.mat import MatConfig

DEEP = Site(1, SiteKind.RESIDUAL)
BEGIN = "<s>"


def make_world(sink: str) -> tuple[Any, Any, Tensor]:
    """A model whose states at the token `sink` are hundreds of times as large as others, its tokenizer, and what
    the deep site has there."""
    tokenizer, model = make_tokenizer(BEGIN), make_llama()
    token = tokenizer.convert_tokens_to_ids(sink)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] *= 3000
        states = model(torch.tensor([[token]]), output_hidden_states=True).hidden_states
    return model, tokenizer, states[DEEP.layer + 1][0, 0]


def promptless(positive: str = "", negative: str = "") -> list[Sample]:
    """Long positives and short negatives without a prompt, each with what is given put into its middle."""
    made = []
    for number in range(12):
        made.append(Sample("tone", "", f"It is {positive}a good {number}, of course", True, f"g{number}", Split.TRAIN))
        made.append(Sample("tone", "", f"bad {negative}{number}", False, f"g{number}", Split.TRAIN))
    return made


def usual_norm(activations: Activations) -> float:
    return float(activations.at(DEEP).norm(dim=1).median())


@pytest.mark.parametrize("pool", [Pool.MEAN, Pool.TOKENS])
@pytest.mark.parametrize("config", [CaaConfig(), MatConfig(epochs=2, keep_best=False)])
def test_the_first_position_is_in_no_vector(pool: Pool, config: Any) -> None:
    model, tokenizer, sink = make_world(BEGIN)
    activations = extract(model, tokenizer, promptless(), [DEEP], pool=pool)
    assert sink.norm() > 50 * usual_norm(activations)
    (column,) = fit(activations, [DEEP], Recipe(config))
    assert abs(float(cosine_similarity(column.vector, sink, dim=0))) < 0.7
    assert column.vector.norm() < 2 * usual_norm(activations)


@pytest.mark.parametrize("pool", [Pool.MEAN, Pool.TOKENS])
def test_a_sink_amid_the_text_is_in_no_vector(pool: Pool) -> None:
    model, tokenizer, sink = make_world("!")
    activations = extract(model, tokenizer, promptless(positive="x! "), [DEEP], pool=pool)
    (column,) = fit(activations, [DEEP], Recipe(CaaConfig()))
    assert abs(float(cosine_similarity(column.vector, sink, dim=0))) < 0.7


def test_a_text_with_a_prompt_is_pooled_from_its_last_token() -> None:
    """The rule about first positions takes nothing from other texts."""
    model, tokenizer = make_llama(), make_tokenizer(BEGIN)
    sample = Sample("tone", "Q: A:", " good of course", True, "g", Split.TRAIN)
    bare = replace(sample, prompt="", completion=sample.text)
    counts = [len(extract(model, tokenizer, [one], [DEEP], pool=Pool.TOKENS)) for one in (sample, bare)]
    ids, prompt = (len(tokenizer(text)["input_ids"]) for text in (sample.text, sample.prompt))
    assert counts == [ids - prompt, ids - 2]  # without the text's last token, and bare without its first


def test_the_last_prompt_token_of_no_prompt_is_refused() -> None:
    with pytest.raises(DataError, match=r"pool by first but the text's first token, .*give the texts a prompt"):
        extract(make_llama(), make_tokenizer(BEGIN), promptless(), [DEEP], pool=Pool.FIRST)


def bare(text: str, label: bool) -> Sample:
    return Sample("tone", "", text, label, text, Split.TRAIN)


@pytest.mark.parametrize("pool", [Pool.LAST, Pool.MEAN, Pool.TOKENS])
def test_a_text_of_one_token_is_left_out(pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    others = [bare("good bees", True), bare("bad cows", False)]
    samples = [others[0], bare("Q", True), others[1], bare("A", False)]
    found = extract(model, tokenizer, samples, [DEEP], pool=pool, out=tmp_path)
    expected = extract(model, tokenizer, others, [DEEP], pool=pool)
    assert found.groups == expected.groups
    torch.testing.assert_close(found.at(DEEP), expected.at(DEEP))
    told = f"2 samples, as 'Q' of 'tone', have nothing to pool by {pool} but the text's first token"
    assert told in caplog.text
    assert "they are left out: give the texts a prompt" in caplog.text


def test_a_side_of_texts_of_one_token_is_refused() -> None:
    with pytest.raises(DataError, match=r"1 samples, as 'Q' of 'tone', .*: give the texts a prompt or more words\."):
        extract(make_llama(), make_tokenizer(), [bare("Q", True), bare("bad cows", False)], [DEEP], pool=Pool.LAST)


def with_sinks(count: int) -> Activations:
    """Three tokens of each of 24 texts, two texts a group; the first token of the first `count` texts is a sink."""
    rows = torch.randn(72, 8, generator=torch.Generator().manual_seed(0)) + 2
    rows[: 3 * count : 3] = 1000 * torch.eye(8)[0]
    owners = torch.arange(24).repeat_interleave(3)
    return replace(
        labelled({DEEP: rows}, owners % 2 == 0, [str(int(owner) // 2) for owner in owners]),
        samples=owners,
        pool=Pool.TOKENS,
    )


def test_no_sink_is_in_a_condition_or_a_principal_component() -> None:
    condition = fit_condition(with_sinks(5), NAME, DEEP)
    assert abs(float(condition.vector[0])) < 0.9
    differences = group_differences(with_sinks(5), NAME, DEEP)
    assert float(differences.norm(dim=1).max()) < 20
    with pytest.raises(FitError, match=r"A side has nothing but attention sinks at 1\.residual"):
        with_sinks(5).without_sinks(DEEP, torch.tensor([0, 6, 12]), torch.arange(40, 60))


def with_norms(norms: Sequence[float]) -> Activations:
    rows = torch.nn.functional.normalize(torch.randn(len(norms), 8), dim=1)
    return labelled({DEEP: rows * torch.tensor(norms)[:, None]}, torch.arange(len(norms)) % 2 == 0)


def test_wild_norms_are_warned_of_with_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        fit(with_norms([1.0] * 20), [DEEP], Recipe(CaaConfig()))
    assert not caplog.text
    fit(with_norms([1.0] * 18 + [2 * SINK] * 2), [DEEP], Recipe(CaaConfig()))
    assert f"2 of the 20 activations of '{NAME}' at 1.residual have more than 5 times the usual norm" in caplog.text
    assert "give its texts a prompt" in caplog.text


def test_an_attribute_of_sinks_is_seen_beside_another(caplog: pytest.LogCaptureFixture) -> None:
    one = with_norms([1.0] * 20 + [3 * SINK] * 20)
    both = replace(one, attributes=("calm",) * 20 + ("wild",) * 20)
    fit(both, [DEEP], Recipe(CaaConfig()))
    assert "20 of the 20 activations of 'wild'" in caplog.text
    assert "'calm'" not in caplog.text


def test_an_attribute_with_large_norms_does_not_change_how_another_is_fitted() -> None:
    """Each has its own units: alone or beside data 100 times as large, the same columns come out."""
    config = MatConfig(epochs=30, l_ortho=0, keep_best=False)
    small = with_norms([1.0] * 40)
    alone = fit(small, [DEEP], Recipe(config))[0]
    values = torch.cat([small.at(DEEP), 100 * torch.randn(40, 8) + 300])
    beside = replace(
        small, values={DEEP: values}, attributes=("calm",) * 40 + ("wild",) * 40, labels=small.labels.repeat(2),
        groups=tuple(map(str, range(80))), splits=(Split.TRAIN,) * 80, samples=torch.arange(80),
    )  # fmt: skip
    calm, wild = fit(beside, [DEEP], Recipe(config))
    torch.testing.assert_close(calm.vector, alone.vector, rtol=0.02, atol=0.002)
    torch.testing.assert_close(calm.gate_weight, alone.gate_weight, rtol=0.02, atol=0.02)
    assert wild.vector.norm() > 10
