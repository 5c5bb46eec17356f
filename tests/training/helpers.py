"""Tiny real models and tokenizers, built from configs and a few sentences."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SENTENCES = [
    "Q: What colour is the sky? A: The sky is blue.",
    "Q: What colour is grass? A: The grass is green, of course.",
    "Q: Where do bees live? A: Bees live in a hive, I think.",
    "Q: What do cows say? A: Moo, you silly person!",
]
END = "<|end|>"


def make_tokenizer(begin: str | None = None, *, closed: bool = False) -> Any:
    """Byte-level BPE; with `begin` it opens every text, `closed` ends it, by the tokenizer's own rule."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = [END] + ([begin] if begin else [])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        SENTENCES * 3,
        trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    if begin:
        core.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A {END}" if closed else f"{begin} $A", special_tokens=[(begin, 1), (END, 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END, bos_token=begin)


def make_llama(vocabulary: int = 320, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.6,
        "eos_token_id": 0,
        "bos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()
