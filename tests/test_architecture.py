"""The direction of the imports, read from the code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "steer_ops": {"steering", "server", "training", "demo"},
    "steering": {"server", "training", "demo"},
    "training": {"server", "demo"},
    "server": {"training", "demo"},
    "server/api": {"torch", "transformers", "steering"},
    "server/schemas.py": {"fastapi", "starlette", "torch", "transformers", "server.api", "server.service"},
    "server/formatting.py": {"fastapi", "starlette", "torch", "transformers", "server.api", "server.service"},
    "server/service.py": {"fastapi", "starlette", "torch", "transformers", "server.api", "server.schemas"},
    "server/opening": {"fastapi", "starlette", "server.api", "server.service"},
    "server/engine": {"fastapi", "starlette", "server.api", "server.service", "server.opening"},
    "server/attention": {"fastapi", "starlette", "server.api", "server.service", "server.opening", "server.engine"},
    "server/attention/places.py": {"torch", "transformers"},
    **{f"server/engine/{name}.py": {"torch", "transformers"} for name in ("scheduler", "kv_cache", "extents", "tape")},
    "demo": {"server"},
}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, with all its parents: a.b.c gives a, a.b and a.b.c."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {".".join(parts[:end]) for name in names for parts in [name.split(".")] for end in range(1, len(parts) + 1)}


def files(place: str) -> list[Path]:
    path = ROOT / place
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("place", FORBIDDEN)
def test_nothing_is_imported_the_wrong_way(place: str) -> None:
    assert files(place)
    wrong = {
        str(file.relative_to(ROOT)): found for file in files(place) if (found := imported(file) & FORBIDDEN[place])
    }
    assert not wrong


def test_the_reader_of_imports_sees_every_form(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text("import a.b\nfrom c.d import e\ndef f():\n    from g import h\n")
    assert imported(file) == {"a", "a.b", "c", "c.d", "c.d.e", "g", "g.h"}
