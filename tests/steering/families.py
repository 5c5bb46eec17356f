"""A tiny random model of every supported family, and where its sites are, written down by hand."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn

from steering import Column, Gate, Site, SiteKind

VOCABULARY, HIDDEN, HEADS, HEAD_WIDTH, LAYERS = 61, 32, 2, 16, 3

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
GROUPED = COMMON | {"num_key_value_heads": 1}
GEMMA = GROUPED | {"head_dim": 24, "tie_word_embeddings": True}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
EXPERTS = {"num_experts_per_tok": 2}


@dataclass(frozen=True)
class Family:
    """`paths`: the modules at the four sites of layer 1, in the order of SiteKind."""

    model: str
    config: str
    settings: dict[str, Any]
    blocks: str = "model.layers"
    attention: str = "self_attn"
    projection: str = "o_proj"
    norm: str = "model.norm"
    heads_width: int = HEADS * HEAD_WIDTH

    def path(self, site: Site) -> str:
        block = f"{self.blocks}.{site.layer}"
        return {
            SiteKind.ATTN_HEADS: f"{block}.{self.attention}.{self.projection}",
            SiteKind.ATTN_OUTPUT: f"{block}.{self.attention}",
            SiteKind.MLP_OUTPUT: f"{block}.mlp",
            SiteKind.RESIDUAL: block,
        }[site.kind]

    def width(self, kind: SiteKind) -> int:
        return self.heads_width if kind is SiteKind.ATTN_HEADS else HIDDEN


FAMILIES = {
    "llama": Family("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", GPT2, "transformer.h", "attn", "c_proj", "transformer.ln_f"),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 24}, heads_width=48),
    "mistral": Family("MistralForCausalLM", "MistralConfig", GROUPED),
    "mixtral": Family("MixtralForCausalLM", "MixtralConfig", GROUPED | EXPERTS | {"num_local_experts": 4}),
    "gemma": Family("GemmaForCausalLM", "GemmaConfig", GEMMA, heads_width=48),
    "gemma2": Family("Gemma2ForCausalLM", "Gemma2Config", GEMMA, heads_width=48),
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA, heads_width=48),
    "phi3": Family("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        COMMON,
        "gpt_neox.layers",
        "attention",
        "dense",
        "gpt_neox.final_layer_norm",
    ),
    "olmo2": Family("Olmo2ForCausalLM", "Olmo2Config", GROUPED),
    "granite": Family("GraniteForCausalLM", "GraniteConfig", GROUPED | {"residual_multiplier": 0.5}),
    "starcoder2": Family("Starcoder2ForCausalLM", "Starcoder2Config", GROUPED),
    "cohere2": Family("Cohere2ForCausalLM", "Cohere2Config", GROUPED | {"tie_word_embeddings": True}),
    "smollm3": Family("SmolLM3ForCausalLM", "SmolLM3Config", GROUPED),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        GROUPED | EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": HEAD_WIDTH},
    ),
}


@cache
def tiny(name: str) -> Any:
    """The model of a family, float32, in evaluation mode. Shared: leave no hooks behind."""
    family = FAMILIES[name]
    config = getattr(transformers, family.config)(**family.settings)
    torch.manual_seed(0)
    model = getattr(transformers, family.model)(config).eval()
    model(torch.tensor([[3]]), output_hidden_states=True)  # transformers' own hooks come now and stay
    return model


def hooks(model: nn.Module) -> int:
    """How many forward hooks there are on a model and its modules."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def column(site: Site, width: int = HIDDEN, *, seed: int = 0, scale: float = 1.0, **settings: Any) -> Column:
    """A random column; gates of about a half."""
    random = torch.Generator().manual_seed(seed)
    given = {
        "attribute": "truthfulness",
        "site": site,
        "gate": Gate.SIGMOID,
        "vector": torch.randn(width, generator=random) * scale,
        "gate_weight": torch.randn(width, generator=random) / width**0.5,
        "gate_bias": float(torch.randn((), generator=random)),
        "keep_norm": True,
        "range": (-40.0, 40.0),
    }
    return Column(**(given | settings))
