"""`matsteer train`: from data, or stored activations, to a checkpoint."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from training import options as o
from training.activations import Pool
from training.commands.method_options import MethodOptions, with_method_options
from training.errors import TrainingError


@with_method_options
def train(
    how: MethodOptions,
    model: o.Model,
    out: Annotated[Path, typer.Option(help="checkpoints/NAME; the version becomes a folder in it.")],
    layer: o.MaybeLayers = None,
    site: o.MaybeSiteKinds = None,
    at: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=LAYER.SITE", help="A place of its own for an attribute; repeat for more."),
    ] = None,
    places: Annotated[
        Path | None, typer.Option(help="Places and strengths that `sweep --alone` wrote; --at, --strength go before.")
    ] = None,
    data: o.Data = None,
    more: o.More = None,
    activations: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Fit what `extract` or `import-features` wrote there, and extract nothing; --data, which may then be "
            "left out, is for the evaluation.",
        ),
    ] = None,
    version: Annotated[str | None, typer.Option(help="Default: the next of v1, v2, ...")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace that version.")] = False,
    strength: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]X", help="Scale vectors, so that multiplier 1 means X.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=X", help="Default multiplier of an attribute.")
    ] = None,
    pool: o.MaybePool = None,
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
        own, sites = o.parse_places(at), how.sites(layer, site)
        specs = o.data_specs(data, more, how.method, activations)
        if not sites and not own and places is None:
            raise TrainingError("--layer is missing (or --at or --places, a place for each attribute).")
        if activations is not None:
            _refuse_unused(pool, specs, chosen=evaluate and judge is None)
        strengths, defaults = o.parse_settings(strength, "--strength", unnamed=True), o.parse_settings(set_, "--set")
        from training.commands.method_recipe import make_recipe
        from training.evaluation.report import rich_table, terminal
        from training.evaluation.sweep import read_places
        from training.models import load_base
        from training.pipeline import TrainingRun
        from training.pipeline import train as run_training

        if places is not None:
            found = read_places(places)
            own = {name: place.sites for name, place in found.items()} | own
            strengths = {name: place.strength for name, place in found.items()} | strengths
        run = TrainingRun(
            data=specs,
            activations=activations,
            sites=sites,
            out=out,
            recipe=replace(make_recipe(how, seed), strengths=strengths, defaults=defaults, places=own),
            evaluator=o.make_measure(judge, prompts, temperature, max_new_tokens, samples, seed, limit, positions),
            pool=pool or how.profile.pool,
            version=version,
            overwrite=overwrite,
            seed=seed,
            work=work,
            max_rows=rows,
            evaluated=evaluate,
            progress=o.shows_progress(),
        )
        load = partial(load_base, model, revision=revision, device=device, dtype=dtype)
        checkpoint, evaluation = run_training(load, run, o.say)
        if evaluation is not None:
            title = f"{checkpoint.config.name}@{checkpoint.config.version} on test"
            terminal().print(rich_table(evaluation, title))
        typer.echo(f"wrote {out / checkpoint.config.version}")


def _refuse_unused(pool: Pool | None, specs: Sequence[str], *, chosen: bool) -> None:
    """Options that have no effect on stored activations. Raises TrainingError."""
    if pool is not None:
        raise TrainingError("--pool is for an extraction: the activations of --activations are pooled already.")
    if specs and not chosen:
        raise TrainingError("--data beside --activations is to choose answers from: not with --judge or --no-evaluate.")
