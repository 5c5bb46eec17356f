"""The kernel for CPUs steers as `operators.steer` does, which is beside it in float64."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.sequence import SteeringParams
from steer_ops import STEER_AND_COUNT
from steering import Clamp, Column, ColumnBank, Gate, Reading, SequenceSteering, Site, steer
from steering.bank import SiteBuffers
from steering.fused import fused_steer
from steering.hook import Steering
from tests.server.desk import Desk
from tests.server.test_architectures import columns, greedy_sequence, tiny

SITE = Site.parse("1.residual")
WIDTH = 67
COMPILED = STEER_AND_COUNT.has_kernel(torch.device("cpu"), torch.float32)
pytestmark = pytest.mark.skipif(not COMPILED, reason="nothing can be compiled here")


def column(seed: int, gate: Gate, keep_norm: bool, width: int = WIDTH, **changes: Any) -> Column:
    generator = torch.Generator().manual_seed(seed)
    return Column(
        attribute=f"a{seed}",
        site=SITE,
        gate=gate,
        vector=2 * torch.randn(width, generator=generator),
        gate_weight=torch.randn(width, generator=generator),
        gate_bias=0.3 * seed,
        keep_norm=keep_norm,
        range=(-9.0, 9.0),
        **changes,
    )


def bank_of(columns: list[Column], rows: list[tuple[float, ...]], tokens: list[int]) -> ColumnBank:
    bank = ColumnBank(device="cpu", max_tokens=len(tokens), spare=3)
    bank.add([column(99, Gate.SIGMOID, True, columns[0].width)])  # someone else's
    handle = bank.add(columns)
    bank.fill([SequenceSteering.of([(handle, row)]) for row in rows], tokens)
    return bank


def fused(bank: ColumnBank, activations: Tensor) -> Tensor:
    bank.opened.copy_(torch.rand(bank.opened.shape, generator=torch.Generator().manual_seed(5)))
    bank.opened[1] = 0
    found = fused_steer(bank.at(SITE), activations, bank.owners, bank.steered_tokens)
    assert found is not None
    return found


def expected(at: SiteBuffers, activations: Tensor) -> Tensor:
    parts = at.vectors.double(), at.weights.double(), at.biases.double(), at.kinds, at.keep_norm
    return steer(
        activations.double(), *parts, at.multipliers[: len(activations)].double(), clamps=at.clamps, opened=at.opened
    )


COLUMNS = [
    column(1, Gate.SIGMOID, True),
    column(2, Gate.CONSTANT, True),
    column(3, Gate.LINEAR, True),
    column(4, Gate.SIGMOID, False),
    column(5, Gate.CONSTANT, False),
    column(6, Gate.SIGMOID, True, clamp=Clamp(2.0, 0.5)),
    column(7, Gate.CONSTANT, False, clamp=Clamp(-3.0)),
    column(8, Gate.COSINE, True),
    column(9, Gate.SIGMOID, False, reads=Reading(Site.parse("0.residual"))),
]
ROWS = [
    (1.0, *(0.0,) * 8),
    (-1.0, 0.5, 0.25, 2.0, -1.0, 1.5, 0.75, 2.0, -1.5),
    (0.0, 0.0, 0.0, 0.0, 3.0, 0.0, -2.0, -1.0, 2.5),
    (0.0,) * 9,
]
TOKENS = [0, 1, 2, 3, -1, 1]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_it_steers(dtype: torch.dtype, tolerance: float, scale: float) -> None:
    bank = bank_of(COLUMNS, ROWS, TOKENS)
    activations = (scale * torch.randn(len(TOKENS), WIDTH, generator=torch.Generator().manual_seed(0))).to(dtype)
    found, wanted = fused(bank, activations), expected(bank.at(SITE), activations)
    assert found.dtype == dtype
    assert ((found.double() - wanted).norm(dim=1) / wanted.norm(dim=1)).max() < tolerance
    assert torch.equal(found[3:5], activations[3:5])
    assert not torch.equal(found[:3], activations[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_whose_multipliers_are_0_comes_out_as_it_went_in(dtype: torch.dtype) -> None:
    bank = bank_of(COLUMNS, ROWS, TOKENS)
    activations = torch.randn(len(TOKENS), WIDTH).to(dtype)
    activations[3, :4] = torch.tensor([-0.0, torch.nan, torch.inf, -torch.inf])
    activations[4, :2] = torch.tensor([-0.0, 1e-45])
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(fused(bank, activations).view(bits)[3:5], activations.view(bits)[3:5])


def test_what_is_not_a_number_stays_in_its_row() -> None:
    bank = bank_of(COLUMNS, ROWS, TOKENS)
    activations = torch.randn(len(TOKENS), WIDTH)
    activations[1, 5] = torch.nan
    assert fused(bank, activations).isnan().any(dim=1).tolist() == [False, True, False, False, False, False]


def test_norms_beyond_float32_are_left_alone_as_the_operators_leave_them() -> None:
    bank = bank_of(COLUMNS, ROWS, TOKENS)
    at = bank.at(SITE)
    activations = 1e30 * torch.randn(len(TOKENS), WIDTH)
    parts = at.vectors, at.weights, at.biases, at.kinds, at.keep_norm, at.multipliers[: len(TOKENS)]
    rest = {"clamps": at.clamps, "opened": at.opened}
    found, wanted = fused(bank, activations).double(), steer(activations, *parts, **rest).double()
    assert ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max() < 1e-5
    nothing = torch.zeros_like(activations)
    assert torch.equal(fused(bank, nothing), steer(nothing, *parts, **rest))


def test_a_view_is_steered_like_its_copy() -> None:
    bank = bank_of(COLUMNS, ROWS, TOKENS)
    wide = torch.randn(len(TOKENS), 3 * WIDTH)
    view = wide[:, WIDTH : 2 * WIDTH]
    assert torch.equal(fused(bank, view), fused(bank, view.clone()))
    across = torch.randn(WIDTH, len(TOKENS)).T
    assert torch.equal(fused(bank, across), fused(bank, across.contiguous()))


def test_many_wide_tokens_are_shared_among_the_threads() -> None:
    columns = [column(seed, Gate.SIGMOID, True, 512) for seed in (1, 2)]
    tokens = [index % 3 - 1 for index in range(300)]
    bank = bank_of(columns, [(1.0, -1.0), (0.0, 2.0)], tokens)
    activations = torch.randn(300, 512)
    wanted = expected(bank.at(SITE), activations)
    assert torch.allclose(fused(bank, activations).double(), wanted, rtol=1e-4, atol=1e-5)
    counts = bank.take_counts().tolist()
    assert counts == [int(token >= 0) for token in tokens]


def test_tokens_are_counted_where_the_site_owns_them() -> None:
    bank = bank_of(COLUMNS, ROWS, TOKENS)
    for _ in range(2):
        fused(bank, torch.randn(len(TOKENS), WIDTH))
    assert bank.take_counts().tolist() == [2, 2, 2, 0, 0, 2]


def test_a_model_is_steered_by_the_kernel_of_its_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though that for float32 has been refused."""
    monkeypatch.setattr(STEER_AND_COUNT, "_chosen", {("cpu", torch.float32): STEER_AND_COUNT.reference})
    monkeypatch.setattr("steering.hook.steer", lambda *args, **named: pytest.fail("by PyTorch"))
    model, bank = tiny("llama").bfloat16(), ColumnBank(device="cpu", max_tokens=4)
    handle = bank.add(columns("llama"))
    bank.fill([SequenceSteering.of([(handle, (1.0, 1.0))])], [0, 0, -1])
    with Steering(model, bank), torch.inference_mode():
        model(torch.tensor([[5, 6, 7]]), use_cache=False)
    assert bank.take_counts().tolist() == [1, 1, 0, 0]


def test_what_steers_is_compiled_before_the_first_checkpoint_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For sites of any width."""
    kernel, launched = STEER_AND_COUNT.for_tensor(torch.zeros(1)), set[tuple[Any, ...]]()

    def recording(activations: Tensor, *rest: Any) -> Any:
        launched.add((activations.shape[1], activations.dtype, activations.stride(0) % 16))
        return kernel(activations, *rest)

    monkeypatch.setattr(STEER_AND_COUNT, "_chosen", {("cpu", torch.float32): recording})
    desk = Desk(tiny("gemma"))
    desk.runner.warm_up()
    warm = launched.copy()
    launched.clear()
    [one, *_] = columns("gemma")
    heads = replace(one, site=Site.parse("0.attn_heads"), vector=torch.ones(48), gate_weight=torch.ones(48))
    handle = desk.bank.add([one, heads])
    desk.run([greedy_sequence((8, 9), 2, SteeringParams(SequenceSteering.of([(handle, (1.0, 1.0))])))])
    assert {width for width, *_ in launched} == {32, 48}
    assert launched <= warm


def test_where_pytorch_has_to_steer_nothing_happens() -> None:
    bank = bank_of(COLUMNS, ROWS, TOKENS)
    activations = torch.randn(len(TOKENS), WIDTH)
    other = activations[:, 1:]
    for given in (activations.double(), activations.half(), activations.clone().requires_grad_(), other):
        assert fused_steer(bank.at(SITE), given, bank.owners, bank.steered_tokens) is None
    assert bank.take_counts().tolist() == [0] * len(TOKENS)
