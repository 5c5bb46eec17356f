"""Static steps, which CUDA graphs replay: told apart by what their shapes depend on. Here they run uncaptured."""

import pytest
import torch

from server.engine.sequence import SteeringParams
from steer_ops import PAGED_ATTENTION_DECODE
from tests.server.desk import Desk
from tests.server.reference import plain
from tests.server.test_architectures import greedy_sequence, tiny

COMPILED = PAGED_ATTENTION_DECODE.has_kernel(torch.device("cpu"), torch.float32)
needs_kernel = pytest.mark.skipif(not COMPILED, reason="nothing can be compiled here")


@pytest.mark.parametrize(
    ("native", "buckets"),
    [
        pytest.param(True, {(4, 16), (2, 16), (1, 16)}, marks=needs_kernel),
        (False, {(4, 2), (4, 4), (2, 4), (1, 4), (1, 8), (1, 16)}),
    ],
    ids=["each row to its own length", "by gathering blocks"],
)
def test_a_kernel_that_reads_lengths_on_the_device_needs_buckets_of_rows_alone(
    native: bool, buckets: set[tuple[int, int]]
) -> None:
    desk = Desk(tiny("llama"), num_blocks=16, block_size=2, graphs=True, native=native)
    asked = [greedy_sequence((5, 6, 7 + new), new, SteeringParams()) for new in (3, 5, 16)]
    texts = desk.run(asked)
    for one in asked:
        assert texts[one] == plain(tiny("llama"), one.prompt_token_ids, new=one.sampling_params.max_new_tokens)
    assert desk.runner._graphs is not None
    assert set(desk.runner._graphs._captured) == buckets


@needs_kernel
def test_the_longest_text_bounds_the_tables_and_none_that_is_longer_is_cut() -> None:
    desk = Desk(tiny("llama"), block_size=2, graphs=True, limit=7)
    one = greedy_sequence((5, 6, 7), 12, SteeringParams())
    assert desk.run([one])[one] == plain(tiny("llama"), one.prompt_token_ids, new=12)
    assert desk.runner._graphs is not None
    assert set(desk.runner._graphs._captured) == {(1, 4), (1, 8)}
