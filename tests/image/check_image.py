"""Builds an image and runs it: `make test-image`.

By default with buildah, for CPUs, on a machine that has no container engine: as root and with `--isolation chroot` it
needs neither namespaces nor a daemon. What is built is the Dockerfile's image, what runs is its entrypoint as its user
in its files, with the host's network. Where the base cannot be pulled, `--debootstrap SUITE` makes one from Debian's
packages. `--volume` and `--pip-conf` lend the build what it needs to reach packages.

With --docker a container engine does both; `--torch cu130` is the image for GPUs, which has to serve on a CPU as well,
and to have what Triton compiles its kernels with.
As root: whose process listens, and what it has mapped, is for root to see.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import httpx
import psutil

from server.event_lines import EventLines

ROOT = Path(__file__).parents[2]
START_S, DRAIN_S, MORE_S = 180.0, 10, 2.0
PORT = 8997
SETTINGS = {"MATSTEER_PORT": str(PORT), "MATSTEER_DRAIN_S": str(DRAIN_S)}
QUESTION = {
    "prompt": "Q: What is the capital of Japan? A:",
    "attributes": {"truthfulness": 1, "civility": 1, "fairness": 1},
    "baseline": True,
    "seed": 1,
}
# As Triton does for each kernel, whose launcher is a module in C.
COMPILES = """
import importlib.util, shutil, subprocess, sysconfig, tempfile, triton
SOURCE = r'''
#include <Python.h>
static struct PyModuleDef tried = {PyModuleDef_HEAD_INIT, "tried", 0, -1, 0};
PyMODINIT_FUNC PyInit_tried(void) { return PyModule_Create(&tried); }
'''
compiler = shutil.which("gcc")
assert compiler, "there is no gcc"
with tempfile.TemporaryDirectory() as folder:
    source, module = folder + "/tried.c", folder + "/tried.so"
    with open(source, "w") as file:
        file.write(SOURCE)
    headers = "-I" + sysconfig.get_path("include")
    subprocess.run([compiler, source, headers, "-shared", "-fPIC", "-o", module], check=True)
    spec = importlib.util.spec_from_file_location("tried", module)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


class Image(Protocol):
    """An image, and a container of it. Everything raises CalledProcessError."""

    def build(self, arguments: Mapping[str, str], volumes: Sequence[str]) -> None: ...

    def config(self) -> dict[str, Any]: ...

    def serve(self, settings: Mapping[str, str], output: IO[str]) -> "subprocess.Popen[str]":
        """The container begins, with what it serves by default."""

    def execute(self, *command: str) -> None:
        """In the container that serves."""

    def close(self) -> None: ...


class Buildah:
    """Images and containers in a folder of their own."""

    def __init__(self, tag: str, store: Path) -> None:
        places = ["--root", str(store / "images"), "--runroot", str(store / "run")]
        self.command = ["buildah", *places, "--storage-driver", "vfs"]
        self._tag = tag
        self._container = ""
        self._run: list[str] = []
        os.environ["BUILDAH_ISOLATION"] = "chroot"

    def __call__(self, *arguments: str) -> str:
        """What it prints."""
        return printed(*self.command, *arguments)

    def debian(self, suite: str, folder: Path) -> str:
        """The name of an image of Debian's packages, made where there is none. `folder`: for its files."""
        name = f"localhost/debian:{suite}"
        if subprocess.run([*self.command, "inspect", name], capture_output=True).returncode == 0:
            return name
        files = folder / "debian"
        subprocess.run(["debootstrap", "--variant=minbase", "--include=ca-certificates", suite, files], check=True)
        container = self("from", "scratch")
        self("add", "--quiet", container, str(files), "/")
        self("commit", "--quiet", "--rm", container, name)
        shutil.rmtree(files)
        return name

    def build(self, arguments: Mapping[str, str], volumes: Sequence[str]) -> None:
        lent = options("--volume", volumes)
        self(
            "build", "--format", "docker", "--layers=false", *build_arguments(arguments), *lent, "--tag", self._tag, "."
        )

    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self("inspect", "--type", "image", self._tag))["Docker"]["config"]
        return found

    def serve(self, settings: Mapping[str, str], output: IO[str]) -> "subprocess.Popen[str]":
        config = self.config()
        self._container = self("from", "--pull-never", self._tag)
        self._run = ["run", "--user", config["User"], *options("--env", pairs(settings)), self._container, "--"]
        command = [*self.command, *self._run, *config["Entrypoint"], *config["Cmd"]]
        return subprocess.Popen(command, text=True, stdout=output, stderr=subprocess.STDOUT)

    def execute(self, *command: str) -> None:
        self(*self._run, *command)

    def close(self) -> None:
        if self._container:
            self("rm", self._container)


class Docker:
    """A container engine's. The image stays there."""

    def __init__(self, tag: str) -> None:
        self._tag = tag
        self._container = f"mat-steer-{os.getpid()}"

    def build(self, arguments: Mapping[str, str], volumes: Sequence[str]) -> None:
        if volumes:
            sys.exit("--volume and --pip-conf are for buildah")
        subprocess.run(["docker", "build", *build_arguments(arguments), "--tag", self._tag, "."], check=True, cwd=ROOT)

    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(printed("docker", "image", "inspect", self._tag))[0]["Config"]
        return found

    def serve(self, settings: Mapping[str, str], output: IO[str]) -> "subprocess.Popen[str]":
        given = ["--name", self._container, "--network", "host", *options("--env", pairs(settings))]
        command = ["docker", "run", *given, self._tag]
        return subprocess.Popen(command, text=True, stdout=output, stderr=subprocess.STDOUT)

    def execute(self, *command: str) -> None:
        printed("docker", "exec", self._container, *command)

    def close(self) -> None:
        subprocess.run(["docker", "rm", "--force", self._container], capture_output=True)


def printed(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout.strip()


def options(name: str, values: Sequence[str]) -> list[str]:
    return [part for value in values for part in (name, value)]


def pairs(given: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in given.items()]


def build_arguments(given: Mapping[str, str]) -> list[str]:
    return options("--build-arg", pairs(given))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docker", action="store_true", help="by a container engine, in place of buildah")
    parser.add_argument("--torch", default="cpu", help="which of PyTorch's builds (default: %(default)s)")
    parser.add_argument("--tag", help="what the image is called; otherwise localhost/mat-steer:TORCH")
    parser.add_argument("--base", default="ubuntu:24.04", help="the image to build on")
    parser.add_argument("--debootstrap", metavar="SUITE", help="make the base from a Debian suite: bookworm")
    parser.add_argument("--torch-index", help="an index of PyTorch's builds; otherwise the Dockerfile's")
    parser.add_argument("--pip-conf", type=Path, help="pip's configuration while the image is built")
    parser.add_argument("--volume", type=Path, action="append", default=[], help="a path that the build may read")
    parser.add_argument(
        "--store", type=Path, help="where buildah's images are kept for the next time; otherwise nowhere"
    )
    parser.add_argument("--no-build", action="store_true", help="run the image that is there")
    args = parser.parse_args()
    if os.geteuid():
        sys.exit("run this as root: whose process listens in the image is for root to see")
    for program in ["docker" if args.docker else "buildah", *(["debootstrap"] if args.debootstrap else [])]:
        if shutil.which(program) is None:
            sys.exit(f"{program} is not installed: apt-get install {program}")
    tag = args.tag or f"localhost/mat-steer:{args.torch}"
    with tempfile.TemporaryDirectory() as folder:
        image: Image
        if args.docker:
            image, base = Docker(tag), args.base
        else:
            image = buildah = Buildah(tag, args.store or Path(folder))
            base = buildah.debian(args.debootstrap, Path(folder)) if args.debootstrap else args.base
        if not args.no_build:
            build(image, base, args)
        facts(image.config())
        try:
            check(image, args.torch)
        finally:
            image.close()


def build(image: Image, base: str, args: argparse.Namespace) -> None:
    arguments = {"BASE": base, "TORCH": args.torch}
    if args.torch_index:
        arguments["TORCH_INDEX"] = args.torch_index
    volumes = [f"{path}:{path}:ro" for path in args.volume]
    volumes += [f"{args.pip_conf.resolve()}:/etc/pip.conf:ro"] if args.pip_conf else []
    began = time.monotonic()
    image.build(arguments, volumes)
    told("built", f"{time.monotonic() - began:.0f} s")


def facts(config: Mapping[str, Any]) -> None:
    """What whoever runs the image relies on."""
    expect("runs as a user without rights", config["User"] == "10001")
    expect("ends at SIGTERM", config["StopSignal"] == "SIGTERM")
    expect("has a health check", config["Healthcheck"]["Test"][0] == "CMD")
    expect("serves by default", (config["Entrypoint"], config["Cmd"]) == (["matsteer"], ["serve"]))


def check(image: Image, torch: str) -> None:
    """`torch`: which of PyTorch's builds it has, and so what it compiles kernels with."""
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the process
    began = time.monotonic()
    server = image.serve(SETTINGS, log)
    url = f"http://127.0.0.1:{PORT}"
    try:
        wait_for(lambda: httpx.get(f"{url}/readyz").status_code == 200, START_S)
        told("ready", f"after {time.monotonic() - began:.1f} s")
        inside = served_by(PORT)
        uids = Path(f"/proc/{inside}/status").read_text().split("Uid:")[1].split()[:4]
        expect("the process has no rights", set(uids) == {"10001"})
        image.execute(*image.config()["Healthcheck"]["Test"][1:])
        told("the health check", "passes")
        answer = httpx.post(f"{url}/generate", json=QUESTION, timeout=120).json()
        steered, unsteered = answer["results"][0], answer["baseline"][0]
        told("steered", steered["text"].strip())
        told("unsteered", unsteered["text"].strip())
        expect(
            "two arms, one steered", steered["steering"]["steered_tokens"] > 0 and steered["text"] != unsteered["text"]
        )
        if torch == "cpu":
            expect("kernels are compiled", b"/library-" in Path(f"/proc/{inside}/maps").read_bytes())
        else:
            image.execute("python", "-c", COMPILES)
            told("ok", "Triton has a compiler and Python's headers")
        drain(url, inside, server)
    except BaseException:
        log.seek(0)
        print(log.read()[-4000:], file=sys.stderr)
        raise
    finally:
        server.kill()
        server.wait()


def drain(url: str, inside: int, server: "subprocess.Popen[str]") -> None:
    """A stream that runs when SIGTERM comes is told to its end."""
    body = {"prompt": "Q:", "max_new_tokens": 60, "ignore_eos": True, "stream": True}
    lines = EventLines()
    with httpx.stream("POST", f"{url}/generate", json=body, timeout=60) as stream:
        texts = stream.iter_text()
        told_before = lines.feed(next(texts))
        began = time.monotonic()
        os.kill(inside, signal.SIGTERM)
        rest = [line for text in texts for line in lines.feed(text)]
    expect("a running stream ends whole", "event: done" in rest and "event: done" not in told_before)
    server.wait(timeout=DRAIN_S + MORE_S)
    told("ended", f"{time.monotonic() - began:.1f} s after SIGTERM, status {server.returncode}")
    expect("ends with status 0", server.returncode == 0)


def served_by(port: int) -> int:
    """The process that listens: the command's own child is another one."""
    listening = [one for one in psutil.net_connections("tcp") if one.laddr.port == port and one.status == "LISTEN"]
    assert listening[0].pid is not None  # root sees it
    return int(listening[0].pid)


def wait_for(there: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            if there():
                return
        except httpx.TransportError:
            pass
        if time.monotonic() > until:
            raise TimeoutError(f"not after {seconds:.0f} s")
        time.sleep(0.2)


def expect(what: str, holds: bool) -> None:
    if not holds:
        raise AssertionError(what)
    told("ok", what)


def told(what: str, how: str) -> None:
    print(f"{what:<16} {how}", flush=True)


if __name__ == "__main__":
    main()
