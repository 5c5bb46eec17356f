"""The options that say how columns are fitted: fields of one dataclass, which `train` and `sweep` both take."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from training.choices import (
    PROFILES,
    Direction,
    Fill,
    GateInit,
    Init,
    Kernel,
    Method,
    Objective,
    Profile,
    Scale,
)
from training.errors import TrainingError
from training.options import parse_sites

if TYPE_CHECKING:
    from steering.types import Site

USED_BY = {
    "normalize": (Method.MAT, Method.CAA, Method.ACTADD, Method.PROBE, Method.ITI, Method.CONTROL),
    "penalty": (Method.PROBE, Method.ITI, Method.HEAD_ABLATION),
    "direction": (Method.ITI, Method.CONTROL),
    "top": (Method.ITI, Method.HEAD_ABLATION),
    "heads": (Method.HEAD_ABLATION,),
    "fill": (Method.HEAD_ABLATION,),
    "source": (Method.ABLATION,),
    "scale": (Method.CONTROL,),
    "coefficient": (Method.CONTROL,),
    "pair": (Method.ACTADD,),
    "attribute": (Method.ACTADD,),
}
"""Every option that is not listed is MAT-Steer's alone."""


def _mat(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="MAT-Steer")


def _other(help: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="Other methods", **settings)


@dataclass(frozen=True)
class MethodOptions:
    """What was given; None where nothing was."""

    method: Annotated[
        Method,
        typer.Option(
            rich_help_panel="Method",
            help="mat: MAT-Steer; caa: difference in means; actadd: difference of two prompts; probe: logistic "
            "regression; iti: inference-time intervention; ablation: directional ablation; head-ablation: heads put "
            "out zero or their mean; control: control vector over many layers.",
        ),
    ] = Method.MAT
    normalize: Annotated[
        bool | None,
        typer.Option(
            rich_help_panel="Method", help="Keep the activation's norm; default: the method's. Not for ablations."
        ),
    ] = None

    paper: Annotated[bool, _mat("The paper's settings as defaults of the fit.", "--paper")] = False
    objective: Annotated[Objective | None, _mat("How the losses are reduced.")] = None
    kernel: Annotated[Kernel | None, _mat("Of the MMD.")] = None
    sigma: Annotated[float | None, _mat("Width of the fixed kernel.")] = None
    init: Annotated[Init | None, _mat("Where the vectors start.")] = None
    gate_init: Annotated[GateInit | None, _mat("Where the gates start.")] = None
    l_pos: Annotated[float | None, _mat("Weight of positive preservation.")] = None
    l_sparse: Annotated[float | None, _mat("Weight of sparsity.")] = None
    l_ortho: Annotated[float | None, _mat("Weight of orthogonality.")] = None
    batch: Annotated[int | None, _mat("Positives, and negatives, of an attribute in a step.")] = None
    lr: Annotated[float | None, _mat("Learning rate of Adam.")] = None
    epochs: Annotated[int | None, _mat("Passes over the largest side.")] = None
    joint: Annotated[bool | None, _mat("Steer each attribute's data with every vector.")] = None
    keep_best: Annotated[bool | None, _mat("Keep the epoch with the lowest dev MMD.")] = None
    patience: Annotated[int | None, _mat("Stop after so many epochs without a lower dev MMD.")] = None

    penalty: Annotated[
        float | None, _other("probe, iti, head-ablation: on the probes' squared weights; default: 1.", min=0)
    ] = None
    top: Annotated[
        int | None, _other("iti, head-ablation: so many heads, the best probed first; default of iti: 48.", min=1)
    ] = None
    direction: Annotated[Direction | None, _other("iti: mean or probe; control: mean or pca; default: mean.")] = None
    heads: Annotated[
        str | None, _other("head-ablation: these heads, whatever their probes.", metavar="LAYER.HEAD[,..]")
    ] = None
    fill: Annotated[Fill | None, _other("head-ablation: what the heads put out; default: zero.")] = None
    source: Annotated[
        str | None, _other("ablation: where the direction is measured that is removed at every site.",
                           metavar="LAYER.SITE")
    ] = None  # fmt: skip
    scale: Annotated[
        Scale | None, _other("control: length at coefficient 1: how far the sides lie apart, 1, or the mean norm.")
    ] = None
    coefficient: Annotated[
        list[str] | None, _other("control: factor on a layer's vector; default: 1. Repeat for more.",
                                 metavar="LAYER=X")
    ] = None  # fmt: skip
    pair: Annotated[
        tuple[str, str] | None, _other("actadd: the prompt to steer towards and the one away.", metavar="TEXT TEXT")
    ] = None
    attribute: Annotated[
        str | None, _other("actadd: what requests call it; default: the first prompt.", metavar="NAME")
    ] = None

    @property
    def profile(self) -> Profile:
        return PROFILES[self.method]

    def check(self) -> None:
        """Raises TrainingError for an option that the method does not use."""
        for field in fields(self):
            users = USED_BY.get(field.name, (Method.MAT,))
            given = getattr(self, field.name) not in (field.default, [])
            if field.name != "method" and given and self.method not in users:
                raise TrainingError(
                    f"{_flag(field.name)} is for --method {' or '.join(users)}, not for {self.method.value}."
                )

    def check_sweep(self) -> None:
        """Raises TrainingError for an option that names layers: a sweep fits one place at a time."""
        for name in ("heads", "coefficient"):
            if getattr(self, name):
                raise TrainingError(f"{_flag(name)} is for `matsteer train`: a sweep fits one place at a time.")

    def sites(self, layers: str | None, kinds: str | None) -> tuple["Site", ...]:
        """Every layer with every kind; without layers those of the heads that are named. Raises TrainingError."""
        if layers is not None:
            return parse_sites(layers, kinds or self.profile.site)
        from training.methods.heads import parse_heads

        return tuple(dict.fromkeys(head.site for head in parse_heads(self.heads))) if self.heads is not None else ()


def with_method_options(command: Callable[..., None]) -> Callable[..., None]:
    """A typer command with every field of MethodOptions as an option, which gets them all as one `how`."""
    names = [field.name for field in fields(MethodOptions)]

    @wraps(command)
    def run(**given: Any) -> None:
        command(how=MethodOptions(**{name: given.pop(name) for name in names}), **given)

    signature = inspect.signature(command)
    kept = [parameter for parameter in signature.parameters.values() if parameter.name != "how"]
    added = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(MethodOptions)
    ]
    run.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    return run


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
