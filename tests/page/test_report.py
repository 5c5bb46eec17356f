"""A report of `matsteer evaluate` in a real browser, without a network."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.page.conftest import ROOT, Opened
from tests.page.test_access import faults
from training.cli import app

pytestmark = pytest.mark.page
SIZES = [(1440, "light"), (390, "dark")]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    prompts = [{"prompt": f"Q: What is the capital of {name}? A:"} for name in ("Japan", "Peru", "Kenya")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    given = ["--judge", "demo.oracle:judge", "--prompts", folder / "prompts.jsonl", "--plain-prompts"]
    given += ["--model", ROOT / "demo/model", "--checkpoint", ROOT / "checkpoints/demo/v1", "--out", folder]
    result = CliRunner().invoke(app, ["evaluate", *map(str, given), "--multipliers=-1,1", "--max-new-tokens", "20"])
    assert result.exit_code == 0, result.output
    return folder / "report.html"


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_a_report_reads_well_everywhere(report: Path, open_page: Any, width: int, scheme: str) -> None:
    at: Opened = open_page(report.as_uri(), width=width, color_scheme=scheme, offline=True)
    at.page.get_by_text("Numbers").first.click()
    assert faults(at) == []
    assert at.page.evaluate("document.documentElement.scrollWidth") == width, "nothing but tables scrolls sideways"
    strips = at.page.locator(".tok").evaluate_all(
        "all => all.map(one => getComputedStyle(one).backgroundImage.split('gradient').length - 1)"
    )
    assert set(strips) == {3}, "the policy lets the style sheet in"
    assert at.page.locator(".bar .value").first.evaluate("one => one.getBoundingClientRect().width") > 5
    assert [asked for asked in at.asked if "report.html" not in asked[1]] == []
