"""What a client feels: `python -m benchmarks.latency --help`.

First tokens of short requests while a long prompt is read, with and without chunks; memory of a request beside the
exact size of its keys and values; a checkpoint that is loaded under load.
"""

import argparse
import json
import queue
import random
import statistics
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Ours
from benchmarks.machine import described
from benchmarks.workload import Request, columns, requests
from server.engine.sequence import Event, Failed, Finished, TokenEvent
from server.threads import run_in_disposable_thread, usable_cores

LONG = 2000  # tokens
CONTEXT = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="100M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/latency-cpu.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = {128: 9, 512: 16, CONTEXT: 9}  # by the tokens of a step; no more than are used: 24 GiB have to be enough
    steps = {
        chunk: run_in_disposable_thread(
            partial(Ours, args.model, torch.float32, count, max_num_batched_tokens=chunk, context=CONTEXT)
        )
        for chunk, count in rows.items()
    }
    results: dict[str, Any] = {
        "machine": described(),
        "model": args.model,
        "first_token_ms_while_a_long_prompt_is_read": first_tokens(steps, args.rounds),
        "memory": memory(steps[512]),
        "checkpoint_loaded_under_load": swap(steps[512], args.model, args.rounds),
    }
    for ours in steps.values():
        ours.close()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def first_tokens(engines: dict[int, Ours], rounds: int) -> dict[str, dict[str, float]]:
    """Eight short requests arrive just after one with a prompt of 2,000 tokens. Milliseconds, by tokens of a step."""
    seen: dict[int, list[float]] = {chunk: [] for chunk in engines}
    longs: dict[int, list[float]] = {chunk: [] for chunk in engines}
    number = random.Random(0)
    for _ in range(rounds):
        for chunk, ours in engines.items():
            ours.blocks.reset_prefix_cache()
            told: queue.SimpleQueue[Event] = queue.SimpleQueue()
            prompt = tuple(number.randrange(4000) for _ in range(LONG))
            shorts = requests(8, 4000, seed=number.randrange(10**6), shortest=16, longest=32)
            ours.engine.submit([ours.sequence(100, Request(prompt, 8))], told.put)
            time.sleep(0.02)
            ours.engine.submit([ours.sequence(i, Request(one.prompt, 8)) for i, one in enumerate(shorts)], told.put)
            for _ in range(9):
                event = _finished(told)
                (longs if event.sequence.index == 100 else seen)[chunk].append(event.timing.ttft_ms)
    return {
        f"steps of {chunk}": {
            "short requests, median": round(statistics.median(times)),
            "short requests, longest": round(max(times)),
            "the long one, median": round(statistics.median(longs[chunk])),
        }
        for chunk, times in seen.items()
    }


def memory(ours: Ours) -> dict[str, float]:
    """Bytes that 32 requests hold in the cache, and what their keys and values need when they end."""
    exact, sequences = 0, []
    ours.blocks.reset_prefix_cache()
    for index, request in enumerate(requests(32, 4000)):
        sequence = ours.sequence(index, request)
        assert ours.blocks.allocate(sequence, len(request.prompt) + request.new)
        exact += (len(request.prompt) + request.new - 1) * ours.token_bytes
        sequences.append(sequence)
    held = sum(len(one.block_table) for one in sequences) * ours.blocks.block_size * ours.token_bytes
    for one in sequences:
        ours.blocks.free(one, keep=False)
    return {"held_bytes": held, "exact_bytes": exact, "held / exact": round(held / exact, 2)}


def swap(ours: Ours, shape: str, rounds: int) -> dict[str, Any]:
    """Ten checkpoints loaded and removed while 16 rows generate: how long each takes, and the longest time that any
    row waited for its next token, beside the same without."""
    gaps: dict[bool, list[float]] = {True: [], False: []}
    taken: list[float] = []
    work = requests(16, 4000, seed=3, shortest=100, longest=128)
    for _ in range(rounds):
        for swapping in (True, False):
            ours.blocks.reset_prefix_cache()
            told: queue.SimpleQueue[tuple[float, Event]] = queue.SimpleQueue()
            sequences = [ours.sequence(i, one, stream=True) for i, one in enumerate(work)]
            ours.engine.submit(sequences, lambda event, told=told: told.put((time.perf_counter(), event)))  # type: ignore[misc]
            worker = threading.Thread(target=lambda: taken.extend(_swaps(ours, shape)))
            if swapping:
                worker.start()
            gaps[swapping].append(_longest_gap(told, len(sequences)))
            if swapping:
                worker.join()
    return {
        "milliseconds a load": round(statistics.median(taken) * 1000, 2),
        "longest wait for a token, ms": round(statistics.median(gaps[True]) * 1000, 1),
        "the same without loads, ms": round(statistics.median(gaps[False]) * 1000, 1),
    }


def _swaps(ours: Ours, shape: str) -> list[float]:
    times = []
    time.sleep(1)  # prompts are read by then
    for _ in range(10):
        start = time.perf_counter()
        handle = ours.engine.call(lambda: ours.bank.add(columns(shape))).result()
        times.append(time.perf_counter() - start)
        ours.engine.call(lambda handle=handle: ours.bank.remove(handle)).result()  # type: ignore[misc]
        time.sleep(0.05)
    return times


def _longest_gap(told: "queue.SimpleQueue[tuple[float, Event]]", rows: int) -> float:
    last: dict[int, float] = {}
    gaps: list[float] = []
    ended = 0
    while ended < rows:
        at, event = told.get()
        assert not isinstance(event, Failed), event
        if isinstance(event, TokenEvent):
            if event.sequence.index in last:
                gaps.append(at - last[event.sequence.index])
            last[event.sequence.index] = at
        ended += isinstance(event, Finished)
    return max(gaps)


def _finished(told: "queue.SimpleQueue[Event]") -> Finished:
    event = told.get()
    assert isinstance(event, Finished), event
    return event


if __name__ == "__main__":
    main()
