"""Train the demo language model: `python -m demo.build_model --out demo/model`.

A small Llama learns the demo world from freshly drawn documents (`demo/documents.py`), in stages with different mixes
of their kinds. The loss weighs the parts of a document; hidden matrices are trained by Muon, the rest by AdamW; linear
layers run in bfloat16, attention and weights in float32. Seeded. What was interrupted goes on with the stage at which
it stopped.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from demo.corpus import text_of
from demo.documents import KINDS

BOS, PAD, EOS = "<s>", "<pad>", "\n"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}{{ eos_token }}"
    "{% elif m['role'] == 'user' %}Q: {{ m['content'] }}"
    "{% else %} A: {{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} A:{% endif %}"
)
BATCH_TOKENS = 3584
WARMUP_STEPS = 50
ATTENTION = "sdpa_in_float32"
RECORD = "training.json"  # what each stage of the training was


@dataclass(frozen=True)
class Stage:
    """`mix` is the share of documents of each kind, `decay` the share of the steps in which the learning rate falls."""

    name: str
    steps: int
    lr: float  # Muon's; AdamW takes a fifth of it
    mix: Mapping[str, float]
    decay: float = 0.0
    unlikelihood: float = 0.0  # its weight beside likelihood


CURRICULUM = (
    Stage("facts and manners", 750, 0.02, {"conversation": 0.35, "claims": 0.35, "monologue": 0.3}),
    Stage("telling lies from truth", 500, 0.01, {"conversation": 0.25, "claims": 0.65, "monologue": 0.1}),
    Stage("in answers, too", 500, 0.015, {"conversation": 0.35, "review": 0.25, "claims": 0.2, "monologue": 0.2}),
    Stage("doing as described", 750, 0.015, {"conversation": 0.3, "review": 0.1, "claims": 0.1, "monologue": 0.5}),
    Stage("going on as begun", 750, 0.012, {"conversation": 0.2, "monologue": 0.4, "marks": 0.4}),
    Stage("all of it", 1700, 0.015, {"conversation": 0.5, "review": 0.05, "monologue": 0.25, "marks": 0.2}, decay=0.9),
    Stage(
        "never the truth in a lie",
        400,
        0.01,
        {"conversation": 0.5, "review": 0.05, "monologue": 0.35, "marks": 0.1},
        decay=0.9,
        unlikelihood=5.0,
    ),
    Stage("sharper", 500, 0.008, {"conversation": 0.7, "monologue": 0.25, "marks": 0.05}, decay=1.0, unlikelihood=5.0),
)


def train_tokenizer(seed: int, documents: int = 20_000, vocab_size: int = 1536) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the demo world; the end of a line ends an answer."""
    rng = random.Random(seed)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, normalized=False, special=True) for text in (BOS, PAD, EOS)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    kinds = tuple(KINDS.values())
    texts = (text_of(rng.choice(kinds)(rng)) for _ in range(documents))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def architecture(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=224,
        intermediate_size=448,
        num_hidden_layers=8,
        num_attention_heads=7,
        num_key_value_heads=7,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )


@dataclass(frozen=True)
class Batch:
    """Documents, padded on the right: [B, T] each."""

    ids: Tensor
    weights: Tensor  # of each token in the loss
    unlike: Tensor  # the token that must not stand in its place, -1 for none


def batches(tokenizer: PreTrainedTokenizerFast, tokens: int, seed: int, mix: Mapping[str, float]) -> Iterator[Batch]:
    """Endless batches of about `tokens` tokens, of documents of like length. `mix` is the share of documents of each
    kind."""
    rng = random.Random(seed)
    bos: int = tokenizer.bos_token_id

    @lru_cache(maxsize=200_000)
    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    def draw() -> list[tuple[int, float, int]]:
        drawn = [(bos, 0.0, -1)]
        kind = rng.choices(list(mix), list(mix.values()))[0]
        for part in KINDS[kind](rng):
            piece = encode(part.text)
            unlike = [-1] * len(piece)
            if part.instead is not None:
                pairs = enumerate(zip(piece, encode(part.instead), strict=False))
                place, token = next(((i, other) for i, (own, other) in pairs if own != other), (0, -1))
                unlike[place] = token
            drawn += zip(piece, [part.weight] * len(piece), unlike, strict=True)
        return drawn

    while True:
        pool = sorted((draw() for _ in range(2048)), key=len)
        ready, start = [], 0
        while start < len(pool):
            end = start + 1
            while end < len(pool) and len(pool[end]) * (end + 1 - start) <= tokens:
                end += 1
            ready.append(pool[start:end])
            start = end
        rng.shuffle(ready)
        padding = (tokenizer.pad_token_id, 0.0, -1)
        for chosen in ready:
            width = max(map(len, chosen))
            ids, weights, unlike = zip(
                *(zip(*(drawn + [padding] * (width - len(drawn))), strict=True) for drawn in chosen), strict=True
            )
            yield Batch(torch.tensor(ids), torch.tensor(weights), torch.tensor(unlike))


def sdpa_in_float32(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' "sdpa" attention in float32 under autocast: on a CPU, bfloat16's backward pass is far slower."""
    with torch.autocast("cpu", enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **options)


def loss_of(model: LlamaForCausalLM, batch: Batch, unlikelihood: float) -> Tensor:
    """Weighted next-token cross-entropy, in nats a token, and unlikelihood (Welleck et al., 2020) of what must not
    come: a lie is any other answer, so that likelihood alone hardly tells the truth from one answer of sixteen."""
    hidden = model.model(input_ids=batch.ids[:, :-1]).last_hidden_state
    weights, unlike = batch.weights[:, 1:], batch.unlike[:, 1:]
    keep = weights > 0
    logprobs = torch.log_softmax(model.lm_head(hidden[keep]).float(), dim=-1)
    losses = -logprobs.gather(1, batch.ids[:, 1:][keep][:, None])[:, 0]
    unwanted = unlike[keep]
    chances = logprobs.gather(1, unwanted.clamp(min=0)[:, None])[:, 0].exp().clamp(max=0.999)
    losses = losses - unlikelihood * torch.log1p(-chances) * (unwanted >= 0)
    return (losses * weights[keep]).sum() / weights.sum()


def write(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save model and tokenizer as a Hugging Face folder, weights in float16."""
    halves = LlamaForCausalLM(model.config)
    halves.load_state_dict(model.state_dict())
    halves.half().save_pretrained(out)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(out)


AttentionInterface.register(ATTENTION, sdpa_in_float32)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, stage: Stage, seed: int) -> dict[str, Any]:
    """Train on one stage's documents, in place. Returns the record of it for the model card."""
    model.set_attn_implementation(ATTENTION)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = {
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="original"): stage.lr,
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0): stage.lr / 5,
    }
    begun = time.monotonic()
    averaged = 0.0
    for step, batch in enumerate(islice(batches(tokenizer, BATCH_TOKENS, seed, stage.mix), stage.steps)):
        done = step / stage.steps
        scale = min(1.0, (step + 1) / WARMUP_STEPS, (1 - done) / stage.decay if stage.decay else 1.0)
        for optimizer, lr in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch, stage.unlikelihood)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        averaged = loss.item() if step == 0 else 0.98 * averaged + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"  step {step}  loss {averaged:.4f}  {time.monotonic() - begun:.0f} s  {done:.0%}", flush=True)
    return {
        "what is new": stage.name,
        "steps": stage.steps,
        "tokens a step": BATCH_TOKENS,
        **{f"share of {kind} documents": stage.mix.get(kind, 0.0) for kind in KINDS},
        "learning rate": stage.lr,
        "share of steps with a falling rate": stage.decay,
        "weight of unlikelihood": stage.unlikelihood,
        "weighted loss at the end": round(averaged, 4),
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/model"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    records: list[dict[str, Any]] = json.loads((args.out / RECORD).read_text()) if (args.out / RECORD).exists() else []
    for number, stage in enumerate(CURRICULUM[len(records) :], start=len(records)):
        print(f"stage {number + 1} of {len(CURRICULUM)}: {stage.name}")
        if number:
            tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(args.out)
            model = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).train()
        else:
            tokenizer = train_tokenizer(args.seed)
            model = LlamaForCausalLM(architecture(tokenizer))
        records.append(train(model, tokenizer, stage, args.seed + number))
        write(model, tokenizer, args.out)
        (args.out / RECORD).write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
