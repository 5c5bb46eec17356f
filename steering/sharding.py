"""A model in shards, one in each of several processes (tensor parallel), by the plan that transformers has for it.

transformers reads into each process its own slices of the weights, and wraps the layers so that slices go in and out.
Those of linear layers are exchanged here for plain layers of a process's own heads and features, which then are made
faster like those of a whole model (`steer_ops.layers`); what else a plan has (embeddings, experts) stays as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

# transformers' names: a slice of the output, a slice of the input, a slice of the output that is brought together.
COLWISE, ROWWISE, GATHERED = "colwise", "rowwise", ("colwise_gather_output", "colwise_rep")
# Layers that have all heads' queries, keys or values side by side.
BY_HEAD = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")
HEADS = {"num_attention_heads": "attention heads", "num_key_value_heads": "heads of keys and values"}


def why_not_sharded(config: Any, processes: int) -> str | None:
    """Why so many processes cannot hold the model of a config together; None: they can."""
    text = config.get_text_config(decoder=True)
    plan: dict[str, str] = getattr(text, "base_model_tp_plan", None) or {}
    if not plan:
        return f"transformers has no tensor-parallel plan for its architecture, {config.model_type}"
    if getattr(config, "quantization_config", None):
        return "its weights are quantized"
    if any(name.rpartition(".")[2] in BY_HEAD and style == COLWISE for name, style in plan.items()):
        for name, what in HEADS.items():
            heads = getattr(text, name, None)
            if isinstance(heads, int) and heads % processes:
                return f"its {heads} {what} cannot be shared equally by {processes}"
    return None


class RowwiseLinear(nn.Module):
    """x [..., in / processes] -> [..., out], the same in every process: each multiplies its slice of the input, and the
    products are added up."""

    def __init__(self, local: nn.Linear, bias: Tensor | None, in_features: int) -> None:
        """`local`: this process's slice, without a bias. `in_features`: of the whole."""
        super().__init__()
        self.local = local
        self.bias = bias
        self.in_features, self.out_features = in_features, local.out_features

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.local(x)
        dist.all_reduce(found)
        return found if self.bias is None else found + self.bias

    def on_whole(self, act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """What `act` makes of the input of all processes, [..., in], for each its slice [..., in / processes]."""
        return act(gathered(x)).chunk(dist.get_world_size(), dim=-1)[dist.get_rank()]


class GatheredLinear(nn.Module):
    """x [..., in] -> [..., out], the same in every process: each computes a slice of the output."""

    def __init__(self, local: nn.Linear, out_features: int) -> None:
        """`local`: this process's slice: as many features as the others have, or those that are left for it."""
        super().__init__()
        self.local = local
        self.in_features, self.out_features = local.in_features, out_features
        self._missing = -(-out_features // dist.get_world_size()) - local.out_features

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.local(x)
        return gathered(pad(found, (0, self._missing)) if self._missing else found)[..., : self.out_features]


def gathered(x: Tensor) -> Tensor:
    """[..., D] of each process -> [..., processes * D], side by side, in all of them."""
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts, dim=-1)


def use_plain_layers(model: Any) -> int:
    """Exchanges the linear layers of a model that is sharded, in place; says how many."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    from torch.distributed.tensor import DTensor
    from transformers.integrations.tensor_parallel import replace_layer_number_by_wildcard

    exchanged = 0
    for name, layer in list(model.named_modules()):
        if type(layer) is not nn.Linear or not isinstance(layer.weight, DTensor):
            continue
        style = model.tp_plan.get(replace_layer_number_by_wildcard(name))
        weight, bias = _local(layer.weight), None if layer.bias is None else _local(layer.bias)
        if style == COLWISE:
            exchange: nn.Module = _plain(weight, bias)
        elif style == ROWWISE:
            exchange = RowwiseLinear(_plain(weight, None), bias, layer.in_features)
        elif style in GATHERED:
            exchange = GatheredLinear(_plain(weight, bias), layer.out_features)
        else:
            continue
        model.set_submodule(name, exchange)
        exchanged += 1
    return exchanged


def _plain(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """weight [out, in]"""
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
    return layer.eval()


def _local(parameter: Any) -> Tensor:
    found: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return found.detach()
