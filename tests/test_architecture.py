"""The direction of the imports, read from the code."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import steering

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "steer_ops": {"steering", "server", "training", "demo", "studies"},
    "steering": {"server", "training", "demo", "studies"},
    "training": {"server", "demo", "studies"},
    "server": {"training", "demo", "studies"},
    "server/api": {"torch", "transformers", "steering"},
    "server/schemas.py": {"fastapi", "starlette", "torch", "transformers", "server.api", "server.service"},
    "server/formatting.py": {"fastapi", "starlette", "torch", "transformers", "server.api", "server.service"},
    "server/service.py": {"fastapi", "starlette", "torch", "transformers", "server.api", "server.schemas"},
    "server/loading.py": {"fastapi", "starlette", "server.api", "server.service"},
    "server/engine": {"fastapi", "starlette", "server.api", "server.service", "server.loading"},
    "server/engine_client.py": {
        "fastapi",
        "starlette",
        "torch",
        "transformers",
        "server.engine.engine",
        "server.registry",
    },
    "server/front.py": {"fastapi", "starlette", "torch", "transformers", "server.api", "server.engine.engine"},
    "server/process/supervisor.py": {"fastapi", "starlette", "transformers", "server.service", "server.engine"},
    "server/parallel": {"fastapi", "starlette", "server.api", "server.service"},
    "server/attention": {"fastapi", "starlette", "server.api", "server.service", "server.loading", "server.engine"},
    "server/attention/layout.py": {"torch", "transformers"},
    **{
        f"server/engine/{name}.py": {"torch", "transformers", "server.engine.model_runner"}
        for name in (
            "sequence",
            "block_manager",
            "scheduler",
            "fair_queue",
            "output_processor",
            "text_builder",
            "tasks",
        )
    },
    "demo": {"server", "studies"},
    "studies": {"server"},
}


def imported(path: Path, *, in_functions: bool = True) -> set[str]:
    """Every module that a file imports, with all its parents: a.b.c gives a, a.b and a.b.c. `in_functions`: also where
    a function is run, as commands do so that `--help` comes at once."""
    names = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if in_functions else outside_functions(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {".".join(parts[:end]) for name in names for parts in [name.split(".")] for end in range(1, len(parts) + 1)}


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from outside_functions(child)


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


def modules() -> dict[str, Path]:
    """Every module of ours by its name; a package is its `__init__`."""
    found = {}
    for package in ("steer_ops", "steering", "server", "training", "demo", "studies", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def circles(needs: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is left of a graph once everything is taken away that needs nothing, again and again."""
    left = {name: set(needed) & needs.keys() - {name} for name, needed in needs.items()}
    while free := {name for name, needed in left.items() if not needed}:
        left = {name: needed - free for name, needed in left.items() if name not in free}
    return left


def test_no_modules_import_each_other_in_a_circle() -> None:
    every = modules()
    # A package that is only passed through on the way to its module is not what is meant.
    needs = {}
    for name, path in every.items():
        seen = imported(path, in_functions=False) & every.keys()
        needs[name] = {one for one in seen if not any(other.startswith(f"{one}.") for other in seen)}
    assert not circles(needs)


def test_a_circle_is_found() -> None:
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == {"a": {"b"}, "b": {"c"}, "c": {"b"}}


def test_the_reader_of_imports_sees_every_form(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text("import a.b\nfrom c.d import e\ndef f():\n    from g import h\n")
    assert imported(file) == {"a", "a.b", "c", "c.d", "c.d.e", "g", "g.h"}
    assert imported(file, in_functions=False) == {"a", "a.b", "c", "c.d", "c.d.e"}


@pytest.mark.parametrize("module", ["server.sockets", "server.process.supervisor", "server.process.workers"])
def test_a_port_is_bound_processes_are_supervised_and_fronts_answer_without_pytorch(module: str) -> None:
    code = f"import sys, {module}; assert not {{'torch', 'transformers'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_what_a_package_lists_is_imported_when_it_is_asked_for() -> None:
    code = "import sys, steering.option_groups; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    for node in ast.walk(ast.parse((ROOT / "steering/__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("steering."):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert getattr(steering, alias.name) is getattr(module, alias.name)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = steering.nonsense
