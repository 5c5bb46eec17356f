"""A text becomes the same tokens wherever it comes from."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from steering.text import special_tokens_before, tokenize, tokenize_pair

BOS, EOS = "<s>", "</s>"


def byte_level(template: str | None) -> PreTrainedTokenizerFast:
    """Bytes and a few merges; `template`: what stands around a text, as in "<s> $A </s>"."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["the sky is blue, the sea is blue"] * 3, trainer)
    if template is not None:
        bpe.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(BOS, 0), (EOS, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS)


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    return byte_level(None)


@pytest.fixture(scope="module")
def beginning() -> PreTrainedTokenizerFast:
    return byte_level(f"{BOS} $A")


@pytest.fixture(scope="module")
def both() -> PreTrainedTokenizerFast:
    return byte_level(f"{BOS} $A {EOS}")


@pytest.fixture(params=["plain", "beginning", "both"])
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_what_comes_before_a_text_is_told_by_the_tokenizer(plain: Any, beginning: Any, both: Any) -> None:
    assert special_tokens_before(plain) == ()
    assert special_tokens_before(beginning) == (0,)
    assert special_tokens_before(both) == (0,)


def test_a_text_gets_the_beginning_once(beginning: Any) -> None:
    bare = tuple(beginning("the sky", add_special_tokens=False)["input_ids"])
    assert tokenize(beginning, "the sky").ids == (0, *bare)
    assert tokenize(beginning, f"{BOS}the sky").ids == (0, *bare)
    assert tokenize(beginning, "").ids == (0,)


def test_add_special_tokens_says_otherwise(beginning: Any) -> None:
    bare = tuple(beginning("the sky", add_special_tokens=False)["input_ids"])
    assert tokenize(beginning, "the sky", add_special_tokens=False).ids == bare
    assert tokenize(beginning, f"{BOS}the sky", add_special_tokens=False).ids == (0, *bare)
    assert tokenize(beginning, f"{BOS}the sky", add_special_tokens=True).ids == (0, 0, *bare)


def test_several_tokens_before_a_text_come_together_or_not_at_all() -> None:
    two = byte_level(f"{BOS} {EOS} $A")
    bare = tuple(two("sea", add_special_tokens=False)["input_ids"])
    assert tokenize(two, "sea").ids == (0, 1, *bare)
    assert tokenize(two, f"{BOS}{EOS}sea").ids == (0, 1, *bare)


def test_a_text_that_goes_on_is_not_ended(both: Any) -> None:
    assert both("the sky")["input_ids"][-1] == 1
    assert 1 not in tokenize(both, "the sky").ids
    before, after = tokenize_pair(both, "the sky", " is blue")
    assert 1 not in before + after


@pytest.mark.parametrize("prompt", ["the sky", "the sky ", "東", ""])
@pytest.mark.parametrize("continuation", [" is blue", "is", "京 is", "\n", "s"])
def test_a_pair_is_the_whole_text(any_tokenizer: Any, prompt: str, continuation: str) -> None:
    before, after = tokenize_pair(any_tokenizer, prompt, continuation)
    assert before + after == tokenize(any_tokenizer, prompt + continuation).ids
    own = any_tokenizer.decode(before, skip_special_tokens=True)
    assert prompt.startswith(own)
    assert after, "a continuation always has tokens of its own, or the one that it shares"


def test_a_token_across_the_border_belongs_to_the_continuation(plain: Any) -> None:
    whole = tokenize(plain, "the sky is").ids
    assert len(tokenize(plain, "the").ids) == 1
    before, after = tokenize_pair(plain, "th", "e sky is")
    assert (before, after) == ((), whole)
    before, after = tokenize_pair(plain, "the sky i", "s")
    assert before + after == whole
    assert plain.decode(after) == " is"


def test_a_slow_tokenizer_splits_where_a_fast_one_does(beginning: Any) -> None:
    class Slow:
        is_fast = False

        def __call__(self, text: str, **options: Any) -> Any:
            return beginning(text, **options)

    for prompt, continuation in (("the sky", " is blue"), ("the", " sea"), ("", "sea")):
        fast = tokenize_pair(beginning, prompt, continuation)
        assert tokenize_pair(Slow(), prompt, continuation) == fast
    assert tokenize(Slow(), f"{BOS}sea").ids == tokenize(beginning, "sea").ids
