"""The command line's options: groups of them that commands share (`steering.option_groups`), and what is made of what
was given. The options of the methods are made from `METHODS`.
"""

import inspect
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from enum import StrEnum
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from steering.option_groups import ChatTemplateFile, ChatTemplateKwargs, OptionGroup, option_parameter
from training.activations import Pool
from training.errors import DataError, TrainingError
from training.methods import METHODS, Method, MethodConfig
from training.methods.base import Option

if TYPE_CHECKING:
    from steering.types import Site
    from training.data.samples import Sample
    from training.evaluation.evaluator import Evaluator
    from training.evaluation.search import Candidates
    from training.methods.fit import Recipe
    from training.models import Base


AUTO = "auto"
_SITES = "attn_output, attn_heads, mlp_output, residual"
_POOLS = (
    "mean: over the positions that produce the answer; tokens: each of them by itself; "
    "first: the last prompt token; last: the last token of the text"
)
_LAYERS = typer.Option("--layer", metavar="L[,L..]", help="Layers and ranges of them, as in 8,10,12-15.")


# Options that commands take by themselves.

Layers = Annotated[str, _LAYERS]
MaybeLayers = Annotated[
    str | None,
    typer.Option(
        "--layer",
        metavar="L[,L..]|auto",
        help="Layers and ranges of them, as in 8,10,12-15; default: auto, one is looked for on dev.",
    ),
]
SiteKinds = Annotated[str, typer.Option("--site", metavar="S[,S..]", help=f"{_SITES}.")]
MaybeSiteKinds = Annotated[
    str | None, typer.Option("--site", metavar="S[,S..]", help=f"{_SITES}; default: the method's.")
]
SearchedSiteKinds = Annotated[
    str | None,
    typer.Option(
        "--site",
        metavar="S[,S..]|auto",
        help=f"{_SITES}; default: the method's where a layer is given, else auto, one is looked for on dev.",
    ),
]
_COUNTS = (
    "'not METRIC' for one that should be low; default: each attribute's mc2, accuracy or preference, or the judged "
    "metrics that are named after an attribute, else all."
)
Goals = Annotated[str | None, typer.Option(metavar="METRIC[,..]", help=f"What counts, {_COUNTS}")]
SearchGoal = Annotated[
    str | None,
    typer.Option(metavar="METRIC[,..]", help=f"What counts where a place is looked for, {_COUNTS}"),
]
PoolOption = Annotated[Pool, typer.Option(help=f"{_POOLS}.")]
MaybePool = Annotated[Pool | None, typer.Option(help=f"{_POOLS}; default: the method's.")]
Report = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.html", help="Where the HTML report goes; default: report.html beside the other results."
    ),
]
Rows = Annotated[int, typer.Option("--rows", min=1, help="Rows of a batch.")]
Seed = Annotated[int, typer.Option(help="Of the splits, the fit and the sampling.")]
Revision = Annotated[str | None, typer.Option(help="Revision of the model.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        envvar="MATSTEER_TRUST_REMOTE_CODE",
        help="Run the Python code that comes with the model; without it a model that needs its own is refused.",
    ),
]
ChatData = Annotated[
    bool,
    typer.Option(
        "--chat",
        help="Prompts are a user's turns in the model's chat template, completions its answers; rows of messages are "
        "so anyway.",
    ),
]


_from_recipe: ContextVar[Mapping[str, Any] | None] = ContextVar("_from_recipe", default=None)


def _use_recipe(context: typer.Context, recipe: str | None) -> str | None:
    from training.recipe_files import use

    with one_sentence():
        _from_recipe.set(None if recipe is None else use(context, recipe))
    return recipe


RecipeOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        is_eager=True,
        callback=_use_recipe,
        help="Options of a published run, or of a .yaml file; options that are given here win.",
    ),
]
CheckpointFolder = Annotated[Path, typer.Option(help="Folder of a checkpoint, with or without its version.")]


@dataclass(frozen=True)
class ModelOptions(OptionGroup):
    """The base model."""

    model: Annotated[
        str,
        typer.Option(help="Causal language model: Hugging Face id or folder, GGUF file, or a model of `matsteer get`."),
    ]
    revision: Revision = None
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto"
    trust_remote_code: TrustRemoteCode = False
    threads: Annotated[int, typer.Option(min=0, max=1024, help="CPU threads, at most; 0: all cores.")] = 0

    def load(self) -> "Base":
        """Raises TrainingError."""
        return self._load(self.dtype)

    def _load(self, dtype: str, **chat: Any) -> "Base":
        import torch

        from training.models import load_base

        if self.threads:
            torch.set_num_threads(self.threads)
        return load_base(
            self.model,
            revision=self.revision,
            device=self.device,
            dtype=dtype,
            trust_remote_code=self.trust_remote_code,
            **chat,
        )


@dataclass(frozen=True)
class ChatModelOptions(ModelOptions):
    """The same, and how conversations become its texts."""

    chat_template: ChatTemplateFile = None
    chat_template_kwargs: ChatTemplateKwargs = None

    def load(self) -> "Base":
        """Raises TrainingError."""
        return self._load(self.dtype, chat_template=self.chat_template, chat_template_kwargs=self.chat_template_kwargs)


@dataclass(frozen=True)
class InspectedModelOptions(ChatModelOptions):
    """The same for the model of a checkpoint, which says what it was trained on."""

    model: Annotated[str, typer.Option(help="Its base model, where it is not found under the name it had.")] = ""

    def of(self, trained_on: str) -> "Base":
        """Raises TrainingError."""
        return replace(self, model=self.model or trained_on).load()


@dataclass(frozen=True)
class BakedModelOptions(ModelOptions):
    """The same for a model that is written again, in the dtype that it is stored in."""

    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto"

    def load(self) -> "Base":
        """Raises TrainingError."""
        from training.models import stored_dtype

        if self.dtype != "auto":
            return self._load(self.dtype)
        return self._load(stored_dtype(self.model, self.revision, trust_remote_code=self.trust_remote_code))


@dataclass(frozen=True)
class DataOptions(OptionGroup):
    """Labelled texts, and how they are split."""

    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="An attribute and its JSON lines of prompt, completion, label, or of messages, label; or a known data "
            "set, as in truthfulqa=PATH, truthfulness=truthfulqa:PATH or truthfulqa=hub:ID (docs/data.md). Repeat for "
            "more.",
        ),
    ] = None
    more: Annotated[list[str] | None, typer.Argument(metavar="[NAME=PATH]...", help="More data, as after --data.")] = (
        None
    )
    seed: Seed = 0
    chat: ChatData = False

    @property
    def specs(self) -> tuple[str, ...]:
        """Every NAME=PATH."""
        return (*(self.data or ()), *(self.more or ()))

    def fitted_on(self, method: Method | None = None, activations: Path | None = None) -> tuple[str, ...]:
        """Every NAME=PATH. Raises DataError where a fit has nothing to start from, or more than its method takes."""
        if method is not None and method.fitted_on and (self.specs or activations):
            unused = "--data" if self.specs else "--activations"
            raise DataError(f"--method {method.name} is fitted on {method.fitted_on} alone: give no {unused}.")
        if self.chat and not self.specs:
            raise DataError("--chat says how --data are read, and no data were given.")
        if not (self.specs or activations or (method and method.fitted_on)):
            raise DataError("No data was given: name at least one --data NAME=PATH.")
        return self.specs

    def split_samples(self) -> "list[Sample]":
        """The samples with their splits. Raises DataError."""
        from training.data import load_data, split_samples

        return split_samples(load_data(self.fitted_on(), chat=self.chat), seed=self.seed)


@dataclass(frozen=True)
class EvaluationOptions(OptionGroup):
    """How steering is measured: a judge's verdicts, or choices by likelihood."""

    judge: Annotated[
        str | None,
        typer.Option(
            "--judge",
            metavar="JUDGE",
            help="Judges generated answers: MODULE:FUNCTION, (prompt, text) -> {metric: true, false or null}; "
            "hf:CLASSIFIER, a text classifier of the hub or in a folder; truth:MODEL or info:MODEL, a judge model of "
            "TruthfulQA; openai:MODEL@URL, a served model. Without one, answers are chosen by likelihood.",
        ),
    ] = None
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='What the judged answers are generated to: JSON lines {"prompt" or "messages", "split"?}; default: '
            "what the data ask, as TruthfulQA's questions, or ToxiGen's statements to go on from."
        ),
    ] = None
    temperature: Annotated[float, typer.Option(help="Of the judged generations; 0 is greedy.")] = 1.0
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of the judged generations.")] = 64
    samples: Annotated[int, typer.Option(min=1, help="Generations of each prompt in each arm.")] = 1
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="At most so many prompts, or questions of each attribute; a fit then takes as many samples of each "
            "side of an attribute, of the same prompts.",
        ),
    ] = None
    prompting: Annotated[
        str,
        typer.Option(
            metavar="primer|plain|chat|harness",
            help="How TruthfulQA, BBQ and ToxiGen are asked without a judge. primer: TruthfulQA after its six "
            "questions and answers, BBQ with its options; plain: without the six; chat: a user's turn in the model's "
            "chat template; harness: word for word as lm-evaluation-harness does. With --chat: chat.",
        ),
    ] = "primer"
    damage: Annotated[
        int,
        typer.Option(
            min=0,
            help="So many questions are answered in every arm without a judge, to see what steering breaks; 0: none, "
            "and a sweep has no limits on the text.",
        ),
    ] = 16
    positions: Annotated[str | None, typer.Option(help="generated, prompt or all: the steered tokens.")] = "generated"
    chat_prompts: Annotated[
        bool | None,
        typer.Option(
            "--chat-prompts/--plain-prompts",
            help="The judge's prompts as a user's turns in the model's chat template, or as they are; default: as "
            "turns, where the model has a template.",
        ),
    ] = None

    def evaluator(self, seed: int) -> "Evaluator":
        """Raises TrainingError."""
        from steering.types import Positions
        from training.data.samples import Form
        from training.evaluation.evaluator import Evaluator
        from training.evaluation.generation import Sampling
        from training.evaluation.judged import load_prompts
        from training.evaluation.judges import load_judge
        from training.evaluation.tasks import Prompting

        if self.judge is None and self.prompts is not None:
            raise TrainingError("--prompts are what a --judge's answers are generated to, and there is none.")
        if self.chat_prompts is not None and self.judge is None:
            chosen = "--chat-prompts" if self.chat_prompts else "--plain-prompts"
            raise TrainingError(f"{chosen} is for the prompts of a --judge, and there is none.")
        if self.positions not in list(Positions):
            raise TrainingError(f"--positions must be one of {', '.join(Positions)}, got {self.positions!r}.")
        if self.prompting not in list(Prompting):
            raise TrainingError(f"--prompting must be one of {', '.join(Prompting)}, got {self.prompting!r}.")
        return Evaluator(
            prompting=Prompting(self.prompting),
            damage=self.damage,
            judge=load_judge(self.judge) if self.judge else None,
            prompts=tuple(load_prompts(self.prompts)) if self.prompts else (),
            sampling=Sampling(self.temperature, self.max_new_tokens, self.samples, seed),
            limit=self.limit,
            positions=Positions(self.positions),
            form=None if self.chat_prompts is None else Form.CHAT if self.chat_prompts else Form.PLAIN,
        )


@dataclass(frozen=True)
class CheckpointEvaluationOptions(EvaluationOptions):
    """The same for a checkpoint, whose own positions count where none are given."""

    positions: Annotated[str | None, typer.Option(help="Default: the checkpoint's own.")] = None

    def at(self, positions: str) -> Self:
        """With the checkpoint's positions where none were given."""
        return replace(self, positions=self.positions or positions)


@dataclass(frozen=True)
class MethodOptions(OptionGroup):
    """The method, and what was given for the options of all methods; None where nothing was."""

    method: Method
    normalize: bool | None
    given: Mapping[str, Any]
    """Field name or preset -> what was given."""

    @classmethod
    def parameters(cls) -> list[inspect.Parameter]:
        names = StrEnum("MethodName", {name: name for name in METHODS})  # type: ignore[misc]
        summaries = "; ".join(f"{method.name}: {method.summary}" for method in METHODS.values())
        chosen = typer.Option("--method", rich_help_panel="Method", help=f"{summaries}.")
        norm = typer.Option(
            rich_help_panel="Method", help="Keep the activation's norm; default: the method's. Not for ablations."
        )
        return [
            option_parameter("method", Annotated[names, chosen], next(iter(names))),
            option_parameter("normalize", Annotated[bool | None, norm], None),
            *_preset_parameters(),
            *_setting_parameters(),
        ]

    @classmethod
    def take(cls, given: dict[str, Any]) -> Self:
        found = {parameter.name: given.pop(parameter.name) for parameter in cls.parameters()}
        method, normalize = METHODS[found.pop("method")], found.pop("normalize")
        for name in _overridden(method, found):
            found[name] = None
        return cls(method, normalize, found)

    def config(self, seed: int) -> MethodConfig:
        """The method's settings. Raises TrainingError for an option that the method does not use or cannot take."""
        if self.normalize is not None and self.method.keep_norm is None:
            self._refuse("normalize", [method.name for method in METHODS.values() if method.keep_norm is not None])
        for name, value in self.given.items():
            if value is None or value == [] or (name in _presets() and not value):
                continue
            if name not in self.method.presets and name not in self.method.options():
                self._refuse(name, users_of(name))
            if isinstance(value, float) and not isfinite(value):
                raise TrainingError(f"{_flag(name)} must be a finite number, got {value}.")
        return self.method.configure(self.given, seed=seed)

    def recipe(self, seed: int) -> "Recipe":
        """Raises TrainingError."""
        from training.methods.fit import Recipe

        return Recipe(self.config(seed), normalize=self.normalize)

    def check_sweep(self) -> None:
        """Raises TrainingError for an option that names layers: a sweep fits one place at a time."""
        for name in (name for method in METHODS.values() for name in method.layer_options):
            if self.given.get(name):
                raise TrainingError(f"{_flag(name)} is for `matsteer train`: a sweep fits one place at a time.")

    def _refuse(self, name: str, users: Sequence[str]) -> None:
        raise TrainingError(f"{_flag(name)} is for --method {' or '.join(users)}, not for {self.method.name}.")


def _overridden(method: Method, given: Mapping[str, Any]) -> list[str]:
    """What a recipe has set that does not go with the method, or with the preset, of the command line."""
    set_by = {name for name, value in (_from_recipe.get() or {}).items() if name in given and given[name] == value}
    chosen = any(given[name] for name in _presets() if name not in set_by)
    return [name for name in set_by if method.name not in users_of(name) or (chosen and name in _presets())]


def users_of(name: str) -> list[str]:
    """The methods that use an option or a preset."""
    return [method.name for method in METHODS.values() if name in method.presets or name in method.options()]


def _presets() -> dict[str, Method]:
    return {name: method for method in METHODS.values() for name in method.presets}


def _preset_parameters() -> Iterator[inspect.Parameter]:
    for name, method in _presets().items():
        help, panel = method.presets[name].help, method.panel
        yield option_parameter(
            name, Annotated[bool, typer.Option(_flag(name), help=help, rich_help_panel=panel)], False
        )


def _setting_parameters() -> Iterator[inspect.Parameter]:
    """One option for all settings of one name; its help says which methods use it, unless its panel does."""
    names = dict.fromkeys(name for method in METHODS.values() for name in method.options())
    for name in names:
        users = [METHODS[user] for user in users_of(name)]
        (field, first), *_ = found = [method.options()[name] for method in users]
        help = first.help
        if users[0].panel == Method.panel:
            helps: dict[str, list[str]] = {}
            for method, (_, spec) in zip(users, found, strict=True):
                helps.setdefault(spec.help, []).append(method.name)
            help = " ".join(f"{', '.join(methods)}: {text}" for text, methods in helps.items())
        yield option_parameter(name, _annotation(first, field.type, help, users[0].panel), None)


def _annotation(spec: Option, type: Any, help: str, panel: str) -> Any:
    info = typer.Option(help=help, metavar=spec.metavar, min=spec.min, rich_help_panel=panel)
    return Annotated[(spec.type or type) | None, info]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# What is given as text.


def parse_sites(layers: str, kinds: str) -> tuple["Site", ...]:
    """Every layer with every kind. Raises TrainingError."""
    from steering.types import Site, SiteKind

    numbers = [number for part in layers.split(",") for number in _layer_range(part.strip(), layers)]
    names = [part.strip() for part in kinds.split(",")]
    for name in names:
        if name not in list(SiteKind):
            raise TrainingError(f"--site must be one of {', '.join(SiteKind)}, got {name!r}.")
    return tuple(dict.fromkeys(Site(number, SiteKind(name)) for number in numbers for name in names))


def parse_goal(text: str | None) -> tuple[str, ...]:
    """Metrics separated by commas. Raises TrainingError."""
    found = tuple(part.strip() for part in text.split(",")) if text is not None else ()
    if not all(found):
        raise TrainingError(f"--goal must be metrics separated by commas, got {text!r}.")
    return found


def parse_search(layers: str | None, kinds: str | None) -> "Candidates":
    """Where to look for a place; "auto" and None: everywhere. Raises TrainingError."""
    from training.evaluation.search import Candidates

    sites = parse_sites("0" if layers in (None, AUTO) else layers, "residual" if kinds in (None, AUTO) else kinds)
    return Candidates(
        None if layers in (None, AUTO) else tuple(dict.fromkeys(site.layer for site in sites)),
        None if kinds in (None, AUTO) else tuple(dict.fromkeys(site.kind for site in sites)),
    )


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


# How a command speaks.


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


def shows_progress() -> bool:
    return sys.stderr.isatty()


def say(text: str) -> None:
    typer.echo(text, err=True)
