"""Everything that is computed faster than plain PyTorch: ops with a twin in PyTorch and kernels beside it.

Each op is a function of this package: it runs the kernel for its tensors' device and dtype where there is one, else
the twin of the same name in `steer_ops.plain`.
"""

from steer_ops.ops import paged_attention_decode

__all__ = ["paged_attention_decode"]
