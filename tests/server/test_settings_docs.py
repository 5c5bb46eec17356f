"""docs/settings.md and `matsteer serve --help` say what the settings are."""

import re

from typer.testing import CliRunner

from server.cli import app
from server.config import OLD_NAMES, Settings, default_text
from server.settings_docs import PATH, page, serve_options


def test_the_page_is_what_the_code_makes_of_it() -> None:
    assert PATH.read_text(encoding="utf-8") == page(), "run `make api-docs`"


def test_every_setting_is_there_with_all_that_is_to_be_known() -> None:
    rows = {row.split("`")[1]: row for row in page().splitlines() if row.startswith("| `")}
    assert set(rows) == set(Settings.model_fields)
    for name, row in rows.items():
        assert f"`MATSTEER_{name.upper()}`" in row
        assert Settings.model_fields[name].description, f"{name} has no description"
    assert rows["port"] == (
        "| `port` | `8000` | whole number from 1 to 65,535 | port to listen on | `MATSTEER_PORT` | `--port` |"
    )
    assert "| `0.9` | number above 0 to 1 |" in rows["gpu_memory_utilization"]
    assert "| unset | text |" in rows["api_key"]
    assert "`true` or `false`" in rows["remember"]
    assert "`debug`, `info`, `warning`, `error`" in rows["log_level"]
    for old in OLD_NAMES:
        assert f"MATSTEER_{old.upper()}" in page()


def test_the_help_of_serve_shows_every_default() -> None:
    shown = " ".join(
        CliRunner(env={"COLUMNS": "250"}).invoke(app, ["serve", "--help"]).output.replace("│", " ").split()
    )
    for name, option in serve_options().items():
        assert re.search(rf"{option} .*?\[default: \(?{re.escape(default_text(name))}\)?\]", shown), name
