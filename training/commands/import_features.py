"""`matsteer import-features`: numpy features as activations."""

from pathlib import Path
from typing import Annotated

import typer

from training import options as o


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
        found = read_features(prefix, Shape.of(model, revision), sites, attribute, by, seed=seed)
        save_activations(found, out)
        count = len(set(found.groups))
        typer.echo(f"{len(found)} activations of {count} groups at {', '.join(map(str, sites))} in {out}")
