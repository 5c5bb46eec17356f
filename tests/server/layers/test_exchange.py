"""What is put in the place of a model's own layers says the same, in every family."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from server.layers.rotary import fuse_rotary
from server.layers.rotary_table import tabulate_rotary
from tests.server.test_architectures import MORE, tiny
from tests.steering.families import FAMILIES


@pytest.mark.parametrize("exchange", [fuse_rotary, tabulate_rotary])
@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_every_family_says_what_it_said(name: str, exchange: Callable[[Any], int]) -> None:
    model = tiny(name)
    ids = torch.randint(3, 60, (1, 23), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
        exchange(model)
        assert torch.allclose(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
