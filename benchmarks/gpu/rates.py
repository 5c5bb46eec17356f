"""What the device reaches."""

from collections.abc import Iterator

from benchmarks.gpu.figures import Figure
from benchmarks.gpu.world import World


def rates(world: World) -> Iterator[Figure]:
    yield Figure("a large copy, read and written", world.copy_rate / 1e9, "GB/s")
    yield Figure("a large product", world.matrix_rate / 1e12, "TFLOP/s", f"{world.sizes.matrix} wide")
