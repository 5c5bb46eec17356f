"""`matsteer extract`: the activations of a model."""

from pathlib import Path
from typing import Annotated

import typer

from training import options as o
from training.activations import Pool


def extract(
    model: o.Model,
    out: Annotated[Path, typer.Option(help="Folder for the shards and, last, the manifest.")],
    layer: o.Layers,
    site: o.SiteKinds = "attn_output",
    data: o.Data = None,
    more: o.More = None,
    pool: o.PoolOption = Pool.MEAN,
    rows: o.Rows = 64,
    seed: o.Seed = 0,
    revision: o.Revision = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
) -> None:
    """Store a model's activations on labelled texts as safetensors shards; an interrupted run goes on.

    Example: matsteer extract --model Qwen/Qwen2.5-0.5B --data truthfulness=facts.jsonl --layer 10,12
    --site attn_output --out runs/activations

    On several GPUs or machines: accelerate launch -m training extract ...; on CPUs: torchrun -m training extract ...
    """
    with o.one_sentence():
        sites, specs = o.parse_sites(layer, site), o.data_specs(data, more)
        from training.activations.extraction import extract_to
        from training.data import load_data, split_samples
        from training.distributed import joined
        from training.models import load_base

        samples = split_samples(load_data(specs), seed=seed)
        base = load_base(model, revision=revision, device=device, dtype=dtype)
        count = extract_to(
            out,
            base.model,
            base.tokenizer,
            samples,
            sites,
            pool=pool,
            max_rows=rows,
            progress=o.shows_progress(),
        )
        if joined().main:
            typer.echo(f"{count} activations at {', '.join(map(str, sites))} in {out}")
