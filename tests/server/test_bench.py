"""The load generator counts what it sends and what it gets, and says what failed."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from server.bench import Summary, Workload, closed_loop, open_loop, percentiles
from server.cli import app

runner = CliRunner()
SHORT = ["--requests", "6", "--prompt-tokens", "2-5", "--new-tokens", "3-7", "--warmup", "1"]


def test_a_seed_is_a_workload() -> None:
    work = Workload("tiny", requests=20, prompt=(2, 5), new=(3, 7), extra={"ignore_eos": True})
    assert work.bodies() == work.bodies()
    assert work.bodies() != Workload("tiny", requests=20, prompt=(2, 5), new=(3, 7), seed=1).bodies()
    assert {len(body["prompt"].split()) for body in work.bodies()} == {2, 3, 4, 5}
    assert {body["max_tokens"] for body in work.bodies()} == {3, 4, 5, 6, 7}
    ids = Workload("tiny", vocab=9).bodies()[0]["prompt"]
    assert all(0 <= token < 9 for token in ids)


def test_percentiles_are_interpolated() -> None:
    assert percentiles([number / 1000 for number in range(101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}
    assert percentiles([0.002]) == {"p50": 2.0, "p90": 2.0, "p99": 2.0}
    assert percentiles([]) == {}


def test_both_loops_count_every_token(address: str) -> None:
    work = Workload("demo@1", requests=8, prompt=(2, 5), new=(3, 7), extra={"ignore_eos": True})

    async def story() -> list[Summary]:
        async with httpx.AsyncClient(base_url=address, timeout=60) as http:
            return [await closed_loop(http, work.bodies(), 3), await open_loop(http, work.bodies(), rate=200.0, seed=0)]

    for one in asyncio.run(story()):
        assert (one.requests, one.failed, one.first_error) == (8, 0, None)
        assert one.new_tokens_per_s * one.seconds == pytest.approx(
            sum(b["max_tokens"] for b in work.bodies()), rel=0.02
        )
        assert one.prompt_tokens_per_s > 0
        assert 0 < one.ttft_ms["p50"] <= one.latency_ms["p50"] <= one.seconds * 1000
        assert one.inter_token_ms["p50"] <= one.inter_token_ms["p99"]


def test_what_fails_is_counted_and_told() -> None:
    broken = {"choices": [{"text": "a"}]}
    replies = iter(
        [
            httpx.Response(500, text="no"),
            httpx.Response(200, text=f"data: {json.dumps(broken)}\n\n"),
            httpx.Response(200, text='data: {"error": {"message": "late"}}\n\n'),
            httpx.Response(200, text="data: {\n\n"),
        ]
    )

    async def story() -> Summary:
        transport = httpx.MockTransport(lambda request: next(replies))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await closed_loop(http, Workload("m", requests=4).bodies(), 1)

    one = asyncio.run(story())
    assert (one.requests, one.failed) == (4, 4)
    assert one.first_error is not None
    assert "500 no" in one.first_error


def test_the_command_prints_a_table_and_writes_the_numbers(address: str, tmp_path: Path) -> None:
    out = tmp_path / "some" / "bench.json"
    result = runner.invoke(
        app, ["bench", "--url", address, "--concurrency", "1,4", *SHORT, "--set", "kind=1", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert "4 clients" in result.output
    found = json.loads(out.read_text())
    assert [one["load"] for one in found] == ["1 clients", "4 clients"]
    assert all(one["requests"] == 6 and one["failed"] == 0 for one in found)
    result = runner.invoke(
        app, ["bench", "--url", address, "--rate", "100", "--model", "demo@1", *SHORT], env={"COLUMNS": "160"}
    )
    assert result.exit_code == 0, result.output
    assert "100 requests/s" in result.output


def test_failures_are_its_exit_status(address: str) -> None:
    result = runner.invoke(app, ["bench", "--url", address, "--concurrency", "2", *SHORT, "--model", "nothing"])
    assert result.exit_code == 1
    assert "6 of 6 failed" in result.output
    assert "model_not_found" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--url", "http://127.0.0.1:9"], "There is no server of OpenAI's API"),
        (["--concurrency", "0"], "whole numbers from 1 on"),
        (["--concurrency", "two"], "whole numbers from 1 on"),
        (["--prompt-tokens", "9-3"], "LEAST-MOST"),
        (["--rate", "0"], "rate"),
    ],
)
def test_what_is_wrong_is_one_sentence(arguments: list[str], message: str) -> None:
    result = runner.invoke(app, ["bench", *arguments])
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.replace("│", " ").split())
