"""Compiles every kernel for an H200, which takes no GPU: `python -m tests.steer_ops.compile_kernels`. In a process of
its own, because the others interpret them. The interpreter takes much that the compiler does not."""

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from steer_ops.cuda import kv_cache, layers, paged_attention, paged_prefill, rotary, steer

SHARED_MEMORY = 227 * 1024  # of a multiprocessor
INTEGERS = {
    **dict.fromkeys(("tables", "lengths", "query_starts"), "*i32"),
    "owners": "*i32",
    "counts": "*i64",
    "places": "*i64",
    "blocks": "*i64",
    "caches": "*i64",
}
COLUMNS = {
    "kinds": "*i8",
    "keep_norm": "*i1",
    **dict.fromkeys(("vectors", "weights", "biases", "clamps", "multipliers", "opened"), "*fp32"),
}
FLOATS = {"parts": "*fp32", "logs": "*fp32", **dict.fromkeys(("scale", "softcap", "epsilon"), "fp32")}
STRIDES = "_row", "_head", "_stride"
# How arguments that are int32 end.
SIZES = (*STRIDES, "window", "chunks", "first", "rows", "heads", "extras", "columns", "owner")
HEADS = {"KV_HEADS": 8, "WIDTH": 128, "WIDTH_PAD": 128, "VALUE_WIDTH": 128, "VALUE_PAD": 128, "BLOCK_SIZE": 64}
PARTING = {"TILE": 64, "LEAST_TILES": paged_attention.LEAST_TILES, "LANES": paged_attention.LANES}
ROW = {"WIDTH": 4096, "PAD": 4096}


def compiled(kernel: Any, dtype: str, constants: dict[str, Any], wide: str = "", **options: int) -> Any:
    """wide: an argument that is float32."""
    types = {**INTEGERS, **COLUMNS, **FLOATS, wide: "*fp32"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32" if name.endswith(SIZES) else f"*{dtype}")
        for name in kernel.arg_names
    }
    # As in a launch: where nothing is known of alignment, loads of half precision are not on their way beforehand.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, parameter in enumerate(kernel.params)
        if (signature[parameter.name].startswith("*") and not parameter.do_not_specialize_on_alignment)
        or (parameter.name.endswith(STRIDES) and not parameter.do_not_specialize)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def attention(dtype: str, rules: bool, **changes: int) -> Any:
    sizes = HEADS | PARTING | {"GROUPS": 4, "GROUPS_PAD": 16, "TURNED": 128} | changes
    constants = sizes | {"HAS_SOFTCAP": rules, "HAS_SINKS": rules}
    return compiled(paged_attention._attend, dtype, constants, num_stages=paged_attention.STAGES)


def prompts(dtype: str, width: int, rules: bool) -> Any:
    itemsize = 4 if dtype == "fp32" else 2
    rows, tile = paged_prefill.tile_sizes(width, width, itemsize, SHARED_MEMORY // 2)
    sizes = dict.fromkeys(("WIDTH", "WIDTH_PAD", "VALUE_WIDTH", "VALUE_PAD"), width)
    constants = sizes | {"KV_HEADS": 8, "GROUPS": 3, "BLOCK_SIZE": 64, "ROWS": rows, "TILE": tile}
    constants |= dict.fromkeys(("HAS_WINDOW", "HAS_SOFTCAP", "HAS_SINKS"), rules)
    return compiled(paged_prefill._attend, dtype, constants, num_stages=paged_prefill.STAGES, num_warps=8)


def main() -> None:
    found = [
        attention("bf16", False),
        attention("fp16", True, BLOCK_SIZE=4, TURNED=0),
        attention("fp32", False, TILE=32, TURNED=32),
        compiled(
            paged_attention._join,
            "bf16",
            PARTING | {"HEADS": 32, "VALUE_WIDTH": 128, "VALUE_PAD": 128, "JOINED": paged_attention.JOINED},
            num_warps=2,
        ),
        prompts("bf16", 128, False),
        prompts("fp16", 256, True),
        prompts("fp32", 128, True),
        compiled(kv_cache._write, "bf16", HEADS | {"HEADS": 8}),
        compiled(kv_cache._gather, "bf16", HEADS | {"HEADS": 8}),
        compiled(kv_cache._copy, "bf16", {"UNIT": tl.int64, "NUMBERS": kv_cache.NUMBERS}),
        compiled(steer._steer, "bf16", ROW | {"TOGETHER": steer.TOGETHER}, num_warps=8),
        compiled(layers._rms_norm, "bf16", ROW, num_warps=8),
        compiled(layers._add_rms_norm, "bf16", ROW, num_warps=8),
        compiled(layers._add_rms_norm, "bf16", ROW, wide="weight", num_warps=8),
        *(
            compiled(layers._gate_mul, "bf16", {"WIDTH": 14336, "GATES": layers.GATES, "GELU": gelu})
            for gelu in (False, True)
        ),
        compiled(
            rotary._rotary,
            "bf16",
            {"QUERY_HEADS": 32, "KEY_HEADS": 8, "WIDTH": 128, "PAD": 128, "TURNED": 128, "HEADS": rotary.HEADS},
            num_warps=1,
        ),
    ]
    for kernel in found:
        assert kernel.metadata.shared <= SHARED_MEMORY // 2, "two programs fit a multiprocessor"
        print(kernel.metadata.name, len(kernel.asm["cubin"]))


if __name__ == "__main__":
    main()
