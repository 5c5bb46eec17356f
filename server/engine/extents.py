"""Memory in pieces of halved sizes: a buddy allocator (Knowlton, 1965). Counts tokens; holds none."""

from bisect import insort

from server.attention.places import Extent

SMALLEST = 16  # tokens


class Extents:
    """`roots` pieces of `largest` tokens each, halved as far as asked, and put together again when both halves are
    free. Pieces of one size are handed out from the lowest address on, so that they come to lie side by side."""

    def __init__(self, largest: int, roots: int) -> None:
        if largest < 1 or roots < 1:
            raise ValueError(f"memory needs at least one piece of one token, not {roots} of {largest}")
        self.largest = largest
        self.total = largest * roots
        sizes = [largest]
        while sizes[-1] % 2 == 0 and sizes[-1] // 2 >= SMALLEST:
            sizes.append(sizes[-1] // 2)
        self._sizes = sizes[::-1]
        self._free: dict[int, list[int]] = {size: [] for size in sizes}
        self._free[largest] = [root * largest for root in range(roots)]

    @property
    def free(self) -> list[Extent]:
        """The pieces that nobody has."""
        return [Extent(start, size) for size, starts in self._free.items() for start in starts]

    @property
    def free_tokens(self) -> int:
        return sum(extent.size for extent in self.free)

    def size_for(self, tokens: int) -> int | None:
        """The smallest piece that holds `tokens`; None: no piece does."""
        return next((size for size in self._sizes if size >= tokens), None)

    def take(self, size: int, *, top: bool = False) -> Extent | None:
        """A piece of exactly `size`, one of the sizes there are, from the bottom or the top; None: none is free."""
        starts = self._free[size]
        if starts:
            return Extent(starts.pop(-1 if top else 0), size)
        if size == self.largest:
            return None
        whole = self.take(size * 2, top=top)
        if whole is None:
            return None
        halves = whole.start, whole.start + size
        insort(starts, halves[not top])
        return Extent(halves[top], size)

    def give(self, extent: Extent) -> None:
        """Takes a piece back."""
        start, size = extent.start, extent.size
        while size < self.largest:
            root = start - start % self.largest
            twin = root + ((start - root) // size ^ 1) * size
            if twin not in self._free[size]:
                break
            self._free[size].remove(twin)
            start, size = min(start, twin), size * 2
        insort(self._free[size], start)
