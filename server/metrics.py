"""Metrics for Prometheus: requests and texts when they end, the engine when it is scraped."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.engine import Engine
from server.engine.sequence import Finished
from server.registry import Registry
from server.request_record import RequestRecord

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """The metrics of one server."""

    def __init__(self, engine: Engine, registry: Registry) -> None:
        self._all = CollectorRegistry()
        self._all.register(_Engine(engine, registry))
        self._requests = Counter(
            "matsteer_requests", "HTTP requests that have ended", ["route", "status"], registry=self._all
        )
        self._request_seconds = self._histogram("request", "duration of HTTP requests", SECONDS, ["route"])
        self._queue = self._histogram("queue", "from a text's request to its first step", SECONDS)
        self._first = self._histogram("first_token", "from a text's request to its first token", SECONDS)
        self._token = self._histogram("token", "between two tokens of a text, on average", TOKEN_SECONDS)
        self._prompt_tokens = Counter(
            "matsteer_prompt_tokens", "tokens of prompts, one for each text", registry=self._all
        )
        self._new_tokens = Counter("matsteer_generated_tokens", "tokens of texts that have ended", registry=self._all)
        self._steered = Counter(
            "matsteer_steered_tokens", "tokens steered, as the device counted them", registry=self._all
        )

    def request(self, record: RequestRecord) -> None:
        """To be called when a request has ended."""
        self._requests.labels(record.route, str(record.status)).inc()
        self._request_seconds.labels(record.route).observe((record.total_ms or 0) / 1000)

    def text(self, event: Finished) -> None:
        """To be called when a text has ended."""
        timing, tokens = event.timing, len(event.token_ids)
        self._queue.observe(timing.queue_ms / 1000)
        self._first.observe(timing.ttft_ms / 1000)
        if tokens > 1:
            self._token.observe((timing.total_ms - timing.ttft_ms) / 1000 / (tokens - 1))
        self._prompt_tokens.inc(len(event.sequence.prompt_token_ids))
        self._new_tokens.inc(tokens)
        self._steered.inc(event.steered_tokens)

    def exposition(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._all)

    def _histogram(
        self, name: str, what: str, buckets: tuple[float, ...], labels: tuple[str, ...] | list[str] = ()
    ) -> Histogram:
        return Histogram(f"matsteer_{name}_seconds", what, labels, buckets=buckets, registry=self._all)


class _Engine(Collector):
    """Reads the counters of the engine and the registry at each scrape."""

    def __init__(self, engine: Engine, registry: Registry) -> None:
        self._engine = engine
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        stats, status = self._engine.stats, self._engine.status
        for name, what, count in (
            ("steps", "forward passes", stats.steps),
            ("computed_tokens", "tokens through the model, prompts included", stats.computed_tokens),
            ("scored_tokens", "tokens of given texts whose log-probabilities were computed", stats.scored_tokens),
            ("shared_tokens", "tokens found in the prefix cache instead of being computed", status.cached_tokens),
            ("failed_steps", "forward passes that failed", stats.failed_steps),
            ("preemptions", "texts whose blocks were taken, to be computed again later", status.preemptions),
        ):
            yield CounterMetricFamily(f"matsteer_{name}", what, value=count)
        for name, what, value in (
            ("rows_running", "texts that are being generated", status.running),
            ("rows_waiting", "texts that wait", status.waiting),
            ("rows_scored", "given texts that are scored or compared, or wait for it", status.scoring),
            ("rows_open", "texts that have been submitted and not ended", self._engine.open_sequences),
            ("checkpoint_leases", "holders of loaded checkpoints: requests that have not ended", self._registry.pins),
            ("cache_tokens_used", "tokens of the KV cache's blocks in use", status.used_blocks * status.block_size),
            ("cache_tokens", "tokens that the KV cache has room for", status.num_blocks * status.block_size),
            ("cache_blocks_used", "blocks of the KV cache that texts hold", status.used_blocks),
            ("cache_blocks", "blocks of the KV cache", status.num_blocks),
            ("cpu_threads", "threads that a step computes with; fewer while others want the cores", status.threads),
            ("ready", "1 while requests are taken", int(self._engine.trouble is None)),
        ):
            yield GaugeMetricFamily(f"matsteer_{name}", what, value=value)
        active = self._registry.active
        checkpoints = GaugeMetricFamily(
            "matsteer_checkpoint", "loaded checkpoints; 1 for the active one", labels=["checkpoint", "sha256"]
        )
        for loaded in self._registry.loaded:
            checkpoints.add_metric([loaded.label, loaded.sha256], int(loaded is active))
        yield checkpoints
