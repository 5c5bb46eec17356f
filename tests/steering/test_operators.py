import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer_ops.plain import READ
from steering import Gate, gate_codes, gate_values, steer, trace
from steering.types import LARGEST

GATES = st.sampled_from(Gate)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def paper_gate(a, w, b, kind):
    linear, length = a @ w + b, np.linalg.norm(a)
    return {
        Gate.SIGMOID: 1 / (1 + math.exp(-max(linear, -700))),
        Gate.CONSTANT: 1.0,
        Gate.LINEAR: linear,
        Gate.COSINE: float((a @ w / length if length else 0.0) + b > 0),
    }[kind]


def paper_steer(a, vectors, weights, biases, kinds, keep_norm, multipliers, clamps):
    """arXiv 2502.12446, eq. 1-3, for one token, in float64; and the factor of the norm rescale. A column with a clamp
    moves the projection on its vector to origin + multiplier x value."""
    deltas = [
        (m if math.isnan(value) else (m != 0) * (origin + m * value - a @ v)) * paper_gate(a, w, b, kind) * v
        for v, w, b, kind, m, (value, origin) in zip(vectors, weights, biases, kinds, multipliers, clamps, strict=True)
    ]
    f, factor = a + sum((d for d, keep in zip(deltas, keep_norm, strict=True) if keep), np.zeros_like(a)), 1.0
    if any(keep and m != 0 for keep, m in zip(keep_norm, multipliers, strict=True)) and np.linalg.norm(f) > 0:
        factor = np.linalg.norm(a) / np.linalg.norm(f)
    return f * factor + sum(
        (d for d, keep in zip(deltas, keep_norm, strict=True) if not keep), np.zeros_like(a)
    ), factor


@st.composite
def problems(draw, max_rows=4):
    rows, columns = draw(st.integers(1, max_rows)), draw(st.integers(1, 4))
    width = draw(st.sampled_from([2, 5, 16, 64]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    dtype = draw(st.sampled_from(list(ROUNDING)))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0, 300.0]))
    numbers = st.one_of(st.just(0.0), st.floats(-4, 4, width=32))
    multipliers = draw(st.lists(st.lists(numbers, min_size=columns, max_size=columns), min_size=rows, max_size=rows))
    kinds = draw(st.lists(GATES, min_size=columns, max_size=columns))
    clamped = torch.tensor(draw(st.lists(st.booleans(), min_size=columns, max_size=columns)))
    vectors = torch.randn(columns, width, generator=random)
    vectors[clamped] = torch.nn.functional.normalize(vectors[clamped], dim=1)
    clamps = 3 * torch.randn(columns, 2, generator=random)
    clamps[~clamped] = torch.nan
    weights = torch.randn(columns, width, generator=random) / width
    biases = torch.randn(columns, generator=random)
    activations = (torch.randn(rows, width, generator=random) * scale).to(dtype)
    lengths = activations.double().norm(dim=1, keepdim=True).clamp_min(1e-19)
    margins = (activations.double() @ weights.double().T / lengths + biases).abs()
    assume(float(margins.min()) > 1e-5)  # no cosine so near its threshold that rounding decides
    return {
        "activations": activations,
        "vectors": vectors,
        "weights": weights,
        "biases": biases,
        "clamps": clamps,
        "kinds": gate_codes(kinds),
        "keep_norm": torch.tensor(draw(st.lists(st.booleans(), min_size=columns, max_size=columns))),
        "multipliers": torch.tensor(multipliers, dtype=torch.float32),
    }


def plan(width: int = 8, columns: int = 3, rows: int = 4, **changes) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(7)
    return {
        "activations": torch.randn(rows, width, generator=random),
        "vectors": torch.randn(columns, width, generator=random),
        "weights": torch.randn(columns, width, generator=random),
        "biases": torch.randn(columns, generator=random),
        "kinds": gate_codes([Gate.SIGMOID, Gate.CONSTANT, Gate.LINEAR][:columns]),
        "keep_norm": torch.tensor([True, False, True][:columns]),
        "multipliers": torch.ones(rows, columns),
    } | changes


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


@given(problems())
@settings(deadline=None, max_examples=150)
def test_steering_is_what_the_paper_writes(problem):
    result = steer(**problem)
    exact = [problem[name].double().numpy() for name in ("vectors", "weights", "biases")]
    kinds = [list(Gate)[[gate.code for gate in Gate].index(int(code))] for code in problem["kinds"]]
    for row, (a, m) in enumerate(
        zip(problem["activations"].double().numpy(), problem["multipliers"].tolist(), strict=True)
    ):
        clamps = problem["clamps"].double().numpy()
        expected, factor = paper_steer(a, *exact, kinds, problem["keep_norm"].tolist(), m, clamps)
        terms = (
            (abs(x) if math.isnan(c) else abs(o) + abs(x * c) + np.abs(a) @ np.abs(v))
            * np.linalg.norm(v)
            * (1 + np.abs(a) @ np.abs(w) + abs(b))
            for x, v, w, b, (c, o) in zip(m, *exact, clamps, strict=True)
        )
        # float32 rounds relative to the largest term, and a rescale that undoes a cancellation magnifies that.
        tolerance = 2e-6 * max(1.0, factor) * (np.linalg.norm(a) + sum(terms))
        found, numbers = result[row].double().numpy(), torch.finfo(result.dtype)
        beyond = np.abs(expected) > 0.99 * numbers.max  # float16 ends at 65,504: what is larger is infinite
        assert (found[beyond] * np.sign(expected[beyond]) > 0.98 * numbers.max).all()
        error = np.abs(found - expected, where=~beyond, out=np.zeros_like(expected)).max()
        assert error <= ROUNDING[result.dtype] * np.abs(expected).max() + tolerance + numbers.tiny
    assert result.dtype == problem["activations"].dtype


@given(problems())
@settings(deadline=None, max_examples=100)
def test_gates_are_what_the_paper_writes(problem):
    gates = gate_values(problem["activations"], problem["weights"], problem["biases"], problem["kinds"])
    assert gates.dtype == torch.float32
    kinds = {gate.code: gate for gate in Gate}
    for a, row in zip(problem["activations"].double().numpy(), gates.tolist(), strict=True):
        for w, b, code, value in zip(
            problem["weights"].double().numpy(), problem["biases"].tolist(), problem["kinds"].tolist(), row, strict=True
        ):
            scale = 1 + np.abs(a) @ np.abs(w) + abs(b)
            assert value == pytest.approx(paper_gate(a, w, b, kinds[code]), abs=2e-6 * scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_norms_survive_where_half_precision_squares_overflow(dtype):
    width = 8192
    activations = (torch.randn(2, width) * 200).to(dtype)
    problem = plan(width, 1, 2, activations=activations, kinds=gate_codes([Gate.CONSTANT]))
    problem["vectors"] = problem["vectors"] * 100
    result = steer(**problem)
    norms = [torch.linalg.vector_norm(t.double(), dim=1) for t in (problem["activations"], result)]
    assert torch.isfinite(result).all()
    assert not torch.equal(result, problem["activations"])
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_multiplier_zero_leaves_every_bit_within_a_mixed_batch(dtype):
    odd = torch.tensor(
        [[-0.0, 0.0, math.inf, -math.inf], [math.nan, -0.0, 1e-7, -5.0], [-0.0] * 4, [3.0, -1.0, 2.0, 9.0]]
    )
    payload = bits(odd.to(dtype)).clone()
    payload[1, 0] ^= 1  # a NaN with another payload
    activations = payload.view(dtype)
    multipliers = torch.tensor([[0.0] * 3, [-0.0] * 3, [0.0] * 3, [1.0, 0.0, 2.0]])
    result = steer(**plan(4, activations=activations, multipliers=multipliers))
    assert torch.equal(bits(result)[:3], bits(activations)[:3])
    assert not torch.equal(result[3], activations[3])


@given(problems(max_rows=6), st.integers(0, 5))
@settings(deadline=None, max_examples=80)
def test_a_row_does_not_depend_on_its_neighbours(problem, row):
    row %= len(problem["activations"])
    others = torch.arange(len(problem["activations"])) != row
    alone = problem["activations"].clone(), problem["multipliers"].clone()
    for value in (0.0, 1.5, math.nan, math.inf):
        activations, multipliers = (tensor.clone() for tensor in alone)
        activations[others] = value
        multipliers[others] = 3.0
        changed = steer(**problem | {"activations": activations, "multipliers": multipliers})
        assert torch.equal(bits(changed[row]), bits(steer(**problem)[row]))


def test_norm_is_kept_exactly_where_norm_keeping_columns_act():
    problem = plan(keep_norm=torch.tensor([True, True, True]))
    norms = [torch.linalg.vector_norm(t, dim=1) for t in (problem["activations"], steer(**problem))]
    torch.testing.assert_close(*norms)


def test_a_column_that_does_not_keep_the_norm_is_added_after_the_rescale():
    problem = plan(multipliers=torch.tensor([[1.0, 2.0, 0.0]] * 4))
    kept = steer(**problem | {"multipliers": torch.tensor([[1.0, 0.0, 0.0]] * 4)})
    torch.testing.assert_close(steer(**problem), kept + 2 * problem["vectors"][1])


def test_rows_without_a_norm_keeping_multiplier_are_not_rescaled():
    problem = plan(multipliers=torch.tensor([[0.0, 1.0, 0.0]] * 4))
    torch.testing.assert_close(steer(**problem), problem["activations"] + problem["vectors"][1])


def test_a_zero_activation_stays_zero_and_a_delta_that_cancels_gives_zero():
    zero = torch.zeros(1, 4)
    still = steer(**plan(4, 1, activations=zero, multipliers=torch.ones(1, 1)))
    assert torch.equal(still, zero)
    ones = torch.ones(1, 4)
    gone = plan(4, 1, activations=ones, vectors=-ones, kinds=gate_codes([Gate.CONSTANT]), multipliers=torch.ones(1, 1))
    assert torch.equal(steer(**gone), zero)


def test_directional_ablation_removes_the_direction():
    unit = torch.nn.functional.normalize(torch.randn(1, 16), dim=1)
    problem = plan(16, 1, vectors=-unit, weights=unit, biases=torch.zeros(1), kinds=gate_codes([Gate.LINEAR]))
    result = steer(**problem | {"keep_norm": torch.tensor([False])})
    torch.testing.assert_close(result @ unit.T, torch.zeros(4, 1), atol=1e-6, rtol=0)


def test_a_cosine_gate_is_open_beyond_its_threshold_whatever_the_length():
    angles = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.1])
    directions = torch.stack([angles.cos(), angles.sin()], dim=1)
    for length in (1e-15, 1.0, 1e15):
        found = gate_values(length * directions, torch.tensor([[1.0, 0]]), torch.tensor([-0.6]), gate_codes(["cosine"]))
        assert found[:, 0].tolist() == [1, 1, 0, 0, 0]
    nothing = gate_values(torch.zeros(1, 2), torch.ones(2, 2), torch.tensor([0.1, -0.1]), gate_codes(["cosine"] * 2))
    assert nothing.tolist() == [[1, 0]]


def test_a_gate_that_was_read_elsewhere_is_taken_as_it_is():
    opened = torch.tensor([[0.25, 9.0, -1.0], [0.0, 9.0, 2.0], [1.0, 9.0, 0.0], [0.0, 9.0, 0.0]])
    kinds = torch.tensor([READ, Gate.CONSTANT.code, READ], dtype=torch.int8)
    problem = plan(kinds=kinds, keep_norm=torch.tensor([False] * 3), opened=opened)
    a, v = problem["activations"], problem["vectors"]
    expected = a + opened[:, :1] * v[0] + v[1] + opened[:, 2:] * v[2]
    torch.testing.assert_close(steer(**problem), expected)
    seen = trace(**{name: value for name, value in problem.items() if name != "keep_norm"})
    assert seen.gates.tolist() == [[0.25, 1, -1], [0, 1, 2], [1, 1, 0], [0, 1, 0]]


def test_a_closed_gate_leaves_every_bit():
    problem = plan(kinds=torch.full((3,), READ, dtype=torch.int8), opened=torch.zeros(4, 3))
    problem["activations"][0, :3] = torch.tensor([-0.0, math.inf, math.nan])
    assert torch.equal(bits(steer(**problem)), bits(problem["activations"]))


def clamp_plan(value: float, origin: float = 0.0, **changes) -> dict[str, Tensor]:
    unit = torch.nn.functional.normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(3)), dim=1)
    clamps = torch.tensor([[value, origin]])
    return plan(16, 1, vectors=unit, kinds=gate_codes([Gate.CONSTANT]), keep_norm=torch.tensor([False])) | {
        "clamps": clamps, **changes
    }  # fmt: skip


@pytest.mark.parametrize(("multiplier", "projection"), [(1.0, 4.5), (2.0, 7.5), (-1.0, -1.5), (0.25, 2.25)])
def test_a_clamp_sets_the_projection_whatever_it_was_and_nothing_else(multiplier, projection):
    problem = clamp_plan(3.0, 1.5, multipliers=torch.full((4, 1), multiplier))
    a, v, result = problem["activations"], problem["vectors"], steer(**problem)
    torch.testing.assert_close(result @ v.T, torch.full((4, 1), projection), atol=1e-5, rtol=0)
    torch.testing.assert_close(result - (result @ v.T) * v, a - (a @ v.T) * v, atol=1e-5, rtol=0)


def test_a_clamp_goes_the_share_of_the_way_that_its_gate_is_open():
    problem = clamp_plan(3.0, kinds=gate_codes([Gate.SIGMOID]))
    a, v = problem["activations"], problem["vectors"]
    opened = gate_values(a, *(problem[name] for name in ("weights", "biases", "kinds")))
    torch.testing.assert_close(steer(**problem) @ v.T, a @ v.T + opened * (3.0 - a @ v.T), atol=1e-5, rtol=0)


def test_a_clamp_that_keeps_the_norm_is_rescaled_with_the_rest():
    problem = clamp_plan(3.0, keep_norm=torch.tensor([True]))
    free = steer(**problem | {"keep_norm": torch.tensor([False])})
    a = problem["activations"]
    torch.testing.assert_close(steer(**problem), free * a.norm(dim=1, keepdim=True) / free.norm(dim=1, keepdim=True))


def test_a_clamp_with_multiplier_zero_leaves_every_bit():
    problem = clamp_plan(3.0, multipliers=torch.tensor([[0.0], [-0.0], [1.0], [0.0]]))
    problem["activations"][0, :3] = torch.tensor([-0.0, math.inf, math.nan])
    result = steer(**problem)
    assert torch.equal(bits(result)[[0, 1, 3]], bits(problem["activations"])[[0, 1, 3]])
    assert not torch.equal(result[2], problem["activations"][2])


def test_a_gate_that_overflows_does_not_reach_a_row_that_does_not_use_it():
    weights = torch.zeros(3, 8)
    weights[2] = 3e38
    problem = plan(weights=weights, multipliers=torch.tensor([[1.0, 1.0, 0.0]] * 4))
    assert torch.isfinite(steer(**problem)).all()


@pytest.mark.parametrize("kind", Gate)
def test_the_largest_columns_leave_all_that_is_told_finite(kind):
    longest = LARGEST * torch.nn.functional.normalize(torch.randn(3, 8), dim=1)
    problem = plan(vectors=longest, weights=longest, biases=torch.full((3,), LARGEST), kinds=gate_codes([kind] * 3))
    problem |= {"activations": 1e4 * problem["activations"], "multipliers": torch.full((4, 3), LARGEST)}
    assert torch.isfinite(steer(**problem)).all()
    told = trace(**{name: value for name, value in problem.items() if name != "keep_norm"})
    assert all(torch.isfinite(numbers).all() for numbers in vars(told).values())


def test_float64_activations_are_steered_in_float64():
    problem = plan()
    wide = steer(**{name: t.double() if t.is_floating_point() else t for name, t in problem.items()})
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), steer(**problem))


def test_autocast_does_not_lower_the_precision():
    problem = plan(64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = steer(**problem)
    assert torch.equal(inside, steer(**problem))


def test_gradients_are_finite_even_for_zero_rows():
    problem = plan(activations=torch.zeros(4, 8), multipliers=torch.tensor([[1.0, 1.0, 1.0], [0.0] * 3] * 2))
    problem["clamps"] = torch.tensor([[math.nan] * 2, [2.0, 1.0], [math.nan] * 2])
    leaves = [problem[name].requires_grad_() for name in ("activations", "vectors", "weights", "biases", "multipliers")]
    steer(**problem).square().sum().backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves if leaf.grad is not None)


def test_nothing_looks_at_a_value_so_that_a_graph_can_hold_it():
    problem = {name: tensor.to("meta") for name, tensor in plan().items()}
    assert steer(**problem).shape == (4, 8)


def test_trace_tells_what_each_column_did():
    problem = plan()
    seen = trace(**{name: value for name, value in problem.items() if name != "keep_norm"})
    gates = gate_values(*(problem[name] for name in ("activations", "weights", "biases", "kinds")))
    assert torch.equal(seen.gates, gates)
    deltas = (problem["multipliers"] * gates)[:, :, None] * problem["vectors"]
    torch.testing.assert_close(seen.delta_norms, torch.linalg.vector_norm(deltas, dim=2))
    torch.testing.assert_close(
        seen.cosines, torch.cosine_similarity(deltas, problem["activations"][:, None, :], dim=2), atol=1e-6, rtol=1e-5
    )


def test_trace_tells_how_far_a_clamp_goes():
    problem = clamp_plan(3.0, 1.0, multipliers=torch.tensor([[1.0], [0.0], [-2.0], [1.0]]))
    seen = trace(**{name: value for name, value in problem.items() if name != "keep_norm"})
    away = 1.0 + 3.0 * problem["multipliers"] - problem["activations"] @ problem["vectors"].T
    away[1] = 0
    torch.testing.assert_close(seen.strengths, away)
    torch.testing.assert_close(seen.delta_norms, (steer(**problem) - problem["activations"]).norm(dim=1, keepdim=True))


def test_trace_of_a_zero_activation_is_finite():
    seen = trace(**{name: value for name, value in plan(activations=torch.zeros(4, 8)).items() if name != "keep_norm"})
    assert torch.equal(seen.cosines, torch.zeros(4, 3))
