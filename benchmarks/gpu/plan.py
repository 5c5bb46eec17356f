"""What is measured, in which order, in how much time, and at which sizes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """`function`: module:name, from a `World` to figures. `limit`: seconds after which it is given up. `optional`: the
    machine that figures are wanted of may lack what it needs."""

    function: str
    limit: float
    about: str
    optional: bool = False


# Not longer than 465 s together, as they are expected to take; each may take its limit where others leave time. Those
# that something is wanted of come first.
PARTS = {
    "tests": Part("benchmarks.gpu.checks:tests", 90, "the tests that need a GPU, and those of Triton's kernels"),
    "rates": Part("benchmarks.gpu.rates:rates", 60, "what a large copy and a large product reach"),
    "engine": Part("benchmarks.gpu.checks:engine", 90, "kernels, layers and CUDA graphs that are used"),
    "decode": Part("benchmarks.gpu.generation:decode", 150, "decoding steps beside their floor"),
    "prefill": Part("benchmarks.gpu.generation:prefill", 60, "prompts in one step, beside a large product"),
    "steering": Part("benchmarks.gpu.generation:steering", 75, "steered against no column; many configurations"),
    "arms": Part("benchmarks.gpu.generation:arms", 60, "a second arm beside one; many arms over one long prompt"),
    "mixed": Part("benchmarks.gpu.generation:mixed", 30, "decoding steps that read a short prompt as well"),
    "arrivals": Part("benchmarks.gpu.generation:arrivals", 60, "requests at 80 % of what the engine can do"),
    "generate": Part("benchmarks.gpu.others:generate", 75, "transformers.generate"),
    "pyvene": Part("benchmarks.gpu.others:by_pyvene", 60, "pyvene, where it is installed", optional=True),
    "http": Part("benchmarks.gpu.over_http:http", 200, "clients over HTTP against the engine alone"),
    "waiting": Part("benchmarks.gpu.generation:waiting", 40, "first tokens of short prompts behind a long one"),
    "memory": Part("benchmarks.gpu.generation:memory", 40, "what a token takes in the cache"),
    "extraction": Part("benchmarks.gpu.fitting:extraction", 60, "activations of as many texts as TruthfulQA has"),
    "fit": Part("benchmarks.gpu.fitting:fit", 40, "a fit of MAT-Steer"),
    "parallel": Part(
        "benchmarks.gpu.parallel:parallel",
        240,
        "the server on two GPUs (tensor parallel) against one",
        optional=True,
    ),
}


@dataclass(frozen=True)
class Sizes:
    """Of everything that is measured."""

    shape: str
    decode: tuple[tuple[int, int, float | None], ...]  # rows, tokens of their texts, wanted per cent of the floor
    new: int  # tokens that are decoded to time a step
    rounds: int
    prompts: tuple[tuple[int, float | None], ...]  # tokens, wanted per cent of the matrix rate
    step: int  # tokens of a step at most
    rows: int  # sequences at most
    cache: int  # tokens
    context: int  # tokens of the longest text
    longest: int  # tokens of the longest prompt, and of the longest answer, where many come one after the other
    matrix: int  # rows and columns of a large product
    copy: int  # bytes of a large copy
    steered_rows: tuple[int, ...]
    pairs: tuple[tuple[int, float], ...]  # prompts with two arms each, and by how many per cent a step may be longer
    arms: int
    arm_prompt: int  # tokens
    # Rows that decode while short prompts are read, tokens of their texts, by how many per cent a step may be longer.
    # 50: by the products of a prompt of 64 tokens, were they to come after the reading of the weights.
    beside_rows: tuple[tuple[int, int, float | None], ...]
    beside_prompt: int  # tokens of these prompts
    long: int  # tokens of the prompt that others wait behind
    clients: tuple[tuple[int, float | None], ...]  # over HTTP, and the per cent wanted of the engine alone
    requests: int  # of a client
    texts: int | None  # whose activations are extracted; None: all
    fit_rows: int  # of each side of an attribute
    fit_epochs: int
    beside: tuple[int, ...]  # rows beside transformers.generate
    test_options: tuple[str, ...] = ()  # of the tests of Triton's kernels


FULL = Sizes(
    shape="8B",
    decode=(
        *((rows, 128, 80) for rows in (1, 8, 32)),
        (128, 128, None),
        (256, 128, 60),
        *((rows, context, 70) for rows, context in ((1, 8192), (8, 4096), (32, 2048), (64, 1024))),
    ),
    new=96,
    rounds=4,
    prompts=((2048, None), (8192, 60)),
    step=8192,
    rows=256,
    cache=160_000,
    context=16_640,
    longest=128,
    matrix=8192,
    copy=2**30,
    steered_rows=(1, 32, 256),
    pairs=((1, 5), (16, 10)),
    arms=8,
    arm_prompt=8000,
    beside_rows=((32, 128, 50), (8, 4096, None), (1, 8000, 50)),
    beside_prompt=64,
    long=16_000,
    clients=((1, None), (32, None), (128, 85), (256, None)),
    requests=4,
    texts=None,
    fit_rows=512,
    fit_epochs=20,
    beside=(1, 8, 32),
)
TINY = Sizes(
    shape="tiny",
    decode=((1, 16, 80), (4, 48, None)),
    new=8,
    rounds=1,
    prompts=((32, None), (64, 60)),
    step=64,
    rows=8,
    cache=2048,
    context=256,
    longest=32,
    matrix=128,
    copy=2**20,
    steered_rows=(1, 4),
    pairs=((1, 5), (2, 10)),
    arms=3,
    arm_prompt=100,
    beside_rows=((4, 128, 50), (1, 200, None)),
    beside_prompt=8,
    long=200,
    clients=((1, None), (2, 85)),
    requests=1,
    texts=24,
    fit_rows=16,
    fit_epochs=20,
    beside=(1, 2),
    test_options=("-k", "all_are_there"),  # interpreted on a CPU, the others take minutes
)
SIZES = {sizes.shape: sizes for sizes in (FULL, TINY)}
