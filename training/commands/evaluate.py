"""`matsteer evaluate`: a checkpoint against its base model."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from training import options as o
from training.errors import DataError, TrainingError


def evaluate(
    model: o.Model,
    checkpoint: Annotated[Path, typer.Option(help="Folder of a checkpoint, with or without its version.")],
    data: o.Data = None,
    more: o.More = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Also without steering, for comparison.")] = False,
    alone: Annotated[bool, typer.Option("--alone", help="Also each attribute by itself.")] = False,
    multipliers: Annotated[
        str | None, typer.Option(metavar="X[,X..]", help="Factors on the default multipliers; default: 1.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=X", help="One more arm with exactly these multipliers.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "test",
    out: Annotated[Path | None, typer.Option(help="Default: evaluation/ in the checkpoint's folder.")] = None,
    judge: o.JudgeName = None,
    prompts: o.Prompts = None,
    temperature: o.Temperature = 1.0,
    max_new_tokens: o.NewTokens = 64,
    samples: o.Samples = 1,
    limit: o.Limit = None,
    positions: Annotated[str | None, typer.Option(help="Default: the checkpoint's own.")] = None,
    rows: o.Rows = 128,
    seed: o.Seed = 0,
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
) -> None:
    """Steered and unsteered side by side on the test split: a table, JSON and a plot.

    Example: matsteer evaluate --model Qwen/Qwen2.5-0.5B --checkpoint checkpoints/mine
    --data truthfulness=facts.jsonl --baseline
    """
    with o.one_sentence():
        extra, factors = o.parse_settings(set_, "--set"), o.parse_numbers(multipliers or "1", "--multipliers")
        from training.data import Split, load_data
        from training.data.splits import split_as_trained
        from training.evaluation.evaluator import compare, open_checkpoint
        from training.evaluation.report import rich_table, store, terminal
        from training.models import load_base

        if split not in list(Split):
            raise TrainingError(f"--split must be train, dev or test, got {split!r}.")
        loaded, folder = open_checkpoint(checkpoint)
        chosen = positions or loaded.config.positions.value
        measure = o.make_measure(judge, prompts, temperature, max_new_tokens, samples, seed, limit, chosen)
        measure = replace(measure, max_rows=rows)
        specs = [*(data or ()), *(more or ())]
        if not specs and judge is None:
            raise DataError("Without a judge, --data is needed: the answers to choose from.")
        texts = split_as_trained(load_data(specs), folder, seed=seed) if specs else []
        if strange := sorted({text.attribute for text in texts} - set(loaded.attributes)):
            o.say(
                f"note: the checkpoint does not steer {', '.join(strange)}; it steers {', '.join(loaded.attributes)}."
            )
        base = load_base(model, revision=revision, device=device, dtype=dtype)
        evaluation, generated = compare(
            base, loaded, texts, measure, Split(split), factors=factors, baseline=baseline, alone=alone, extra=extra,
            progress=o.shows_progress(),
        )  # fmt: skip
        terminal().print(rich_table(evaluation, f"{loaded.config.name}@{loaded.config.version} on {split}"))
        for path in store(evaluation, out or folder / "evaluation", texts=generated):
            typer.echo(f"wrote {path}")
