"""What answers and arms have in common is computed once, and every log-probability is that of the text by itself."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from steering import Column, Gate, HookError, Positions, Reading, Site, SiteKind, steered
from steering.sites import layers, site_module
from tests.steering.families import COMMON, FAMILIES, LAYERS, Family, column, tiny
from training.activations.tokenization import Encoded, batches
from training.evaluation.answer_tree import answer_trees
from training.evaluation.likelihood import log_likelihoods, steered_mask
from training.evaluation.partial_pass import last_alike, second_part

PROMPTS = ((3, 4, 5, 6), (3, 4, 9))
ANSWERS = ((11, 12, 13, 14), (11, 12, 15), (11, 16, 13), (17,), (11, 12, 15))  # one twice
ROWS = [Encoded((*p, *a), len(p) - 1, len(p) + len(a) - 1) for p in PROMPTS for a in ANSWERS]
# Places in the trees of a prompt: its last token, 11, 12, 13 and 16; no answer's last token is read.
NODES = 5
Columns = Callable[[Family], list[Column]]


def at(site: str, seed: int = 0, attribute: str = "a", **settings: Any) -> Columns:
    place = Site.parse(site)
    return lambda family: [column(place, family.width(place.kind), seed=seed, attribute=attribute, **settings)]


def both(*each: Columns) -> Columns:
    return lambda family: [one for make in each for one in make(family)]


def reading(latched: bool) -> Columns:
    return at("2.residual", reads=Reading(Site(1, SiteKind.RESIDUAL), latched))


# What is steered, and the last block that all arms have in common.
STEERED: dict[str, tuple[Columns, int]] = {
    "residual, two columns": (both(at("1.residual"), at("1.residual", 1, "b", gate=Gate.CONSTANT, keep_norm=False)), 1),
    "attn_output": (at("1.attn_output"), 0),
    "attn_heads": (at("1.attn_heads"), 0),
    "mlp_output": (at("1.mlp_output"), 0),
    "several sites": (both(at("2.attn_output"), at("1.residual", 1), at("2.mlp_output", 2, "b", gate=Gate.LINEAR)), 1),
    "the first block": (at("0.attn_output"), -1),
    "the last block": (at(f"{LAYERS - 1}.residual"), LAYERS - 1),
    "another site read": (reading(latched=False), 1),
    "another site read and latched": (reading(latched=True), 1),
}


def arms_of(columns: Sequence[Column]) -> list[tuple[float, ...]]:
    """Unsteered twice, all columns alike, and each by a strength of its own."""
    count = len(columns)
    return [(0.0,) * count, (2.0,) * count, tuple(1.5 - n for n in range(count)), (-0.0,) * count]


@torch.no_grad()
def plain(
    model: Any, row: Encoded, columns: Sequence[Column], multipliers: Sequence[float], positions: Positions
) -> Tensor:
    """The whole text by itself in one forward pass."""
    with steered(model, columns, list(multipliers), mask=steered_mask([row], positions)):
        shares = model(torch.tensor([row.ids])).logits[0].float().log_softmax(-1)
    found: Tensor = shares[list(range(row.start, row.end)), list(row.targets)]
    return found


def check(
    model: Any,
    columns: Sequence[Column],
    positions: Positions = Positions.GENERATED,
    rows: Sequence[Encoded] = ROWS,
    arms: Sequence[tuple[float, ...]] | None = None,
    **limits: int,
) -> None:
    arms = arms_of(columns) if arms is None else arms
    told: list[float] = []
    found = log_likelihoods(
        model, [*rows] * len(arms), columns=columns, multipliers=[arm for arm in arms for _ in rows],
        positions=positions, advance=told.append, **limits,
    )  # fmt: skip
    different = {(row, arm) for arm in arms for row in rows}
    alone = {(row, arm): plain(model, row, columns, arm, positions) for row, arm in different}
    expected = [alone[row, arm] for arm in arms for row in rows]
    assert sum(told) == len(expected)
    for scores, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(scores, reference, rtol=1e-4, atol=1e-4)


@contextmanager
def counted(model: Any) -> Iterator[Counter[int]]:
    """Block -> how many tokens it computes."""
    seen: Counter[int] = Counter()
    hooks = [
        site_module(model, Site(block, SiteKind.ATTN_HEADS))[0].register_forward_pre_hook(
            lambda _, args, block=block: seen.update({block: args[0][..., 0].numel()})
        )
        for block in range(LAYERS)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("what", STEERED)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_in_every_arm_is_as_by_itself(name: str, what: str) -> None:
    columns, last = STEERED[what]
    own = columns(FAMILIES[name])
    assert last_alike(own, arms_of(own)) == last
    check(tiny(name), own, rows=ROWS[: len(ANSWERS)])


@pytest.mark.parametrize("what", STEERED)
@pytest.mark.parametrize(
    ("positions", "limits"),
    [*((one, {}) for one in Positions), (Positions.GENERATED, {"max_rows": 2}), (Positions.ALL, {"max_tokens": 7})],
    ids=str,
)
def test_so_it_is_at_all_positions_and_in_small_batches(
    what: str, positions: Positions, limits: dict[str, int]
) -> None:
    columns = STEERED[what][0](FAMILIES["llama"])
    if "latched" in what and positions is not Positions.GENERATED:
        with pytest.raises(HookError, match="latched"):
            check(tiny("llama"), columns, positions, **limits)
        return
    check(tiny("llama"), columns, positions, **limits)


@pytest.mark.parametrize("what", STEERED)
def test_blocks_before_the_first_steered_site_are_computed_once_for_all_arms(what: str) -> None:
    columns, last = STEERED[what]
    own, rows, model = columns(FAMILIES["llama"]), ROWS[: len(ANSWERS)], tiny("llama")
    check(model, own, rows=rows)  # the model is tried out
    arms = arms_of(own)
    with counted(model) as seen:
        multipliers = [arm for arm in arms for _ in rows]
        log_likelihoods(model, rows * len(arms), columns=own, multipliers=multipliers)
    different = len(set(arms))
    prompt = len(PROMPTS[0]) - 1
    assert [seen[block] - prompt for block in range(LAYERS)] == [
        NODES if block <= last else NODES * different for block in range(LAYERS)
    ]


def test_no_answer_s_last_token_and_no_beginning_twice_is_computed_without_steering() -> None:
    rows, model = ROWS[: len(ANSWERS)], tiny("llama")
    log_likelihoods(model, rows)
    with counted(model) as seen:
        log_likelihoods(model, rows)
    assert set(seen.values()) == {len(PROMPTS[0]) - 1 + NODES}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_common_blocks_and_beginnings_once(name: str) -> None:
    """Nothing is right merely because the model was found not to be fit for it."""
    model, (own,) = tiny(name), at("1.residual")(FAMILIES[name])
    rows = ROWS[: len(ANSWERS)]
    run = lambda: log_likelihoods(model, rows * 2, columns=[own], multipliers=[(0.0,)] * 5 + [(1.0,)] * 5)  # noqa: E731
    run()
    with counted(model) as seen:
        run()
    prompt = len(PROMPTS[0]) - 1
    assert [seen[block] - prompt for block in range(LAYERS)] == [NODES, NODES, 2 * NODES]


def test_rows_without_a_prompt_or_an_answer() -> None:
    rows = [Encoded((5, 6, 7), 0, 2), Encoded((5, 6, 8, 9), 0, 3), Encoded((7, 6), 0, 1), Encoded((5, 6), 1, 1)]
    own = at("1.residual")(FAMILIES["llama"])
    check(tiny("llama"), own, rows=rows)
    assert [len(scores) for scores in log_likelihoods(tiny("llama"), rows)] == [2, 3, 1, 0]


def test_answers_of_one_prompt_may_differ_from_arm_to_arm() -> None:
    own = at("1.residual")(FAMILIES["llama"])
    rows = [ROWS[0], ROWS[1], ROWS[2], ROWS[6]]
    multipliers = [(0.0,), (1.0,), (1.0,), (2.0,)]
    found = log_likelihoods(tiny("llama"), rows, columns=own, multipliers=multipliers)
    for scores, row, arm in zip(found, rows, multipliers, strict=True):
        torch.testing.assert_close(scores, plain(tiny("llama"), row, own, arm, Positions.GENERATED))


@pytest.mark.parametrize("what", ["residual, two columns", "attn_output"])
@pytest.mark.parametrize("name", ["mistral", "gemma3", "gemma2", "cohere2"])
def test_texts_longer_than_a_sliding_window(name: str, what: str) -> None:
    family, window = FAMILIES[name], 6
    assert max(row.end for row in ROWS) > window > min(row.end for row in ROWS)
    model = made(family, sliding_window=window)
    check(model, STEERED[what][0](family))
    own = STEERED[what][0](family)
    whole, cut = (plain(one, ROWS[0], own, [0.0] * len(own), Positions.ALL) for one in (tiny(name), model))
    assert not torch.allclose(whole, cut)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_text_beyond_the_window_beside_answers_that_branch(name: str) -> None:
    family = FAMILIES[name]
    asked = ((3, 4, 5, 6), (11, 12)), ((3, 4, 5, 6), (13, 14)), ((3, 4, 9, 6), (11, 12, 13, 14))
    rows = [Encoded((*p, *a), len(p) - 1, len(p) + len(a) - 1) for p, a in asked]
    check(made(family, sliding_window=6), STEERED["attn_output"][0](family), rows=rows)


def made(family: Family, **changes: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**family.settings | changes)
    return getattr(transformers, family.model)(config).eval()


def test_sdpa() -> None:
    check(made(FAMILIES["llama"], attn_implementation="sdpa"), STEERED["several sites"][0](FAMILIES["llama"]))


def causal_alone(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
    """Attention that knows no mask of ours."""
    length, seen = query.shape[2], key.shape[2]
    causal = torch.ones(length, seen, dtype=torch.bool).tril(seen - length)
    return sdpa_attention_forward(module, query, key, value, causal[None, None], **settings)


def test_a_model_whose_attention_takes_no_mask_computes_every_answer_by_itself() -> None:
    AttentionInterface.register("causal_alone", causal_alone)
    model = made(FAMILIES["llama"], attn_implementation="causal_alone")
    check(model, at("1.residual")(FAMILIES["llama"]), rows=ROWS[: len(ANSWERS)], max_rows=1)


def test_a_model_whose_later_blocks_use_what_an_earlier_one_did_computes_every_arm_by_itself() -> None:
    model = made(FAMILIES["llama"])
    blocks, left = layers(model), []
    mlp = blocks[0].mlp.register_forward_hook(lambda _m, _i, output: left.append(output))  # type: ignore[union-attr]
    later = blocks[2].mlp.register_forward_hook(lambda _m, _i, output: output + left[-1])  # type: ignore[union-attr]
    try:
        check(model, at("1.residual")(FAMILIES["llama"]))
    finally:
        mlp.remove()
        later.remove()


def test_the_blocks_are_as_they_were_whatever_happens() -> None:
    model = made(FAMILIES["llama"])
    first, second, _ = layers(model)
    own = first.forward
    vars(first)["forward"] = own  # as accelerate puts one there
    output = torch.zeros(1, 2, COMMON["hidden_size"])

    def breaks() -> None:
        with second_part(model, 1, output, [0, 0]):
            both.extend([first(output), second(output)])
            raise ValueError("inside")

    both: list[Tensor] = []
    with pytest.raises(ValueError, match="inside"):
        breaks()
    assert both[0] is both[1]
    assert both[0].shape == (2, 2, COMMON["hidden_size"])
    assert vars(first)["forward"] == own
    assert "forward" not in vars(second)


def test_a_tree_holds_every_beginning_once() -> None:
    (tree,) = answer_trees([(1, 2, 3), (1, 2), (1, 4, 3), (1, 2, 3)], 10)
    assert sorted(tree.tokens) == [1, 2, 3, 3, 4]
    assert tree.branches
    for text, path in tree.paths.items():
        assert tuple(tree.tokens[place] for place in path) == text
        assert [tree.depths[place] for place in path] == list(range(len(text)))
        assert tree.visible()[path[-1]].nonzero()[:, 0].tolist() == sorted(path)
    assert set(tree.paths) == {(1, 2, 3), (1, 2), (1, 4, 3)}


@pytest.mark.parametrize(("most", "sizes"), [(0, [2, 3, 3]), (4, [3, 3]), (5, [5]), (100, [5])])
def test_trees_are_of_bounded_size(most: int, sizes: list[int]) -> None:
    found = list(answer_trees([(1, 2, 3), (1, 4, 3), (1, 2)], most))
    assert sorted(map(len, found)) == sizes
    assert {text for tree in found for text in tree.paths} == {(1, 2, 3), (1, 4, 3), (1, 2)}


def test_a_batch_that_is_not_small_is_padded_by_an_eighth_at_most() -> None:
    lengths = [1, 2, 10, 10, 11, 30, 33, 34, 90]
    found = list(batches(lengths, max_rows=10, max_tokens=1000, few=30))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    for batch in found:
        size = len(batch) * max(lengths[index] for index in batch)
        assert size <= 30 or 8 * (size - sum(lengths[index] for index in batch)) <= size
    assert len(list(batches(lengths, max_rows=10, max_tokens=1000))) == 1
