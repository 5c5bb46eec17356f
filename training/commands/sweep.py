"""`matsteer sweep`: where to steer, and how strongly."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from training import options as o
from training.commands.method_options import MethodOptions, with_method_options


@with_method_options
def sweep(
    how: MethodOptions,
    model: o.Model,
    out: Annotated[Path, typer.Option(help="Folder for the results; an interrupted sweep goes on there.")],
    layer: o.Layers,
    site: o.MaybeSiteKinds = None,
    data: o.Data = None,
    more: o.More = None,
    multipliers: Annotated[str, typer.Option(metavar="X[,X..]", help="What is tried.")] = "0.5,1,2",
    alone: Annotated[
        bool, typer.Option("--alone", help="Each attribute by itself: finds a place for each, then strengths together.")
    ] = False,
    sites_each: Annotated[int, typer.Option(min=1, help="With --alone: so many places for an attribute.")] = 1,
    apart: Annotated[bool, typer.Option("--apart", help="With --alone: no two attributes at one place.")] = False,
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
    pool: o.MaybePool = None,
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
        sites, specs = how.sites(layer, site), o.data_specs(data, more, how.method)
        how.check_sweep()
        factors, least = o.parse_numbers(multipliers, "--multipliers"), o.parse_settings(keep, "--keep")
        from training.activations.extraction import extract_under
        from training.commands.method_recipe import make_recipe
        from training.data.samples import Split
        from training.evaluation.report import sweep_table, terminal
        from training.evaluation.sweep import Goal, Sweep
        from training.models import load_base
        from training.pipeline import read_samples

        measure = o.make_measure(judge, prompts, temperature, max_new_tokens, samples, seed, limit, positions)
        measure = replace(measure, max_rows=max(rows, measure.max_rows))
        recipe = make_recipe(how, seed)
        texts = read_samples(specs, recipe, seed)
        measure.check(texts, Split.DEV, sorted({sample.attribute for sample in texts}) if alone else ())
        base = load_base(model, revision=revision, device=device, dtype=dtype)
        shown = o.shows_progress()
        activations = extract_under(
            out, base.model, base.tokenizer, texts, sites, pool=pool or how.profile.pool, max_rows=rows, progress=shown
        )
        wanted = Goal(tuple(goal.split(",")) if goal else (), max_perplexity_ratio, least, max_side_effect, tolerance)
        run = Sweep(base, texts, activations, recipe, factors, measure, out, wanted, progress=shown, say=o.say)
        swept = run.alone(sites_each, apart=apart) if alone else run.together()
        terminal().print(sweep_table(swept))
        for remark in swept.remarks(wanted):
            o.say(remark)
        if alone:
            chosen = ", ".join(
                f"{name} at {' and '.join(map(str, place.sites))} times {place.strength:g}"
                for name, place in swept.places.items()
            )
            typer.echo(f"best together: {chosen}; now: matsteer train --places {out / 'places.json'}")
        else:
            best = swept.points[0]
            typer.echo(f"best: --layer {best.layer} --site {best.site}, multiplier {best.multiplier:g}; wrote {out}")
