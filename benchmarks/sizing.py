"""How many texts fit on a GPU, computed from a model's shape: `python -m benchmarks.sizing` writes the tables of
docs/scaling.md."""

from dataclasses import dataclass
from pathlib import Path

from demo.readme import replace_between

PAGE = Path(__file__).parents[1] / "docs/scaling.md"
WRITTEN = ("<!-- sizes: written by python -m benchmarks.sizing -->", "<!-- end of sizes -->")
ELEMENT_BYTES = 2  # bfloat16
UTILIZATION = 0.9  # gpu_memory_utilization
STEP_GIB = 3.0  # the largest step and the CUDA graphs; a server measures its own at its start
LENGTHS = (1024, 4096, 32768)  # tokens of a text, prompt and answer
LEAST_TOKENS = 16384  # fewer are no use to a server
GPUS = {"24 GB (L4, RTX 4090)": 22.5, "80 GB (A100, H100)": 79.2, "141 GB (H200)": 139.8}  # GiB of one


@dataclass(frozen=True)
class Shape:
    """What decides the memory of a model."""

    name: str
    parameters: float
    layers: int
    kv_heads: int
    head_width: int

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token, in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_width * ELEMENT_BYTES

    @property
    def weights_gib(self) -> float:
        return self.parameters * ELEMENT_BYTES / 2**30

    def cache_tokens(self, gpu_gib: float, gpus: int = 1) -> int:
        """Tokens whose keys and values fit beside the weights; 0 where the weights themselves do not."""
        left = gpus * (UTILIZATION * gpu_gib - STEP_GIB) - self.weights_gib
        return max(0, int(left * 2**30 // self.token_bytes))


SHAPES = (
    Shape("Qwen 2.5 0.5B", 0.494e9, 24, 2, 64),
    Shape("Llama 3.1 8B", 8.03e9, 32, 8, 128),
    Shape("Qwen 2.5 32B", 32.8e9, 64, 8, 128),
    Shape("Llama 3.1 70B", 70.6e9, 80, 8, 128),
)


def tables() -> str:
    lines = [
        "| model, in bfloat16 | weights | keys and values of a token |",
        "| --- | ---: | --- |",
    ]
    for shape in SHAPES:
        sum_ = f"2 x {shape.layers} layers x {shape.kv_heads} heads x {shape.head_width} x {ELEMENT_BYTES} bytes"
        lines.append(f"| {shape.name} | {shape.weights_gib:.1f} GiB | {sum_} = {shape.token_bytes // 1024} KiB |")
    lengths = " | ".join(f"of {length:,}" for length in LENGTHS)
    lines += [
        "",
        f"| model | GPUs | tokens in the cache | texts {lengths} |",
        f"| --- | --- | {'---: | ' * 4}".rstrip(),
    ]
    for shape in SHAPES:
        for name, gib in GPUS.items():
            gpus = next((count for count in (1, 2, 4, 8) if shape.cache_tokens(gib, count) >= LEAST_TOKENS), 0)
            if not gpus:
                continue
            tokens = shape.cache_tokens(gib, gpus)
            texts = " | ".join(f"{tokens // length:,}" for length in LENGTHS)
            lines.append(f"| {shape.name} | {gpus} x {name} | {tokens:,} | {texts} |")
    return "\n".join(lines)


if __name__ == "__main__":
    replace_between(PAGE, WRITTEN, tables())
