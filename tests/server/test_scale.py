"""What a replica's settings are, wherever Ray puts it. Replicas themselves are tried in tests/ray."""

import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from server.config import Settings, load_settings
from server.errors import StartupError
from server.scale import app, replica_gpus, replica_settings


@pytest.mark.parametrize(
    ("given", "cluster_has_gpus", "gpus"),
    [
        ({}, True, 1),
        ({}, False, 0),
        ({"device": "cpu"}, True, 0),
        ({"device": "cuda"}, False, 1),
        ({"replica_gpus": 0.5}, True, 0.5),
        ({"replica_gpus": 0}, True, 0),
        ({"replica_gpus": 0.5, "device": "cpu"}, True, 0),
    ],
)
def test_a_replica_has_a_gpu_where_there_are_any(given: dict[str, object], cluster_has_gpus: bool, gpus: float) -> None:
    assert replica_gpus(Settings(**given), lambda: cluster_has_gpus) == gpus


def test_replicas_on_one_gpu_share_its_memory() -> None:
    assert replica_settings(Settings(), 0.5).gpu_memory_utilization == pytest.approx(0.45)
    assert replica_settings(Settings(), 1).gpu_memory_utilization == 0.9
    assert replica_settings(Settings(gpu_memory_utilization=0.3), 0.5).gpu_memory_utilization == 0.3


def test_replicas_on_cpus_share_memory_and_have_as_many_threads_as_cores() -> None:
    made = replica_settings(Settings(replicas=2, max_replicas=5, replica_cpus=3.5), 0)
    assert (made.device, made.threads, made.cpu_kv_cache_share) == ("cpu", 3, 0.05)
    assert replica_settings(Settings(threads=7, replica_cpus=0.5), 0).threads == 7
    assert replica_settings(Settings(replica_cpus=0.5), 0).threads == 1


def test_paths_mean_the_same_in_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    made = replica_settings(Settings(model="tiny", checkpoints="mine", chat_template="chat.jinja"), 0)
    assert (made.model, made.served_name) == (str(tmp_path / "tiny"), "tiny")
    assert (made.checkpoints, made.chat_template) == (tmp_path / "mine", tmp_path / "chat.jinja")
    hub = replica_settings(Settings(model="some/model"), 0)
    assert (hub.model, hub.served_name) == ("some/model", "some/model")


def test_settings_travel_whole_with_their_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    made = replica_settings(Settings(api_key="secret", max_model_len=77), 0)
    monkeypatch.setenv("MATSTEER_MAX_MODEL_LEN", "5")  # of the machine of the replica
    there = pickle.loads(pickle.dumps(made))
    assert there == made
    assert there.max_model_len == 77
    assert there.api_key.get_secret_value() == "secret"


def test_what_cannot_be_is_refused_with_a_sentence() -> None:
    with pytest.raises(StartupError, match="set device to cuda, not cuda:1"):
        replica_settings(Settings(device="cuda:1"), 1)
    with pytest.raises(StartupError, match="max_replicas is 1, but replicas is 2"):
        load_settings(replicas=2, max_replicas=1)
    with pytest.raises(StartupError, match="no setting called 'replica'"):
        app({"replica": 2})


def test_rays_own_processes_need_no_torch() -> None:
    code = "import sys, server.scale; assert not {'torch', 'transformers', 'ray'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_serve_says_what_to_install() -> None:
    command = [sys.executable, "-m", "server.cli", "serve", "--ray"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert ended.returncode == 1
    assert "pip install 'ray[serve]>=2.60'" in ended.stderr
    assert "Traceback" not in ended.stderr
