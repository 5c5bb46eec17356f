"""Servers in processes of their own."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import psutil


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    pid: int


@contextmanager
def running(
    command: Sequence[str],
    *,
    ready: str = "/readyz",
    timeout: float = 600,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """`command` with `--port N` behind it, from the moment at which it answers at `ready`. Raises RuntimeError where it
    does not."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([*command, "--port", str(port)], env=os.environ | (environment or {}))
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, url + ready, time.monotonic() + timeout)
        yield Running(url, process.pid)
    finally:
        process.terminate()
        process.wait()


def ray_processes(title: str) -> dict[int, str]:
    """Process id -> title, of those of Ray that this process has started and whose titles begin so."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        try:
            name = child.cmdline()[0]
        except (psutil.Error, IndexError):
            continue
        if name.startswith(f"ray::{title}"):
            found[child.pid] = name
    return found


def ready_replicas() -> set[int]:
    """Replicas of Ray Serve that take requests."""
    return {pid for pid, title in ray_processes("ServeReplica").items() if "initialize" not in title}


def _wait(process: "subprocess.Popen[bytes]", url: str, end: float) -> None:
    while time.monotonic() < end:
        try:
            httpx.get(url).raise_for_status()
            return
        except httpx.HTTPError:
            if process.poll() is not None:
                raise RuntimeError(f"the server of {url} has ended") from None
            time.sleep(0.2)
    raise RuntimeError(f"nothing answers at {url}")
