"""`matsteer bake`: steering in the weights."""

from pathlib import Path
from typing import Annotated

import typer

from training import options as o


def bake(
    model: o.Model,
    checkpoint: Annotated[Path, typer.Option(help="Folder of a checkpoint, with or without its version.")],
    out: Annotated[Path, typer.Option(help="The new folder of the baked model.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=X", help="A multiplier; repeat it. Default: the checkpoint's own."),
    ] = None,
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Write constant steering vectors into a copy of the model, as biases: a folder that needs no code of ours.

    A bias acts at every position, the prompt's included: the copy equals the model steered at positions `all`.

    Example: matsteer bake --model meta-llama/Llama-3.1-8B --checkpoint checkpoints/honesty --set honesty=1.5
    --out models/honest-llama
    """
    with o.one_sentence():
        attributes = o.parse_settings(set_, "--set") if set_ else None
        from training.bake import bake as run
        from training.evaluation.evaluator import open_checkpoint
        from training.models import load_base, stored_dtype

        loaded, _ = open_checkpoint(checkpoint)
        chosen = stored_dtype(model, revision) if dtype == "auto" else dtype
        baked = run(load_base(model, revision=revision, device=device, dtype=chosen), loaded, out, attributes)
        typer.echo(
            f"wrote {out}: biases for {', '.join(map(str, baked.sites))}, at every position; its logits differ from "
            f"the run-time hook's by {baked.apart:.2g} of what steering changes"
        )
