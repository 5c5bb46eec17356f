"""Builds the sdist and from it the wheel, installs that into an empty environment, and serves: `make test-release`.

What is built stays in dist/. The environment takes packages from pip's indexes, PyTorch among them.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

import httpx

from benchmarks.processes import running
from demo.readme import requests

ROOT = Path(__file__).parents[2]
DIST = ROOT / "dist"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    shutil.rmtree(DIST, ignore_errors=True)
    sdist = built("sdist", ROOT)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        wheel = built("wheel", Path(folder) / sdist.name.removesuffix(".tar.gz"))
    print(*(f"{path.stat().st_size / 2**20:6.1f} MiB  {path.relative_to(ROOT)}" for path in (sdist, wheel)), sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        serve(wheel, Path(folder))


def built(target: str, source: Path) -> Path:
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", target, "-d", DIST], cwd=source, check=True)
    (found,) = DIST.glob("*.tar.gz" if target == "sdist" else "*.whl")
    return found


def serve(wheel: Path, folder: Path) -> None:
    """From a folder in which nothing of the clone is."""
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv/bin/python"
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *constraints, str(wheel)], check=True)
    os.chdir(folder)
    version = subprocess.run(["venv/bin/matsteer", "--version"], check=True, capture_output=True, text=True).stdout
    print(version.strip())
    (request, *_) = requests(ROOT / "README.md")
    with running(["venv/bin/matsteer", "serve"]) as server:
        checkpoint = httpx.get(f"{server.url}/readyz", trust_env=False).json()["checkpoint"]
        page = httpx.get(server.url, headers={"accept": "text/html"}, trust_env=False)
        answer = httpx.post(server.url + request.path, json=request.body, timeout=60, trust_env=False).json()
    steered, unsteered = answer["results"][0], answer["baseline"][0]
    print(f"checkpoint {checkpoint}\nsteered    {steered['text'].strip()}\nunsteered  {unsteered['text'].strip()}")
    assert checkpoint == "demo@v1"
    assert page.status_code == 200
    assert "page.js" in page.text
    assert steered["steering"]["steered_tokens"] > 0
    assert steered["text"] != unsteered["text"]


if __name__ == "__main__":
    main()
