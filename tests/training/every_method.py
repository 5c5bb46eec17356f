"""One fit of every method on a tiny model, each stored as a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steering import Column, Positions, Site, SiteKind
from steering import checkpoint as checkpoints
from training.activations import Pool
from training.activations.extraction import extract
from training.activations.store import Activations
from training.choices import Fill, Method
from training.data import Sample, Split
from training.methods import AblationConfig, ControlConfig, HeadAblationConfig, ItiConfig, MatConfig, Pair
from training.methods.fit import Recipe, fit
from training.methods.heads import parse_heads

NAME, PAIR = "truthfulness", Pair("good bees", "bad cows", "truthfulness")
RESIDUAL, HEADS = ([Site(layer, kind) for layer in range(3)] for kind in (SiteKind.RESIDUAL, SiteKind.ATTN_HEADS))
ATTENTION, SOURCE = [Site(1, SiteKind.ATTN_OUTPUT)], RESIDUAL[1]
ZEROED, MEANED = parse_heads("0.1,2.3"), parse_heads("1.0")
COEFFICIENTS = {0: 0.5, 1: -0.25, 2: 1.5}
TOP = 5

RECIPES: dict[str, tuple[Recipe, list[Site]]] = {
    "mat": (Recipe(mat=MatConfig(epochs=3, lr=0.05)), ATTENTION),
    "caa": (Recipe(Method.CAA), ATTENTION),
    "actadd": (Recipe(Method.ACTADD, pair=PAIR), RESIDUAL[:1]),
    "probe": (Recipe(Method.PROBE), ATTENTION),
    "iti": (Recipe(Method.ITI, iti=ItiConfig(top=TOP)), HEADS),
    "ablation": (Recipe(Method.ABLATION, ablation=AblationConfig(SOURCE)), RESIDUAL),
    "zeroed": (Recipe(Method.HEAD_ABLATION, head_ablation=HeadAblationConfig(ZEROED)), HEADS),
    "meaned": (Recipe(Method.HEAD_ABLATION, head_ablation=HeadAblationConfig(MEANED, fill=Fill.MEAN)), HEADS),
    "control": (Recipe(Method.CONTROL, control=ControlConfig(coefficients=COEFFICIENTS)), RESIDUAL),
}


def read_everywhere(model: Any, tokenizer: Any) -> Activations:
    """Activations of one attribute at every site that RECIPES name."""
    texts = [
        Sample(NAME, f"Q: What is {n}? A:", f" {word} {n}", label, f"g{n}", Split.TRAIN)
        for n in range(12)
        for label, word in ((True, "good bees"), (False, "bad cows moo"))
    ]
    return extract(model, tokenizer, texts, [*RESIDUAL, *HEADS, *ATTENTION], pool=Pool.LAST)


def store_all(model: Any, tokenizer: Any, activations: Activations, folder: Path) -> dict[str, checkpoints.Checkpoint]:
    """A checkpoint of each method in `folder`/NAME/v1, written and read."""
    found = {}
    for name, (recipe, sites) in RECIPES.items():
        on = activations
        if recipe.pair is not None:
            on = extract(model, tokenizer, recipe.pair.samples(), sites, pool=Pool.LAST)
        found[name] = _store(model, folder / name / "v1", name, recipe, fit(on, sites, recipe))
    return found


def _store(model: Any, folder: Path, name: str, recipe: Recipe, columns: Sequence[Column]) -> checkpoints.Checkpoint:
    checkpoints.save(
        folder, name=name, version="v1", method=recipe.method.value, columns=columns, normalize=recipe.keep_norm,
        base_model=checkpoints.base_model_info(model, "tiny", None), positions=Positions.GENERATED,
        training={"hyperparameters": recipe.as_dict()}, evaluation={}, card="",
    )  # fmt: skip
    loaded = checkpoints.load(folder)
    checkpoints.verify_sites(loaded, model)
    return loaded
