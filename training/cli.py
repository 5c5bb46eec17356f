"""`matsteer extract | train | evaluate | sweep`. torch is imported by a command that runs, never by --help."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from training import options as o
from training.choices import Method, Pool
from training.errors import DataError, TrainingError

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Train and evaluate steering.")


@app.callback()
def main() -> None:
    """Train and evaluate steering."""


@app.command()
def extract(
    model: o.Model,
    out: Annotated[Path, typer.Option(help="Folder for the shards and, last, the manifest.")],
    layer: o.Layers,
    site: o.SiteKinds = "attn_output",
    data: o.Data = None,
    more: o.More = None,
    pool: o.PoolOption = Pool.MEAN,
    rows: o.Rows = 64,
    seed: o.Seed = 0,
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
) -> None:
    """Store a model's activations on labelled texts as safetensors shards; an interrupted run goes on.

    Example: matsteer extract --model Qwen/Qwen2.5-0.5B --data truthfulness=facts.jsonl --layer 10,12
    --site attn_output --out runs/activations
    """
    with o.one_sentence():
        sites, specs = o.parse_sites(layer, site), _specs(data, more)
        from training.data import load_data, split_samples
        from training.extraction import extract as run
        from training.models import load_base

        samples = split_samples(load_data(specs), seed=seed)
        base = load_base(model, revision=revision, device=device, dtype=dtype)
        found = run(
            base.model,
            base.tokenizer,
            samples,
            sites,
            pool=pool,
            out=out,
            max_rows=rows,
            progress=o.shows_progress(),
        )
        typer.echo(f"{len(found)} activations at {', '.join(map(str, sites))} in {out}")


@app.command()
def train(
    model: o.Model,
    out: Annotated[Path, typer.Option(help="checkpoints/NAME; the version becomes a folder in it.")],
    layer: o.MaybeLayers = None,
    site: o.SiteKinds = "attn_output",
    at: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=LAYER.SITE", help="A place of its own for an attribute; repeat for more."),
    ] = None,
    places: Annotated[
        Path | None, typer.Option(help="Places and strengths that `sweep --alone` wrote; --at, --strength go before.")
    ] = None,
    data: o.Data = None,
    more: o.More = None,
    version: Annotated[str | None, typer.Option(help="Default: the next of v1, v2, ...")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that version.")] = False,
    method: o.MethodOption = Method.MAT,
    paper: o.PaperOption = False,
    objective: o.ObjectiveOption = None,
    kernel: o.KernelOption = None,
    sigma: o.Sigma = None,
    init: o.InitOption = None,
    gate_init: o.GateInitOption = None,
    l_pos: o.LossPos = None,
    l_sparse: o.LossSparse = None,
    l_ortho: o.LossOrtho = None,
    batch: o.BatchSize = None,
    lr: o.LearningRate = None,
    epochs: o.Epochs = None,
    joint: o.Joint = None,
    keep_best: o.KeepBest = None,
    patience: o.Patience = None,
    normalize: o.Normalize = None,
    penalty: o.Penalty = 1.0,
    strength: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]X", help="Scale vectors, so that multiplier 1 means X.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=X", help="Default multiplier of an attribute.")
    ] = None,
    pool: o.PoolOption = Pool.MEAN,
    work: Annotated[Path | None, typer.Option(help="Where intermediate artifacts stay; default: OUT/.work.")] = None,
    evaluate: Annotated[bool, typer.Option(help="Evaluate on the test split.")] = True,
    judge: o.JudgeName = None,
    prompts: o.Prompts = None,
    temperature: o.Temperature = 1.0,
    max_new_tokens: o.NewTokens = 64,
    samples: o.Samples = 1,
    limit: o.Limit = None,
    positions: o.PositionsOption = "generated",
    rows: o.Rows = 64,
    seed: o.Seed = 0,
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
) -> None:
    """Extract, fit, evaluate on test, and write the checkpoint with its model card: one command.

    Example: matsteer train --model Qwen/Qwen2.5-0.5B --data truthfulness=facts.jsonl --data civility=tone.jsonl
    --layer 12 --site attn_output --method mat --out checkpoints/mine
    """
    with o.one_sentence():
        own, specs = o.parse_places(at), _specs(data, more)
        if layer is None and not own and places is None:
            raise TrainingError("--layer is missing (or --at or --places, a place for each attribute).")
        sites = o.parse_sites(layer, site) if layer else ()
        strengths, defaults = o.parse_settings(strength, "--strength", unnamed=True), o.parse_settings(set_, "--set")
        mat = o.mat_config(
            paper, objective=objective, kernel=kernel, sigma=sigma, init=init, gate_init=gate_init, l_pos=l_pos,
            l_sparse=l_sparse, l_ortho=l_ortho, batch=batch, lr=lr, epochs=epochs, joint=joint, keep_best=keep_best,
            patience=patience, seed=seed,
        )  # fmt: skip
        from training.fit import Recipe
        from training.models import load_base
        from training.pipeline import Plan
        from training.pipeline import train as run
        from training.places import read_places

        if places is not None:
            found = read_places(places)
            own = {name: place.sites for name, place in found.items()} | own
            strengths = {name: place.strength for name, place in found.items()} | strengths
        plan = Plan(
            data=tuple(specs),
            sites=sites,
            out=out,
            recipe=Recipe(method, mat, penalty, normalize, strengths, defaults, own),
            measure=o.make_measure(judge, prompts, temperature, max_new_tokens, samples, seed, limit, positions),
            pool=pool,
            version=version,
            overwrite=overwrite,
            seed=seed,
            work=work,
            max_rows=rows,
            evaluated=evaluate,
            progress=o.shows_progress(),
        )
        base = load_base(model, revision=revision, device=device, dtype=dtype)
        checkpoint, evaluation = run(base, plan, o.say)
        if evaluation is not None:
            _print_evaluation(evaluation, f"{checkpoint.config.name}@{checkpoint.config.version} on test")
        typer.echo(f"wrote {out / checkpoint.config.version}")


@app.command()
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
        from training.comparison import compare, open_checkpoint
        from training.data import Split, load_data, split_samples
        from training.models import load_base
        from training.report import store

        if split not in list(Split):
            raise TrainingError(f"--split must be train, dev or test, got {split!r}.")
        loaded, folder = open_checkpoint(checkpoint)
        chosen = positions or loaded.config.positions.value
        measure = o.make_measure(judge, prompts, temperature, max_new_tokens, samples, seed, limit, chosen)
        measure = replace(measure, max_rows=rows)
        if not (data or more) and judge is None:
            raise DataError("Without a judge, --data is needed: the answers to choose from.")
        texts = split_samples(load_data([*(data or ()), *(more or ())]), seed=seed) if data or more else []
        base = load_base(model, revision=revision, device=device, dtype=dtype)
        evaluation, generated = compare(
            base, loaded, texts, measure, Split(split), factors=factors, baseline=baseline, alone=alone, extra=extra,
            progress=o.shows_progress(),
        )  # fmt: skip
        _print_evaluation(evaluation, f"{loaded.config.name}@{loaded.config.version} on {split}")
        for path in store(evaluation, out or folder / "evaluation", texts=generated):
            typer.echo(f"wrote {path}")


@app.command()
def sweep(
    model: o.Model,
    out: Annotated[Path, typer.Option(help="Folder for the results; an interrupted sweep goes on there.")],
    layer: o.Layers,
    site: o.SiteKinds = "attn_output",
    data: o.Data = None,
    more: o.More = None,
    multipliers: Annotated[str, typer.Option(metavar="X[,X..]", help="What is tried.")] = "0.5,1,2",
    alone: Annotated[
        bool, typer.Option("--alone", help="Each attribute by itself: finds a place for each, then strengths together.")
    ] = False,
    sites_each: Annotated[int, typer.Option(min=1, help="With --alone: so many places for an attribute.")] = 1,
    apart: Annotated[bool, typer.Option("--apart", help="With --alone: no two attributes at one place.")] = False,
    method: o.MethodOption = Method.MAT,
    paper: o.PaperOption = False,
    objective: o.ObjectiveOption = None,
    kernel: o.KernelOption = None,
    sigma: o.Sigma = None,
    init: o.InitOption = None,
    gate_init: o.GateInitOption = None,
    l_pos: o.LossPos = None,
    l_sparse: o.LossSparse = None,
    l_ortho: o.LossOrtho = None,
    batch: o.BatchSize = None,
    lr: o.LearningRate = None,
    epochs: o.Epochs = None,
    joint: o.Joint = None,
    keep_best: o.KeepBest = None,
    patience: o.Patience = None,
    normalize: o.Normalize = None,
    penalty: o.Penalty = 1.0,
    goal: Annotated[str | None, typer.Option(metavar="METRIC[,..]", help="What counts; default: all.")] = None,
    max_perplexity_ratio: Annotated[float, typer.Option(help="Settings beyond it rank last.")] = 1.5,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="METRIC=X", help="Settings with less than X of it rank last.")
    ] = None,
    max_side_effect: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="With --alone: settings that move the other attributes by more rank last."),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="With --alone: weaker settings and fewer places may lack so much of the score."
        ),
    ] = 0.01,
    pool: o.PoolOption = Pool.MEAN,
    judge: o.JudgeName = None,
    prompts: o.Prompts = None,
    temperature: o.Temperature = 1.0,
    max_new_tokens: o.NewTokens = 64,
    samples: o.Samples = 1,
    limit: o.Limit = None,
    positions: o.PositionsOption = "generated",
    rows: o.Rows = 64,
    seed: o.Seed = 0,
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
) -> None:
    """Fit and measure layers x sites x multipliers on dev: a table, a plot, the best written down.

    Example: matsteer sweep --model Qwen/Qwen2.5-0.5B --data truthfulness=facts.jsonl --layer 8,10,12
    --site attn_output,residual --multipliers 0.5,1,2 --out runs/sweep
    """
    with o.one_sentence():
        sites, specs = o.parse_sites(layer, site), _specs(data, more)
        factors, least = o.parse_numbers(multipliers, "--multipliers"), o.parse_settings(keep, "--keep")
        mat = o.mat_config(
            paper, objective=objective, kernel=kernel, sigma=sigma, init=init, gate_init=gate_init, l_pos=l_pos,
            l_sparse=l_sparse, l_ortho=l_ortho, batch=batch, lr=lr, epochs=epochs, joint=joint, keep_best=keep_best,
            patience=patience, seed=seed,
        )  # fmt: skip
        from training.data import load_data, split_samples
        from training.extraction import extract_under
        from training.fit import Recipe
        from training.goal import Goal
        from training.models import load_base
        from training.report import terminal
        from training.sweep import Sweep
        from training.sweep_report import rich_table

        measure = o.make_measure(judge, prompts, temperature, max_new_tokens, samples, seed, limit, positions)
        measure = replace(measure, max_rows=max(rows, measure.max_rows))
        texts = split_samples(load_data(specs), seed=seed)
        base = load_base(model, revision=revision, device=device, dtype=dtype)
        shown = o.shows_progress()
        activations = extract_under(
            out, base.model, base.tokenizer, texts, sites, pool=pool, max_rows=rows, progress=shown
        )
        run = Sweep(
            base, texts, activations, Recipe(method, mat, penalty, normalize), factors, measure, out,
            Goal(tuple(goal.split(",")) if goal else (), max_perplexity_ratio, least, max_side_effect, tolerance),
            progress=shown, say=o.say,
        )  # fmt: skip
        if alone:
            points, found = run.alone(sites_each, apart=apart)
            terminal().print(rich_table(points))
            chosen = ", ".join(
                f"{name} at {' and '.join(map(str, place.sites))} times {place.strength:g}"
                for name, place in found.items()
            )
            typer.echo(f"best: {chosen}; now: matsteer train --places {out / 'places.json'}")
        else:
            points = run.together()
            terminal().print(rich_table(points))
            best = points[0]
            typer.echo(f"best: --layer {best.layer} --site {best.site}, multiplier {best.multiplier:g}; wrote {out}")


def _specs(data: list[str] | None, more: list[str] | None) -> list[str]:
    specs = [*(data or ()), *(more or ())]
    if not specs:
        raise DataError("No data was given: name at least one --data NAME=PATH.")
    return specs


def _print_evaluation(evaluation: Any, title: str) -> None:
    from training.report import rich_table, terminal

    terminal().print(rich_table(evaluation, title))
