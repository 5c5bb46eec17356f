"""What each compiled kernel takes beside what it stands for, microseconds: `python -m benchmarks.cpu_kernels --help`.

In turn, call by call; medians. Several copies of the data are gone through, so that they do not stay in a core's cache.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from benchmarks.machine import described
from server.threads import usable_cores
from steer_ops import DTYPES, PAGED_ATTENTION_DECODE
from steer_ops.layers import fuse_mlps, fuse_norms
from steer_ops.linears import PackedLinear, TiledLinear, pack_linears
from steering import Column, ColumnBank, Gate, SequenceSteering, Site, steer
from steering.fused import fused_steer

COPIES, REPEAT = 12, 60
Case = tuple[str, Callable[[int], object], Callable[[int], object]]  # what it is, PyTorch's way and ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu-kernels.md"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = ["# Compiled kernels beside what they stand for", ""]
    lines += [f"- {key}: {value}" for key, value in described().items()]
    lines += ["", "Microseconds a call, medians of interleaved calls.", "", "| | PyTorch | compiled | times |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    with torch.inference_mode():
        for cases in (attention(), linear(), steering(), norm(), gated_mlp()):
            for name, theirs, ours in cases:
                them, us = beside(theirs, ours)
                lines.append(f"| {name} | {them:.0f} | {us:.0f} | {them / us:.1f} |")
                print(lines[-1], flush=True)
    args.out.write_text("\n".join(lines) + "\n")


def beside(theirs: Callable[[int], object], ours: Callable[[int], object]) -> tuple[float, float]:
    taken: tuple[list[float], list[float]] = ([], [])
    for number in range(REPEAT + 5):
        for way, times in zip((theirs, ours), taken, strict=True):
            start = time.perf_counter()
            for copy in range(COPIES):
                way(copy)
            times.append((time.perf_counter() - start) / COPIES * 1e6)
        if number == 4:  # these warmed up
            taken = ([], [])
    return statistics.median(taken[0]), statistics.median(taken[1])


def attention() -> Iterator[Case]:
    """Rows of 32 to 256 tokens, in blocks of 64 that lie in no order."""
    random = torch.Generator().manual_seed(0)
    ops = PAGED_ATTENTION_DECODE
    for dtype in DTYPES:
        for heads, kv_heads in ((4, 4), (12, 12), (9, 3)):
            for rows in (1, 8, 32):
                lengths = torch.randint(32, 256, (rows,), generator=random).int()
                tables = torch.randperm(4 * rows, generator=random).int().view(rows, 4)
                caches = [
                    [torch.zeros(4 * rows, kv_heads, 64, 64, dtype=dtype).normal_() for _ in range(2)]
                    for _ in range(COPIES)
                ]
                query, key = (torch.randn(rows, count, 64).to(dtype) for count in (heads, kv_heads))
                rest = tables, lengths, torch.empty_like(query)

                def way(
                    op: Callable[..., None],
                    new: tuple[Tensor, ...] = (query, key, key),
                    caches: list[list[Tensor]] = caches,
                    rest: tuple[Tensor, ...] = rest,
                ) -> Callable[[int], object]:
                    return lambda copy: op(*new, *caches[copy], *rest, scale=0.125)

                name = f"attention, {rows} rows, {heads} heads over {kv_heads} of 64, {name_of(dtype)}"
                yield name, way(ops.reference), way(ops.choose(torch.device("cpu"), dtype))


def linear() -> Iterator[Case]:
    for dtype in DTYPES:
        for outputs, inputs in ((256, 256), (4096, 256), (4096, 768), (768, 2048)):
            weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(COPIES)]
            if not TiledLinear.takes(weights[0]):
                continue
            packed = [PackedLinear(weight, None) for weight in weights]
            tiled = [TiledLinear(weight, None) for weight in weights]
            for tokens in (1, 8, 32, 128, 512):
                x = torch.randn(1, tokens, inputs).to(dtype)

                def way(layers: list[nn.Module], x: Tensor) -> Callable[[int], object]:
                    return lambda copy: layers[copy](x)

                name = f"linear (oneDNN's), {tokens} x {inputs} to {outputs}, {name_of(dtype)}"
                yield name, way([*packed], x), way([*tiled], x)


def steering() -> Iterator[Case]:
    site = Site.parse("1.residual")
    for width in (256, 768, 4096):
        columns = [
            Column(
                attribute=f"a{index}",
                site=site,
                gate=Gate.SIGMOID,
                vector=torch.randn(width),
                gate_weight=torch.randn(width),
                gate_bias=0.0,
                keep_norm=True,
                range=(-9.0, 9.0),
            )
            for index in range(3)
        ]
        for tokens in (1, 8, 32):
            bank = ColumnBank(device="cpu", max_tokens=tokens)
            bank.fill([SequenceSteering.of([(bank.add(columns), (1.0, 0.5, -0.5))])], [0] * tokens)
            at, x = bank.at(site), torch.randn(tokens, width)
            parts = at.vectors, at.weights, at.biases, at.kinds, at.keep_norm, at.multipliers

            def theirs(copy: int, x: Tensor = x, parts: tuple[Tensor, ...] = parts) -> object:
                return steer(x, *parts, all_keep=True)

            def ours(copy: int, x: Tensor = x, bank: ColumnBank = bank) -> object:
                return fused_steer(bank.at(site), x, bank.owners, bank.steered_tokens)

            yield f"steering, {tokens} tokens, {width} wide, 3 attributes", theirs, ours


def norm() -> Iterator[Case]:
    for dtype in DTYPES:
        for tokens, width in ((8, 256), (32, 256), (8, 4096), (512, 768)):
            own = LlamaRMSNorm(width).to(dtype)
            holder = nn.Sequential(own)
            fuse_norms(holder)
            x = torch.randn(1, tokens, width).to(dtype)

            def theirs(copy: int, x: Tensor = x, own: nn.Module = own) -> object:
                return own(x)

            def ours(copy: int, x: Tensor = x, mine: nn.Module = holder[0]) -> object:
                return mine(x)

            yield f"RMS norm, {tokens} tokens, {width} wide, {name_of(dtype)}", theirs, ours


def gated_mlp() -> Iterator[Case]:
    """Both on packed linear layers."""
    config = LlamaConfig(hidden_size=256, intermediate_size=640, num_attention_heads=4)
    for dtype in DTYPES:
        for tokens in (8, 32, 512):
            layers: list[nn.Module] = [LlamaMLP(config) for _ in range(2)]  # type: ignore[no-untyped-call]
            own, mine = (nn.Sequential(layer.to(dtype)).requires_grad_(False) for layer in layers)
            pack_linears(own)
            pack_linears(mine)
            fuse_mlps(mine)
            x = torch.randn(1, tokens, 256).to(dtype)

            def theirs(copy: int, x: Tensor = x, own: nn.Module = own) -> object:
                return own(x)

            def ours(copy: int, x: Tensor = x, mine: nn.Module = mine) -> object:
                return mine(x)

            yield f"feed-forward layer, {tokens} tokens, 256 to 640 to 256, {name_of(dtype)}", theirs, ours


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
