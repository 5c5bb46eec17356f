"""Which rows the programs of decode attention find that they have parts of."""

import triton
import triton.language as tl

from steer_ops.cuda.paged_attention import _extra, _share


@triton.jit
def divide(lengths, out, rows, extras, window, tile: tl.constexpr, least_tiles: tl.constexpr, lanes: tl.constexpr):
    """out [extras, 3]: of each row and part, and how many tiles a part has."""
    item = tl.program_id(0)
    share = _share(lengths, rows, extras, window, tile, least_tiles, lanes)
    row, part = _extra(item, share, lengths, rows, window, tile, lanes)
    tl.store(out + 3 * item, row)
    tl.store(out + 3 * item + 1, part)
    tl.store(out + 3 * item + 2, share)
