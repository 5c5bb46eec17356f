"""The trainable part of MAT-Steer and its starting point (arXiv 2502.12446)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from steering.types import Column, Gate, Site
from training.activations import Contrast
from training.choices import GateInit, Init
from training.losses import bandwidths, mmd2
from training.methods.logistic import fit_logistic
from training.methods.mat_config import MatConfig

_EVALUATED_ROWS = 512


@dataclass(frozen=True, eq=False)
class Frame:
    """The units of the training: activations are divided by `scale`; gates see them less `centre` [D]."""

    scale: float
    centre: Tensor

    @classmethod
    def of(cls, contrasts: Mapping[str, Contrast], standardize: bool, device: str | torch.device = "cpu") -> Self:
        sides = [side.float() for contrast in contrasts.values() for side in (contrast.positive, contrast.negative)]
        if not standardize:
            return cls(1.0, torch.zeros_like(sides[0][0]).to(device))
        centre = torch.stack([side.mean(0) for side in sides]).mean(0)
        spread = torch.stack([(side - centre).square().mean() for side in sides]).mean().sqrt()
        scale = float(spread.clamp_min(1e-12))
        return cls(scale, (centre / scale).to(device))

    def apply(self, contrast: Contrast) -> Contrast:
        """The contrast in these units, on the frame's device."""
        positive, negative = (
            side.float().to(self.centre.device) / self.scale for side in (contrast.positive, contrast.negative)
        )
        return Contrast(positive, negative)


@dataclass(frozen=True, eq=False)
class Model:
    """T gated vectors in a frame: vectors [T, D], gate weights [T, D], gate biases [T]."""

    vectors: Tensor
    weights: Tensor
    biases: Tensor
    centre: Tensor
    normalize: bool

    @classmethod
    def of(cls, parameters: Sequence[Tensor], centre: Tensor, normalize: bool) -> Self:
        vectors, weights, biases = parameters
        return cls(vectors, weights, biases, centre, normalize)

    def parameters(self) -> list[Tensor]:
        return [self.vectors, self.weights, self.biases]

    def gates(self, rows: Tensor) -> Tensor:
        """Rows [.., D] -> gates [.., T] in (0, 1)."""
        return torch.sigmoid((rows - self.centre) @ self.weights.mT + self.biases)

    def steer(self, rows: Tensor, gates: Tensor) -> Tensor:
        """Rows [.., D] and their gates [.., T] -> steered rows, of the same norms where those are kept."""
        steered = rows + gates @ self.vectors
        if not self.normalize:
            return steered
        kept: Tensor = rows.norm(dim=-1, keepdim=True) / steered.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return steered * kept

    def columns(self, names: tuple[str, ...], site: Site, frame: Frame) -> tuple[Column, ...]:
        """The same function of activations in their own units."""
        weights = (self.weights / frame.scale).detach().cpu()
        biases = (self.biases - self.weights @ self.centre).detach().cpu()
        vectors = (self.vectors * frame.scale).detach().cpu()
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
            rows = torch.cat([contrast.positive, contrast.negative]) - frame.centre
            targets = torch.ones(len(rows), device=rows.device)
            targets[: len(contrast.positive)] = 0
            weight, bias = fit_logistic(rows, targets, penalty=max(1.0, 0.1 * len(rows)))
        weights.append(weight)
        biases.append(bias)
    parts = [torch.stack(part).float().requires_grad_() for part in (vectors, weights, biases)]
    return Model.of(parts, frame.centre, config.normalize)


def kernel_widths(contrasts: Mapping[str, Contrast], frame: Frame, config: MatConfig) -> Tensor:
    """Sigmas [T, K] in the frame's units."""
    fixed = config.sigma / frame.scale
    rows = [bandwidths(config.kernel, c.positive, c.negative, fixed) for c in contrasts.values()]
    return torch.stack(rows).to(frame.centre.device)


def unsteered_mmd(contrasts: Mapping[str, Contrast], sigmas: Tensor) -> Tensor:
    """MMD^2 [T] between the two sides as they are, never 0."""
    values = [
        mmd2(thin(contrast.positive), thin(contrast.negative), sigma)
        for contrast, sigma in zip(contrasts.values(), sigmas, strict=True)
    ]
    return torch.stack(values).clamp_min(1e-6)


def own_gates(gates: Tensor) -> Tensor:
    """Gates [T, B, T] with those of other attributes than the data's own closed."""
    return gates * torch.eye(gates.shape[0], device=gates.device)[:, None]


def thin(rows: Tensor) -> Tensor:
    """Evenly spread rows, few enough for a full kernel matrix."""
    step = max(1, -(-len(rows) // _EVALUATED_ROWS))
    return rows[::step]
