"""`matsteer data | extract | train | evaluate | sweep | inspect | import-features | bake`.

torch is imported by a command that runs, never by --help: heavy imports are inside the functions.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steering.option_groups import with_option_groups
from training import options as o
from training.activations import Pool
from training.errors import DataError, TrainingError
from training.methods.base import parse_numbers, parse_settings

if TYPE_CHECKING:
    from steering.types import Site
    from training.evaluation.search import Candidates
    from training.methods.fit import Recipe

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Train and evaluate steering.")


@app.callback()
def main() -> None:
    """Train and evaluate steering."""


@app.command("data")
def show_data(
    data: Annotated[list[str], typer.Argument(metavar="NAME=PATH", help="As after --data.")],
    seed: o.Seed = 0,
    chat: o.ChatData = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the samples there, as JSON lines of the plain form with their splits."
        ),
    ] = None,
) -> None:
    """Show what data hold: samples and groups of each attribute and split, and an example of each side.

    Example: matsteer data truthfulqa=TruthfulQA.csv civility=tone.jsonl
    """
    with o.one_sentence():
        from training.data import load_data, split_samples
        from training.data.samples import dump_samples
        from training.data.summary import count_samples, counts_table, examples_table, missing_sides
        from training.evaluation.report import terminal

        samples = split_samples(load_data(data, chat=chat), seed=seed)
        if out is not None:
            out.write_text(dump_samples(samples), encoding="utf-8")
        terminal().print(counts_table(count_samples(samples)), examples_table(samples))
        for sentence in missing_sides(samples):
            o.say(f"warning: {sentence}")


@app.command()
@with_option_groups
def extract(
    base: o.ChatModelOptions,
    out: Annotated[Path, typer.Option(help="Folder for the shards and, last, the manifest.")],
    layer: o.Layers,
    texts: o.DataOptions,
    site: o.SiteKinds = "attn_output",
    pool: o.PoolOption = Pool.MEAN,
    rows: o.Rows = 64,
) -> None:
    """Store a model's activations on labelled texts as safetensors shards; an interrupted run goes on.

    Example: matsteer extract --model Qwen/Qwen2.5-0.5B --data truthfulness=facts.jsonl --layer 10,12
    --site residual --out runs/activations

    On several GPUs or machines: accelerate launch --no_python matsteer extract ...; on CPUs:
    torchrun --no-python matsteer extract ...
    """
    with o.one_sentence():
        sites = o.parse_sites(layer, site)
        texts.fitted_on()
        from training.activations.extraction import extract_to
        from training.distributed import joined

        samples = texts.split_samples()
        loaded = base.load()
        count = extract_to(
            out, loaded.model, loaded.tokenizer, samples, sites, chat=loaded.chat, pool=pool, max_rows=rows,
            progress=o.shows_progress(),
        )  # fmt: skip
        if joined().main:
            typer.echo(f"{count} activations at {', '.join(map(str, sites))} in {out}")


@app.command()
@with_option_groups
def train(
    base: o.ChatModelOptions,
    out: Annotated[Path, typer.Option(help="checkpoints/NAME; the version becomes a folder in it.")],
    texts: o.DataOptions,
    measured: o.EvaluationOptions,
    how: o.MethodOptions,
    recipe: o.RecipeOption = None,
    layer: o.MaybeLayers = None,
    site: o.SearchedSiteKinds = None,
    goal: o.SearchGoal = None,
    at: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=LAYER.SITE", help="A place of its own for an attribute; repeat for more."),
    ] = None,
    places: Annotated[
        Path | None, typer.Option(help="Places and strengths that `sweep --alone` wrote; --at, --strength go before.")
    ] = None,
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
    report: o.Report = None,
    rows: o.Rows = 64,
) -> None:
    """Extract, fit, evaluate on test, and write the checkpoint with its model card: one command.

    Without --layer a place is looked for on dev, among layers and sites, by what steering there does to the scores.

    Example: matsteer train --model Qwen/Qwen2.5-0.5B --data truthfulness=facts.jsonl --data civility=tone.jsonl
    --method mat --out checkpoints/mine
    """
    with o.one_sentence():
        settings, own = how.recipe(texts.seed), o.parse_places(at)
        specs = texts.fitted_on(how.method, activations)
        sites, search = _sites(settings, layer, site, elsewhere=bool(own) or places is not None)
        if goal is not None and search is None:
            raise TrainingError("--goal is for a place that is looked for: not with a --layer, --at or --places.")
        if activations is not None:
            _refuse_unused(pool, specs, chosen=evaluate and measured.prompts is None)
        strengths, defaults = parse_settings(strength, "--strength", unnamed=True), parse_settings(set_, "--set")
        from training.evaluation.report import show, terminal
        from training.evaluation.sweep_results import read_places
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
            recipe=replace(settings, strengths=strengths, defaults=defaults, places=own),
            evaluator=measured.evaluator(texts.seed),
            pool=pool or how.method.pool,
            version=version,
            overwrite=overwrite,
            seed=texts.seed,
            chat=texts.chat,
            work=work,
            max_rows=rows,
            evaluated=evaluate,
            report=report,
            search=search,
            goal=o.parse_goal(goal),
            progress=o.shows_progress(),
        )
        checkpoint, evaluation = run_training(base.load, run, o.say)
        if evaluation is not None:
            title = f"{checkpoint.config.name}@{checkpoint.config.version} on test"
            terminal().print(show(evaluation, title))
        typer.echo(f"wrote {out / checkpoint.config.version}")


_POOLED = "--pool is for an extraction: the activations of --activations are pooled already."


def _sites(
    recipe: "Recipe", layer: str | None, site: str | None, *, elsewhere: bool
) -> tuple[tuple["Site", ...], "Candidates | None"]:
    """The sites that were given, or where to look for one; `elsewhere`: attributes have places of their own. Raises
    TrainingError."""
    method, named = recipe.method, recipe.config.named_sites()
    wanted = o.AUTO in (layer, site)
    if layer is not None and not wanted:
        return o.parse_sites(layer, site or method.site), None
    if (named or elsewhere) and not wanted:
        return named, None
    if not method.one_place:
        raise TrainingError(f"--layer is missing: for --method {method.name} no place is looked for.")
    return (), o.parse_search(layer, site)


def _refuse_unused(pool: Pool | None, specs: Sequence[str], *, chosen: bool) -> None:
    """Options that have no effect on stored activations. Raises TrainingError."""
    if pool is not None:
        raise TrainingError(_POOLED)
    if specs and not chosen:
        raise TrainingError("--data beside --activations is to be evaluated on: not with --prompts or --no-evaluate.")


@app.command()
@with_option_groups
def evaluate(
    base: o.ChatModelOptions,
    checkpoint: o.CheckpointFolder,
    texts: o.DataOptions,
    measured: o.CheckpointEvaluationOptions,
    baseline: Annotated[bool, typer.Option(help="Also without steering: what the differences are to.")] = True,
    alone: Annotated[bool, typer.Option("--alone", help="Also each attribute by itself.")] = False,
    multipliers: Annotated[
        str | None, typer.Option(metavar="X[,X..]", help="Factors on the default multipliers; default: 1.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=X", help="One more arm with exactly these multipliers.")
    ] = None,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "test",
    out: Annotated[Path | None, typer.Option(help="Default: evaluation/ in the checkpoint's folder.")] = None,
    report: o.Report = None,
    rows: o.Rows = 128,
) -> None:
    """Steered and unsteered side by side on the test split: tables, JSON, what was measured of every question, an HTML
    report, a plot.

    An interrupted evaluation goes on where it stopped.

    Example: matsteer evaluate --model Qwen/Qwen2.5-0.5B --checkpoint checkpoints/mine
    --data truthfulness=facts.jsonl --baseline
    """
    with o.one_sentence():
        extra, factors = parse_settings(set_, "--set"), parse_numbers(multipliers or "1", "--multipliers")
        from training.data import Split, load_data
        from training.data.splits import split_as_trained
        from training.evaluation.evaluator import EXAMPLES, compare, open_checkpoint
        from training.evaluation.html_report import REPORT, checkpoint_report
        from training.evaluation.report import show, store, terminal
        from training.files import write_bytes

        if split not in list(Split):
            raise TrainingError(f"--split must be train, dev or test, got {split!r}.")
        loaded, folder = open_checkpoint(checkpoint)
        evaluator = measured.at(loaded.config.positions.value).evaluator(texts.seed)
        evaluator = replace(evaluator, max_rows=rows, examples=EXAMPLES)
        if not texts.specs and measured.prompts is None:
            raise DataError("--data is needed: answers to choose from, or questions to a --judge without --prompts.")
        samples = []
        if texts.specs:
            samples = split_as_trained(load_data(texts.specs, chat=texts.chat), folder, seed=texts.seed)
        elif texts.chat:
            raise DataError("--chat says how --data are read, and no data were given.")
        if strange := sorted({sample.attribute for sample in samples} - set(loaded.attributes)):
            o.say(
                f"note: the checkpoint does not steer {', '.join(strange)}; it steers {', '.join(loaded.attributes)}."
            )
        model = base.load()
        if note := evaluator.other_form(model, samples, Split(split), loaded.config.training.get("form")):
            o.say(f"note: {note}")
        evaluation, generated = compare(
            model, loaded, samples, evaluator, Split(split), factors=factors, baseline=baseline, alone=alone,
            extra=extra, progress=o.shows_progress(), kept=(out or folder / "evaluation") / "evaluation.partial",
        )  # fmt: skip
        title, results = f"{loaded.config.name}@{loaded.config.version} on {split}", out or folder / "evaluation"
        terminal().print(show(evaluation, title))
        page = report or results / REPORT
        write_bytes(page, checkpoint_report(evaluation, title, loaded).encode())
        for path in (*store(evaluation, results, texts=generated), page):
            typer.echo(f"wrote {path}")


@app.command()
@with_option_groups
def sweep(
    base: o.ChatModelOptions,
    out: Annotated[Path, typer.Option(help="Folder for the results; an interrupted sweep goes on there.")],
    layer: o.Layers,
    texts: o.DataOptions,
    measured: o.EvaluationOptions,
    how: o.MethodOptions,
    site: o.MaybeSiteKinds = None,
    multipliers: Annotated[str, typer.Option(metavar="X[,X..]", help="What is tried.")] = "0.5,1,2",
    alone: Annotated[
        bool, typer.Option("--alone", help="Each attribute by itself: finds a place for each, then strengths together.")
    ] = False,
    sites_each: Annotated[int, typer.Option(min=1, help="With --alone: so many places for an attribute.")] = 1,
    apart: Annotated[bool, typer.Option("--apart", help="With --alone: no two attributes at one place.")] = False,
    goal: o.Goals = None,
    max_perplexity_ratio: Annotated[float, typer.Option(help="Settings beyond it rank last.")] = 1.5,
    max_repetition: Annotated[
        float, typer.Option(min=0, help="The same for rep-4, beyond the unsteered model's: texts that loop.")
    ] = 0.1,
    max_empty: Annotated[
        float, typer.Option(min=0, help="The same for the share of empty answers, beyond the unsteered model's.")
    ] = 0.1,
    max_kl: Annotated[float, typer.Option(min=0, help="The same for KL on neutral text, in nats a token.")] = 1.0,
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
    activations: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Fit what `extract` wrote there, and extract nothing.")
    ] = None,
    pool: o.MaybePool = None,
    report: o.Report = None,
    rows: o.Rows = 64,
) -> None:
    """Fit and measure layers x sites x multipliers on dev: a table, an HTML report, a plot, the best written down.

    With --activations the fits take what `extract` wrote, and --data are what is measured on, in the same splits.

    Example: matsteer sweep --model Qwen/Qwen2.5-0.5B --data truthfulness=facts.jsonl --layer 8,10,12
    --site attn_output,residual --multipliers 0.5,1,2 --out runs/sweep
    """
    with o.one_sentence():
        sites, specs = o.parse_sites(layer, site or how.method.site), texts.fitted_on(how.method, activations)
        how.check_sweep()
        if activations is not None and pool is not None:
            raise TrainingError(_POOLED)
        factors, least = parse_numbers(multipliers, "--multipliers"), parse_settings(keep, "--keep")
        from training.data.samples import Split
        from training.evaluation.html_report import REPORT, sweep_report
        from training.evaluation.report import sweep_table, terminal
        from training.evaluation.sweep import Sweep
        from training.evaluation.sweep_results import Goal, check_goal
        from training.files import write_bytes
        from training.pipeline import TrainingRun, activations_for, fitted_on, fitted_texts, prepare_data, texts_for

        evaluator = measured.evaluator(texts.seed)
        evaluator = replace(evaluator, max_rows=max(rows, evaluator.max_rows))
        recipe = how.recipe(texts.seed)
        shown = o.shows_progress()
        run = TrainingRun(
            data=specs, activations=activations, sites=sites, out=out, recipe=recipe, evaluator=evaluator,
            pool=pool or how.method.pool, seed=texts.seed, chat=texts.chat, work=out, max_rows=rows, progress=shown,
        )  # fmt: skip
        samples = prepare_data(run)
        asked = texts_for(samples, run)
        names = tuple(dict.fromkeys(sample.attribute for sample in samples))
        wanted = Goal(
            o.parse_goal(goal), max_perplexity_ratio, max_repetition, max_empty, max_kl, least, max_side_effect,
            tolerance, names,
        )  # fmt: skip
        check_goal(wanted, evaluator)
        evaluator.check(asked, Split.DEV, names if alone else ())
        loaded = base.load()
        used = fitted_on(samples, run)
        found = activations_for(loaded, samples, used, run)
        swept_by = Sweep(
            loaded, asked, found, recipe, factors, evaluator, out, wanted,
            fitted_texts=fitted_texts(samples, used, run), progress=shown, say=o.say,
        )  # fmt: skip
        swept = swept_by.alone(sites_each, apart=apart) if alone else swept_by.together()
        terminal().print(sweep_table(swept))
        remarks = list(swept.remarks(wanted))
        for remark in remarks:
            o.say(remark)
        write_bytes(report or out / REPORT, sweep_report(swept, f"sweep of {loaded.id}", remarks).encode())
        if alone:
            chosen = ", ".join(
                f"{name} at {' and '.join(map(str, place.sites))} times {place.strength:g}"
                for name, place in swept.places.items()
            )
            typer.echo(f"best together: {chosen}; now: matsteer train --places {out / 'places.json'}")
        else:
            best = swept.points[0]
            typer.echo(f"best: --layer {best.layer} --site {best.site}, multiplier {best.multiplier:g}; wrote {out}")


@app.command("inspect")
@with_option_groups
def inspect_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a checkpoint, with or without its version.")],
    base: o.InspectedModelOptions,
    texts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="On which gates are shown and norms taken: a text a line, or JSON lines (.jsonl) of text, prompt or "
            "messages; default: eight neutral ones.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=100, help="Tokens that are named of each vector.")] = 8,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all of it there, as a page.")] = None,
) -> None:
    """Look into a checkpoint: what every vector promotes (logit lens), norms, cosines, what its gates fire on.

    Example: matsteer inspect checkpoints/tone --texts questions.txt --html tone.html
    """
    with o.one_sentence():
        from training.evaluation.evaluator import open_checkpoint
        from training.evaluation.neutral import TEXTS
        from training.evaluation.report import terminal
        from training.inspection import inspect, read_texts
        from training.inspection_report import render_page, show_inspection

        loaded, _ = open_checkpoint(checkpoint)
        said = read_texts(texts) if texts else list(TEXTS)
        found = inspect(base.of(loaded.config.base_model.id), loaded, said, top=top)
        terminal().print(show_inspection(found))
        if html is not None:
            html.write_text(render_page(found), encoding="utf-8")
            typer.echo(f"wrote {html}")


@app.command()
def import_features(
    prefix: Annotated[str, typer.Argument(help="PREFIX_labels.npy, PREFIX_head_wise.npy, PREFIX_layer_wise.npy.")],
    model: Annotated[str, typer.Option(help="Hugging Face id or folder of their model; only the config is read.")],
    attribute: Annotated[str, typer.Option(metavar="NAME", help="What label 1 is.")],
    layer: o.Layers,
    out: Annotated[Path, typer.Option(help="Folder for the shard and, last, the manifest.")],
    site: o.SiteKinds = "attn_heads",
    groups: Annotated[
        str,
        typer.Option(
            metavar="answers|rows|FILE.npy",
            help="Rows of one question stay in one split. answers: a right answer after a wrong one begins the next "
            "question; rows: each row is one; or a file with a group for each row.",
        ),
    ] = "answers",
    seed: o.Seed = 0,
    revision: o.Revision = None,
    trust_remote_code: o.TrustRemoteCode = False,
) -> None:
    """Turn features of honest_llama or MAT-Steer into the activations that `extract` writes.

    Example: matsteer import-features features/llama_7B_tqa_mc2 --model huggyllama/llama-7b --attribute truthfulness
    --layer 10-14 --site attn_heads --out runs/activations
    """
    with o.one_sentence():
        sites = o.parse_sites(layer, site)
        from training.activations.features import GroupBy, Shape, read_features
        from training.activations.store import save_activations

        by = GroupBy(groups) if groups in list(GroupBy) else Path(groups)
        shape = Shape.of(model, revision, trust_remote_code=trust_remote_code)
        found = read_features(prefix, shape, sites, attribute, by, seed=seed)
        save_activations(found, out)
        count = len(set(found.groups))
        typer.echo(f"{len(found)} activations of {count} groups at {', '.join(map(str, sites))} in {out}")


@app.command()
@with_option_groups
def bake(
    base: o.BakedModelOptions,
    checkpoint: o.CheckpointFolder,
    out: Annotated[Path, typer.Option(help="The new folder of the baked model.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=X", help="A multiplier; repeat it. Default: the checkpoint's own."),
    ] = None,
) -> None:
    """Write constant steering vectors into a copy of the model, as biases: a folder that needs no code of ours.

    A bias acts at every position, the prompt's included: the copy equals the model steered at positions `all`.

    Example: matsteer bake --model meta-llama/Llama-3.1-8B --checkpoint checkpoints/honesty --set honesty=1.5
    --out models/honest-llama
    """
    with o.one_sentence():
        attributes = parse_settings(set_, "--set") if set_ else None
        from training.bake import bake as write_baked
        from training.evaluation.evaluator import open_checkpoint

        loaded, _ = open_checkpoint(checkpoint)
        baked = write_baked(base.load(), loaded, out, attributes)
        typer.echo(
            f"wrote {out}: biases for {', '.join(map(str, baked.sites))}, at every position; its logits differ from "
            f"the run-time hook's by {baked.apart:.2g} of what steering changes"
        )
