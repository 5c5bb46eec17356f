"""Whether the server says what `transformers.generate` says: `python -m benchmarks.agreement --model M --checkpoint C`.

The same prompts, greedily, steered and not: by the whole engine, all texts in flight at once, and by transformers'
own `generate` with the columns hooked onto a second copy of the model, one text at a time. Where two texts part, the
log-probability that transformers' likelier token has ahead of the engine's says whether it was a tie.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import described
from server.assembly import open_service
from server.config import Settings
from server.schemas import GenerateRequest
from steering import checkpoint as checkpoints
from steering.column import Column
from steering.hook import steered


@dataclass(frozen=True)
class Parting:
    """Where the engine's text leaves that of transformers, and by how much its token is the less likely one."""

    prompt: int
    arm: str
    token: int
    behind: float  # nats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a Hugging Face id")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint's version folder, made for it")
    parser.add_argument("--prompts", type=Path, required=True, help="a text file, one prompt a line")
    parser.add_argument("--limit", type=int, default=100, help="prompts that are taken")
    parser.add_argument("--multiplier", type=float, default=1.0, help="of every attribute")
    parser.add_argument("--new", type=int, default=40, help="tokens of a text")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/agreement.json"))
    args = parser.parse_args()
    lines = [line for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    prompts = lines[: args.limit]
    machine = described()
    columns = checkpoints.load(args.checkpoint).columns
    ours = engine_texts(args, prompts, sorted({column.attribute for column in columns}))
    theirs = Reference(args.model, args.dtype, columns)
    partings = []
    for arm in ("steered", "baseline"):
        for number, prompt in enumerate(prompts):
            multiplier = args.multiplier if arm == "steered" else None
            parting = theirs.parting(prompt, ours[arm][number], args.new, multiplier)
            if parting is not None:
                partings.append(Parting(number, arm, *parting))
        print(f"{arm}: {sum(one.arm == arm for one in partings)} of {len(prompts)} texts differ", file=sys.stderr)
    results = {
        "machine": machine,
        "model": type(theirs.model).__name__,
        "dtype": args.dtype,
        "columns": [f"{column.attribute} at {column.site}" for column in columns],
        "prompts": len(prompts),
        "new_tokens": sum(map(len, [*ours["steered"], *ours["baseline"]])),
        "steered_texts_that_differ_from_unsteered": sum(map(list.__ne__, ours["steered"], ours["baseline"])),
        "equal": {arm: len(prompts) - sum(one.arm == arm for one in partings) for arm in ("steered", "baseline")},
        "furthest_parting_nats": max((one.behind for one in partings), default=None),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def engine_texts(args: argparse.Namespace, prompts: Sequence[str], attributes: Sequence[str]) -> dict[str, Any]:
    """New token ids of every prompt, by arm."""
    folder: Path = args.checkpoint.resolve()
    settings = Settings(
        model=args.model,
        dtype=args.dtype,
        device="cpu",
        checkpoints=folder.parents[1],
        checkpoint=f"{folder.parent.name}@{folder.name}",
        remember=False,
        log_level="warning",
        max_request_rows=4096,
        queue_limit=4096,
    )
    service = open_service(settings)
    body = GenerateRequest.model_validate(
        {
            "prompt": list(prompts),
            "attributes": dict.fromkeys(attributes, args.multiplier),
            "baseline": True,
            "temperature": 0,
            "max_new_tokens": args.new,
            "positions": "generated",
        }
    )
    try:
        answer = asyncio.run(service.generate(body.to_params()))
    finally:
        service.engine.stop()
    return {arm.name: [list(text.token_ids) for text in arm.texts] for arm in answer.arms}


class Reference:
    """transformers' own generation, with the columns hooked on."""

    def __init__(self, name: str, dtype: str, columns: Sequence[Column]) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
        self.model: Any = model.eval()
        self._context: int = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
        self._columns = columns

    @torch.inference_mode()
    def parting(self, prompt: str, ours: Sequence[int], new: int, multiplier: float | None) -> tuple[int, float] | None:
        """The first token that differs, and how much likelier transformers' is; None: the texts are equal."""
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        new = min(new, self._context - ids.shape[1])  # the engine's texts end with the context
        multipliers = [multiplier or 0.0] * len(self._columns)
        with steered(self.model, self._columns, multipliers) if multiplier is not None else nullcontext():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=0,
            )
        text = out.sequences[0, ids.shape[1] :].tolist()
        if text == list(ours):
            return None
        at = next((i for i, (one, two) in enumerate(zip(text, ours, strict=False)) if one != two), None)
        if at is None:  # one of them ends earlier
            return min(len(text), len(ours)), float("inf")
        logprobs = out.logits[at][0].float().log_softmax(-1)
        return at, float(logprobs[text[at]] - logprobs[ours[at]])


if __name__ == "__main__":
    main()
