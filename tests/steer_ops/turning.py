"""transformers' plain attention, for layers that leave rotary embeddings to theirs: each model's own, step by step."""

import sys
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from steer_ops import plain
from steer_ops.layers import takes_rotary

NAME = "turning"


@takes_rotary
def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, rotary: Any = None, **options: Any
) -> Any:
    if rotary is not None:
        turned = plain.rotary(query[0].transpose(0, 1), key[0].transpose(0, 1), *rotary)
        query, key = (part.transpose(0, 1)[None] for part in turned)
    files = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    own: Any = next(file for file in files if hasattr(file, "eager_attention_forward"))
    return own.eager_attention_forward(module, query, key, value, mask, **options)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, eager_mask)
