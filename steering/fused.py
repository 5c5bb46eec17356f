"""`operators.steer` for a site of a bank by a kernel, in one pass over the tokens instead of thirty operations."""

import torch
from torch import Tensor

from steer_ops import STEER_AND_COUNT
from steering.bank import SiteBuffers


def fused_steer(at: SiteBuffers, activations: Tensor, owners: Tensor, counts: Tensor) -> Tensor | None:
    """Steers activations [N, D] by the first N multipliers of a site; N `counts` go up where the site is the owner.

    None, having done nothing, where PyTorch has to do it, or has to say what is wrong: on other devices, dtypes and
    widths, where gradients are wanted, and where there is no kernel.
    """
    if activations.device != at.vectors.device or activations.shape[-1] != at.width:
        return None
    if type(activations) is not Tensor or (torch.is_grad_enabled() and activations.requires_grad):
        return None
    kernel = STEER_AND_COUNT.for_tensor(activations)
    if kernel is STEER_AND_COUNT.reference:
        return None
    parts = (
        at.vectors,
        at.weights,
        at.biases,
        at.kinds,
        at.keep_norm,
        at.clamps,
        at.multipliers,
        at.opened,
        owners,
        counts,
    )
    moved: Tensor = kernel(activations, *parts, at.owner)
    return moved
