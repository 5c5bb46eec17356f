"""A checkpoint looked at says what a forward pass does with it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from steering import Clamp, Column, ColumnBank, Gate, Positions, Reading, SequenceSteering, Site, SiteKind, Steering
from steering import checkpoint as checkpoints
from steering.checkpoint import Checkpoint
from steering.operators import Trace
from training.cli import app
from training.data.samples import Turn
from training.errors import DataError
from training.inspection import inspect, logit_lens, read_texts
from training.inspection_report import render_page, show_inspection
from training.models import Base

RESIDUAL, HEADS = Site(1, SiteKind.RESIDUAL), Site(1, SiteKind.ATTN_HEADS)
READ = Site(0, SiteKind.RESIDUAL)
TEXTS = ["Q: What colour is the sky? A: <b>", "good bees"]


def vector(seed: int, width: int) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def base(llama: Any, tokenizer: Any) -> Base:
    return Base(llama, tokenizer, "tiny", None)


@pytest.fixture(scope="module")
def stored(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    width = llama.config.hidden_size
    with torch.no_grad():
        sink = llama(torch.tensor([[7]]), output_hidden_states=True).hidden_states[2][0, 0]
    gates = {"gate_weight": vector(5, width), "gate_bias": 0.1, "keep_norm": False}
    columns = [
        Column("kind", RESIDUAL, Gate.SIGMOID, vector(1, width), **gates),
        Column("kind", RESIDUAL, Gate.COSINE, vector(2, width), **gates, reads=Reading(READ, latched=True)),
        Column("sunk", RESIDUAL, Gate.CONSTANT, sink, torch.zeros(width), 0.0, False, clamp=Clamp(3.0)),
        Column("headed", HEADS, Gate.CONSTANT, vector(4, width), torch.zeros(width), 0.0, False),
    ]
    folder = tmp_path_factory.mktemp("inspected") / "mine"
    info = checkpoints.base_model_info(llama, "tiny", None)
    checkpoints.save(
        folder / "v1", name="mine", version="v1", method="caa", base_model=info,
        columns=columns, normalize=False, positions=Positions.GENERATED, training={}, evaluation={}, card="",
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def loaded(stored: Path) -> Checkpoint:
    return checkpoints.load(stored / "v1")


def test_the_lens_is_the_final_norm_and_the_unembedding(llama: Any, loaded: Checkpoint) -> None:
    for column in (loaded.columns[0], loaded.columns[3]):
        v = column.vector.double()
        if column.site == HEADS:
            v = llama.model.layers[1].self_attn.o_proj.weight.double() @ v
        normed = llama.model.norm.weight.double() * v / v.square().mean().sqrt()
        expected = llama.lm_head.weight.double() @ normed
        torch.testing.assert_close(
            logit_lens(llama, column.site, column.vector).double(), expected, rtol=1e-3, atol=1e-3
        )


def test_columns_are_told_as_they_are(base: Base, loaded: Checkpoint) -> None:
    found = inspect(base, loaded, TEXTS, top=3)
    first = found.columns[0]
    lens = logit_lens(base.model, RESIDUAL, first.column.vector)
    assert [token.value for token in first.promoted] == pytest.approx(lens.topk(3).values.tolist())
    assert [token.value for token in first.suppressed] == pytest.approx(sorted(lens.tolist())[:3])
    assert first.promoted[0].text == base.tokenizer.decode([int(lens.argmax())])
    assert first.norm == pytest.approx(float(first.column.vector.norm()))
    expected = torch.cosine_similarity(loaded.columns[0].vector, loaded.columns[1].vector, dim=0)
    assert found.cosines[0][1] == pytest.approx(float(expected), abs=1e-6)
    assert found.cosines[0][3] is None
    assert found.cosines[3][3] == pytest.approx(1)


def test_norms_and_the_sink_are_those_of_the_texts(base: Base, loaded: Checkpoint) -> None:
    found = inspect(base, loaded, ["".join(base.tokenizer.convert_ids_to_tokens([7, 8, 9]))])
    ids = torch.tensor([base.tokenizer(found.texts[0])["input_ids"]])
    with torch.no_grad():
        states = base.model(ids, output_hidden_states=True).hidden_states[2][0]
    one = found.columns[0]
    assert one.share == pytest.approx(one.norm / float(states[1:].norm(dim=1).median()), rel=1e-5)
    expected = torch.cosine_similarity(states[0], one.column.vector, dim=0)
    assert one.sink == pytest.approx(float(expected), abs=1e-5)


def test_gates_are_those_of_a_forward_pass(base: Base, loaded: Checkpoint) -> None:
    found = inspect(base, loaded, TEXTS)
    ids = torch.tensor([base.tokenizer(TEXTS[0])["input_ids"]])
    bank = ColumnBank(device="cpu", max_tokens=ids.shape[1])
    columns = [loaded.columns[0], Column(**{**vars(loaded.columns[1]), "reads": Reading(READ)})]
    row = SequenceSteering.of([(bank.add(columns), [1e-30, 1e-30])])
    with torch.no_grad(), Steering(base.model, bank, traced=True) as steering:
        bank.fill([row], [0] * ids.shape[1])
        base.model(ids)
        gates = steering.traces[RESIDUAL][:, :2, list(Trace.__dataclass_fields__).index("gates")].clone()
    for i in (0, 1):
        told = [token.value for token in found.columns[i].gates[0]]
        assert told == pytest.approx(gates[: len(told), i].tolist(), abs=1e-5)
        assert found.columns[i].opened == pytest.approx(
            [token.value for text in found.columns[i].gates for token in text[1:]]
        )
        strongest = found.columns[i].strongest(2)
        assert strongest[0].value == max(found.columns[i].opened)
    assert found.columns[2].gates == ()


def test_the_page_needs_nothing_else_and_takes_texts_for_texts(base: Base, loaded: Checkpoint) -> None:
    page = render_page(inspect(base, loaded, TEXTS))
    assert "<b>" not in page
    assert not any(part in page for part in ("http://", "https://", "<script", "src=", "@import", "url("))
    assert page.count("<h2>Gate of") == 2
    assert "cosine of 0.residual, held" in page


def test_the_command_shows_tables_and_writes_the_page(llama: Any, tokenizer: Any, stored: Path, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("good bees\n\nbad cows moo\n")
    result = CliRunner(env={"COLUMNS": "200"}).invoke(
        app,
        ["inspect", str(stored), "--model", str(tmp_path / "model"), "--device", "cpu", "--threads", "1",
         "--texts", str(tmp_path / "texts.txt"), "--html", str(tmp_path / "page.html")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for part in ("kind at 1.residual", "headed at 1.attn_heads", "clamp 0 + 3 m", "promoted", "most open on"):
        assert part in result.output
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_texts_are_lines_or_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"text": "a"}\n{"prompt": "b", "completion": "c"}\n{"messages": [{"role": "user", "content": "d"}]}\n'
    )
    assert read_texts(path) == ["a", "bc", (Turn("user", "d"),)]
    for content in ("[1]\n", '{"text": 3}\n', "no\n"):
        path.write_text(content)
        with pytest.raises(DataError, match=r"t\.jsonl:1 is no JSON object"):
            read_texts(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="holds no text"):
        read_texts(path)


def test_many_columns_show_the_most_alike_pairs(base: Base, loaded: Checkpoint) -> None:
    many = Checkpoint(loaded.config, loaded.columns * 15)
    found = inspect(base, many, TEXTS[1:])
    assert len(show_inspection(found).renderables) == 4
    assert len(found.columns) == 60
