"""One fit of every method on a tiny model, each stored as a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steering import Column, Positions, Site, SiteKind
from steering import checkpoint as checkpoints
from training.activations import Pool
from training.activations.extraction import extract
from training.activations.store import Activations
from training.data import Sample, Split
from training.methods.ablation import AblationConfig
from training.methods.actadd import ActAddConfig
from training.methods.caa import CaaConfig
from training.methods.cast import CastConfig, Hold
from training.methods.clamp import ClampConfig
from training.methods.control import ControlConfig
from training.methods.fit import Recipe, fit
from training.methods.head_ablation import Fill, HeadAblationConfig
from training.methods.heads import parse_heads
from training.methods.iti import ItiConfig
from training.methods.mat import MatConfig
from training.methods.probe import ProbeConfig
from training.methods.reps import RepsConfig
from training.models import Base

NAME, PAIR = "truthfulness", ActAddConfig(("good bees", "bad cows"), "truthfulness")
RESIDUAL, HEADS = ([Site(layer, kind) for layer in range(3)] for kind in (SiteKind.RESIDUAL, SiteKind.ATTN_HEADS))
ATTENTION, SOURCE = [Site(1, SiteKind.ATTN_OUTPUT)], RESIDUAL[1]
ZEROED, MEANED = parse_heads("0.1,2.3"), parse_heads("1.0")
COEFFICIENTS = {0: 0.5, 1: -0.25, 2: 1.5}
TOP = 5

RECIPES: dict[str, tuple[Recipe, list[Site]]] = {
    "mat": (Recipe(MatConfig(epochs=3, lr=0.05)), ATTENTION),
    "caa": (Recipe(CaaConfig()), ATTENTION),
    "actadd": (Recipe(PAIR), RESIDUAL[:1]),
    "probe": (Recipe(ProbeConfig()), ATTENTION),
    "iti": (Recipe(ItiConfig(top=TOP)), HEADS),
    "ablation": (Recipe(AblationConfig(SOURCE)), RESIDUAL),
    "cast": (Recipe(CastConfig("questions", RESIDUAL[0], Hold.TOKEN)), RESIDUAL[2:]),
    "held": (Recipe(CastConfig("questions", RESIDUAL[0])), RESIDUAL[2:]),
    "clamp": (Recipe(ClampConfig()), RESIDUAL[1:]),
    "zeroed": (Recipe(HeadAblationConfig(heads=ZEROED)), HEADS),
    "meaned": (Recipe(HeadAblationConfig(heads=MEANED, fill=Fill.MEAN)), HEADS),
    "control": (Recipe(ControlConfig(coefficient=COEFFICIENTS)), RESIDUAL),
    "reps": (Recipe(RepsConfig(steps=3, rate=0.05)), RESIDUAL[1:2]),
}


def texts() -> list[Sample]:
    """Of one attribute."""
    return [
        Sample(NAME, f"Q: What is {n}? A:", f" {word} {n}", label, f"g{n}", Split.TRAIN)
        for n in range(12)
        for label, word in ((True, "good bees"), (False, "bad cows moo"))
    ]


def read_everywhere(model: Any, tokenizer: Any) -> Activations:
    """Activations of one attribute at every site that RECIPES name."""
    return extract(model, tokenizer, texts(), [*RESIDUAL, *HEADS, *ATTENTION], pool=Pool.LAST)


def read_with_condition(model: Any, tokenizer: Any) -> Activations:
    """The same attribute, and which of the prompts are questions, token by token at RESIDUAL."""
    conditions = [
        Sample("questions", f"{said} {n}?{end}", " .", label, f"q{n}", Split.TRAIN)
        for n in range(12)
        for label, said, end in ((True, "Q: What is", " A:"), (False, "good cows", " bees"))
    ]
    return extract(model, tokenizer, [*texts(), *conditions], RESIDUAL, pool=Pool.TOKENS)


def store_all(model: Any, tokenizer: Any, activations: Activations, folder: Path) -> dict[str, checkpoints.Checkpoint]:
    """A checkpoint of each method in `folder`/NAME/v1, written and read."""
    found = {}
    for name, (recipe, sites) in RECIPES.items():
        on = activations
        if recipe.config.own_samples():
            on = extract(model, tokenizer, recipe.config.own_samples(), sites, pool=Pool.LAST)
        if recipe.config.conditions():
            on = read_with_condition(model, tokenizer)
        columns = fit(on, sites, recipe, base=Base(model, tokenizer, "tiny", None), samples=texts())
        found[name] = _store(model, folder / name / "v1", name, recipe, columns)
    return found


def _store(model: Any, folder: Path, name: str, recipe: Recipe, columns: Sequence[Column]) -> checkpoints.Checkpoint:
    checkpoints.save(
        folder, name=name, version="v1", method=recipe.method.name, columns=columns, normalize=recipe.keep_norm,
        base_model=checkpoints.base_model_info(model, "tiny", None), positions=Positions.GENERATED,
        training={"hyperparameters": recipe.as_dict()}, evaluation={}, card="",
    )  # fmt: skip
    loaded = checkpoints.load(folder)
    checkpoints.verify_sites(loaded, model)
    return loaded
