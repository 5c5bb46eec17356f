"""constraints.txt pins what every extra asks for, at a version that pyproject.toml admits."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ASKED = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
LINES = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
PINNED = {
    canonicalize_name(name): version for name, version in (line.split("#")[0].strip().split("==") for line in LINES)
}


@pytest.mark.parametrize("extra", ASKED)
def test_what_is_asked_for_is_pinned(extra: str) -> None:
    for asked in map(Requirement, ASKED[extra]):
        if (name := canonicalize_name(asked.name)) != PROJECT["name"]:
            assert name in PINNED, f"constraints.txt has no {name}"
            assert PINNED[name] in asked.specifier, asked


def test_each_is_pinned_once() -> None:
    assert len(PINNED) == len(LINES)
