"""The metrics say what has happened, in a format that Prometheus reads."""

import asyncio
import math
import re
from collections.abc import Iterator
from itertools import count

import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from server.engine.gate_stats import SAMPLE_S, GateStats
from server.engine.sequence import SamplingParams, ScheduledChunk, Sequence, SteeringParams
from server.types import GenerateParams
from server.version import own_version
from steering.types import Handle, SequenceSteering, Site
from tests.deploy.monitoring import DASHBOARD, ROOT, queries, variables
from tests.server.conftest import World, hold_steps, wait_until
from tests.server.test_engine import runner_of


def families(world: World) -> Iterator[Metric]:
    response = world.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    yield from text_string_to_metric_families(response.text)


def numbers(world: World) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families(world) for s in family.samples}


def test_requests_texts_and_the_engine_are_counted(fresh: World) -> None:
    before = numbers(fresh)
    assert (
        before["matsteer_checkpoint", (("checkpoint", "demo@2"), ("sha256", fresh.service.registry.active.sha256))] == 1
    )  # type: ignore[union-attr]
    assert before["matsteer_ready", ()] == 1
    answer = fresh.post(prompt="Q: What", n=2, baseline=True, max_new_tokens=5, ignore_eos=True)
    fresh.refused(prompt="")
    fresh.client.get("/checkpoints/demo")
    fresh.client.get("/no/such/path")
    after = numbers(fresh)

    def grown(name: str, **labels: str) -> float:
        key = name, tuple(sorted(labels.items()))
        return after[key] - before.get(key, 0)

    assert grown("matsteer_http_requests_total", route="/generate", status="200", api_key="") == 1
    assert grown("matsteer_http_requests_total", route="/generate", status="422", api_key="") == 1
    assert grown("matsteer_http_requests_total", route="/checkpoints/{name}", status="200", api_key="") == 1
    assert grown("matsteer_http_requests_total", route="other", status="404", api_key="") == 1
    assert grown("matsteer_http_request_duration_seconds_count", route="/generate") == 2
    assert grown("matsteer_generation_tokens_total", api_key="") == 4 * 5
    assert grown("matsteer_prompt_tokens_total", api_key="") == 4 * answer["results"][0]["usage"]["prompt_tokens"]
    assert grown("matsteer_steered_tokens_total") == sum(r["steering"]["steered_tokens"] for r in answer["results"]) > 0
    of_texts = ("request_queue_time", "request_prefill_time", "request_decode_time", "time_to_first_token")
    for name in (*of_texts, "e2e_request_latency", "request_time_per_output_token"):
        assert grown(f"matsteer_{name}_seconds_count") == 4
    parts = sum(grown(f"matsteer_{name}_seconds_sum") for name in of_texts[:3])
    assert parts == pytest.approx(grown("matsteer_e2e_request_latency_seconds_sum"), abs=1e-6)
    assert grown("matsteer_request_success_total", finished_reason="length") == 4
    assert grown("matsteer_steps_total") >= 5
    assert grown("matsteer_computed_tokens_total") > 0
    assert after["matsteer_num_requests_running", ()] == after["matsteer_num_requests_waiting", ()] == 0
    assert after["matsteer_kv_cache_blocks_used", ()] == after["matsteer_kv_cache_usage_perc", ()] == 0
    assert after["matsteer_kv_cache_blocks", ()] > 0
    assert 0 < grown("matsteer_prefix_cache_hits_total") <= grown("matsteer_prefix_cache_queries_total")
    assert after["process_resident_memory_bytes", ()] > 2**20
    ((build, one),) = [
        (dict(labels), value) for (name, labels), value in after.items() if name == "matsteer_build_info"
    ]
    assert (one, build["model"], build["version"]) == (1, "tiny", own_version())
    assert {"torch", "transformers", "python"} <= set(build)


def test_steered_tokens_are_counted_for_each_attribute_that_acts(fresh: World) -> None:
    asked = {"prompt": "Q: What", "max_new_tokens": 5, "ignore_eos": True, "baseline": True}
    answer = fresh.post(**asked, attributes={"kind": 1.0, "true": -1.0, "fair": 0})
    steered = sum(result["steering"]["steered_tokens"] for result in answer["results"])
    fresh.post(**asked, checkpoint="demo@1", attributes={"kind": 1.0})
    found = {
        tuple(dict(labels).values()): value
        for (name, labels), value in numbers(fresh).items()
        if name == "matsteer_attribute_steered_tokens_total"
    }
    assert found == {("kind", "demo@2"): steered, ("true", "demo@2"): steered, ("kind", "demo@1"): steered}
    assert steered == 5


def test_what_a_version_has_steered_is_told_once_more_after_it_is_unloaded(fresh: World) -> None:
    def steered() -> dict[str, float]:
        found = numbers(fresh).items()
        name = "matsteer_attribute_steered_tokens_total"
        return {dict(labels)["checkpoint"]: value for (one, labels), value in found if one == name}

    asked = {"prompt": "Q: What", "max_new_tokens": 5, "ignore_eos": True, "attributes": {"kind": 1.0}}
    for version in "12":
        fresh.post(**asked, checkpoint=f"demo@{version}")
    assert steered() == {"demo@1": 5, "demo@2": 5}
    fresh.post(**asked, checkpoint="demo@1")
    assert fresh.client.delete("/checkpoints/demo", params={"version": "1"}).status_code == 200
    assert steered() == {"demo@1": 10, "demo@2": 5}, "nothing of it is lost"
    assert steered() == {"demo@2": 5}
    fresh.post(**asked, checkpoint="demo@1")
    assert steered() == steered() == {"demo@1": 5, "demo@2": 5}, "as after a restart"


def observe_every_step(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    now = count(step=2 * SAMPLE_S)
    monkeypatch.setattr(world.service.engine._runner, "gate_stats", GateStats(lambda: next(now)))


def observe_no_step(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    never = GateStats()
    never._next = math.inf
    monkeypatch.setattr(world.service.engine._runner, "gate_stats", never)


def test_gates_and_norms_are_those_that_a_trace_tells_of(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    observe_every_step(fresh, monkeypatch)
    answer = fresh.post(
        prompt="Q: What", max_new_tokens=6, ignore_eos=True, n=2, trace=True, baseline=True,
        attributes={"kind": 1.0, "fair": -0.5},
    )  # fmt: skip
    traced = [
        column
        for result in answer["results"]
        for token in result["trace"]
        for column in token["columns"]
        if column["attribute"] != "true"
    ]
    seen = numbers(fresh)
    for attribute in ("kind", "fair"):
        columns = [column for column in traced if column["attribute"] == attribute]
        labels = (("attribute", attribute), ("checkpoint", "demo@2"))
        assert seen["matsteer_gate_count", labels] == len(columns) == 12
        assert seen["matsteer_gate_sum", labels] == pytest.approx(sum(column["gate"] for column in columns), rel=1e-4)
        assert seen["matsteer_delta_norm_sum", labels] == pytest.approx(
            sum(column["delta_norm"] for column in columns), rel=1e-4
        )
        saturated = sum(column["gate"] <= 0.01 or column["gate"] > 0.99 for column in columns)
        assert seen["matsteer_saturated_gates_total", labels] == saturated
        closed = sum(column["gate"] <= 0.5 for column in columns)
        assert (
            seen["matsteer_gate_bucket", (("attribute", attribute), ("checkpoint", "demo@2"), ("le", "0.5"))] == closed
        )
    assert seen["matsteer_saturated_gates_total", (("attribute", "fair"), ("checkpoint", "demo@2"))] == 12, "constant"
    assert not [labels for name, labels in seen if name == "matsteer_gate_count" and ("attribute", "true") in labels]


def test_a_text_does_not_depend_on_whether_its_gates_are_looked_at(
    fresh: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"prompt": "Q: Where", "max_new_tokens": 12, "ignore_eos": True, "seed": 3, "n": 3, "logprobs": 3}
    found = []
    for observe in (observe_no_step, observe_no_step, observe_every_step):
        observe(fresh, monkeypatch)
        answer = fresh.post(**asked, attributes={"kind": 1.5, "true": -1.0})
        found.append([(one["token_ids"], one["logprobs"]) for one in answer["results"]])
    assert found[1] == found[2], "to the last bit, once both find their prompt in the cache"
    assert any(name == "matsteer_gate_count" for name, _ in numbers(fresh))


def test_one_step_in_two_seconds_is_looked_at() -> None:
    clock = iter([0.0, 0.5, 1.0, 2.49, 2.5, 3.0])
    stats, handle = GateStats(lambda: next(clock)), Handle(((Site.parse("1.residual"), 0),), ("kind",))
    steered = SteeringParams(SequenceSteering.of([(handle, (1.0,))]))
    chunks = [ScheduledChunk(Sequence("a", i, (1,), steering_params=steered), 0, 1) for i in range(20)]
    plain = [ScheduledChunk(Sequence("b", 0, (1,)), 0, 1)]
    assert stats.choose(plain) == (), "nobody is steered, and the next step may be looked at"
    assert [len(stats.choose(chunks)) for _ in range(5)] == [8, 0, 0, 8, 0]


def test_swaps_loads_and_cancelled_texts_are_counted(fresh: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = numbers(fresh)
    fresh.client.post("/checkpoints/demo/activate", json={"version": "1"})
    fresh.client.post("/checkpoints/other/load", json={})
    fresh.client.post("/checkpoints/demo/activate", json={"version": "1"})
    after = numbers(fresh)
    grown = {name: after[key] - before[key] for key in before if (name := key[0]).startswith("matsteer_checkpoint_")}
    assert grown["matsteer_checkpoint_swaps_total"] == 1
    assert grown["matsteer_checkpoint_loads_total"] == 2

    inside, go_on = hold_steps(runner_of(fresh), monkeypatch)
    sampling = SamplingParams(max_new_tokens=80, ignore_eos=True)

    async def leave() -> None:
        task = asyncio.create_task(fresh.service.generate(GenerateParams(prompts=("a",), sampling=sampling)))
        await asyncio.to_thread(inside.wait, 20)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    fresh.client.portal.call(leave)  # type: ignore[union-attr]
    cancelled = "matsteer_request_success_total", (("finished_reason", "cancelled"),)
    wait_until(lambda: numbers(fresh).get(cancelled) == 1)
    ended = numbers(fresh)
    assert ended["matsteer_generation_tokens_total", (("api_key", ""),)] == 1, "that of the step it left in"
    assert ("matsteer_e2e_request_latency_seconds_count", ()) in ended
    assert ended["matsteer_e2e_request_latency_seconds_count", ()] == 0


def test_the_dashboard_asks_for_metrics_and_labels_that_there_are(fresh: World) -> None:
    observe = {"prompt": "Q:", "max_new_tokens": 3, "attributes": {"kind": 1.0}}
    fresh.post(**observe)
    samples = [sample for family in families(fresh) for sample in family.samples]
    labels: dict[str, set[str]] = {}
    for sample in samples:
        labels.setdefault(sample.name, {"instance", "job"}).update(sample.labels)
    asked = [query for _, query in queries()]
    assert len(asked) > 30
    for query in asked:
        for name, selected in re.findall(r"\b((?:matsteer|process)_\w+){([^}]*)}", query):
            assert name in labels, f"{name} of {query}"
            assert set(re.findall(r"(\w+)=~?\"", selected)) <= labels[name]
        (name, *_) = re.findall(r"(?:matsteer|process)_\w+", query)
        grouped = {one.strip() for group in re.findall(r"by \(([^)]*)\)", query) for one in group.split(",")}
        assert grouped <= labels[name], query
    asked_for = list(variables())
    assert {name for name, _, _ in asked_for} == {"instance", "checkpoint"}
    for _, metric, label in asked_for:
        assert label in labels[metric]


def test_compose_mounts_what_is_in_deploy() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    mounted = [volume.split(":") for name in ("prometheus", "grafana") for volume in services[name]["volumes"]]
    folders = {inside: ROOT / outside for outside, inside, *_ in mounted if outside.startswith("./")}
    assert all(path.exists() for path in folders.values())
    (provider,) = yaml.safe_load(
        (folders["/etc/grafana/provisioning"] / "dashboards/mat-steer.yml").read_text(encoding="utf-8")
    )["providers"]
    assert folders[provider["options"]["path"]] == DASHBOARD.parent
    (job,) = yaml.safe_load(folders["/etc/prometheus/prometheus.yml"].read_text(encoding="utf-8"))["scrape_configs"]
    assert job["job_name"] == "mat-steer"
    assert job["static_configs"] == [{"targets": ["mat-steer:8000"]}]
    for name in ("server", "cpu"):
        assert services[name]["networks"]["default"]["aliases"] == ["mat-steer"]
