"""From texts to a checkpoint: activations, and a fit."""

import time
from collections.abc import Iterator

import torch

from benchmarks.gpu.figures import Figure
from benchmarks.gpu.world import World
from benchmarks.questions import synthetic
from benchmarks.workload import ATTRIBUTES, SHAPES
from steering.types import Site, SiteKind
from training.activations import Pool
from training.activations.extraction import extract
from training.activations.store import Contrast
from training.methods.mat import MatConfig
from training.methods.mat_training import fit_mat


def extraction(world: World) -> Iterator[Figure]:
    """One layer's residual stream at the last token, of random words with the lengths of TruthfulQA's texts."""
    samples, tokenizer = synthetic()
    samples = samples[: world.sizes.texts]
    site = Site(SHAPES[world.sizes.shape]["num_hidden_layers"] // 2, SiteKind.RESIDUAL)
    extract(world.model, tokenizer, samples[:16], [site], pool=Pool.LAST)  # warms up
    world.wait()
    start = time.perf_counter()
    extract(world.model, tokenizer, samples, [site], pool=Pool.LAST)
    seconds = time.perf_counter() - start
    tokens = sum(len(one) for one in tokenizer([sample.text for sample in samples])["input_ids"])
    note = f"{seconds:.1f} s for {len(samples):,} texts, {tokens / seconds:,.0f} tokens/s"
    yield Figure("activations of TruthfulQA-sized data", len(samples) / seconds, "texts/s", note)


def fit(world: World) -> Iterator[Figure]:
    """Of three attributes at one site."""
    sizes = world.sizes
    width = SHAPES[sizes.shape]["hidden_size"]
    number = torch.Generator().manual_seed(0)
    data = {
        attribute: Contrast(
            torch.randn(sizes.fit_rows, width, generator=number) + 0.1 * torch.randn(width, generator=number),
            torch.randn(sizes.fit_rows, width, generator=number),
        )
        for attribute in ATTRIBUTES
    }
    seconds = []
    for epochs in (1, 1, 1 + sizes.fit_epochs):  # the first one warms up, the second tells what is not of epochs
        start = time.perf_counter()
        fit_mat(data, Site(0, SiteKind.RESIDUAL), MatConfig(epochs=epochs), device=world.device)
        world.wait()
        seconds.append(time.perf_counter() - start)
    note = f"{len(data)} x {2 * sizes.fit_rows} rows of {width}; {seconds[2]:.2f} s for {1 + sizes.fit_epochs} epochs"
    yield Figure("a fit of MAT-Steer, an epoch", 1000 * (seconds[2] - seconds[1]) / sizes.fit_epochs, "ms", note)
