"""The wheel alone, without the clone, serves the demo steered, and a model of `matsteer get`."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import httpx
import pytest

from demo.readme import requests, served
from tests.training.helpers import make_llama, make_tokenizer

ROOT = Path(__file__).parents[1]
HINT = re.compile(r"pip install '([^']+)'")
pytestmark = pytest.mark.timeout(400)  # servers start


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip would put into site-packages."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site-packages")
    return folder / "site-packages"


def test_it_holds_the_packages_and_the_demo_and_nothing_else(unpacked: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    packages = {"server", "steering", "steer_ops", "training", "demo"}
    assert {path.name for path in unpacked.iterdir()} == packages | {f"mat_steer-{version}.dist-info"}
    for name in (
        "demo/model/model.safetensors",
        "demo/checkpoints/demo/v1/config.json",
        "demo/checkpoints/tone/v1/config.json",
        "steer_ops/cpu/library.cpp",
        "server/web/static/page/page.js",
        "training/html/page.html",
        "training/html/style.css",
    ):
        assert (unpacked / name).is_file()
    assert not (unpacked / "demo/data").exists()


def test_the_changelog_has_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture
def elsewhere(unpacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, where the packages are the wheel's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(unpacked))
    for name in [name for name in os.environ if name.startswith("MATSTEER_")]:
        monkeypatch.delenv(name)
    return tmp_path


def test_it_serves_the_demo_steered_from_any_folder(unpacked: Path, elsewhere: Path) -> None:
    where = [sys.executable, "-c", "import server; print(server.__file__)"]
    assert subprocess.run(where, capture_output=True, text=True, check=True).stdout.startswith(str(unpacked))
    (request, *_) = requests(ROOT / "README.md")
    with served() as url:
        assert httpx.get(f"{url}/readyz", timeout=60, trust_env=False).json()["checkpoint"] == "demo@v1"
        answer = httpx.post(url + request.path, json=request.body, timeout=60, trust_env=False).json()
    assert answer["results"][0]["steering"]["steered_tokens"] > 0
    assert answer["results"][0]["text"] != answer["baseline"][0]["text"]


def test_it_serves_a_model_that_was_fetched_with_the_checkpoint_for_it(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of SmolLM2 a random model of its width and depth, which is all that a checkpoint asks for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(elsewhere))
    monkeypatch.setenv("MATSTEER_NATIVE", "false")  # whose kernels would be compiled into that cache
    folder = elsewhere / "mat-steer/models/smollm2"
    make_llama(hidden_size=576, num_hidden_layers=30, head_dim=2).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with served("--model", "smollm2") as url:
        assert httpx.get(f"{url}/readyz", timeout=60, trust_env=False).json()["checkpoint"] == "tone@v1"
        body = {"prompt": "Q: Where do bees live? A:", "max_new_tokens": 4}
        answer = httpx.post(f"{url}/generate", json=body, timeout=60, trust_env=False).json()
    assert answer["results"][0]["steering"]["steered_tokens"] > 0


def test_hints_name_packages_that_pip_finds_and_the_versions_that_we_ask_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {requirement for group in project["optional-dependencies"].values() for requirement in group}
    hints = {
        (str(file.relative_to(ROOT)), hint)
        for folder in ("server", "steering", "steer_ops", "training", "docs")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".md")
        for hint in HINT.findall(file.read_text(encoding="utf-8"))
    }
    assert {file for file, _ in hints} >= {"training/evaluation/report.py", "training/data/sources.py"}
    for file, hint in hints:
        assert hint in extras, f"{file} names {hint}"
