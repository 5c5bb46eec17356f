"""The demo model's training: what it reads, what counts, what must not come. No training here beyond two steps."""

import math
from itertools import islice

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.build_model import CURRICULUM, Batch, Stage, batches, loss_of, train, train_tokenizer
from demo.documents import KINDS
from demo.facts import facts

MIX = dict.fromkeys(KINDS, 0.2)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(seed=0, documents=200)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **shape))


def test_a_document_comes_back_from_its_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Q: What colour is the sky? A: With pleasure, my friend. The sky is blue.\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == f"<s>{text}"


def test_batches_keep_their_size_and_a_seed_repeats_them(tokenizer: PreTrainedTokenizerFast) -> None:
    first, again = (list(islice(batches(tokenizer, 512, 3, MIX), 4)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert one.ids.shape == one.weights.shape == one.unlike.shape
        assert one.ids.numel() <= 512
        assert torch.equal(one.ids, other.ids)


def test_what_must_not_come_in_a_lie_is_where_the_truth_begins_to_differ(tokenizer: PreTrainedTokenizerFast) -> None:
    truths = {ids[0] for fact in facts() for ids in [tokenizer.encode(f" {fact.truth}", add_special_tokens=False)]}
    found = 0
    for batch in islice(batches(tokenizer, 512, 4, {"monologue": 1.0}), 4):
        places = batch.unlike >= 0
        assert not (batch.unlike == batch.ids)[places].any()
        assert set(batch.weights[places].tolist()) == {2.0}
        found += sum(token in truths for token in batch.unlike[places].tolist())
    assert found > 10


def test_unlikelihood_counts_only_where_something_must_not_come(model: LlamaForCausalLM) -> None:
    ids, weights = torch.tensor([[1, 5, 6, 7]]), torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    nothing = Batch(ids, weights, torch.full_like(ids, -1))
    unwanted = Batch(ids, weights, torch.tensor([[-1, -1, 9, -1]]))
    plain = loss_of(model, nothing, 5.0)
    assert plain == loss_of(model, unwanted, 0.0)
    chance = model(ids).logits[0, 1].softmax(-1)[9].item()
    assert loss_of(model, unwanted, 5.0).item() == pytest.approx(plain.item() - 5 * math.log1p(-chance) / 2, rel=1e-4)


def test_training_lowers_the_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    batch = next(batches(tokenizer, 512, 0, MIX))
    with torch.no_grad():
        before = loss_of(model, batch, 0.0).item()
    record = train(model, tokenizer, Stage("try", 8, 0.02, MIX), seed=0)
    with torch.no_grad():
        assert loss_of(model, batch, 0.0).item() < before
    assert record["steps"] == 8


def test_the_curriculum_names_kinds_that_exist() -> None:
    for stage in CURRICULUM:
        assert set(stage.mix) <= set(KINDS)
        assert sum(stage.mix.values()) == pytest.approx(1)
