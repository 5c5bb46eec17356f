"""The trainable part of MAT-Steer and its starting point (arXiv 2502.12446)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from steering.types import Column, Gate, Site
from training.activations.store import Contrast
from training.choices import GateInit, Init
from training.methods.logistic import fit_logistic
from training.methods.losses import bandwidths
from training.methods.mat_config import MatConfig
from training.methods.mat_data import Frame


@dataclass(frozen=True, eq=False)
class Model:
    """T gated vectors in a frame: vectors [T, D], gate weights [T, D], gate biases [T]."""

    vectors: Tensor
    weights: Tensor
    biases: Tensor
    frame: Frame
    normalize: bool

    @classmethod
    def of(cls, parameters: Sequence[Tensor], frame: Frame, normalize: bool) -> Self:
        vectors, weights, biases = parameters
        return cls(vectors, weights, biases, frame, normalize)

    def parameters(self) -> list[Tensor]:
        return [self.vectors, self.weights, self.biases]

    def columns(self, names: tuple[str, ...], site: Site) -> tuple[Column, ...]:
        """The same function of activations in their own units."""
        weights = (self.weights / self.frame.scale).detach().cpu()
        biases = (self.biases - self.weights @ self.frame.centre).detach().cpu()
        vectors = (self.vectors * self.frame.scale).detach().cpu()
        return tuple(
            Column(
                attribute=name,
                site=site,
                gate=Gate.SIGMOID,
                vector=vectors[index].clone(),
                gate_weight=weights[index].clone(),
                gate_bias=float(biases[index]),
                keep_norm=self.normalize,
            )
            for index, name in enumerate(names)
        )


def start(contrasts: Mapping[str, Contrast], frame: Frame, config: MatConfig) -> Model:
    """The model before the first step; random parts come from the seed alone. Contrasts are in the frame."""
    generator = torch.Generator().manual_seed(config.seed)
    vectors, weights, biases = [], [], []
    for contrast in contrasts.values():
        difference = contrast.positive.mean(0) - contrast.negative.mean(0)
        noise = torch.randn(difference.shape, generator=generator).to(difference.device)
        if config.init is Init.DIFFERENCE:
            vectors.append(difference)
        elif config.init is Init.NORMAL:
            vectors.append(noise)
        else:
            vectors.append(noise / noise.norm() * difference.norm())
        weight, bias = torch.zeros_like(difference), torch.zeros((), device=difference.device)
        if config.gate_init is GateInit.PROBE:
            rows = torch.cat([contrast.positive, contrast.negative]) + frame.offset
            targets = torch.ones(len(rows), device=rows.device)
            targets[: len(contrast.positive)] = 0
            weight, bias = fit_logistic(rows, targets, penalty=max(1.0, 0.1 * len(rows)))
        weights.append(weight)
        biases.append(bias)
    parts = [torch.stack(part).float() for part in (vectors, weights, biases)]
    return Model.of(parts, frame, config.normalize)


def kernel_widths(contrasts: Mapping[str, Contrast], frame: Frame, config: MatConfig) -> Tensor:
    """Sigmas [T, K] in the frame's units."""
    fixed = config.sigma / frame.scale
    rows = [bandwidths(config.kernel, c.positive, c.negative, fixed) for c in contrasts.values()]
    return torch.stack(rows).to(frame.origin.device)
