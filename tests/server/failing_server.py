"""`matsteer serve` on which a step fails that has a text of so many tokens: what a device or a bug would do is done
here, all else is the server's own. `python -m tests.server.failing_server --port 8000 ...`"""

import sys
import time
from functools import partial
from typing import Any

import torch

from server.cli import app
from server.engine.model_runner import ModelRunner
from server.engine.output_processor import OutputProcessor
from server.process import supervisor, workers

NO_MEMORY, NAN, DEAD, STUCK, BUG = range(71, 76)  # max_new_tokens


def prepare() -> None:
    """In the process that has the engine."""
    forward, recover, process = ModelRunner.forward, ModelRunner.recover, OutputProcessor.process
    dead = False

    def failing_forward(runner: ModelRunner, chunks: Any, *more: Any) -> Any:
        nonlocal dead
        lengths = {chunk.sequence.sampling_params.max_new_tokens for chunk in chunks}
        dead |= DEAD in lengths
        if dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if NO_MEMORY in lengths:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if STUCK in lengths:
            print("stuck", file=sys.stderr, flush=True)
            time.sleep(600)
        logits, counts = forward(runner, chunks, *more)
        return logits * torch.nan if NAN in lengths else logits, counts

    def failing_recover(runner: ModelRunner) -> None:
        if dead:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        recover(runner)

    def failing_process(outputs: OutputProcessor, chunk: Any, output: Any) -> None:
        if chunk.sequence.sampling_params.max_new_tokens == BUG:
            raise KeyError("a bug")
        process(outputs, chunk, output)

    ModelRunner.forward = failing_forward  # type: ignore[method-assign]
    ModelRunner.recover = failing_recover  # type: ignore[method-assign]
    OutputProcessor.process = failing_process  # type: ignore[method-assign]


def run_engine(*arguments: Any) -> None:
    """In place of `server.process.workers.run_engine`."""
    prepare()
    workers.run_engine(*arguments)


if __name__ == "__main__":
    prepare()
    supervisor.serve = partial(supervisor.serve, run_engine=run_engine)  # type: ignore[assignment]
    app(["serve", *sys.argv[1:]])
