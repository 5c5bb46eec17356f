"""deploy/ with a real Prometheus: `make test-monitoring`.

Starts the demo and Prometheus with deploy/prometheus.yml, sends traffic, and asks every query of the dashboard and of
its variables. Exit status 1 where one of them finds nothing; where there is no `prometheus` (Debian's package of this
name) it says so.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.processes import running
from tests.server.conftest import free_port, wait_until

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "deploy" / "prometheus.yml"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "mat-steer.json"
KEYS = {"alice": "key-of-alice", "bob": "key-of-bob"}
SCRAPE_S, TRAFFIC_S = 1, 25
WINDOW = "15s"


def variables() -> Iterator[tuple[str, str, str]]:
    """Name, metric and label of those whose values Grafana asks Prometheus for."""
    for variable in json.loads(DASHBOARD.read_text(encoding="utf-8"))["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
            assert found, f"{variable['name']} asks otherwise"
            yield variable["name"], found[1], found[2]


def queries() -> Iterator[tuple[str, str]]:
    """Title of the panel and expression, as Grafana sends it for all servers and checkpoints."""
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", WINDOW)
            yield panel["title"], expression.replace("$instance", ".*").replace("$checkpoint", ".*")


def main() -> int:
    found = shutil.which("prometheus")
    if found is None:
        print("test-monitoring is left out: there is no prometheus (Debian: apt-get install prometheus)")
        return 0
    command = [sys.executable, "-m", "server.cli", "serve", "--log-level", "warning"]
    keys = {"MATSTEER_API_KEYS": " ".join(f"{name}={key}" for name, key in KEYS.items()), "MATSTEER_REMEMBER": "false"}
    with running(command, environment=keys) as server, prometheus(found, server.url) as address:
        traffic(server.url)
        return report(address)


@contextmanager
def prometheus(program: str, server: str) -> Iterator[str]:
    """Prometheus' address, from the moment at which it answers. It scrapes `server` in place of the compose file's."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["global"]["scrape_interval"] = f"{SCRAPE_S}s"
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [server.removeprefix("http://")]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prometheus.yml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        if promtool := shutil.which("promtool"):
            for one in (CONFIG, file):
                subprocess.run([promtool, "check", "config", str(one)], check=True)
        command = [program, f"--config.file={file}", f"--storage.tsdb.path={folder}/data", "--log.level=warn"]
        address = f"127.0.0.1:{free_port()}"
        process = subprocess.Popen([*command, f"--web.listen-address={address}"])
        try:
            wait_until(lambda: httpx.get(f"http://{address}/-/ready", trust_env=False).status_code == 200)
            yield f"http://{address}"
        finally:
            process.terminate()
            process.wait()


def traffic(url: str) -> None:
    """Of both keys, with every attribute, streams, comparisons, bad input and swaps."""
    until, number = time.monotonic() + TRAFFIC_S, 0
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
        while time.monotonic() < until:
            number += 1
            client.headers["authorization"] = f"Bearer {list(KEYS.values())[number % 2]}"
            attributes = {"truthfulness": 1, "civility": number % 3 - 1, "fairness": 0.5}
            body = {"prompt": f"Q: What is {number % 4}? A:", "n": 2, "baseline": True, "max_new_tokens": 24}
            client.post("/generate", json=body | {"attributes": attributes})
            chat = {"model": "demo", "prompt": "Q: Who? A:", "max_tokens": 8, "stream": True}
            client.post("/v1/completions", json=chat)
            client.post("/score", json={"prompt": "Q: Who? A:", "continuations": [" Me.", " You."]})
            client.post("/generate", json={"prompt": ""})
            client.get("/nowhere")
            if number % 5 == 0:
                client.post("/checkpoints/demo/activate", json={})


def report(address: str) -> int:
    """A line for each query. 1 where one of them found nothing."""
    missed = 0
    now = time.time()
    for name, metric, label in variables():
        asked = {"match[]": metric, "start": now - 20, "end": now}
        answer = httpx.get(f"{address}/api/v1/label/{label}/values", params=asked, trust_env=False).json()
        values = answer.get("data", [])
        missed += not values
        print(f"{'ok  ' if values else 'MISS'} ${name}: {', '.join(values) or answer.get('error', 'nothing')}")
    for title, query in queries():
        span = {"query": query, "start": now - 20, "end": now, "step": 1}
        answer = httpx.get(f"{address}/api/v1/query_range", params=span, trust_env=False).json()
        series = answer.get("data", {}).get("result", [])
        numbers = [float(value) for one in series for _, value in one["values"] if value not in ("NaN", "+Inf")]
        good = answer["status"] == "success" and bool(numbers)
        missed += not good
        said = f"{len(series)} series, last {numbers[-1]:.4g}" if good else answer.get("error", "nothing")
        print(f"{'ok  ' if good else 'MISS'} {title}: {said}")
        if not good:
            print(f"     {query}")
    print(f"{missed} queries found nothing" if missed else "every query of the dashboard found something")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
