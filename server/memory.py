"""How much memory the KV cache takes: what weights and the largest step that the settings allow leave of it."""

import logging
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from server.engine.model_runner import ModelRunner
from server.engine.scoring import max_num_logits
from server.engine.sequence import SamplingParams, ScheduledChunk, Sequence
from server.errors import StartupError
from server.heap import trim_heap
from server.parallel.group import least
from steering.errors import first_line

if TYPE_CHECKING:  # an engine without a server needs no pydantic
    from server.config import Settings, StepLimits

log = logging.getLogger(__name__)
CGROUP = Path("/sys/fs/cgroup")
PROC = Path("/proc/self")
BLOCK_SIZE = 64  # tokens, where a kernel reads blocks where they lie: benchmarks/results/steer-ops-cpu.md
LARGE_BLOCK_SIZE = 256  # where blocks are copied together for every step, and fewer copies are faster
SMALLEST_CACHE = 32  # tokens
MOST_LOGPROBS = 20  # alternatives that a request may ask for


def choose_block_size(runner: ModelRunner, wanted: int | None = None) -> int:
    """Tokens of a block: as wanted, else what is fastest on the device."""
    if wanted is not None:
        return wanted
    reads_blocks = runner.attention.can_read_blocks or runner.device.type == "cuda"
    return BLOCK_SIZE if reads_blocks else LARGE_BLOCK_SIZE


def num_kv_cache_blocks(
    runner: ModelRunner,
    block_size: int,
    settings: "Settings",
    limits: "StepLimits",
    *,
    graph_rows: int = 0,
    max_model_len: int | None = None,
) -> int:
    """How many blocks the KV cache has, by `kv_cache_mib`, or by what is free on a device: beyond the largest step and
    the CUDA graphs of steps of up to `graph_rows` sequences, and up to `gpu_memory_utilization` of all memory on a GPU,
    or `cpu_kv_cache_share` of what is free on a CPU. Not more than twice what `max_num_seqs` texts of `max_model_len`
    tokens can use.

    Raises StartupError where not even a short text fits.
    """
    token = runner.attention.token_bytes
    tokens = settings.kv_cache_mib * 2**20 // token if settings.kv_cache_mib else _num_free_tokens(runner, settings, {})
    if not settings.kv_cache_mib and tokens >= block_size:
        longest = min(max_model_len or tokens, tokens)
        peaks = profile_run(runner, block_size, limits, longest)
        if graph_rows:
            peaks[runner.device] += profile_graphs(runner, block_size, graph_rows, longest)
        tokens = _num_free_tokens(runner, settings, peaks)
    if tokens < max(SMALLEST_CACHE, block_size):
        raise StartupError(
            f"There is no memory for keys and values: a token takes {token} bytes, and {max(0, tokens) * token} are to "
            f"be had; at least {max(SMALLEST_CACHE, block_size)} tokens have to fit (MATSTEER_KV_CACHE_MIB; "
            "MATSTEER_MAX_NUM_BATCHED_TOKENS makes steps smaller)."
        )
    if max_model_len and max_model_len > tokens:
        log.warning("texts may have %d tokens, not %d: there is no memory for more", tokens, max_model_len)
    blocks = tokens // block_size
    # More than twice what the sequences can use would serve repeated prompts only.
    return min(blocks, 2 * limits.max_num_seqs * -(-max_model_len // block_size)) if max_model_len else blocks


def profile_run(runner: ModelRunner, block_size: int, limits: "StepLimits", longest: int) -> dict[torch.device, int]:
    """Computes the largest step that the limits allow, and returns the memory that it takes on each device beside
    weights and KV cache, in bytes: beside a token of `max_num_seqs` texts, each to be sampled from, the ends of others
    that are scored, all of `longest` tokens, `max_num_batched_tokens` together. On a CPU only up to the first layer of
    each kind: the next ones take no more, and would take minutes in a large model.

    Raises StartupError where it does not fit.
    """
    runner.allocate(1, block_size)  # every block of the texts is this one: what it holds does not matter
    chunks = _largest_step(runner, limits, longest)
    devices = {runner.device} | {shape.device for shape in runner.attention.shapes.values()}
    tokens = sum(map(len, chunks))
    try:
        with runner.few_layers() if runner.device.type == "cpu" else nullcontext():
            peaks = _peak_bytes(devices, lambda: runner.execute_async(chunks).result())
    except Exception as error:
        log.debug("the largest step fails", exc_info=error)
        raise StartupError(
            f"The largest step that the settings allow ({tokens} tokens, {len(chunks)} texts of up to {longest}) "
            f"fails: {first_line(error)}. Set MATSTEER_MAX_NUM_BATCHED_TOKENS or MATSTEER_MAX_NUM_SEQS lower."
        ) from error
    finally:
        runner.release()
    log.info("the largest step, of %d tokens, takes %d MiB beside the weights", tokens, max(peaks.values()) // 2**20)
    return peaks


def profile_graphs(runner: ModelRunner, block_size: int, rows: int, longest: int) -> int:
    """The memory that the CUDA graphs of steps of up to so many sequences will take, in bytes: the largest two are
    captured, and the others, which compute in the same memory, will each add as much as the second; and the block
    tables of each, for texts of `longest` tokens. They cannot all be captured yet: they are for the KV cache's
    addresses. (As vLLM estimates it.)"""
    runner.allocate(1, block_size, graph_rows=rows, max_model_len=block_size)
    taken: list[int] = []
    try:
        wanted = runner.want_graphs()
        for _ in wanted[:2]:
            free = _free_bytes(runner.device)
            runner.capture_next_graph()
            taken.append(max(0, free - _free_bytes(runner.device)))
    finally:
        runner.release()
    tables = -(-longest // block_size) * sum(bucket.table_bytes for bucket in wanted)
    bytes_ = sum(taken[:1]) + sum(taken[1:]) * (len(wanted) - 1) + tables
    log.info("CUDA graphs of %d sizes will take about %d MiB", len(wanted), bytes_ // 2**20)
    return bytes_


def _largest_step(runner: ModelRunner, limits: "StepLimits", longest: int) -> tuple[ScheduledChunk, ...]:
    most = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1, logprobs=MOST_LOGPROBS)
    prompt = (0,) * longest
    decodes = [Sequence("profile", index, prompt, most) for index in range(limits.max_num_seqs)]
    chunks = [ScheduledChunk(one, longest - 1, longest) for one in decodes]
    room, logits = limits.max_num_batched_tokens - len(chunks), max_num_logits(runner.vocab_size)
    # So many texts that one call gathers all that it may: the first has the longest chunk, others two tokens at least.
    texts = min(runner.attention.gathered_tokens // longest, limits.max_num_seqs)
    while room > 0 and len(chunks) < 2 * limits.max_num_seqs:  # as many that are scored as are generated
        texts = max(0, texts - 1)
        count = min(longest, max(2, room - 2 * texts), room)
        wanted = max(1, min(count, logits))
        scored = Sequence("profile", len(chunks), (0,) * (longest - wanted + 1), most, continuation=(0,) * wanted)
        chunks.append(ScheduledChunk(scored, longest - count, longest))
        room, logits = room - count, logits - wanted
    for chunk in chunks:
        chunk.sequence.block_table = [0] * runner.blocks.blocks_for(longest)
    return tuple(chunks)


# --- what is free, and what was taken -------------------------------------------------------------


def _num_free_tokens(runner: ModelRunner, settings: "Settings", peaks: dict[torch.device, int]) -> int:
    """How many tokens' keys and values fit into what the cache may take of every device that has layers, in every
    process that has some."""
    sizes: Counter[torch.device] = Counter()
    for shape in runner.attention.shapes.values():
        sizes[shape.device] += shape.bytes
    fit = min(_cache_bytes(device, settings, peaks.get(device, 0)) // size for device, size in sizes.items())
    return least(fit, runner.device) if settings.tensor_parallel_size > 1 else fit


def _cache_bytes(device: torch.device, settings: "Settings", peak: int) -> int:
    """What the cache may take of a device where a step takes `peak` bytes."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        return _free_bytes(device) - peak - int(total * (1 - settings.gpu_memory_utilization))
    free = min(psutil.virtual_memory().available, _container_bytes()) // settings.tensor_parallel_size
    return int((free - peak) * settings.cpu_kv_cache_share)


def _free_bytes(device: torch.device) -> int:
    """Of a GPU, with what PyTorch keeps for later."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _container_bytes() -> int:
    """What is left of a container's own limit (cgroup v2). Cached files do not count: they make room for others."""
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return sys.maxsize
    cached = int(statistics.get("inactive_file", 0))
    return max(0, int(limit) - int(used) + cached) if limit != "max" else sys.maxsize


def _peak_bytes(devices: set[torch.device], step: Callable[[], object]) -> dict[torch.device, int]:
    """Runs the step; what it takes on each device for a while."""
    cuda = [device for device in devices if device.type == "cuda"]
    if not cuda:
        return dict.fromkeys(devices, _peak_resident_bytes(step))
    for device in cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    before = {device: torch.cuda.memory_allocated(device) for device in cuda}
    step()
    return {device: torch.cuda.max_memory_allocated(device) - before[device] for device in cuda}


def _peak_resident_bytes(step: Callable[[], object]) -> int:
    """Of the process. 0 where that is not known: only Linux has a peak that can be reset (man 5 proc)."""
    trim_heap()  # the step would take what others have freed
    before = psutil.Process().memory_info().rss
    try:
        (PROC / "clear_refs").write_text("5")
    except OSError:
        log.debug("the memory that a step takes cannot be measured here")
        step()
        return 0
    step()
    status = dict(line.split(":", 1) for line in (PROC / "status").read_text().splitlines())
    return max(0, int(status["VmHWM"].split()[0]) * 1024 - before)
