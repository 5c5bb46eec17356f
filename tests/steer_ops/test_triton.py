"""Triton's kernels beside their references in PyTorch: interpreted where there is no CUDA device."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steer_ops import plain
from steer_ops.cuda import library
from steer_ops.ops import STEER_AND_COUNT
from steer_ops.registry import TOLERANCES, Op, _run, _same
from tests.steer_ops.interpreted import mend_interpreter
from tests.steer_ops.test_paged_attention import Rows, any_rows
from tests.steer_ops.test_registry import CPU, CUDA_OPS, OPS

pytest.importorskip("triton", reason="triton is not installed: pip install 'mat-steer[triton]'")

# The interpreter's NumPy tells of overflows and of what is not a number.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning:triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BY_NAME = {op.name: op for op in [*OPS, *CUDA_OPS]}
TRITON = (
    "paged_attention_decode",
    "paged_attention_prefill",
    "write_kv",
    "gather_kv",
    "copy_kv",
    "steer_and_count",
    "rms_norm",
    "add_rms_norm",
    "silu_mul",
    "gelu_tanh_mul",
    "rotary",
)


@pytest.fixture(scope="module")
def kernels() -> Iterator[dict[str, Callable[..., Any]]]:
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            mend_interpreter(patch)
        yield {name: kernel for name, (kernel, _) in library.triton_kernels(DEVICE).items()}


def test_all_are_there(kernels: dict[str, Callable[..., Any]]) -> None:
    assert tuple(kernels) == TRITON


@pytest.mark.parametrize("dtype", library.DTYPES, ids=str)
@pytest.mark.parametrize("name", TRITON)
def test_a_kernel_computes_what_its_twin_computes(
    kernels: dict[str, Callable[..., Any]], name: str, dtype: torch.dtype
) -> None:
    op: Op = BY_NAME[name]
    for args, named in op._examples(dtype):
        assert _same(_run(kernels[name], args, named, DEVICE), _run(op.reference, args, named, CPU), dtype)


def test_heads_of_a_product_are_normed_where_they_lie(kernels: dict[str, Callable[..., Any]]) -> None:
    product, weight = torch.randn(5, 6 * 16, device=DEVICE), torch.randn(16, device=DEVICE)
    with torch.autograd.profiler.profile() as seen:
        found = [
            kernels["rms_norm"](part.view(5, -1, 16), weight, 1e-5) for part in product.split([4 * 16, 2 * 16], dim=1)
        ]
    assert {"aten::clone", "aten::contiguous"}.isdisjoint(event.name for event in seen.function_events)
    assert torch.allclose(torch.cat(found, dim=1), plain.rms_norm(product.view(5, 6, 16), weight, 1e-5), atol=1e-5)


@pytest.mark.timeout(600)
def test_every_kernel_compiles_for_an_h200(tmp_path: Path) -> None:
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.steer_ops.compile_kernels"],
        cwd=Path(__file__).parents[2],
        env=surroundings | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kernels = {"_attend", "_join", "_write", "_gather", "_copy", "_steer", "_rotary"}
    kernels |= {"_rms_norm", "_add_rms_norm", "_gate_mul"}
    assert {line.split()[0] for line in done.stdout.splitlines()} == kernels


# --- decode attention -------------------------------------------------------------------------------


def attend(kernels: dict[str, Callable[..., Any]], rows: Rows, **rules: Any) -> Tensor:
    """On the CPU and back, whatever the device."""
    out = rows.query.new_full((*rows.query.shape[:2], rows.value.shape[2]), torch.nan)
    args = rows.query, rows.key, rows.value, *rows.caches, rows.tables, rows.lengths, out
    rules = {**rows.turns, **rules}
    if DEVICE.type == "cpu":
        kernels["paged_attention_decode"](*args, **{"scale": 0.2, **rules})
        return out
    there = [arg.to(DEVICE) for arg in args]
    named = {name: rule.to(DEVICE) if isinstance(rule, Tensor) else rule for name, rule in rules.items()}
    kernels["paged_attention_decode"](*there, **{"scale": 0.2, **named})
    for mine, theirs in zip(rows.caches, there[3:5], strict=True):
        mine.copy_(theirs)
    return there[-1].cpu()


def small_parts(patch: pytest.MonkeyPatch, extras: int) -> None:
    from steer_ops.cuda import paged_attention

    for name, value in {"TILE": 16, "LEAST_TILES": 1, "LANES": 4, "JOINED": 2}.items():
        patch.setattr(paged_attention, name, value)
    patch.setattr(paged_attention, "num_extras", lambda *args: extras)


@pytest.mark.parametrize("extras", [1, 5])
@pytest.mark.parametrize(
    ("shape", "rules"),
    [
        ({"heads": 4, "kv_heads": 2}, {}),
        ({"kv_heads": 1, "width": 5, "value_width": 7, "block_size": 40}, {"scale": 0.5, "window": 7}),
        ({"width": 80, "value_width": 24, "dtype": torch.bfloat16, "block_size": 1, "turned": 80}, {"softcap": 2.0}),
        (
            {"kv_heads": 4, "width": 16, "value_width": 16, "dtype": torch.float16, "block_size": 4, "turned": 6},
            {"window": 16},
        ),
        (
            {"width": 16, "value_width": 16, "block_size": 16, "turned": 16},
            {"window": 1, "sinks": torch.tensor([0.5, -40.0, 40.0, 0.0]).bfloat16()},
        ),
        (
            {"heads": 6, "width": 16, "value_width": 16, "block_size": 32},
            {"sinks": torch.randn(6), "softcap": 5.0, "window": 20},
        ),
    ],
    ids=[
        "plain",
        "odd widths, window",
        "cap, turned",
        "a window of blocks, partly turned",
        "sinks, turned",
        "all rules",
    ],
)
def test_decode_attention_is_attention(
    kernels: dict[str, Callable[..., Any]],
    shape: dict[str, Any],
    rules: dict[str, Any],
    extras: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks in no order, memory beyond a row that is no number, tables that end in nonsense, lengths from one token to
    several tiles, some of which are read in parts; some programs have nothing to read."""
    small_parts(monkeypatch, extras)
    rows = Rows(**shape, lengths=(1, 16, 70, 30, 17))
    tolerance = TOLERANCES[rows.query.dtype]
    before = [cache.clone() for cache in rows.caches]
    expected = rows.expected(**rules)
    found = attend(kernels, rows, **rules)
    assert (found.double() - expected).norm() / expected.norm() < tolerance / 5
    for cache, written in zip(rows.caches, rows.written(before), strict=True):
        assert torch.equal(cache.isnan(), written.isnan())
        away = cache.double().nan_to_num(7.0) - written.double().nan_to_num(7.0)
        assert away.norm() <= (tolerance * rows.key.norm() if rows.turns else 0)


@pytest.mark.parametrize("seed", range(8))
def test_any_rows_get_their_attention_and_what_is_no_number_spreads_nowhere(
    kernels: dict[str, Callable[..., Any]], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch, (1, 3, 9)[seed % 3])
    rows, rules, busy = any_rows(seed)
    before = [cache.clone() for cache in rows.caches]
    expected = rows.expected(**rules)[busy]
    found = attend(kernels, rows, **rules)
    assert (found[busy].double() - expected).norm() / expected.norm() < TOLERANCES[torch.float32] / 5
    assert found.isfinite().all(), "idle rows read what they bring"
    idle = set(rows.tables[len(busy) :, 0].tolist())
    others = [block for block in range(len(rows.caches[0])) if block not in idle]
    for cache, written in zip(rows.caches, rows.written(before), strict=True):
        assert torch.allclose(cache[others], written[others], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_rows_share_blocks_and_idle_rows_share_a_place(kernels: dict[str, Callable[..., Any]]) -> None:
    rows = Rows(width=16, value_width=16)
    rows.tables[4, :2] = rows.tables[3, :2]  # 17 tokens: two blocks in common, then one of its own
    rows.lengths[2] = 1
    rows.tables[2, 0] = rows.tables[0, 0]  # both write to one place, and read only what they bring
    expected = rows.expected()
    found = attend(kernels, rows).double()
    for row in (0, 1, 3, 4):
        assert torch.allclose(found[row], expected[row], rtol=1e-4, atol=1e-5)
    assert torch.allclose(found[2], rows.value[2].double().repeat_interleave(2, 0))


def test_what_is_not_a_number_stays_with_its_row(kernels: dict[str, Callable[..., Any]]) -> None:
    rows = Rows(width=16, value_width=16)
    rows.query[2, 1, 3] = torch.nan
    found = attend(kernels, rows)
    assert found[2, 1].isnan().all()
    assert found.isnan().sum() == 16


def test_scores_of_any_size_have_shares(kernels: dict[str, Callable[..., Any]]) -> None:
    rows = Rows(width=16, value_width=16)
    assert torch.allclose(attend(kernels, rows, scale=1e4).double(), rows.expected(scale=1e4), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: setattr(rows, "value", rows.value.bfloat16()), "one dtype"),
        (lambda rows: setattr(rows, "key", rows.key[:, :1]), "shapes"),
        (lambda rows: setattr(rows, "tables", rows.tables.long()), "int32"),
        (lambda rows: setattr(rows, "caches", [cache.mT for cache in rows.caches]), "shapes|contiguous"),
    ],
    ids=["dtype", "heads", "long table", "strided cache"],
)
def test_what_does_not_fit_is_refused(
    kernels: dict[str, Callable[..., Any]], change: Callable[[Rows], Any], message: str
) -> None:
    rows = Rows()
    change(rows)
    with pytest.raises(RuntimeError, match=message):
        attend(kernels, rows)


def parts_of(lengths: list[int], extras: int, window: int) -> tuple[list[list[int]], int]:
    """The parts, from 1 on, that extra programs have of each row, in their order, and how many tiles a part has."""
    from steer_ops.cuda import paged_attention
    from tests.steer_ops.parting import divide

    on_device = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    found = on_device.new_empty(extras, 3)
    sizes = {name: getattr(paged_attention, name.upper()) for name in ("tile", "least_tiles", "lanes")}
    divide[extras,](on_device, found, len(lengths), extras, window, **sizes)
    parts: list[list[int]] = [[] for _ in lengths]
    for row, part, _ in found.tolist():
        if row < len(lengths):
            parts[row].append(part)
        else:
            assert row == len(lengths), "nothing is left"
    return parts, int(found[0, 2])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("seed", range(20))
def test_every_tile_of_every_row_is_read_by_one_program_and_none_has_more_than_its_share(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steer_ops.cuda import paged_attention

    number = random.Random(seed)
    monkeypatch.setattr(paged_attention, "LANES", number.choice((4, 256)))
    lengths = [number.choice((1, 64, 65, number.randint(1, 40_000))) for _ in range(number.randint(1, 9))]
    window, extras = number.choice((1000, paged_attention.NO_WINDOW)), number.randint(1, 20)
    parts, share = parts_of(lengths, extras, window)
    ends = [(length - 1, max(0, length - window) // 64) for length in lengths]
    tiles = [-(-last // 64) - first for last, first in ends]
    assert share == max(paged_attention.LEAST_TILES, -(-sum(tiles) // extras))
    assert parts == [list(range(1, -(-count // share))) for count in tiles]


@pytest.mark.usefixtures("kernels")
def test_a_long_row_among_short_ones_is_read_in_parts_by_many_programs() -> None:
    """In tables as wide as the longest text, as captured graphs have them."""
    from steer_ops.cuda.paged_attention import NO_WINDOW, num_extras

    extras = num_extras(41, 8, 131_072 // 64, 132)  # 41 rows of 8 key heads on an H200
    parts, share = parts_of([1000] * 40 + [32_768], extras, NO_WINDOW)
    assert parts[:40] == [[]] * 40
    assert len(parts[40]) >= 25
    assert share * 64 < 1500


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("length", "parts"), [(129, []), (130, [1]), (1025, [*range(1, 8)])])
def test_one_row_is_read_in_parts_as_small_as_they_may_be(length: int, parts: list[int]) -> None:
    from steer_ops.cuda.paged_attention import NO_WINDOW, num_extras

    for room in (length, 131_072):
        assert parts_of([length], num_extras(1, 8, -(-room // 64), 132), NO_WINDOW)[0] == [parts]


def test_what_kernels_are_tried_on_has_a_row_in_parts(
    kernels: dict[str, Callable[..., Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from steer_ops.cuda import paged_attention

    class Nothing:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **named: None

    monkeypatch.setattr(paged_attention, "_join", Nothing())
    op = BY_NAME["paged_attention_decode"]
    trials = [
        _same(_run(kernels[op.name], args, named, DEVICE), _run(op.reference, args, named, DEVICE), torch.float32)
        for args, named in op._examples(torch.float32)
    ]
    assert not all(trials), "parts that are not joined are found out"


def test_programs_for_parts_keep_all_processors_busy_where_a_row_can_have_some() -> None:
    from steer_ops.cuda.paged_attention import num_extras, tile_size

    for rows in (2, 32, 256):  # of 8 key heads, of up to 8,192 tokens, on an H200
        assert num_extras(rows, 8, 128, 132) == 66
    assert num_extras(1, 8, 32, 132) == 16
    assert num_extras(256, 8, 2, 132) == 0
    assert num_extras(1, 8, 0, 132) == 0
    assert tile_size(2 * 2 * 128, 113 * 1024) == 64
    assert tile_size(2 * 4 * 256, 113 * 1024) == 16


# --- steering ---------------------------------------------------------------------------------------


def test_what_is_not_steered_keeps_every_bit_and_columns_that_rest_have_no_say(
    kernels: dict[str, Callable[..., Any]],
) -> None:
    args, _ = next(iter(STEER_AND_COUNT._examples(torch.float32)))
    args = [arg.to(DEVICE, copy=True) if isinstance(arg, Tensor) else arg for arg in args]
    activations, vectors, weights, _, _, _, _, multipliers, _, _, counts, _ = args
    multipliers[1] = 0
    multipliers[2, 3] = 0
    activations[1, :4] = torch.tensor([-0.0, torch.inf, torch.nan, -torch.inf], device=DEVICE)
    before = activations.clone()
    moved = kernels["steer_and_count"](*args)
    assert torch.equal(moved[1].view(torch.int32), before[1].view(torch.int32))
    assert counts.tolist() == [1, 1, 0, 0, 1, 0]
    # Column 3 rests on token 2: whatever it is, nothing changes.
    vectors[3], weights[3] = torch.nan, torch.inf
    assert torch.equal(kernels["steer_and_count"](*args)[2], moved[2])


def test_activations_of_any_size_keep_their_norm(kernels: dict[str, Callable[..., Any]]) -> None:
    args, _ = next(iter(STEER_AND_COUNT._examples(torch.float32)))
    args = [arg.to(DEVICE, copy=True) if isinstance(arg, Tensor) else arg for arg in args]
    args[0] *= torch.tensor([1e-30, 1.0, 1e15, 1e30, 0.0], device=DEVICE)[:, None]
    expected = plain.steer_and_count(*(arg.clone() if isinstance(arg, Tensor) else arg for arg in args))
    found = kernels["steer_and_count"](*args)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def of_many_columns(acting: list[int], columns: int = 100) -> list[Any]:
    """Arguments of `steer_and_count` for two tokens, on each of which the same columns act."""
    args, _ = next(iter(STEER_AND_COUNT._examples(torch.float32)))
    x, *parts = [arg.to(DEVICE, copy=True) if isinstance(arg, Tensor) else arg for arg in args]
    which = torch.arange(columns, device=DEVICE) % 9
    of_columns = [part[which].contiguous() for part in parts[:6]]
    multipliers = torch.zeros(2, columns, device=DEVICE)
    multipliers[:, acting] = torch.linspace(0.2, 1.0, len(acting), device=DEVICE)
    counters = parts[8][:2], parts[9][:2], 3
    return [x[:2].contiguous(), *of_columns, multipliers, torch.rand_like(multipliers), *counters]


@pytest.mark.parametrize("acting", [[], [0], [31, 32], [63, 99], [*range(0, 100, 7)]], ids=str)
def test_columns_of_many_are_found(kernels: dict[str, Callable[..., Any]], acting: list[int]) -> None:
    args = of_many_columns(acting)
    expected = plain.steer_and_count(*(arg.clone() if isinstance(arg, Tensor) else arg for arg in args))
    assert torch.allclose(kernels["steer_and_count"](*args), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="loads are counted in the interpreter")
def test_a_token_looks_at_many_columns_together_before_it_reads_one(
    kernels: dict[str, Callable[..., Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    loads = 0
    load = InterpreterBuilder.create_masked_load

    def counted(*args: Any, **named: Any) -> Any:
        nonlocal loads
        loads += 1
        return load(*args, **named)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted)
    kernels["steer_and_count"](*of_many_columns([]))
    assert loads < 2 * 10, "of two tokens"
    loads = 0
    kernels["steer_and_count"](*of_many_columns([40]))
    assert loads < 2 * 20
