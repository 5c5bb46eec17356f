"""Reports are one file each that opens without a network, runs nothing, and shows what was measured."""

import json
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from steering.column import Column
from steering.operators import gate_codes, gate_values
from steering.types import Gate, Positions, Site, SiteKind
from tests.training.helpers import make_llama, make_tokenizer
from training.activations.tokenization import encode
from training.cli import app
from training.evaluation.traced import trace_answer
from training.html import FOLDER, render, step
from training.html.charts import Bar, Chart, Point, Scale, Series, nice

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }} \"'& שלום"
DATA = ["--data", "tone=tone.jsonl", "--data", "truth=truth.jsonl"]
FIT = ["--method", "caa", "--layer", "1", "--site", "residual"]
FEW = ["--limit", "6", "--damage", "2", "--max-new-tokens", "4"]
JUDGE = ["--judge", "judge_of_reports:judge", "--prompts", "prompts.jsonl", "--max-new-tokens", "5"]


class Page(HTMLParser):
    """What a browser would make of a report."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.style = ""
        self.words: list[str] = []
        self._within = ""
        self.feed(text)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self._within = tag
        if tag in ("td", "th", "dd"):
            self.words.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within == "style":
            self.style += data
        else:
            self.words.append(data)

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.tags if name in (attributes.get("class") or "").split()]


def read(path: Path) -> Page:
    """A report that no network and no script has a part in."""
    page = Page(path.read_text(encoding="utf-8"))
    assert {"script", "link", "img", "iframe", "object", "base", "form"}.isdisjoint(tag for tag, _ in page.tags)
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "href")], tag
    assert "url(" not in page.style
    assert "@import" not in page.style
    (policy,) = (a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    hashed = b64encode(sha256(page.style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{hashed}'; base-uri 'none'; form-action 'none'"
    return page


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and texts that would like to be HTML."""
    folder = tmp_path_factory.mktemp("world")
    make_llama().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    for attribute in ("tone", "truth"):
        rows = [
            {"prompt": f"Q: {HOSTILE} {n}? A:", "completion": f" {'good' if label else 'bad'} <b>{n}</b>",
             "label": label, "group": n}
            for n in range(20) for label in (True, False)
        ]  # fmt: skip
        (folder / f"{attribute}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": f"Q: {HOSTILE} {n}? A:", "split": ("dev", "test")[n % 2]} for n in range(6)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (folder / "judge_of_reports.py").write_text(
        "def judge(prompt, text):\n    return {'short_<i>': len(text) < 10, 'never': None}\n"
    )
    return folder


def run(command: str, *arguments: str) -> str:
    result = CliRunner().invoke(app, [command, "--model", "model", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_train_writes_its_report_into_the_checkpoint(here: Path) -> None:
    run("train", *DATA, *FIT, *FEW, "--out", "checkpoints/mine")
    folder = here / "checkpoints/mine/v1"
    page = read(folder / "report.html")
    assert "<title>mine@v1</title>" in (folder / "report.html").read_text()
    for arm in json.loads((folder / "config.json").read_text())["evaluation"]["arms"]:
        for name, one in (*arm["metrics"].items(), *arm["damage"].items()):
            scale, digits = (1, 3) if name == "kl" else (100, 1)
            value, low, high = (f"{scale * one[end]:.{digits}f}" for end in ("value", "low", "high"))
            assert f"{arm['arm']} {value} [{low}, {high}]" in page.text
    for gate in json.loads((folder / "config.json").read_text())["training"]["gates"]:
        head = f"{gate['attribute']} {gate['site']}, {gate['split']}"
        assert f"{head} positives {gate['positive']:.2f} negatives {gate['negative']:.2f}" in page.text
    assert "Hyperparameters" in page.text
    assert "<script>alert(1)</script>" in page.text, "as text"
    assert str(here) not in page.text


def test_a_report_goes_where_it_is_asked_for(here: Path) -> None:
    run("train", *DATA, *FIT, "--out", "checkpoints/mine", "--no-evaluate", "--report", "fit.html")
    assert not (here / "checkpoints/mine/v1/report.html").exists()
    assert "Gain" not in read(here / "fit.html").text, "it was not evaluated"
    output = run("evaluate", "--checkpoint", "checkpoints/mine", *DATA, *FEW, "--report", "pages/chosen.html")
    assert "wrote pages/chosen.html" in output
    assert not (here / "checkpoints/mine/v1/evaluation/report.html").exists()
    read(here / "pages/chosen.html")


def test_the_report_of_choices_shows_both_sides_token_by_token(here: Path) -> None:
    run("train", *DATA, *FIT, "--out", "checkpoints/mine", "--no-evaluate")
    run("evaluate", "--checkpoint", "checkpoints/mine", *DATA, *FEW, "--multipliers=-1,1,2")
    page = read(here / "checkpoints/mine/v1/evaluation/report.html")
    examples = page.of_class("example")
    assert len(examples) == 2 * 3 * 2, "three questions of two attributes, both sides"
    tokens = page.of_class("tok")
    assert {len((one["class"] or "").split()) for one in tokens} == {3}, "a strip for each attribute"
    assert {"l0p10", "l1p10"} <= set(" ".join(one["class"] or "" for one in tokens).split())
    assert "truth: gate 1.00, multiplier x gate 1.00" in (tokens[0]["title"] or "")
    assert "tone: a negative answer, steered" in page.text
    assert "<b>" in page.text
    assert len(page.of_class("chart")) == 3, "gain, perplexity and other damage over the multiplier"


def test_the_report_of_judged_answers_shows_what_steering_changed(here: Path) -> None:
    run("train", *DATA, *FIT, "--out", "checkpoints/mine", "--no-evaluate", "--strength", "40")
    run("evaluate", "--checkpoint", "checkpoints/mine", *JUDGE, "--out", "judged")
    page = read(here / "judged/report.html")
    texts = [json.loads(line) for line in (here / "judged/generations.jsonl").read_text().splitlines()]
    assert len(page.of_class("example")) == 6
    for text in texts:
        assert " ".join(text["text"].split()) in page.text
    unsteered = page.of_class("tok")[0]
    assert (unsteered["class"] or "").split()[1:] == ["l0p0", "l1p0"]
    assert "short-<i>" in page.text
    assert len(page.of_class("verdicts")) == 6


def test_the_report_of_a_sweep_has_every_setting_and_what_was_chosen(here: Path) -> None:
    arguments = [*DATA, "--method", "caa", "--layer", "0,1", "--site", "residual", "--multipliers", "1,2", *FEW]
    run("sweep", *arguments, "--alone", "--out", "swept")
    page = read(here / "swept/report.html")
    points = json.loads((here / "swept/sweep.json").read_text())
    for point in points:
        cells = (
            f"{point['attribute']} {point['layer']} {point['site']} {point['multiplier']:g} {100 * point['score']:.1f}"
        )
        assert cells in page.text
    places = json.loads((here / "swept/places.json").read_text())
    for name, place in places.items():
        assert f"{name} {' and '.join(place['sites'])}, times {place['strength']:g}" in page.text
    assert "together" in page.text
    assert page.of_class("example")
    assert page.of_class("gates")
    run("sweep", *arguments, "--out", "shared", "--report", "shared.html")
    best = json.loads((here / "shared/best.json").read_text())
    assert (
        f"best place {best['layer']}.{best['site']} multiplier {best['multiplier']:g}"
        in read(here / "shared.html").text
    )


def test_a_trace_is_multiplier_x_gate_where_each_token_came_from(llama: Any, tokenizer: Any) -> None:
    site, made = Site(1, SiteKind.RESIDUAL), torch.Generator().manual_seed(0)
    vector, weight = torch.randn(16, generator=made), torch.randn(16, generator=made)
    columns = (
        Column("truth", site, Gate.SIGMOID, vector, weight, 0.3, True),
        Column("tone", site, Gate.CONSTANT, vector, torch.zeros(16), 0.0, True),
        Column("truth", Site(0, SiteKind.RESIDUAL), Gate.CONSTANT, vector, torch.zeros(16), 0.0, True),
    )
    row = encode(tokenizer, "Q: What do cows say? A:", " Moo, 牛 person!")
    seen: list[torch.Tensor] = []
    watch = llama.model.layers[1].register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    try:
        with torch.no_grad():
            llama(torch.tensor([row.ids]))
    finally:
        watch.remove()
    traced = trace_answer(llama, tokenizer, row, columns[:2], [2.0, -0.5])
    assert traced.attributes == ("truth", "tone")
    assert "".join(token.text for token in traced.tokens) == " Moo, 牛 person!"
    gates = gate_values(seen[0][0, row.start : row.end], weight[None], torch.tensor([0.3]), gate_codes([Gate.SIGMOID]))
    assert [token.gates[0] for token in traced.tokens] == pytest.approx(gates[:, 0].tolist(), abs=1e-5)
    assert [token.strengths[0] for token in traced.tokens] == pytest.approx((2 * gates[:, 0]).tolist(), abs=1e-5)
    assert {token.strengths[1] for token in traced.tokens} == {-0.5}
    only = trace_answer(llama, tokenizer, row, columns[:2], [2.0, 1.0], Positions.PROMPT)
    assert {token.strengths for token in only.tokens[1:]} == {(0.0, 0.0)}, "the answer itself is not steered"
    both = trace_answer(llama, tokenizer, row, columns, [2.0, 1.0, 2.0])
    assert {token.strengths[0] for token in both.tokens} == {2.0}, "of two columns, the one that did most"


def test_strips_have_the_colour_of_their_strength() -> None:
    assert [step(value, 2.0) for value in (0.0, 0.05, 1.0, -2.0, 9.0, -0.01)] == ["p0", "p0", "p5", "n10", "p10", "p0"]


@pytest.mark.parametrize(("value", "above"), [(0.97, 1.0), (1.0, 1.0), (1.01, 2.0), (0.00034, 0.0004), (730.0, 800.0)])
def test_axes_end_where_it_reads_well(value: float, above: float) -> None:
    assert nice(value) == pytest.approx(above)
    assert nice(-value) == 0


def test_bars_begin_at_zero_and_stay_within() -> None:
    assert Bar.at(Scale(0.0, 1.0), 0.4, 0.3, 0.6) == Bar(0.0, 40.0, 30.0, 60.0)
    assert Bar.at(Scale.of([-0.37], high=0.4), -0.2) == Bar(25.0, 25.0)
    assert Bar.at(Scale.of([float("inf")], high=1.0), float("inf")) == Bar(0.0, 100.0)


def test_a_chart_keeps_the_order_of_its_numbers() -> None:
    points = [Point(x, y, f"{y} %", y - 5, y + 5) for x, y in ((2.0, 80.0), (-1.0, 10.0), (0.0, 50.0))]
    chart = Chart.of("Gain", "multiplier", [Series("truth", "a0", points)], high=100.0)
    (line,) = chart.lines
    xs, ys = zip(*(map(float, point.split(",")) for point in line.points.split()), strict=True)
    assert list(xs) == sorted(xs)
    assert list(ys) == sorted(ys, reverse=True), "up is more"
    assert len(line.band.split()) == 6
    assert [tick.text for tick in chart.x_ticks] == ["-1", "0", "2"]
    assert chart.zero == pytest.approx(xs[1], abs=0.1)
    flat = Chart.of("Damage", "multiplier", [Series("kl", "a7", [Point(1.0, 0.0, "0")])])
    assert flat.lines[0].points, "one point, and nothing but zeros"


def test_reports_have_the_colours_of_the_page() -> None:
    own, page = (
        dict(re.findall(r"(--[\w-]+): (light-dark\([^;]+\));", path.read_text(encoding="utf-8")))
        for path in (FOLDER / "style.css", Path(__file__).parents[2] / "web/src/style.css")
    )
    assert own
    assert own.items() <= page.items()


def test_a_title_is_text(here: Path) -> None:
    shown = dict.fromkeys(("notes", "charts", "gains", "damages", "gates", "examples", "tables"), ())
    text = render("report.html", title=HOSTILE, facts={HOSTILE: HOSTILE}, **shown)
    (here / "page.html").write_text(text, encoding="utf-8")
    page = read(here / "page.html")
    assert page.text.count("<script>alert(1)</script>") == 4
    assert "{{ 7 * 7 }}" in page.text
