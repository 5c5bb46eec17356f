"""Linear layers of a model on a CPU, with weights laid out once as oneDNN's products want them.

PyTorch's own `linear` lays the weight out anew in every call, which for the few tokens of a decoding step takes longer
than the product (docs/engine.md has the figures).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """x [..., in] -> [..., out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight [out, in]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())

    @property
    def weight(self) -> Tensor:
        """A plain copy, [out, in]."""
        return self._packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return found


def pack(model: Any) -> int:
    """Replaces the linear layers of a model, in place; says how many: none where oneDNN is missing or the model is not
    on a CPU. Weights that nobody else holds are freed."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return 0
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return 0
    packed = 0
    with torch.no_grad():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                # Only the classes themselves: a subclass computes something else.
                if type(child) not in (nn.Linear, Conv1D):
                    continue
                weight: Any = child.weight
                if weight.device.type != "cpu" or weight.dtype not in DTYPES:
                    continue
                bias: Any = child.bias
                setattr(parent, name, PackedLinear(weight if isinstance(child, nn.Linear) else weight.T, bias))
                packed += 1
    return packed
