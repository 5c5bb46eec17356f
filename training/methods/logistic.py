"""Logistic regression with an L2 penalty: the linear probe that several methods share."""

import torch
from torch import Tensor


def fit_logistic(features: Tensor, targets: Tensor, *, penalty: float = 1.0, steps: int = 50) -> tuple[Tensor, Tensor]:
    """Weights [D] and bias [] that minimise the summed log loss + penalty / 2 * |weights|^2.

    `features` [N, D] are best standardised; `targets` [N] are 0 or 1; both classes weigh the same. Deterministic:
    L-BFGS in float64 from zero.
    """
    x, y = features.double(), targets.double()
    share = y.mean().clamp(1e-6, 1 - 1e-6)
    class_weights = torch.where(y > 0.5, 0.5 / share, 0.5 / (1 - share))
    parameters = torch.zeros(x.shape[1] + 1, dtype=torch.float64, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = x @ parameters[:-1] + parameters[-1]
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, class_weights, reduction="sum")
        loss = losses + penalty / 2 * parameters[:-1].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    fitted = parameters.detach().float()
    return fitted[:-1], fitted[-1]
