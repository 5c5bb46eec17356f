"""Ray's own commands on a cluster that runs already: `serve run server.scale:app` with settings as arguments.

The cluster says that it has a GPU. That is Ray's account of it, which replicas take their shares of; PyTorch finds none
and they compute on the CPU.
"""

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from benchmarks.processes import ray_processes, ready_replicas
from tests.ray.conftest import BODY, ROOT, STARTED_S, Fleet, until
from tests.server.conftest import free_port

pytest.importorskip("ray.serve")
pytestmark = pytest.mark.timeout(600)
COMMANDS = Path(sys.executable).parent
ROWS = 4  # texts at once on a replica


def takes_ctrl_c() -> None:
    """In a process that begins: what a shell starts in the background is told to ignore it, and all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.address, self.url = f"127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}"
        self.environment = os.environ | {
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "MATSTEER_CHECKPOINTS": str(folder),
            "MATSTEER_LOG_LEVEL": "warning",
        }

    def begin(self, *command: str, **environment: str) -> "subprocess.Popen[bytes]":
        program, *arguments = command
        given = [str(COMMANDS / program), *arguments]
        return subprocess.Popen(
            given,
            cwd=ROOT,
            env=self.environment | environment,
            stdout=subprocess.DEVNULL,
            preexec_fn=takes_ctrl_c,
        )

    def says(self, *command: str) -> str:
        program, *arguments = command
        return subprocess.run(
            [str(COMMANDS / program), *arguments], env=self.environment, check=True, capture_output=True, text=True
        ).stdout

    @contextmanager
    def serving(self, *settings: str) -> Iterator[int]:
        """The process of `serve run`, from the first answer until Ctrl-C has ended the replicas."""
        process = self.begin("serve", "run", "server.scale:app", *settings)
        try:
            until(lambda: process.poll() is not None or self.ready())
            assert process.poll() is None
            yield process.pid
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
        until(lambda: not ray_processes("ServeReplica"))

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=60).status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    """Of two cores and a GPU, by `ray start`. `ray stop` would end every cluster of this machine."""
    made = Cluster(folder)
    port = made.address.rpartition(":")[2]
    options = ["--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2", "--num-gpus=1"]
    options += ["--include-dashboard=false", f"--ray-client-server-port={free_port()}"]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary:  # a short path
        node = made.begin("ray", "start", *options, f"--temp-dir={temporary}", RAY_ADDRESS="")
        try:
            until(lambda: "1.0 GPU" in usage(made))
            yield made
        finally:
            node.terminate()
            node.wait(60)
        until(lambda: not ray_processes(""))


def usage(cluster: Cluster) -> str:
    try:
        return cluster.says("ray", "status")
    except subprocess.CalledProcessError:  # it does not run yet
        return ""


def start_proxy(cluster: Cluster) -> None:
    """At another port than 8000: `serve run` itself has no option for it."""
    cluster.says("serve", "start", "--http-port", cluster.url.rpartition(":")[2])


def test_serve_run_gives_two_replicas_half_of_a_gpu_each(cluster: Cluster) -> None:
    start_proxy(cluster)
    with cluster.serving("replicas=2", "replica_gpus=0.5", "replica_cpus=0.5") as process:
        fleet = Fleet.at(cluster.url, process, 2)
        assert re.search(r"1\.0/1\.0 GPU", usage(cluster))
        for version in ("v1", "v2"):
            fleet.change("POST", "/checkpoints/demo/activate", version=version)
            assert fleet.asks_all(16) == {f"demo@{version}"}


def test_a_replica_is_added_where_requests_wait_and_has_what_is_active(cluster: Cluster) -> None:
    start_proxy(cluster)
    settings = ("replicas=1", "max_replicas=2", f"max_num_seqs={ROWS}", "replica_gpus=0.5", "replica_cpus=0.5")
    with cluster.serving(*settings) as process:
        fleet = Fleet.at(cluster.url, process, 1)
        fleet.change("POST", "/checkpoints/demo/activate", version="v1")
        over, versions = threading.Event(), []

        def client() -> None:
            with httpx.Client(timeout=STARTED_S) as http:
                while not over.is_set():
                    versions.append(fleet.version(http.post(f"{fleet.url}/generate", json=BODY)))

        clients = [threading.Thread(target=client) for _ in range(3 * ROWS)]
        began = time.monotonic()
        for one in clients:
            one.start()
        try:
            until(lambda: len(ready_replicas()) == 2)
            print(f"{3 * ROWS} clients of a replica for {ROWS}: a second one after {time.monotonic() - began:.0f} s")
        finally:
            over.set()
            for one in clients:
                one.join()
        assert set(versions) == {"demo@v1"}, "none failed"
        assert fleet.asks_all(16) == {"demo@v1"}
        assert re.search(r"1\.0/1\.0 GPU", usage(cluster))
