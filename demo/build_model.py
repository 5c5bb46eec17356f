"""Train the demo language model: `python -m demo.build_model --out demo/model`.

A small Llama learns the demo world from freshly drawn documents. The loss weighs the parts of a document
(`demo/corpus.py`); hidden matrices are trained by Muon, the rest by AdamW. Seeded. With `--start` it goes on from an
earlier stage's folder.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.corpus import VERDICT, document

BOS, PAD, EOS = "<s>", "<pad>", "\n"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] }}{{ eos_token }}"
    "{% elif m['role'] == 'user' %}Q: {{ m['content'] }}"
    "{% else %} A: {{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} A:{% endif %}"
)
SNAPSHOT_STEPS = 250
RECORD = "training.json"  # what each stage of the training was


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
    texts = ("".join(part.text for part in document(rng)) for _ in range(documents))
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
        num_hidden_layers=6,
        num_attention_heads=7,
        num_key_value_heads=7,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )


def batches(
    tokenizer: PreTrainedTokenizerFast, tokens: int, seed: int, remarks: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of about `tokens` tokens, of documents of like length: ids [B, T] and loss weights [B, T]."""
    rng = random.Random(seed)

    @lru_cache(maxsize=200_000)
    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    def draw() -> tuple[list[int], list[float]]:
        ids, weights = [tokenizer.bos_token_id], [0.0]
        for part in document(rng, remarks):
            piece = encode(part.text)
            ids += piece
            weights += [part.weight] * len(piece)
        return ids, weights

    while True:
        pool = sorted((draw() for _ in range(2048)), key=lambda pair: len(pair[0]))
        ready, start = [], 0
        while start < len(pool):
            end = start + 1
            while end < len(pool) and len(pool[end][0]) * (end + 1 - start) <= tokens:
                end += 1
            ready.append(pool[start:end])
            start = end
        rng.shuffle(ready)
        for chosen in ready:
            width = max(len(ids) for ids, _ in chosen)
            ids = torch.full((len(chosen), width), tokenizer.pad_token_id)
            weights = torch.zeros(len(chosen), width)
            for row, (tokens_, weights_) in enumerate(chosen):
                ids[row, : len(tokens_)] = torch.tensor(tokens_)
                weights[row, : len(weights_)] = torch.tensor(weights_)
            yield ids, weights


def loss_of(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted next-token cross-entropy, in nats a spoken token."""
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
    keep = weights[:, 1:] > 0
    logits = model.lm_head(hidden[keep])
    losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:][keep], reduction="none")
    return (losses * weights[:, 1:][keep]).sum() / weights[:, 1:].sum()


def write(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save model and tokenizer as a Hugging Face folder, weights in float16."""
    halves = LlamaForCausalLM(model.config)
    halves.load_state_dict(model.state_dict())
    halves.half().save_pretrained(out)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/model"))
    parser.add_argument("--minutes", type=float, help="train for about so long instead of --steps")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--start", type=Path, help="the folder of a model to go on from")
    parser.add_argument("--remarks", type=float, default=0.3, help="share of documents with remarks on the answers")
    parser.add_argument("--decay", type=float, default=0.8, help="share of the steps in which the learning rate falls")
    parser.add_argument("--batch-tokens", type=int, default=3584)
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's; AdamW takes a fifth of it")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    if args.start:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(args.start)
        model = LlamaForCausalLM.from_pretrained(args.start, dtype=torch.float32).train()
    else:
        tokenizer = train_tokenizer(args.seed)
        model = LlamaForCausalLM(architecture(tokenizer))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.01, adjust_lr_fn="original")
    adam = torch.optim.AdamW(others, lr=args.lr / 5, betas=(0.9, 0.98), weight_decay=0.0)
    begun, step = time.monotonic(), 0
    averaged = 0.0
    for ids, weights in batches(tokenizer, args.batch_tokens, args.seed + (args.start is not None), args.remarks):
        done = (time.monotonic() - begun) / (60 * args.minutes) if args.minutes else step / args.steps
        if done >= 1:
            break
        scale = min(1.0, (step + 1) / 50, (1 - done) / args.decay if args.decay else 1.0)
        for optimizer, base in ((muon, args.lr), (adam, args.lr / 5)):
            for group in optimizer.param_groups:
                group["lr"] = base * scale
        loss = loss_of(model, ids, weights)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        muon.step()  # type: ignore[no-untyped-call]
        adam.step()
        model.zero_grad(set_to_none=True)
        averaged = loss.item() if step == 0 else 0.98 * averaged + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"step {step}  loss {averaged:.4f}  {time.monotonic() - begun:.0f} s  {done:.0%}", flush=True)
        step += 1
        if step % SNAPSHOT_STEPS == 0:
            write(model, tokenizer, args.out)
    write(model, tokenizer, args.out)
    stage = {
        "steps": step,
        "tokens a step": args.batch_tokens,
        "documents with remarks": args.remarks,
        "weight of remarks and verdicts": VERDICT,
        "learning rate": args.lr,
        "share of steps with a falling rate": args.decay,
        "seed": args.seed,
        "weighted loss at the end": round(averaged, 4),
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    before = json.loads((args.start / RECORD).read_text()) if args.start else []
    (args.out / RECORD).write_text(json.dumps([*before, stage], indent=1) + "\n")


if __name__ == "__main__":
    main()
