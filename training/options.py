"""The command line's options, and what they are turned into."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from training.activations import Pool
from training.choices import Method
from training.errors import DataError, TrainingError

if TYPE_CHECKING:
    from steering.types import Site
    from training.evaluation.evaluator import Evaluator

Model = Annotated[str, typer.Option(help="Hugging Face id or folder of a causal language model.")]
Revision = Annotated[str | None, typer.Option(help="Revision of the model.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=PATH",
        help="An attribute and its JSON lines of prompt, completion, label; or a known data set, as in "
        "truthfulqa=PATH, truthfulness=truthfulqa:PATH or truthfulqa=hub:ID (docs/data.md). Repeat for more.",
    ),
]
More = Annotated[list[str] | None, typer.Argument(metavar="[NAME=PATH]...", help="More data, as after --data.")]
_LAYERS = typer.Option("--layer", metavar="L[,L..]", help="Layers and ranges of them, as in 8,10,12-15.")
Layers = Annotated[str, _LAYERS]
MaybeLayers = Annotated[str | None, _LAYERS]
_SITES = "attn_output, attn_heads, mlp_output, residual"
SiteKinds = Annotated[str, typer.Option("--site", metavar="S[,S..]", help=f"{_SITES}.")]
MaybeSiteKinds = Annotated[
    str | None, typer.Option("--site", metavar="S[,S..]", help=f"{_SITES}; default: the method's.")
]
_POOLS = (
    "mean: over the positions that produce the answer; tokens: each of them by itself; "
    "first: the last prompt token; last: the last token of the text"
)
PoolOption = Annotated[Pool, typer.Option(help=f"{_POOLS}.")]
MaybePool = Annotated[Pool | None, typer.Option(help=f"{_POOLS}; default: the method's.")]
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
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many prompts, or questions of each attribute.")]
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
    except OSError as error:
        if error.filename is None:
            raise
        typer.secho(f"error: {error.filename} cannot be used: {error.strerror}.", err=True, fg="red")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.secho("interrupted: the same command goes on where it stopped", err=True, fg="yellow")
        raise typer.Exit(130) from None


def data_specs(
    data: Sequence[str] | None,
    more: Sequence[str] | None,
    method: Method | None = None,
    activations: Path | None = None,
) -> tuple[str, ...]:
    """Every NAME=PATH. Raises DataError where a fit has nothing to start from, or more than its method takes."""
    specs = (*(data or ()), *(more or ()))
    if method is Method.ACTADD and (specs or activations):
        unused = "--data" if specs else "--activations"
        raise DataError(f"--method actadd is fitted on its --pair alone: give no {unused}.")
    if not (specs or activations or method is Method.ACTADD):
        raise DataError("No data was given: name at least one --data NAME=PATH.")
    return specs


def parse_sites(layers: str, kinds: str) -> tuple["Site", ...]:
    """Every layer with every kind. Raises TrainingError."""
    from steering.types import Site, SiteKind

    numbers = [number for part in layers.split(",") for number in _layer_range(part.strip(), layers)]
    names = [part.strip() for part in kinds.split(",")]
    for name in names:
        if name not in list(SiteKind):
            raise TrainingError(f"--site must be one of {', '.join(SiteKind)}, got {name!r}.")
    return tuple(dict.fromkeys(Site(number, SiteKind(name)) for number in numbers for name in names))


def _layer_range(part: str, given: str) -> range:
    """ "12" or "12-15"."""
    ends = re.fullmatch(r"(\d+)(?:-(\d+))?", part, re.ASCII)
    if ends is None:
        if re.fullmatch(r"-\d+", part, re.ASCII):
            raise TrainingError(f"--layer must not be negative, got {given!r}.")
        raise TrainingError(f"--layer must be whole numbers or ranges separated by commas, got {given!r}.")
    first, last = int(ends[1]), int(ends[2] or ends[1])
    if last < first:
        raise TrainingError(f"--layer must count upwards, as in 12-15, got {part!r}.")
    return range(first, last + 1)


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
        raise TrainingError(f"{option} must be finite numbers separated by commas, got {text!r}.")
    return numbers


def parse_settings(items: Sequence[str] | None, option: str, *, unnamed: bool = False) -> dict[str, float]:
    """ "NAME=NUMBER" items; with `unnamed` also a bare number, under the name "". Raises TrainingError."""
    settings = {}
    for item in items or ():
        name, found, number = item.rpartition("=")
        if (not name.strip() and found) or not (found or unnamed):
            raise TrainingError(f"{option} must be NAME=NUMBER, got {item!r}.")
        try:
            (settings[name.strip()],) = parse_numbers(number, option)
        except ValueError:  # no number, or several
            raise TrainingError(f"{option} must be NAME=NUMBER with one finite number, got {item!r}.") from None
    return settings


def make_measure(
    judge: str | None,
    prompts: Path | None,
    temperature: float,
    max_new_tokens: int,
    samples: int,
    seed: int,
    limit: int | None,
    positions: str,
) -> "Evaluator":
    """Raises TrainingError."""
    from steering.types import Positions
    from training.evaluation.evaluator import Evaluator
    from training.evaluation.generation import Sampling, load_judge, load_prompts

    if (judge is None) != (prompts is None):
        raise TrainingError("--judge and --prompts belong together: give both or neither.")
    if positions not in list(Positions):
        raise TrainingError(f"--positions must be one of {', '.join(Positions)}, got {positions!r}.")
    return Evaluator(
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
