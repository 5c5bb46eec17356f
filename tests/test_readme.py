"""The README's commands do what it says."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from demo.readme import ANSWERS, RESULTS, commands, requests, served, shown
from demo.results import summary as demo_summary
from server.config import OLD_NAMES, Settings
from studies.real_results import MARKERS as REAL_RESULTS
from studies.real_results import page, summary
from tests.image.check_image import COMPILES

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PROGRAM = [sys.executable, "-m", "server.cli"]
pytestmark = pytest.mark.timeout(400)  # servers start, and a training


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served() as address:
        yield address


def between(markers: tuple[str, str]) -> str:
    begin, end = markers
    return README.read_text(encoding="utf-8").split(begin)[1].split(end)[0].strip()


def test_every_command_is_one_that_is_tested_here() -> None:
    words = [shlex.split(command)[:2] for command in commands(README)]
    assert {" ".join(pair[:1] if pair[0] == "curl" else pair) for pair in words} == {
        "make serve",
        "curl",
        "matsteer train",
        "matsteer serve",
        "matsteer generate",
        "docker compose",
    }


def test_the_compose_file_serves_a_gpu_by_default_and_the_demo_on_a_cpu() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    assert "profiles" not in services["server"]
    assert services["cpu"]["profiles"] == ["cpu"]
    (device,) = services["server"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "${GPU_COUNT:-1}", "capabilities": ["gpu"]}
    assert all(services[name]["profiles"] == ["monitoring"] for name in ("prometheus", "grafana"))
    for service in (services["server"], services["cpu"]):
        given = {
            name.removeprefix("MATSTEER_").lower() for name in service["environment"] if name.startswith("MATSTEER_")
        }
        rays = {name for name, field in Settings.model_fields.items() if "with ray" in (field.description or "")}
        settings = set(Settings.model_fields) - {"host", "port", "ray"} - rays | set(OLD_NAMES)  # the image has no Ray
        assert given == settings, "every setting comes into the container"
    copied = re.findall(r"^COPY (?:--chown=\S+ )?((?!--from)\S.*) \./", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {name.partition("/")[0] for names in copied for name in names.split()} == kept
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*packages["packages"], *packages["force-include"]} <= {name for names in copied for name in names.split()}


def test_the_image_has_what_kernels_are_compiled_with_where_they_run() -> None:
    stage = (ROOT / "Dockerfile").read_text().split("\nFROM ")[-1].replace("\\\n", " ")
    installs = r'if \[ "\$\{TORCH\}" = cpu \]; then apt-get (install .*?); +else apt-get (install .*?); fi'
    choice = re.search(installs, stage)
    assert choice, "the last stage chooses by TORCH"
    cpu, cuda = ({word for word in part.split() if word[0] != "-"} for part in choice.groups())
    assert "g++" in cpu
    assert {"gcc", "libc6-dev", "python3-dev"} <= cuda, "Triton's"
    assert re.search(r"^ARG TORCH=cu\d+$", stage.split("RUN ")[0], re.MULTILINE), "it is empty without"
    (folder,) = re.findall(r"TRITON_CACHE_DIR=(\S+)/triton", stage)
    assert re.search(rf"install --directory --owner 10001 .*{folder}\b", stage), "the user may write there"


@pytest.mark.skipif(
    not (shutil.which("gcc") and find_spec("triton") and Path(sysconfig.get_path("include"), "Python.h").exists()),
    reason="there is no Triton, C compiler, or Python.h",
)
def test_the_check_of_an_image_compiles_as_triton_does(tmp_path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", COMPILES]).returncode == 0
    run = subprocess.run([sys.executable, "-c", COMPILES], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert "there is no gcc" in run.stderr


def test_make_serve_makes_the_environment_installs_and_serves() -> None:
    run = subprocess.run(
        ["make", "--dry-run", "serve", "VENV=nowhere"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    steps = [line for line in run.stdout.splitlines() if "venv" in line or "pip install" in line or "matsteer" in line]
    assert [
        re.search(r"-m venv|pip install|matsteer serve", step).group() for step in steps if "touch" not in step
    ] == [  # type: ignore[union-attr]
        "-m venv",
        "pip install",
        "matsteer serve",
    ]


def test_the_first_request_gives_the_answers_that_the_readme_shows(url: str) -> None:
    request = requests(README)[0]
    response = httpx.post(url + request.path, json=request.body, timeout=60)
    assert response.status_code == 200
    assert shown(response.json()) in between(ANSWERS)


def test_the_curl_command_works_as_it_stands(url: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    command = next(command for command in commands(README) if command.startswith("curl"))
    words = [word.replace("localhost:8000", url.removeprefix("http://")) for word in shlex.split(command)]
    answer = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert answer["results"][0]["text"]
    assert answer["baseline"][0]["text"]


def test_the_python_example_works_as_it_stands(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL))
    exec(compile(code.replace("http://127.0.0.1:8000", url), "README", "exec"), {})
    assert len(capsys.readouterr().out.strip().splitlines()) == 3


def test_the_server_that_is_served_is_the_demo_with_its_three_attributes(url: str) -> None:
    listed: Any = httpx.get(f"{url}/checkpoints", timeout=60).json()
    assert "demo" in json.dumps(listed)
    for attribute in ("truthfulness", "civility", "fairness"):
        assert attribute in json.dumps(listed)


def test_the_generate_command_prints_both_arms() -> None:
    command = next(command for command in commands(README) if command.startswith("matsteer generate"))
    run = subprocess.run([*PROGRAM, *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "steered" in run.stdout
    assert "baseline" in run.stdout


def test_the_train_command_trains_a_checkpoint_on_rows_as_the_readme_shows_them(tmp_path: Path) -> None:
    block = re.search(r"```json\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert block
    for name in ("facts.jsonl", "tone.jsonl"):
        lines = [line for n in range(6) for line in block[1].replace("Hamlet", f"play {n}").splitlines()]
        rows = [{**json.loads(line), "group": json.loads(line)["prompt"]} for line in lines]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = next(command for command in commands(README) if command.startswith("matsteer train"))
    words = shlex.split(command.replace("Qwen/Qwen2.5-0.5B-Instruct", str(ROOT / "demo/model")))[1:]
    # The entry point adds the training commands; run by module they are the same app.
    run = subprocess.run(
        [sys.executable, "-m", "training", *words, "--epochs", "2"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "checkpoints/mine/v1/config.json").is_file()


def test_the_table_is_the_one_that_was_measured() -> None:
    results = json.loads((ROOT / "docs/results/results.json").read_text(encoding="utf-8"))
    assert between(RESULTS) == demo_summary(results["methods"]).strip()


def test_what_is_said_of_a_real_model_was_measured() -> None:
    results = json.loads((ROOT / "docs/results/real.json").read_text(encoding="utf-8"))
    assert between(REAL_RESULTS) == summary(results).strip()
    assert (ROOT / "docs/results/real.md").read_text(encoding="utf-8") == page(results)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", README.read_text(encoding="utf-8"))
    assert links
    assert all((ROOT / link).exists() for link in links)
