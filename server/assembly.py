"""From settings to a service whose engine runs: the one place that knows all parts."""

import logging
import time

from server.config import Settings
from server.engine.engine import Engine
from server.engine.forward import is_spread
from server.engine.kv_cache import KVCache
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.errors import ServerError, StartupError
from server.metrics import Metrics
from server.opening.memory import cache_size, text_limit
from server.opening.model import LoadedModel, load_model
from server.opening.trial import open_forward
from server.registry import LoadedCheckpoint, Registry, fits_model
from server.registry_state import read_state, write_state
from server.service import Service
from server.threads import aside
from server.tokenizer import Codec
from steering.columns import ColumnBank
from steering.errors import UnsupportedArchitecture

log = logging.getLogger(__name__)


def open_service(settings: Settings) -> Service:
    """Load the model, start the engine, activate a checkpoint. Close with `service.engine.stop()`.

    Raises StartupError with one sentence.
    """
    start = time.monotonic()
    if "checkpoints" in settings.model_fields_set and not settings.checkpoints.is_dir():
        raise StartupError(f"There is no checkpoints folder {str(settings.checkpoints)!r} (MATSTEER_CHECKPOINTS).")
    service = aside(lambda: _build(settings, load_model(settings)))
    service.engine.start()
    try:
        active = _activate(service.registry, settings)
    except ServerError as error:
        service.engine.stop()
        raise StartupError(f"The checkpoint {settings.checkpoint!r} cannot be used: {error.message}") from error
    log.info("serving %s, checkpoint %s, after %.1f s", service.model, active, time.monotonic() - start)
    return service


def _build(settings: Settings, loaded: LoadedModel) -> Service:
    try:
        return _build_service(settings, loaded)
    except UnsupportedArchitecture as error:
        raise StartupError(f"The model {settings.model_path!r} cannot be steered: {error}.") from error


def _build_service(settings: Settings, loaded: LoadedModel) -> Service:
    fits = fits_model(loaded.model, settings.served_name, settings.revision)
    bank = ColumnBank(device=loaded.device, max_tokens=settings.max_num_batched_tokens)
    forward = open_forward(loaded.model, bank, settings.served_name, native=settings.native)
    forward.steering.install()
    limit = text_limit(loaded.model, loaded.context)
    largest, count = cache_size(forward, limit=limit, rows=settings.max_num_seqs, mib=settings.kv_cache_mib)
    spread = is_spread(loaded.model)
    if spread:
        log.info("the model is spread over several devices: decoding steps are not captured in CUDA graphs")
    forward.allocate(largest * count, graphs=loaded.device.type == "cuda" and not spread)
    cache = KVCache(largest, count)
    codec = Codec(loaded.tokenizer, vocab=loaded.vocab, context=min(limit or largest, largest))
    engine = Engine(
        Runner(forward, cache, step_tokens=settings.max_num_batched_tokens),
        Scheduler(cache, max_rows=settings.max_num_seqs, step_tokens=settings.max_num_batched_tokens),
        eos=loaded.eos,
        decode=codec.decode,
        queue_limit=settings.queue_limit,
        stall_s=settings.stall_s,
        deadline_s=settings.deadline_s,
    )
    registry = Registry(settings.checkpoints, bank, fits, engine.call)
    return Service(settings, codec, engine, registry, Metrics(engine, registry))


def _activate(registry: Registry, settings: Settings) -> str:
    """Activates the checkpoint of the settings, else that of the last run, else the obvious one; there may be none."""
    for entry in registry.entries():
        if entry.problem:
            log.warning("checkpoint %s@%s cannot be loaded: %s", entry.name, entry.version, entry.problem)
    root, model = settings.checkpoints, settings.served_name
    restored = registry.restore(read_state(root, model)) if settings.remember else None
    if settings.checkpoint:
        active: LoadedCheckpoint | None = registry.activate(settings.checkpoint)
    else:
        active = restored or registry.activate_default()
    if settings.remember:
        registry.on_change = lambda: write_state(root, registry.state(model))
    return active.label if active else "none"
