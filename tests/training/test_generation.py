"""The decode loop is plain `generate`, only faster; arms differ by steering alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from steering import Column, Gate, Positions, Site, SiteKind, steered
from training.activations.tokenization import Encoded
from training.errors import DataError, TrainingError
from training.evaluation import generation
from training.evaluation.generation import Sampling, generate
from training.evaluation.kept import Kept
from training.evaluation.likelihood import log_likelihoods
from training.evaluation.results import BASELINE, Arm

PROMPTS = ["Q: What do cows say? A:", "Q", "Q: Where do bees live? Tell me, you silly person. A:", "The sky is"]
SITE = Site(1, SiteKind.ATTN_OUTPUT)


def column(seed: int = 0, site: Site = SITE, gate: Gate = Gate.SIGMOID, attribute: str = "civility") -> Column:
    generator = torch.Generator().manual_seed(seed)
    vector, weight = torch.randn(2, 16, generator=generator)
    return Column(attribute, site, gate, 6 * vector, weight, 0.3, gate is Gate.SIGMOID)


COLUMNS = (column(0), column(1, Site(2, SiteKind.RESIDUAL), Gate.CONSTANT, "fairness"))
ARMS = (BASELINE, Arm("both", {"civility": 1.0, "fairness": 0.5}), Arm("away", {"civility": -2.0}))


def plain(
    model: Any, tokenizer: Any, prompt: str, columns: Sequence[Column], arm: Arm, positions: Positions
) -> list[int]:
    inputs = tokenizer(prompt, return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with steered(model, columns, list(arm.multipliers(columns)), positions=positions):
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=8, pad_token_id=0)
    return list(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("positions", list(Positions))
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_rows_of_a_mixed_batch_equal_transformers_generate(
    name: str, positions: Positions, tokenizer: Any, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    columns, arms = (COLUMNS, ARMS) if name == "llama" else (COLUMNS[:1], (ARMS[0], ARMS[2]))
    sampling = Sampling(temperature=0, max_new_tokens=8)
    for text in generate(model, tokenizer, PROMPTS, columns, arms, sampling, positions=positions):
        arm = next(arm for arm in arms if arm.name == text.arm)
        assert list(text.token_ids) == plain(model, tokenizer, PROMPTS[text.prompt], columns, arm, positions)


def test_steering_changes_the_text(llama: Any, tokenizer: Any) -> None:
    texts = generate(llama, tokenizer, PROMPTS, COLUMNS, ARMS, Sampling(temperature=0, max_new_tokens=8))
    by_arm = [tuple(t.token_ids for t in texts if t.arm == arm.name) for arm in ARMS]
    assert len(set(by_arm)) == 3


def test_texts_end_at_the_end_token_while_others_go_on(llama: Any, tokenizer: Any) -> None:
    free = generate(llama, tokenizer, PROMPTS, COLUMNS, ARMS, Sampling(temperature=0, max_new_tokens=8))
    common = free[0].token_ids[3]
    llama.generation_config.eos_token_id = [0, common]
    try:
        cut = generate(llama, tokenizer, PROMPTS, COLUMNS, ARMS, Sampling(temperature=0, max_new_tokens=8))
    finally:
        llama.generation_config.eos_token_id = 0
    for before, after in zip(free, cut, strict=True):
        ids = before.token_ids
        expected = ids[: ids.index(common) + 1] if common in ids else ids
        assert after.token_ids == expected
        assert after.finished == (expected[-1] in (0, common))
    assert any(text.finished for text in cut)


def test_samples_do_not_depend_on_the_batch(llama: Any, tokenizer: Any) -> None:
    sampling = Sampling(temperature=0.8, max_new_tokens=6, samples=3, seed=5)
    wide = generate(llama, tokenizer, PROMPTS, COLUMNS, ARMS, sampling, max_rows=256)
    narrow = generate(llama, tokenizer, PROMPTS, COLUMNS, ARMS, sampling, max_rows=1)
    assert [text.token_ids for text in wide] == [text.token_ids for text in narrow]
    other = generate(llama, tokenizer, PROMPTS, COLUMNS, ARMS, Sampling(0.8, 6, 3, seed=6))
    assert [text.token_ids for text in wide] != [text.token_ids for text in other]


def test_an_arm_without_steering_repeats_the_baseline(llama: Any, tokenizer: Any) -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=6, samples=4)
    texts = generate(llama, tokenizer, PROMPTS, COLUMNS, [BASELINE, Arm("zero", {"civility": 0.0}), ARMS[1]], sampling)
    count = len(texts) // 3
    assert [t.token_ids for t in texts[:count]] == [t.token_ids for t in texts[count : 2 * count]]


def test_sampling_follows_the_model(llama: Any, tokenizer: Any) -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=1, samples=3000)
    texts = generate(llama, tokenizer, [PROMPTS[0]], (), [BASELINE], sampling, max_rows=3000)
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        shares = llama(ids).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([t.token_ids[0] for t in texts]), minlength=len(shares)) / 3000
    assert float((counts - shares).abs().max()) < 0.03


def test_costs_are_those_of_the_unsteered_model(llama: Any, tokenizer: Any) -> None:
    texts = generate(llama, tokenizer, PROMPTS, COLUMNS, ARMS, Sampling(max_new_tokens=5))
    for text in texts:
        prompt = tokenizer(PROMPTS[text.prompt])["input_ids"]
        ids = torch.tensor([[*prompt, *text.token_ids]])
        with torch.no_grad():
            scores = llama(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert text.nll == pytest.approx(-float(scores.gather(1, ids[0, len(prompt) :, None]).sum()), rel=1e-4)


def test_an_interrupted_generation_goes_on(
    llama: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sampling = tmp_path / "texts.partial", Sampling(max_new_tokens=5)
    kept = Kept.of(path, llama, COLUMNS, ARMS)
    whole = generate(llama, tokenizer, PROMPTS, COLUMNS, ARMS, sampling)
    costs, calls = generation._base_costs, []

    def dies(*given: Any) -> list[float]:
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return costs(*given)

    monkeypatch.setattr(generation, "_base_costs", dies)
    with pytest.raises(KeyboardInterrupt):
        generate(llama, tokenizer, PROMPTS, COLUMNS, ARMS, sampling, max_rows=len(ARMS), kept=kept)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], lines[-1][:9]]))
    calls.clear()
    again = generate(llama, tokenizer, PROMPTS, COLUMNS, ARMS, sampling, max_rows=1000, kept=kept)
    assert len(calls) == 1
    assert sum(len(prompts) for _, prompts, *_ in calls) == (len(PROMPTS) - 1) * len(ARMS), "the second was cut short"
    assert [text.token_ids for text in again] == [text.token_ids for text in whole]
    other = generate(llama, tokenizer, PROMPTS, COLUMNS, ARMS, Sampling(max_new_tokens=5, seed=7), kept=kept)
    assert [text.token_ids for text in other] != [text.token_ids for text in whole], "what was asked has changed"


def test_prompts_without_tokens_or_too_long_are_refused(llama: Any, tokenizer: Any) -> None:
    for prompt, complaint in (("", "has 0 tokens"), ("word " * 300, "takes 1 to 192")):
        with pytest.raises(DataError, match=complaint):
            generate(llama, tokenizer, [prompt], (), [BASELINE], Sampling())


def test_bad_sampling_is_refused() -> None:
    with pytest.raises(TrainingError, match="temperature"):
        Sampling(temperature=float("nan"))
    with pytest.raises(TrainingError, match="max_new_tokens"):
        Sampling(max_new_tokens=0)


@pytest.mark.parametrize("positions", list(Positions))
def test_a_scored_answer_gets_the_steering_of_its_generation(llama: Any, tokenizer: Any, positions: Positions) -> None:
    """The oracle decodes with a cache, one token a forward pass, under plain `steered`."""
    answers = [" The sky is blue", " Moo", " in a hive, I think."]
    rows, multipliers, expected = [], [], []
    for number, answer in enumerate(answers):
        prompt, tokens = tokenizer(PROMPTS[number])["input_ids"], tokenizer(answer)["input_ids"]
        rows.append(Encoded((*prompt, *tokens), len(prompt) - 1, len(prompt) + len(tokens) - 1))
        multipliers.append(ARMS[number].multipliers(COLUMNS))
        expected.append(_step_by_step(llama, prompt, tokens, multipliers[-1], positions))
    found = log_likelihoods(llama, rows, columns=COLUMNS, multipliers=multipliers, positions=positions)
    for scores, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(scores, reference, rtol=1e-4, atol=1e-4)


def _step_by_step(
    model: Any, prompt: list[int], answer: list[int], multipliers: tuple[float, ...], positions: Positions
) -> torch.Tensor:
    scores, cache, fed = [], None, prompt
    with steered(model, COLUMNS, list(multipliers), positions=positions), torch.no_grad():
        for token in answer:
            inputs = torch.tensor([fed])
            length = inputs.shape[1] + (cache.get_seq_length() if cache is not None else 0)
            output = model(inputs, past_key_values=cache, use_cache=True, attention_mask=torch.ones(1, length))
            cache, fed = output.past_key_values, [token]
            scores.append(output.logits[0, -1].log_softmax(-1)[token])
    return torch.stack(scores)


def test_a_prompt_is_read_once_for_all_of_its_answers_and_arms(llama: Any, tokenizer: Any) -> None:
    begun = tokenizer("Q: What do cows say? A: Moo, you silly person! ")["input_ids"]
    prompts = [[*begun, *tokenizer(text)["input_ids"]] for text in ("Q: Where do bees live? A:", "The sky is")]
    answers = [tokenizer(text)["input_ids"] for text in (" Moo", " blue, of course", " in a hive")]
    rows = [
        Encoded((*prompt, *answer), len(prompt) - 1, len(prompt) + len(answer) - 1)
        for _ in ARMS
        for prompt in prompts
        for answer in answers
    ]
    multipliers = [arm.multipliers(COLUMNS) for arm in ARMS for _ in range(len(prompts) * len(answers))]
    log_likelihoods(llama, rows, columns=COLUMNS, multipliers=multipliers)  # the model is tried out
    read: list[int] = []
    hook = llama.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"].numel()), with_kwargs=True
    )
    try:
        found = log_likelihoods(llama, rows, columns=COLUMNS, multipliers=multipliers, max_rows=1)
    finally:
        hook.remove()
    prefixes = [prompt[:-1] for prompt in prompts]
    once = len(begun) + sum(len(prefix) - len(begun) for prefix in prefixes)
    assert prefixes[0][len(begun)] != prefixes[1][len(begun)]
    beginnings = {tuple(answer[:size]) for answer in answers for size in range(len(answer))}
    assert sum(read) == once + len(beginnings) * len(prompts) * len(ARMS)
    alone = [
        log_likelihoods(llama, [row], columns=COLUMNS, multipliers=[own])[0]
        for row, own in zip(rows, multipliers, strict=True)
    ]
    for scores, reference in zip(found, alone, strict=True):
        torch.testing.assert_close(scores, reference, rtol=1e-4, atol=1e-4)
