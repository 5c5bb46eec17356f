"""The Helm chart gives what the server needs to start, to be looked at and to drain. Skipped without `helm`.

`make check-chart` holds what it gives against Kubernetes' own schemas, too.
"""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.config import Settings

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy/helm/mat-steer"
needs_helm = pytest.mark.skipif(shutil.which("helm") is None, reason="there is no helm")
EVERYTHING = {
    "secret.name": "keys",
    "secret.keysFile": "true",
    "secret.hubToken": "true",
    "checkpoints.create": "true",
    "replicas": "3",
    "model": "some/model",
    "checkpoint": "mine@v1",
    "env.MATSTEER_LOG_LEVEL": "debug",
    "drainSeconds": "90",
}


def helm(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["helm", *arguments], capture_output=True, text=True, check=False)


def rendered(**values: str) -> dict[str, Any]:
    """Kind -> the manifest of that kind."""
    options = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    done = helm("template", "steer", str(CHART), *options)
    assert done.returncode == 0, done.stderr
    return {one["kind"]: one for one in yaml.safe_load_all(done.stdout) if one}


def container(manifests: dict[str, Any]) -> Any:
    return manifests["Deployment"]["spec"]["template"]["spec"]["containers"][0]


def test_every_variable_of_the_chart_is_a_setting() -> None:
    text = "".join(path.read_text("utf-8") for path in CHART.rglob("*.yaml"))
    named = {name.lower() for name in re.findall(r"- name: MATSTEER_(\w+)", text)}
    assert "drain_s" in named
    assert named <= set(Settings.model_fields)


def test_the_chart_is_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert {chart["version"], chart["appVersion"]} == {project["version"]}


@needs_helm
def test_the_chart_passes_helms_own_checks() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr


@needs_helm
def test_probes_ask_for_health_and_readiness() -> None:
    server = container(rendered())
    paths = {probe: server[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}
    assert server["startupProbe"]["periodSeconds"] * server["startupProbe"]["failureThreshold"] >= 1800
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 1


@needs_helm
@pytest.mark.parametrize("drain", ["0", "30", "600"])
def test_a_pod_has_longer_to_end_than_its_requests_have(drain: str) -> None:
    manifests = rendered(drainSeconds=drain)
    server = container(manifests)
    variables = {one["name"]: one.get("value") for one in server["env"]}
    before = int(server["lifecycle"]["preStop"]["exec"]["command"][-1])
    grace = manifests["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert variables["MATSTEER_DRAIN_S"] == drain
    assert grace > int(drain) + before


@needs_helm
def test_keys_and_tokens_come_from_the_secret_alone() -> None:
    server = container(rendered(**EVERYTHING))
    secret = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in server["env"] if "valueFrom" in one}
    assert {name: one["key"] for name, one in secret.items()} == {
        "MATSTEER_API_KEY": "api-key",
        "MATSTEER_ADMIN_KEY": "admin-key",
        "HF_TOKEN": "hf-token",
    }
    assert {one["name"] for one in secret.values()} == {"keys"}
    assert not any("valueFrom" in one for one in container(rendered())["env"])
    assert helm("template", str(CHART), "--set", "secret.keysFile=true").returncode != 0


@needs_helm
def test_checkpoints_are_on_a_claim_that_outlives_the_release() -> None:
    manifests = rendered(**EVERYTHING)
    claim = manifests["PersistentVolumeClaim"]["metadata"]
    volumes = {one["name"]: one for one in manifests["Deployment"]["spec"]["template"]["spec"]["volumes"]}
    mounts = {one["name"]: one["mountPath"] for one in container(manifests)["volumeMounts"]}
    variables = {one["name"]: one.get("value") for one in container(manifests)["env"]}
    assert volumes["checkpoints"]["persistentVolumeClaim"]["claimName"] == claim["name"]
    assert mounts["checkpoints"] == variables["MATSTEER_CHECKPOINTS"]
    assert claim["annotations"]["helm.sh/resource-policy"] == "keep"
    assert variables["MATSTEER_REMEMBER"] == "false", "several pods must not write one file"


@needs_helm
def test_a_value_that_the_chart_does_not_know_is_refused() -> None:
    assert helm("template", str(CHART), "--set", "drainSecond=5").returncode != 0
