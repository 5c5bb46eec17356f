"""What every contender is asked: the same requests of the same random models."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from steering.column import Column
from steering.types import Gate, Site

SHAPES = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "vocab_size": 4096,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "5M": {"hidden_size": 256, "num_hidden_layers": 6, "vocab_size": 4096, "num_attention_heads": 4},
    "100M": {"hidden_size": 768, "num_hidden_layers": 12, "vocab_size": 32000, "num_attention_heads": 12},
    "8B": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
    },
}
ATTRIBUTES = ("truthfulness", "toxicity", "fairness")


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    new: int


def requests(count: int, vocab: int, *, seed: int = 0, shortest: int = 16, longest: int = 128) -> list[Request]:
    """Prompts and answers of 16 to 128 tokens."""
    number = random.Random(seed)
    return [
        Request(
            tuple(number.randrange(vocab) for _ in range(number.randint(shortest, longest))),
            number.randint(shortest, longest),
        )
        for _ in range(count)
    ]


def llama(shape: str, dtype: torch.dtype, device: torch.device | str = "cpu", vocab: int | None = None) -> Any:
    """A random Llama, the same every time. `vocab`: tokens that it knows, where not those of the shape."""
    torch.manual_seed(0)
    hidden = SHAPES[shape]["hidden_size"]
    sizes: dict[str, Any] = {
        "intermediate_size": hidden * 8 // 3 // 64 * 64,
        "max_position_embeddings": 4096,
        **SHAPES[shape],
    }
    if vocab is not None:
        sizes["vocab_size"] = vocab
    config = LlamaConfig(
        **sizes,
        tie_word_embeddings=shape != "8B",
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    return model.eval().requires_grad_(False)


def columns(shape: str) -> list[Column]:
    """Three attributes at the attention's output of the middle layer."""
    width, layer = SHAPES[shape]["hidden_size"], SHAPES[shape]["num_hidden_layers"] // 2
    return random_columns(Site.parse(f"{layer}.attn_output"), width)


def random_columns(site: Site, width: int) -> list[Column]:
    """The three attributes at a site of this width."""
    random_ = torch.Generator().manual_seed(1)
    return [
        Column(
            attribute=attribute,
            site=site,
            gate=Gate.SIGMOID,
            vector=0.1 * torch.randn(width, generator=random_),
            gate_weight=torch.randn(width, generator=random_),
            gate_bias=0.0,
            keep_norm=True,
            range=(-5.0, 5.0),
        )
        for attribute in ATTRIBUTES
    ]
