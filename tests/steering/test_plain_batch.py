"""`steered` in plain calls of a Hugging Face model."""

import pytest
import torch

from steering import (
    ColumnError,
    HookError,
    Positions,
    Site,
    SiteKind,
    UnsupportedArchitecture,
    site_module,
    steer,
    steered,
)
from steering.operators import gate_codes
from tests.steering.families import FAMILIES, column, hooks, tiny

SITES = [Site(0, SiteKind.MLP_OUTPUT), Site(1, SiteKind.ATTN_OUTPUT), Site(1, SiteKind.ATTN_HEADS)]
PROMPTS = [[5, 9, 12, 7, 30], [8, 4], [41, 6, 17]]
STRENGTHS = torch.tensor([[2.0, -1.0, 1.5], [0.0, 0.0, 0.0], [0.0, 3.0, -2.0]])
NEW = 6

families = pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "mixtral"])


def columns(family: str):
    return [column(site, FAMILIES[family].width(site.kind), seed=i, scale=1.5) for i, site in enumerate(SITES)]


def left_padded() -> dict[str, torch.Tensor]:
    longest = max(map(len, PROMPTS))
    tokens = [[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS]
    return {"input_ids": torch.tensor(tokens), "attention_mask": torch.tensor(mask)}


@torch.no_grad()
def one_forward(model, given, strengths, chosen, tokens):
    """Logits of the last token, with the operator applied where `chosen` says, by hooks written out here."""
    watches = []
    for col, strength in zip(given, strengths, strict=True):
        multipliers = torch.tensor(chosen).float()[:, None] * strength

        def act(x, col=col, multipliers=multipliers):
            parts = (col.vector[None], col.gate_weight[None], torch.tensor([col.gate_bias]), gate_codes([col.gate]))
            return steer(x[0], *parts, torch.tensor([col.keep_norm]), multipliers)[None]

        module, side = site_module(model, col.site)
        if side == "input":
            watches.append(module.register_forward_pre_hook(lambda module, args, act=act: (act(args[0]),)))
        else:
            watches.append(
                module.register_forward_hook(
                    lambda module, args, out, act=act: (act(out[0]), *out[1:]) if isinstance(out, tuple) else act(out)
                )
            )
    try:
        return model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    finally:
        for watch in watches:
            watch.remove()


def reference(model, given, strengths, prompt, positions):
    """Greedy decoding of one row without padding and without a cache."""
    tokens, scores = list(prompt), []
    for _ in range(NEW):
        chosen = {
            Positions.GENERATED: [i >= len(prompt) - 1 for i in range(len(tokens))],
            Positions.PROMPT: [i < len(prompt) for i in range(len(tokens))],
            Positions.ALL: [True] * len(tokens),
        }[positions]
        scores.append(one_forward(model, given, strengths, chosen, tokens))
        tokens.append(int(scores[-1].argmax()))
    return tokens[len(prompt) :], torch.stack(scores)


def generate(model, **settings):
    batch = left_padded()
    return model.generate(
        **batch,
        **{"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        | settings,
    )


@families
@pytest.mark.parametrize("positions", Positions)
def test_generation_equals_decoding_every_row_alone_token_by_token(family, positions):
    model, given = tiny(family), columns(family)
    with steered(model, given, STRENGTHS, positions=positions):
        out = generate(model, return_dict_in_generate=True, output_logits=True)
    new = out.sequences[:, -NEW:]
    for i, prompt in enumerate(PROMPTS):
        tokens, scores = reference(model, given, STRENGTHS[i].tolist(), prompt, positions)
        assert new[i].tolist() == tokens
        torch.testing.assert_close(torch.stack(out.logits)[:, i], scores, atol=2e-4, rtol=1e-3)


@families
def test_an_unsteered_row_generates_what_the_plain_model_generates(family):
    model = tiny(family)
    plain = generate(model)
    with steered(model, columns(family), STRENGTHS):
        mixed = generate(model)
    assert torch.equal(mixed[1], plain[1])
    assert not torch.equal(mixed, plain)


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (Positions.GENERATED, 2 * NEW),
        (Positions.PROMPT, 5 + 3),
        (Positions.ALL, 5 + 3 + 2 * (NEW - 1)),
    ],
)
def test_the_device_counts_the_tokens_of_steered_rows(positions, expected):
    model = tiny("llama")
    with steered(model, columns("llama"), STRENGTHS, positions=positions) as steering:
        generate(model)
        assert int(steering.steered_tokens.sum()) == expected


def test_each_generation_within_one_block_starts_anew():
    model = tiny("llama")
    with steered(model, columns("llama"), STRENGTHS, positions=Positions.PROMPT):
        assert torch.equal(generate(model), generate(model))


def test_one_list_of_multipliers_serves_every_row():
    model, given = tiny("llama"), columns("llama")
    with steered(model, given, [1.0, 0.0, -2.0]):
        every = generate(model)
    with steered(model, given, torch.tensor([[1.0, 0.0, -2.0]] * 3)):
        assert torch.equal(generate(model), every)


def test_returned_sequences_take_the_multipliers_of_their_prompt():
    model, given = tiny("llama"), columns("llama")
    with steered(model, given, STRENGTHS):
        once, beams = generate(model), generate(model, num_beams=2, num_return_sequences=2)
        sampled = generate(model, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(sampled[::2], once)
    assert torch.equal(sampled[1::2], once)
    assert beams.shape[0] == 6


def test_a_mask_steers_exactly_its_tokens():
    model, given = tiny("llama"), columns("llama")
    batch = left_padded()
    mask = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]])
    with torch.no_grad():
        plain = model(**batch).logits
        with steered(model, given, [1.0, 1.0, 1.0], mask=mask) as steering:
            moved = model(**batch).logits
    real = batch["attention_mask"][:, :3].bool()  # what a fully masked padding token attends to is nobody's business
    assert torch.equal(moved[:, :3][real], plain[:, :3][real])
    assert torch.equal(moved[2], plain[2])
    assert not torch.equal(moved[0, 3], plain[0, 3])
    assert steering.bank.steered_tokens.reshape(3, 5).tolist() == mask.tolist()


def test_a_scored_answer_gets_the_logits_of_its_generation():
    model, given = tiny("llama"), columns("llama")
    with torch.no_grad(), steered(model, given, [1.0, 2.0, -1.0]):
        out = model.generate(
            torch.tensor([PROMPTS[0]]),
            attention_mask=torch.ones(1, 5),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
    mask = torch.arange(out.sequences.shape[1])[None] >= len(PROMPTS[0]) - 1
    with torch.no_grad(), steered(model, given, [1.0, 2.0, -1.0], mask=mask):
        scored = model(out.sequences).logits[0, len(PROMPTS[0]) - 1 : -1]
    torch.testing.assert_close(scored, torch.cat(out.logits), atol=1e-4, rtol=1e-3)


def test_embeddings_and_positional_arguments_are_steered_too():
    model, given = tiny("llama"), columns("llama")
    batch = left_padded()
    with torch.no_grad(), steered(model, given, STRENGTHS):
        expected = model(**batch).logits
        torch.testing.assert_close(model(batch["input_ids"], batch["attention_mask"]).logits, expected)
        embedded = model.get_input_embeddings()(batch["input_ids"])
        torch.testing.assert_close(
            model(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits, expected
        )


def test_hooks_are_gone_after_the_block_whatever_happened_in_it():
    model = tiny("llama")
    before = hooks(model)
    with steered(model, columns("llama"), STRENGTHS):
        assert hooks(model) == before + len(SITES) + 1
    with pytest.raises(ZeroDivisionError), steered(model, columns("llama"), STRENGTHS):
        raise ZeroDivisionError
    assert hooks(model) == before


def test_hooks_are_gone_after_a_site_that_the_model_lacks():
    model = tiny("llama")
    before = hooks(model)
    missing = column(Site(9, SiteKind.RESIDUAL))
    with pytest.raises(UnsupportedArchitecture), steered(model, [*columns("llama"), missing], [1.0] * 4):
        pass
    assert hooks(model) == before


def test_nested_blocks_add_up_and_end_one_by_one():
    model = tiny("llama")
    before = hooks(model)
    far, near = column(SITES[0], scale=1.5), column(SITES[1], seed=3, scale=1.5)
    with steered(model, [far, near], [1.0, 1.0]):
        together = generate(model)
    with steered(model, [far], [1.0]):
        alone = generate(model)
        with steered(model, [near], [1.0]):
            assert torch.equal(generate(model), together)
        assert torch.equal(generate(model), alone)
    assert hooks(model) == before


def test_right_padding_is_refused_where_the_last_token_matters():
    model = tiny("llama")
    tokens, mask = torch.tensor([[5, 6, 0], [5, 6, 7]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    with steered(model, columns("llama"), [1.0] * 3), pytest.raises(HookError, match="left padding"):
        model(tokens, attention_mask=mask)


def test_a_mask_of_another_shape_is_refused():
    model = tiny("llama")
    with (
        steered(model, columns("llama"), [1.0] * 3, mask=torch.ones(1, 4)),
        pytest.raises(HookError, match=r"\[1, 4\], not for one of shape \[1, 3\]"),
    ):
        model(torch.tensor([[3, 4, 5]]))


def test_a_mask_serves_one_forward_and_not_a_generation():
    model = tiny("llama")
    with (
        steered(model, columns("llama"), [1.0] * 3, mask=torch.ones(3, 5)),
        pytest.raises(HookError, match="after 5 cached tokens"),
    ):
        generate(model)


def test_a_batch_that_the_multipliers_are_not_for_is_refused():
    model = tiny("llama")
    with steered(model, columns("llama"), STRENGTHS), pytest.raises(HookError, match="3 rows, but the batch has 2"):
        model(torch.full((2, 4), 5))


@pytest.mark.parametrize(
    "multipliers", [[1.0], torch.ones(2, 2), torch.ones(0, 3), torch.ones(1, 1, 3), [float("nan")] * 3]
)
def test_multipliers_that_do_not_fit_the_columns_are_refused(multipliers):
    with pytest.raises(ColumnError, match="multiplier"), steered(tiny("llama"), columns("llama"), multipliers):
        pass


def test_padding_is_needed_to_be_known_only_where_it_matters():
    model = tiny("llama")
    full = torch.zeros(1, 1, 3, 3)
    with torch.no_grad(), steered(model, columns("llama"), [1.0] * 3):
        model(torch.full((1, 3), 5), attention_mask=full)
    with (
        steered(model, columns("llama"), [1.0] * 3, positions=Positions.ALL),
        pytest.raises(HookError, match="two-dimensional"),
    ):
        model(torch.full((1, 3), 5), attention_mask=full)
