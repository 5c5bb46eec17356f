"""Without matplotlib there are no plots, and that is said once, with the remedy."""

from pathlib import Path

import pytest

from training.evaluation import report

ROOT = Path(__file__).parents[2]


@pytest.fixture
def undrawn() -> None:
    """Here nothing is in the way of plots."""


def test_the_absence_of_plots_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    report.can_plot.cache_clear()
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    try:
        assert [report.can_plot() for _ in range(3)] == [False] * 3
    finally:
        report.can_plot.cache_clear()
    assert [record.getMessage() for record in caplog.records] == [
        "There are no plots, for want of matplotlib: pip install 'matplotlib>=3.9'."
    ]


def test_make_install_installs_what_draws_plots() -> None:
    assert "--editable '.[plots," in (ROOT / "Makefile").read_text(encoding="utf-8")
