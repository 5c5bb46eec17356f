"""Builds the image for CPUs and runs it, on a machine that has buildah and no container engine: `make test-image`.

buildah, as root and with `--isolation chroot`, needs neither namespaces nor a daemon: what is built is the Dockerfile's
image, what runs is its entrypoint as its user in its files, with the host's network. Where the base cannot be pulled,
`--debootstrap SUITE` makes one from Debian's packages. `--volume` and `--pip-conf` lend the build what it needs to
reach packages.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[2]
IMAGE = "localhost/mat-steer:cpu"
START_S, DRAIN_S, MORE_S = 180.0, 10, 2.0
PORT = 8997
QUESTION = {
    "prompt": "Q: What is the capital of Japan? A:",
    "attributes": {"truthfulness": 1, "civility": 1, "fairness": 1},
    "baseline": True,
    "seed": 1,
}


class Buildah:
    """Images and containers in a folder of their own."""

    def __init__(self, store: Path) -> None:
        places = ["--root", str(store / "images"), "--runroot", str(store / "run")]
        self.command = ["buildah", *places, "--storage-driver", "vfs"]

    def __call__(self, *arguments: str) -> str:
        """What it prints. Raises CalledProcessError."""
        done = subprocess.run([*self.command, *arguments], check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.strip()

    def begin(self, *arguments: str, **options: Any) -> "subprocess.Popen[str]":
        return subprocess.Popen([*self.command, *arguments], text=True, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="ubuntu:24.04", help="the image to build on")
    parser.add_argument("--debootstrap", metavar="SUITE", help="make the base from a Debian suite: bookworm")
    parser.add_argument("--torch-index", help="an index of PyTorch's CPU builds; otherwise the Dockerfile's")
    parser.add_argument("--pip-conf", type=Path, help="pip's configuration while the image is built")
    parser.add_argument("--volume", type=Path, action="append", default=[], help="a path that the build may read")
    parser.add_argument("--store", type=Path, help="where images are kept for the next time; otherwise nowhere")
    parser.add_argument("--no-build", action="store_true", help="run the image that --store has")
    args = parser.parse_args()
    for program in ["buildah", *(["debootstrap"] if args.debootstrap else [])]:
        if shutil.which(program) is None:
            sys.exit(f"{program} is not installed: apt-get install {program}")
    os.environ["BUILDAH_ISOLATION"] = "chroot"
    with tempfile.TemporaryDirectory() as folder:
        buildah = Buildah(args.store or Path(folder))
        if not args.no_build:
            base = debian(buildah, args.debootstrap, Path(folder)) if args.debootstrap else args.base
            build(buildah, base, args)
        facts(buildah)
        container = buildah("from", "--pull-never", IMAGE)
        try:
            check(buildah, container)
        finally:
            buildah("rm", container)


def debian(buildah: Buildah, suite: str, folder: Path) -> str:
    name = f"localhost/debian:{suite}"
    if subprocess.run([*buildah.command, "inspect", name], capture_output=True).returncode == 0:
        return name
    files = folder / "debian"
    subprocess.run(["debootstrap", "--variant=minbase", "--include=ca-certificates", suite, files], check=True)
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, str(files), "/")
    buildah("commit", "--quiet", "--rm", container, name)
    shutil.rmtree(files)
    return name


def build(buildah: Buildah, base: str, args: argparse.Namespace) -> None:
    options = ["--build-arg", f"BASE={base}", "--build-arg", "TORCH=cpu"]
    if args.torch_index:
        options += ["--build-arg", f"TORCH_INDEX={args.torch_index}"]
    volumes = [f"{path}:{path}:ro" for path in args.volume]
    volumes += [f"{args.pip_conf.resolve()}:/etc/pip.conf:ro"] if args.pip_conf else []
    for volume in volumes:
        options += ["--volume", volume]
    began = time.monotonic()
    buildah("build", "--format", "docker", "--layers=false", *options, "--tag", IMAGE, str(ROOT))
    told("built", f"{time.monotonic() - began:.0f} s")


def facts(buildah: Buildah) -> None:
    """What whoever runs the image relies on."""
    config = json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]
    expect("runs as a user without rights", config["User"] == "10001")
    expect("ends at SIGTERM", config["StopSignal"] == "SIGTERM")
    expect("has a health check", config["Healthcheck"]["Test"][0] == "CMD")
    expect("serves by default", (config["Entrypoint"], config["Cmd"]) == (["matsteer"], ["serve"]))


def check(buildah: Buildah, container: str) -> None:
    run = ["run", "--user", "10001", "--env", f"MATSTEER_PORT={PORT}", "--env", f"MATSTEER_DRAIN_S={DRAIN_S}"]
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the process
    began = time.monotonic()
    server = buildah.begin(*run, container, "--", "matsteer", "serve", stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{PORT}"
    try:
        wait_for(lambda: httpx.get(f"{url}/readyz").status_code == 200, START_S)
        told("ready", f"after {time.monotonic() - began:.1f} s")
        inside = served_by(PORT)
        uids = Path(f"/proc/{inside}/status").read_text().split("Uid:")[1].split()[:4]
        expect("the process has no rights", set(uids) == {"10001"})
        test = json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]["Healthcheck"]["Test"]
        buildah(*run, container, "--", *test[1:])
        told("the health check", "passes")
        answer = httpx.post(f"{url}/generate", json=QUESTION, timeout=120).json()
        steered, unsteered = answer["results"][0], answer["baseline"][0]
        told("steered", steered["text"].strip())
        told("unsteered", unsteered["text"].strip())
        expect(
            "two arms, one steered", steered["steering"]["steered_tokens"] > 0 and steered["text"] != unsteered["text"]
        )
        expect("kernels are compiled", b"/library-" in Path(f"/proc/{inside}/maps").read_bytes())
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
    with httpx.stream("POST", f"{url}/generate", json=body, timeout=60) as stream:
        lines = stream.iter_lines()
        next(lines)
        began = time.monotonic()
        os.kill(inside, signal.SIGTERM)
        rest = list(lines)
    expect("a running stream ends whole", any(line.startswith("event: done") for line in rest))
    server.wait(timeout=DRAIN_S + MORE_S)
    told("ended", f"{time.monotonic() - began:.1f} s after SIGTERM, status {server.returncode}")
    expect("ends with status 0", server.returncode == 0)


def served_by(port: int) -> int:
    """The process that listens: buildah's child is another one."""
    found = [one.pid for one in psutil.net_connections("tcp") if one.laddr.port == port and one.status == "LISTEN"]
    return int(found[0])


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
