"""What the device reaches, and the kernels that attend to prompts."""

from collections.abc import Iterator

import torch

from benchmarks.gpu.figures import Figure
from benchmarks.gpu.world import World
from benchmarks.workload import SHAPES
from steer_ops import FLASH_ATTENTION, VARLEN_ATTENTION


def rates(world: World) -> Iterator[Figure]:
    yield Figure("a large copy, read and written", world.copy_rate / 1e9, "GB/s")
    yield Figure("a large product", world.matrix_rate / 1e12, "TFLOP/s", f"{world.sizes.matrix} wide")
    yield prompt_attention(world)


def prompt_attention(world: World) -> Figure:
    """What models with soft caps or sinks, which FlashAttention does not take, pay for the attention of a prompt."""
    shape, tokens = SHAPES[world.sizes.shape], world.sizes.prompts[-1][0]
    heads, width = shape["num_attention_heads"], shape["hidden_size"] // shape["num_attention_heads"]
    query, keys, values = (
        torch.randn(tokens, count, width, device=world.device).to(world.dtype)
        for count in (heads, *[shape["num_key_value_heads"]] * 2)
    )
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=world.device)
    times = {}
    for op in (VARLEN_ATTENTION, FLASH_ATTENTION):
        attend = op.choose(world.device, world.dtype)
        args = query, keys, values, starts, starts, starts[1:], tokens, tokens
        times[op.name] = world.seconds(lambda: attend(*args, scale=width**-0.5))  # noqa: B023
    rates = [2 * tokens**2 * heads * width / seconds / 1e12 for seconds in times.values()]
    note = "{:.3g} against {:.3g} TFLOP/s".format(*rates)
    share = times["varlen_attention"] / times["flash_attention"]
    return Figure(f"attention of {tokens} tokens, Triton's against Flash", share, "x", note)
