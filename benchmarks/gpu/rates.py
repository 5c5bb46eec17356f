"""What the device reaches, and the kernels that attend to prompts."""

from collections.abc import Iterator

import torch

from benchmarks.gpu.figures import Figure
from benchmarks.gpu.world import World
from benchmarks.workload import SHAPES
from steer_ops import PAGED_ATTENTION_PREFILL, VARLEN_ATTENTION


def rates(world: World) -> Iterator[Figure]:
    yield Figure("a large copy, read and written", world.copy_rate / 1e9, "GB/s")
    yield Figure("a large product", world.matrix_rate / 1e12, "TFLOP/s", f"{world.sizes.matrix} wide")
    yield prompt_attention(world)


def prompt_attention(world: World) -> Figure:
    """What models with soft caps or sinks, which FlashAttention does not take, pay for the attention of a prompt."""
    shape, tokens = SHAPES[world.sizes.shape], world.sizes.prompts[-1][0]
    heads, width = shape["num_attention_heads"], shape["hidden_size"] // shape["num_attention_heads"]
    size = 64  # tokens of a block
    query, keys, values = (
        torch.randn(tokens, count, width, device=world.device).to(world.dtype)
        for count in (heads, *[shape["num_key_value_heads"]] * 2)
    )
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=world.device)
    tables = torch.arange(tokens // size, dtype=torch.int32, device=world.device)[None]
    caches = [part.view(-1, size, *part.shape[1:]).transpose(1, 2).contiguous() for part in (keys, values)]
    flash, paged = (op.choose(world.device, world.dtype) for op in (VARLEN_ATTENTION, PAGED_ATTENTION_PREFILL))
    scale, out = width**-0.5, torch.empty_like(query)
    by_flash = world.seconds(
        lambda: flash(query, keys, values, starts, starts, starts[1:], tokens, tokens, scale=scale)
    )
    by_paged = world.seconds(lambda: paged(query, *caches, tables, starts, starts[1:], out, scale=scale))
    note = "{:.3g} against {:.3g} TFLOP/s".format(
        *(2 * tokens**2 * heads * width / seconds / 1e12 for seconds in (by_paged, by_flash))
    )
    return Figure(f"attention of {tokens} tokens, Triton's against Flash", by_paged / by_flash, "x", note)
