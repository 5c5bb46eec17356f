"""Linear probe direction: the unit normal of a logistic probe, scaled by the activations' standard deviation on it."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from training.data.samples import Split
from training.errors import FitError
from training.methods.base import FitInputs, Method, MethodConfig, option

if TYPE_CHECKING:
    from torch import Tensor

    from steering.column import Column
    from steering.types import Site
    from training.activations.store import Contrast

PENALTY_HELP = "on the probes' squared weights; default: 1."


@dataclass(frozen=True)
class ProbeConfig(MethodConfig):
    penalty: float = option(PENALTY_HELP, default=1.0, min=0)


def fit(inputs: FitInputs, config: ProbeConfig) -> Sequence["Column"]:
    """Site by site, attribute by attribute."""
    columns: list[Column] = []
    for site, names in inputs.by_site():
        contrasts = inputs.activations.contrasts(site, Split.TRAIN, names)
        columns += fit_probe(contrasts, site, penalty=config.penalty, normalize=inputs.keep_norm)
    return columns


def fit_probe(
    contrasts: Mapping[str, "Contrast"], site: "Site", *, penalty: float = 1.0, normalize: bool = False
) -> tuple["Column", ...]:
    """One ungated column an attribute: positive against negative, `penalty` on the squared weights of the probe."""
    import torch

    from steering.column import Column
    from steering.types import Gate

    columns = []
    for name, contrast in contrasts.items():
        direction = probe_direction(contrast, penalty)
        deviation = (torch.cat([contrast.positive, contrast.negative]) @ direction).std()
        column = Column(
            attribute=name,
            site=site,
            gate=Gate.CONSTANT,
            vector=deviation * direction,
            gate_weight=torch.zeros_like(direction),
            gate_bias=0.0,
            keep_norm=normalize,
        )
        columns.append(column)
    return tuple(columns)


def probe_direction(contrast: "Contrast", penalty: float = 1.0) -> "Tensor":
    """The unit vector [D] along which a logistic probe finds an activation more positive."""
    import torch

    rows = torch.cat([contrast.positive, contrast.negative])
    targets = torch.cat([torch.ones(len(contrast.positive)), torch.zeros(len(contrast.negative))])
    centred = rows - rows.mean(0)
    scale = centred.square().mean().sqrt().clamp_min(1e-12)
    weights, _ = fit_logistic(centred / scale, targets.to(rows.device), penalty=penalty)
    return torch.nn.functional.normalize(weights, dim=0)


def fit_logistic(
    features: "Tensor", targets: "Tensor", *, penalty: float = 1.0, tolerance: float = 1e-6
) -> tuple["Tensor", "Tensor"]:
    """Weights [D] and bias [] that minimise the summed log loss + penalty / 2 * |weights|^2.

    `features` [N, D] are best standardised; `targets` [N] are 0 or 1; both classes weigh the same. Deterministic:
    L-BFGS in float64 from zero, until no gradient is beyond `tolerance`. Raises FitError where all targets are the
    same or features are not finite.
    """
    import torch
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x, y = features.detach().double().cpu().numpy(), targets.detach().cpu().numpy() > 0.5
    if y.all() or not y.any():
        raise FitError("A probe needs both positive and negative samples.")
    if not bool(features.isfinite().all()):
        raise FitError("A probe needs activations that are all finite.")
    strength = 1 / penalty if penalty > 0 else float("inf")
    probe = LogisticRegression(C=strength, class_weight="balanced", tol=tolerance, max_iter=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # without a penalty separable classes never converge
        probe.fit(x, y)
    weights, bias = torch.from_numpy(probe.coef_[0]), torch.from_numpy(probe.intercept_)[0]
    return weights.to(features.device, torch.float32), bias.to(features.device, torch.float32)


PROBE = Method(
    name="probe",
    summary="logistic regression",
    title="linear probe direction",
    config=ProbeConfig,
    fit=fit,
)
