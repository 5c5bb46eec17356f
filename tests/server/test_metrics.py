"""The metrics say what has happened, in a format that Prometheus reads."""

from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import World


def numbers(world: World) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    response = world.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(response.text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


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

    assert grown("matsteer_requests_total", route="/generate", status="200") == 1
    assert grown("matsteer_requests_total", route="/generate", status="422") == 1
    assert grown("matsteer_requests_total", route="/checkpoints/{name}", status="200") == 1
    assert grown("matsteer_requests_total", route="other", status="404") == 1
    assert grown("matsteer_request_seconds_count", route="/generate") == 2
    assert grown("matsteer_generated_tokens_total") == 4 * 5
    assert grown("matsteer_prompt_tokens_total") == 4 * answer["results"][0]["usage"]["prompt_tokens"]
    assert grown("matsteer_steered_tokens_total") == sum(r["steering"]["steered_tokens"] for r in answer["results"]) > 0
    for name in ("queue", "first_token", "token"):
        assert grown(f"matsteer_{name}_seconds_count") == 4
    assert grown("matsteer_steps_total") >= 5
    assert grown("matsteer_computed_tokens_total") > 0
    assert after["matsteer_rows_running", ()] == after["matsteer_rows_waiting", ()] == 0
    assert after["matsteer_cache_tokens_used", ()] == 0 < after["matsteer_cache_tokens", ()]
