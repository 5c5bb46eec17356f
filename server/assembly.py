"""From settings to a service whose engine runs: the one place that knows all parts."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from server.config import Settings
from server.engine.engine import Engine
from server.engine.model_runner import ModelRunner, is_spread
from server.engine.scheduler import Scheduler
from server.engine.scoring import max_num_logits
from server.engine_client import EngineFacts, why_none_is_active
from server.engine_core import EngineCore
from server.errors import ServerError, StartupError, is_out_of_memory
from server.front import open_judging, read_template, service_of
from server.keys import ApiKeys
from server.loading import LoadedModel, check_tensor_parallel, choose_device, load_model, open_runner
from server.memory import choose_block_size, num_kv_cache_blocks
from server.parallel.leader import Leader
from server.registry import LoadedCheckpoint, Registry, find_folder, fits_model
from server.registry_state import read_state, write_state
from server.service import Service
from server.threads import run_in_disposable_thread
from server.tokenizer import Codec
from steering.bank import ColumnBank
from steering.errors import UnsupportedArchitecture, first_line

log = logging.getLogger(__name__)


def open_service(settings: Settings) -> Service:
    """A service whose engine runs in this process. Close with `service.client.stop()`. Raises StartupError with one
    sentence."""
    judging = open_judging(settings)
    core, codec = open_engine(settings)
    return service_of(settings, codec, core, judging)


def open_engine(settings: Settings, *, makes_texts: bool = True) -> tuple[EngineCore, Codec]:
    """Load the model, start the engine, activate a checkpoint. `makes_texts`: in its own thread (`Engine`).

    Raises StartupError with one sentence.
    """
    start = time.monotonic()
    if "checkpoints" in settings.model_fields_set and not os.path.isdir(settings.checkpoints):
        raise StartupError(f"There is no checkpoints folder {str(settings.checkpoints)!r} (MATSTEER_CHECKPOINTS).")
    template = read_template(settings.chat_template)
    ApiKeys(settings)  # what cannot be used is told of before the model is loaded
    with _usable(settings):
        if settings.checkpoint:
            name, at, version = settings.checkpoint.partition("@")
            find_folder(settings.checkpoints, name, version if at else None)
    leader = _start_shards(settings)
    try:
        core, codec = run_in_disposable_thread(lambda: _build(settings, template, makes_texts, leader))
    except BaseException:
        if leader:
            leader.close()
        raise
    core.engine.start()
    try:
        with _usable(settings):
            active = _activate(core.registry, settings)
        core.engine.warm_up().result()  # with the hooks of what has been loaded, and before anybody waits
    except BaseException:
        core.stop()
        raise
    log.info("serving %s, checkpoint %s, after %.1f s", settings.served_name, active, time.monotonic() - start)
    return core, codec


@contextmanager
def _usable(settings: Settings) -> Iterator[None]:
    try:
        yield
    except ServerError as error:
        raise StartupError(f"The checkpoint {settings.checkpoint!r} cannot be used: {error.message}") from error


def _start_shards(settings: Settings) -> Leader | None:
    """The other processes of a model that is in several. Raises StartupError where it cannot be."""
    if settings.tensor_parallel_size == 1:
        return None
    check_tensor_parallel(settings)
    return Leader(settings, choose_device(settings))


def _build(
    settings: Settings, chat_template: str | None, makes_texts: bool, leader: Leader | None
) -> tuple[EngineCore, Codec]:
    if leader:
        leader.join()
    try:
        return _build_engine(settings, load_model(settings), chat_template, makes_texts, leader)
    except UnsupportedArchitecture as error:
        raise StartupError(f"The model {settings.model_path!r} cannot be steered: {error}.") from error


def open_cached_runner(settings: Settings, loaded: LoadedModel) -> ModelRunner:
    """What runs the model, with its KV cache: in each process of a model that is in several, where all have to come by
    here together. Raises StartupError."""
    try:
        return _open_cached_runner(settings, loaded)
    except Exception as error:
        if isinstance(error, ServerError) or not is_out_of_memory(error):
            raise
        raise StartupError(
            f"There is no memory on {loaded.device} to serve the model {settings.served_name!r}: {first_line(error)}. "
            "Free some, or choose a smaller model, MATSTEER_DTYPE or MATSTEER_KV_CACHE_MIB."
        ) from error


def _open_cached_runner(settings: Settings, loaded: LoadedModel) -> ModelRunner:
    limits = settings.step_limits(loaded.device.type)
    bank = ColumnBank(device=loaded.device, max_tokens=limits.max_num_batched_tokens)
    runner = open_runner(loaded.model, bank, settings.served_name, native=settings.native)
    runner.steering.install()
    block_size = choose_block_size(runner, settings.block_size)
    spread = is_spread(loaded.model)
    if spread:
        log.info("the model is spread over several devices: decoding steps are not captured in CUDA graphs")
    captured = loaded.device.type == "cuda" and not spread and settings.tensor_parallel_size == 1
    graph_rows = limits.max_num_seqs if captured else 0
    num_blocks = num_kv_cache_blocks(
        runner, block_size, settings, limits, graph_rows=graph_rows, max_model_len=loaded.max_model_len
    )
    runner.allocate(num_blocks, block_size, graph_rows=graph_rows, max_model_len=loaded.max_model_len)
    return runner


def _build_engine(
    settings: Settings, loaded: LoadedModel, chat_template: str | None, makes_texts: bool, leader: Leader | None
) -> tuple[EngineCore, Codec]:
    if chat_template is not None:
        loaded.tokenizer.chat_template = chat_template
    fits = fits_model(loaded.model, settings.served_name, settings.revision)
    limits = settings.step_limits(loaded.device.type)
    runner = open_cached_runner(settings, loaded)
    if leader:
        leader.lead(runner)
    blocks = runner.blocks
    context = min(loaded.max_model_len or blocks.num_tokens, blocks.num_tokens)
    codec = Codec(loaded.tokenizer, vocab=loaded.vocab, context=context)
    scheduler = Scheduler(
        blocks,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_num_logits=max_num_logits(runner.vocab_size),
    )
    engine = Engine(
        runner,
        scheduler,
        eos=loaded.eos,
        decode=codec.decode if makes_texts else None,
        decode_all=codec.decode_all,
        queue_limit=settings.queue_limit,
        stall_s=settings.stall_s,
        deadline_s=settings.deadline_s,
    )
    registry = Registry(settings.checkpoints, leader or runner.bank, fits, engine.call)
    facts = EngineFacts(
        max_pair_tokens=engine.max_pair_tokens,
        context=context,
        vocab=loaded.vocab,
        eos=loaded.eos,
        created=int(time.time()),
        adapter=str(loaded.adapter) if loaded.adapter else None,
        pid=os.getpid(),
    )
    return EngineCore(engine, registry, facts, on_stop=leader.close if leader else None), codec


def _activate(registry: Registry, settings: Settings) -> str:
    """Activates the checkpoint of the settings, else that of the last run, else the obvious one; there may be none."""
    for entry in registry.entries():
        if entry.problem:
            # A sound checkpoint for another model is nothing to worry about: a folder may hold those of several.
            level = logging.INFO if entry.config else logging.WARNING
            log.log(level, "checkpoint %s@%s cannot be loaded: %s", entry.name, entry.version, entry.problem)
    root, model = settings.checkpoints, settings.served_name
    restored = registry.restore(read_state(root, model)) if settings.remember else None
    if settings.checkpoint:
        active: LoadedCheckpoint | None = registry.activate(settings.checkpoint)
    else:
        active = restored or registry.activate_default()
    if active is None:
        log.warning("%s The folder is %s.", why_none_is_active(registry.entries()), root)
    if settings.remember:
        registry.on_change = lambda: write_state(root, registry.state(model))
    return active.label if active else "none"
