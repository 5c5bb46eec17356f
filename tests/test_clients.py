"""What tries other people's clients is whole, though only `make test-clients` runs it."""

import ast
import subprocess
from pathlib import Path

import pytest

from tests.clients.run import ADDRESS, CLIENTS, COLUMNS, PAGE, WRITTEN, Tried, example, report, script

HERE = Path(__file__).parent / "clients"


@pytest.mark.parametrize("client", CLIENTS)
def test_every_client_has_an_example_and_a_script(client: str) -> None:
    language, text = example(client)
    assert ADDRESS in text
    if language == "python":
        ast.parse(text)
    else:
        subprocess.run(["bash", "-n", "-c", text], check=True)
    tree = ast.parse(script(client).read_text(encoding="utf-8"))
    named = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("check", "not_possible")
    }
    assert named >= set(COLUMNS), "every column is tried, or said not to be possible"


def test_the_page_has_the_table_of_the_clients_that_there_are() -> None:
    begin, end = WRITTEN
    table = PAGE.read_text(encoding="utf-8").split(begin)[1].split(end)[0]
    assert [line.split("]")[0].removeprefix("| [") for line in table.splitlines() if line.startswith("| [")] == [
        *CLIENTS
    ]
    assert {path.name for path in HERE.glob("use_*.py")} == {script(client).name for client in CLIENTS}


def test_nothing_of_it_is_collected() -> None:
    assert not [*HERE.rglob("test_*.py"), *HERE.rglob("*_test.py"), *HERE.rglob("conftest.py")]


def test_a_report_says_what_passed_and_why_the_rest_did_not() -> None:
    checks = dict.fromkeys(("example", *COLUMNS), ("passed", ""))
    whole = Tried("openai", "openai 1", checks | {"agents": ("passed", "")})
    part = Tried("curl", "8", checks | {"stop": ("failed", "it goes on"), "usage": ("not possible", "no field")})
    lines = report([whole, part]).splitlines()
    assert lines[2] == f"| [openai](#openai) | openai 1 |{' yes |' * 9} agents |"
    assert lines[3] == f"| [curl](#curl) | 8 |{' yes |' * 4} **no** | yes | - | yes | yes |  |"
    assert lines[4:] == [
        *("", "Not possible with the client:", "", "- curl, usage: no field"),
        *("", "Did not pass:", "", "- curl, stop: it goes on"),
    ]
