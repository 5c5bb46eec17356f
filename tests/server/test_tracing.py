"""A request is a trace: HTTP, and in it queue, prefill and decode; off it is nothing at all."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.config import Settings
from server.errors import StartupError
from server.tracing import Tracing, open_tracing
from tests.server.conftest import World
from tests.server.test_logs import logged

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

ASKED = {"prompt": "Q: What", "max_new_tokens": 5, "ignore_eos": True, "n": 2, "baseline": True}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def traced(settings: Settings) -> Iterator[tuple[TestClient, InMemorySpanExporter]]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.app.open_tracing", lambda: Tracing(provider))
        app = create_app(Settings(**settings.model_dump(exclude={"api_keys"}), api_keys="alice=sk-alice-7e57"))
    with TestClient(app, headers={"authorization": "Bearer sk-alice-7e57"}) as client:
        yield client, exporter


@pytest.fixture
def spans(traced: tuple[TestClient, InMemorySpanExporter]) -> Callable[..., dict[str, Any]]:
    client, exporter = traced

    def of(path: str, body: Any = None, **headers: str) -> dict[str, Any]:
        exporter.clear()
        client.request("POST" if body is not None else "GET", path, json=body, headers=headers)
        return {span.name: span for span in exporter.get_finished_spans()}

    return of


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", ASKED),
        ("/generate", ASKED | {"stream": True}),
        ("/v1/completions", {"model": "demo", "prompt": "Q:", "max_tokens": 4, "stream": True}),
    ],
)
def test_a_request_is_a_span_and_its_parts_follow_each_other_within_it(
    spans: Callable[..., dict[str, Any]], path: str, body: Any
) -> None:
    found = spans(path, body, traceparent=f"00-{TRACE}-{PARENT}-01")
    assert set(found) == {f"POST {path}", "queue", "prefill", "decode"}
    request = found[f"POST {path}"]
    assert request.kind is SpanKind.SERVER
    assert f"{request.context.trace_id:032x}" == TRACE
    assert f"{request.parent.span_id:016x}" == PARENT
    parts = [found[name] for name in ("queue", "prefill", "decode")]
    for part in parts:
        assert part.context.trace_id == request.context.trace_id
        assert part.parent.span_id == request.context.span_id
        assert request.start_time <= part.start_time <= part.end_time <= request.end_time + 10**6
    assert parts[0].end_time == parts[1].start_time
    assert parts[1].end_time == parts[2].start_time
    assert parts[2].end_time > parts[2].start_time
    said = dict(request.attributes)
    assert (said["http.route"], said["http.response.status_code"]) == (path, 200)
    assert said["mat_steer.checkpoints"] == ("demo@2",)
    assert said["mat_steer.api_key"] == "alice"
    assert said["gen_ai.usage.output_tokens"] == (20 if body["prompt"] == ASKED["prompt"] else 4)
    assert request.status.status_code is StatusCode.UNSET
    assert not any(secret in str(said) for secret in ("7e57", ASKED["prompt"]))


def test_a_request_without_a_parent_begins_a_trace_that_the_log_names(
    traced: tuple[TestClient, InMemorySpanExporter],
) -> None:
    client, exporter = traced
    exporter.clear()
    with logged(log_format="json") as log:
        client.post("/generate", json=ASKED, headers={"traceparent": "00-nonsense"})
    (request,) = [span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER]
    assert request.parent is None
    assert log.request()["trace_id"] == f"{request.context.trace_id:032x}"


def test_errors_are_told_and_nobody_who_watches_is_traced(spans: Callable[..., dict[str, Any]]) -> None:
    refused = spans("/generate", {"prompt": ""})["POST /generate"]
    assert refused.attributes["error.type"] == "invalid_field"
    assert refused.status.status_code is StatusCode.UNSET, "it is the client's error"
    assert list(spans("/nowhere/at/all")) == ["GET other"]
    for path in ("/healthz", "/readyz", "/metrics"):
        assert not spans(path)


def test_what_a_parent_does_not_sample_is_not_exported(spans: Callable[..., dict[str, Any]]) -> None:
    assert not spans("/generate", ASKED, traceparent=f"00-{TRACE}-{PARENT}-00")


def test_spans_come_to_the_collector_that_the_environment_names(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            received.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "steered")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        with TestClient(create_app(settings)) as client:
            assert client.post("/generate", json=ASKED).status_code == 200
        collector.shutdown()  # the app has ended, and has sent what it had
    sent = [ExportTraceServiceRequest.FromString(body) for body in received]
    (resource,) = [one for request in sent for one in request.resource_spans]
    names = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert names["service.name"] == "steered"
    assert names["service.version"]
    found = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert sorted(found) == ["POST /generate", "decode", "prefill", "queue"]


def test_off_nothing_is_made_and_nothing_imported(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert open_tracing() is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert open_tracing() is None
    code = "import sys, server.tracing; assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_endpoint_without_the_package_is_a_sentence_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.delenv("OTEL_SDK_DISABLED", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(StartupError, match=r"pip install 'opentelemetry-exporter-otlp-proto-http>=1\.27' brings both"):
        open_tracing()
