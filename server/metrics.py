"""Metrics for Prometheus: requests and texts when they end, the engine when it is scraped.

Names are vLLM's with our prefix where vLLM has the same thing. What it calls a request there is a text here: a request
may ask for many.
"""

import os
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import version

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from server.engine.gate_stats import CLOSED, OPEN, SAMPLE_S, SAMPLED_ROWS
from server.engine.sequence import Finished
from server.engine_client import EngineSnapshot
from server.errors import ServerError
from server.process.counting import VARIABLE
from server.request_record import RequestRecord
from server.types import AppliedCheckpoint
from server.version import own_version

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
SAMPLE = f"of a sample: at most {SAMPLED_ROWS} steered texts of one step in {SAMPLE_S:g} s, a token each"


class Metrics:
    """The metrics of one server."""

    def __init__(self, model: str, *, engine_pid: int | None = None) -> None:
        """`model`: its name, as clients know it. `engine_pid`: the engine's process, which may be this one."""
        self._model = model
        self._all = CollectorRegistry()
        self._processes = CollectorRegistry()  # memory, processor time and files
        ProcessCollector(registry=self._processes)
        ProcessCollector("matsteer_engine", pid=lambda: engine_pid or os.getpid(), registry=self._processes)
        self._requests = Counter(
            "matsteer_http_requests",
            "HTTP requests that have ended",
            ["route", "status", "api_key"],
            registry=self._all,
        )
        self._request_seconds = self._histogram(
            "http_request_duration", "duration of HTTP requests", SECONDS, ["route"]
        )
        self._queue = self._histogram("request_queue_time", "from a text's request to its first step", SECONDS)
        self._prefill = self._histogram("request_prefill_time", "from a text's first step to its first token", SECONDS)
        self._decode = self._histogram("request_decode_time", "from a text's first token to its end", SECONDS)
        self._first = self._histogram("time_to_first_token", "from a text's request to its first token", SECONDS)
        self._whole = self._histogram("e2e_request_latency", "from a text's request to its end", SECONDS)
        self._token = self._histogram(
            "request_time_per_output_token", "between two tokens of a text, on average", TOKEN_SECONDS
        )
        self._ended = Counter(
            "matsteer_request_success", "texts that have ended", ["finished_reason"], registry=self._all
        )
        self._prompt_tokens = Counter(
            "matsteer_prompt_tokens", "tokens of prompts, one for each text", ["api_key"], registry=self._all
        )
        self._new_tokens = Counter(
            "matsteer_generation_tokens", "tokens of texts that have ended", ["api_key"], registry=self._all
        )
        self._steered = Counter(
            "matsteer_steered_tokens", "tokens steered, as the device counted them", registry=self._all
        )
        self._steered_by = Counter(
            "matsteer_attribute_steered_tokens",
            "the same of each attribute: a token that several act on counts for each of them",
            ["checkpoint", "attribute"],
            registry=self._all,
        )
        self._steered_of: set[tuple[str, str]] = set()  # the labels of these that there are

    def request(self, record: RequestRecord) -> None:
        """To be called when a request has ended."""
        self._requests.labels(record.route, str(record.status), record.key_name).inc()
        self._request_seconds.labels(record.route).observe((record.total_ms or 0) / 1000)

    def refusal(self, error: ServerError) -> None:
        """To be called when something that never became a request has been answered."""
        self._requests.labels("other", str(error.status), "").inc()

    def text(self, event: Finished, checkpoints: Iterable[AppliedCheckpoint], api_key: str) -> None:
        """To be called when a text has ended, also one that was cancelled. `api_key`: the key's name, or empty."""
        timing, tokens = event.timing, len(event.token_ids)
        self._ended.labels(event.finish_reason).inc()
        if event.finish_reason != "cancelled":
            self._queue.observe(timing.queue_ms / 1000)
            self._prefill.observe((timing.ttft_ms - timing.queue_ms) / 1000)
            self._decode.observe((timing.total_ms - timing.ttft_ms) / 1000)
            self._first.observe(timing.ttft_ms / 1000)
            self._whole.observe(timing.total_ms / 1000)
            if tokens > 1:
                self._token.observe((timing.total_ms - timing.ttft_ms) / 1000 / (tokens - 1))
        self._prompt_tokens.labels(api_key).inc(len(event.sequence.prompt_token_ids))
        self._new_tokens.labels(api_key).inc(tokens)
        self._steered.inc(event.steered_tokens)
        for checkpoint in checkpoints:
            for attribute, multiplier in checkpoint.attributes.items():
                if multiplier:
                    label = f"{checkpoint.checkpoint}@{checkpoint.version}"
                    self._steered_by.labels(label, attribute).inc(event.steered_tokens)
                    self._steered_of.add((label, attribute))

    def exposition(self, engine: EngineSnapshot) -> bytes:
        """All of them, in Prometheus' text format; of the engine what it says of itself now, of processes this one and
        the engine's."""
        of_engine = CollectorRegistry()
        of_engine.register(_Engine(engine, self._model))
        parts = (of_engine, self._processes, self._of_all_fronts())
        told = b"".join(generate_latest(part) for part in parts)
        self._forget({loaded.label for loaded in engine.loaded})
        return told

    def _forget(self, loaded: set[str]) -> None:
        """Of checkpoints that are not `loaded` any more, what has been told for the last time: a counter that goes, or
        begins anew, is what Prometheus knows of restarts. Where several processes count together, all are kept, since
        prometheus_client takes none of theirs away."""
        if VARIABLE in os.environ:
            return
        for labels in [labels for labels in self._steered_of if labels[0] not in loaded]:
            self._steered_of.remove(labels)
            self._steered_by.remove(*labels)

    def _of_all_fronts(self) -> CollectorRegistry:
        """Where several processes answer, each of them tells what all have counted (prometheus_client's multiprocess
        mode)."""
        if VARIABLE not in os.environ:
            return self._all
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return together

    def _histogram(
        self, name: str, what: str, buckets: tuple[float, ...], labels: tuple[str, ...] | list[str] = ()
    ) -> Histogram:
        return Histogram(f"matsteer_{name}_seconds", what, labels, buckets=buckets, registry=self._all)


class _Engine(Collector):
    """The counters of the engine and its checkpoints."""

    def __init__(self, engine: EngineSnapshot, model: str) -> None:
        self._engine = engine
        self._build = {
            "version": own_version(),
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
            "model": model,
        }

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily("matsteer_build", "versions of what serves, and the model's name", value=self._build)
        engine, stats, status = self._engine, self._engine.stats, self._engine.status
        for name, what, count in (
            ("steps", "forward passes", stats.steps),
            ("computed_tokens", "tokens through the model, prompts included", stats.computed_tokens),
            ("scored_tokens", "tokens of given texts whose log-probabilities were computed", stats.scored_tokens),
            ("prefix_cache_queries", "tokens looked for in the prefix cache", status.queried_tokens),
            ("prefix_cache_hits", "those of them that were found, and not computed", status.cached_tokens),
            ("failed_steps", "forward passes that failed", stats.failed_steps),
            ("num_preemptions", "texts whose blocks were taken, to be computed again later", status.preemptions),
            ("checkpoint_loads", "checkpoints that were brought to the device", engine.loads),
            ("checkpoint_swaps", "times that requests without a name got another checkpoint", engine.swaps),
        ):
            yield CounterMetricFamily(f"matsteer_{name}", what, value=count)
        used = status.used_blocks / status.num_blocks
        for name, what, value in (
            ("num_requests_running", "texts that are being generated", status.running),
            ("num_requests_waiting", "texts that wait", status.waiting),
            ("num_requests_scored", "given texts that are scored or compared, or wait for it", status.scoring),
            ("num_requests_open", "texts that have been submitted and not ended", engine.open_sequences),
            ("checkpoint_leases", "holders of loaded checkpoints: requests that have not ended", engine.pins),
            (
                "kv_cache_usage_perc",
                "share of the KV cache's blocks in use, 0 to 1",
                used,
            ),
            ("kv_cache_blocks_used", "blocks of the KV cache that texts hold", status.used_blocks),
            ("kv_cache_blocks", "blocks of the KV cache", status.num_blocks),
            ("kv_cache_block_tokens", "tokens that a block has room for", status.block_size),
            ("cpu_threads", "threads that a step computes with; fewer while others want the cores", status.threads),
            ("ready", "1 while requests are taken", int(engine.trouble is None)),
        ):
            yield GaugeMetricFamily(f"matsteer_{name}", what, value=value)
        active = engine.active
        checkpoints = GaugeMetricFamily(
            "matsteer_checkpoint", "loaded checkpoints; 1 for the active one", labels=["checkpoint", "sha256"]
        )
        for loaded in engine.loaded:
            checkpoints.add_metric([loaded.label, loaded.sha256], int(loaded == active))
        yield checkpoints
        yield from self._gates()

    def _gates(self) -> Iterator[Metric]:
        labels = ["checkpoint", "attribute"]
        gates = HistogramMetricFamily("matsteer_gate", f"how open gates are, {SAMPLE}", labels=labels)
        norms = HistogramMetricFamily("matsteer_delta_norm", f"|multiplier x gate x vector|, {SAMPLE}", labels=labels)
        saturated = CounterMetricFamily(
            "matsteer_saturated_gates",
            f"gates up to {CLOSED:g} or above {OPEN:g}, of those of matsteer_gate",
            labels=labels,
        )
        for checkpoint, attributes in self._engine.gates.items():
            for attribute, seen in attributes.items():
                named = [checkpoint, attribute]
                gates.add_metric(named, seen.gates, seen.gates_total)
                norms.add_metric(named, seen.delta_norms, seen.delta_norms_total)
                saturated.add_metric(named, seen.saturated)
        yield from (gates, norms, saturated)
