"""Traces for OpenTelemetry: HTTP -> queue -> prefill -> decode of a request, made when it has ended.

On where `OTEL_EXPORTER_OTLP_ENDPOINT` (or `..._TRACES_ENDPOINT`) is set; the SDK reads it and its other variables, as
`OTEL_SERVICE_NAME` and `OTEL_TRACES_SAMPLER`. Otherwise nothing of it is imported.
"""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from server.errors import StartupError
from server.request_record import RequestRecord
from server.version import own_version

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
UNTRACED = ("/healthz", "/health", "/readyz", "/metrics")  # asked all the time, by who watches


def open_tracing() -> "Tracing | None":
    """None: nobody wants traces. Raises StartupError where they are wanted and OpenTelemetry is not installed."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or not any(map(os.environ.get, ENDPOINTS)):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise StartupError(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, but OpenTelemetry's SDK or exporter is not installed: "
            "pip install 'opentelemetry-exporter-otlp-proto-http>=1.27' brings both; or unset the variable."
        ) from None
    ours = Resource.create({"service.name": "mat-steer", "service.version": own_version()})
    provider = TracerProvider(resource=ours.merge(OTELResourceDetector().detect()))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


class Tracing:
    """Makes the spans of requests."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("mat-steer", own_version())
        self._propagator = TraceContextTextMapPropagator()

    def request(self, record: RequestRecord, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """The spans of a request that has ended, in the trace that the client's `traceparent` names, if it does. The
        record learns the trace's id."""
        from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context

        if record.route in UNTRACED or record.started_ns is None:
            return
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        span = self._tracer.start_span(
            f"{record.method} {record.route}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes=_attributes(record),
            start_time=record.started_ns,
        )
        if record.status >= 500 or (record.status < 400 and record.outcome != "ok"):
            span.set_status(StatusCode.ERROR, record.outcome)
        record.trace_id = f"{span.get_span_context().trace_id:032x}"
        inside = set_span_in_context(span)
        submitted = record.started_ns + int(((record.submitted or record.started) - record.started) * 1e9)
        start = submitted
        for name, end_ms in (("queue", record.queue_ms), ("prefill", record.ttft_ms), ("decode", record.engine_ms)):
            if record.submitted is None or end_ms is None:
                break
            end = submitted + int(end_ms * 1e6)
            self._tracer.start_span(name, context=inside, start_time=start).end(end)
            start = end
        span.end(record.started_ns + int((record.total_ms or 0) * 1e6))

    def close(self) -> None:
        """Sends what has not been sent yet."""
        self._provider.shutdown()


def _attributes(record: RequestRecord) -> dict[str, Any]:
    """By OpenTelemetry's conventions where there are some."""
    found = {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status or None,
        "url.path": record.path.partition("?")[0],
        "client.address": record.client,
        "error.type": record.outcome if record.outcome != "ok" else None,
        "gen_ai.response.model": record.model,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "mat_steer.request_id": record.request_id,
        "mat_steer.api_key": record.key_name or None,
        "mat_steer.checkpoints": record.checkpoints,
        "mat_steer.arms": record.arms,
    }
    return {name: value for name, value in found.items() if value is not None}
