"""The command line's options, and what they are turned into."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from training.choices import GateInit, Init, Kernel, Method, Objective, Pool
from training.errors import TrainingError

if TYPE_CHECKING:
    from steering.types import Site
    from training.measure import Measure
    from training.methods.mat_config import MatConfig

Model = Annotated[str, typer.Option(help="Hugging Face id or folder of a causal language model.")]
Revision = Annotated[str | None, typer.Option(help="Revision of the model.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=PATH",
        help="JSON lines with prompt, completion, label; NAME is the attribute of rows without one. Repeat for more.",
    ),
]
More = Annotated[list[str] | None, typer.Argument(metavar="[NAME=PATH]...", help="More data, as after --data.")]
_LAYERS = typer.Option("--layer", metavar="L[,L..]", help="Layers, separated by commas.")
Layers = Annotated[str, _LAYERS]
MaybeLayers = Annotated[str | None, _LAYERS]
SiteKinds = Annotated[
    str, typer.Option("--site", metavar="S[,S..]", help="attn_output, attn_heads, mlp_output, residual.")
]
PoolOption = Annotated[
    Pool,
    typer.Option(
        help="mean: over the positions that produce the answer; tokens: each of them by itself; "
        "first: the last prompt token; last: the last token of the text."
    ),
]
MethodOption = Annotated[
    Method, typer.Option("--method", help="mat: MAT-Steer; caa: difference in means; probe: logistic regression.")
]
PaperOption = Annotated[bool, typer.Option("--paper", help="The paper's settings as defaults of the fit.")]
ObjectiveOption = Annotated[Objective | None, typer.Option("--objective", help="How the losses are reduced.")]
KernelOption = Annotated[Kernel | None, typer.Option("--kernel", help="Of the MMD.")]
Sigma = Annotated[float | None, typer.Option(help="Width of the fixed kernel.")]
InitOption = Annotated[Init | None, typer.Option("--init", help="Where the vectors start.")]
GateInitOption = Annotated[GateInit | None, typer.Option("--gate-init", help="Where the gates start.")]
LossPos = Annotated[float | None, typer.Option("--l-pos", help="Weight of positive preservation.")]
LossSparse = Annotated[float | None, typer.Option("--l-sparse", help="Weight of sparsity.")]
LossOrtho = Annotated[float | None, typer.Option("--l-ortho", help="Weight of orthogonality.")]
BatchSize = Annotated[int | None, typer.Option("--batch", help="Positives, and negatives, of an attribute in a step.")]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Learning rate of Adam.")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the largest side.")]
Joint = Annotated[bool | None, typer.Option(help="Steer each attribute's data with every vector.")]
KeepBest = Annotated[bool | None, typer.Option(help="Keep the epoch with the lowest dev MMD.")]
Patience = Annotated[int | None, typer.Option(help="Stop after so many epochs without a lower dev MMD.")]
Normalize = Annotated[bool | None, typer.Option(help="Keep the activation's norm; default: the method's.")]
Penalty = Annotated[float, typer.Option(min=0, help="On the probe's squared weights.")]
Rows = Annotated[int, typer.Option("--rows", min=1, help="Rows of a batch.")]
Seed = Annotated[int, typer.Option(help="Of the splits, the fit and the sampling.")]
JudgeName = Annotated[
    str | None,
    typer.Option(
        "--judge",
        metavar="MODULE:FUNCTION",
        help="Judges generated answers: (prompt, text) -> {metric: true, false or null}. "
        "Without one, answers are chosen by likelihood.",
    ),
]
Prompts = Annotated[
    Path | None, typer.Option(help='What the judge\'s answers are generated to: JSON lines {"prompt", "split"?}.')
]
Temperature = Annotated[float, typer.Option(help="Of the judged generations; 0 is greedy.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of the judged generations.")]
Samples = Annotated[int, typer.Option(min=1, help="Generations of each prompt in each arm.")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many prompts or questions.")]
PositionsOption = Annotated[str, typer.Option("--positions", help="generated, prompt or all: the steered tokens.")]


@contextmanager
def one_sentence() -> Iterator[None]:
    """Expected failures end a command with one sentence and exit code 2, never a traceback."""
    from steering.errors import SteeringError

    try:
        yield
    except (TrainingError, SteeringError) as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.secho("interrupted: the same command goes on where it stopped", err=True, fg="yellow")
        raise typer.Exit(130) from None


def parse_sites(layers: str, kinds: str) -> tuple["Site", ...]:
    """Every layer with every kind. Raises TrainingError."""
    from steering.types import Site, SiteKind

    try:
        numbers = [int(part) for part in layers.split(",")]
    except ValueError:
        raise TrainingError(f"--layer must be whole numbers separated by commas, got {layers!r}.") from None
    if min(numbers) < 0:
        raise TrainingError(f"--layer must not be negative, got {layers!r}.")
    names = [part.strip() for part in kinds.split(",")]
    for name in names:
        if name not in list(SiteKind):
            raise TrainingError(f"--site must be one of {', '.join(SiteKind)}, got {name!r}.")
    return tuple(dict.fromkeys(Site(number, SiteKind(name)) for number in numbers for name in names))


def parse_places(items: Sequence[str] | None) -> dict[str, tuple["Site", ...]]:
    """ "NAME=LAYER.SITE" items, one name in several of them at several sites. Raises TrainingError."""
    from steering.errors import SteeringError
    from steering.types import Site

    places: dict[str, tuple[Site, ...]] = {}
    for item in items or ():
        name, _, place = item.partition("=")
        try:
            places[name.strip()] = (*places.get(name.strip(), ()), Site.parse(place.strip()))
        except SteeringError as error:
            raise TrainingError(
                f"--at must be NAME=LAYER.SITE, as in truthfulness=12.residual, got {item!r}: {error}."
            ) from None
    return places


def parse_numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers separated by commas. Raises TrainingError."""
    from math import isfinite

    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(isfinite(number) for number in numbers):
        raise TrainingError(f"{option} must be numbers separated by commas, got {text!r}.")
    return numbers


def parse_settings(items: Sequence[str] | None, option: str, *, unnamed: bool = False) -> dict[str, float]:
    """ "NAME=NUMBER" items; with `unnamed` also a bare number, under the name "". Raises TrainingError."""
    settings = {}
    for item in items or ():
        name, found, number = item.rpartition("=")
        if (not name.strip() and found) or not (found or unnamed):
            raise TrainingError(f"{option} must be NAME=NUMBER, got {item!r}.")
        settings[name.strip()] = parse_numbers(number, option)[0]
        if "," in number:
            raise TrainingError(f"{option} must be NAME=NUMBER, got {item!r}.")
    return settings


def mat_config(paper: bool, **given: object) -> "MatConfig":
    """MAT-Steer's settings with those `given` that are not None. Raises FitError."""
    from training.methods.mat_config import PAPER, MatConfig

    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(PAPER if paper else MatConfig(), **changes)


def make_measure(
    judge: str | None,
    prompts: Path | None,
    temperature: float,
    max_new_tokens: int,
    samples: int,
    seed: int,
    limit: int | None,
    positions: str,
) -> "Measure":
    """Raises TrainingError."""
    from steering.types import Positions
    from training.generation import Sampling
    from training.judges import load_judge, load_prompts
    from training.measure import Measure

    if (judge is None) != (prompts is None):
        raise TrainingError("--judge and --prompts belong together: give both or neither.")
    if positions not in list(Positions):
        raise TrainingError(f"--positions must be one of {', '.join(Positions)}, got {positions!r}.")
    return Measure(
        judge=load_judge(judge) if judge else None,
        prompts=tuple(load_prompts(prompts)) if prompts else (),
        sampling=Sampling(temperature, max_new_tokens, samples, seed),
        limit=limit,
        positions=Positions(positions),
    )


def shows_progress() -> bool:
    return sys.stderr.isatty()


def say(text: str) -> None:
    typer.echo(text, err=True)
