"""Tiny models of all architectures that transformers has a tensor-parallel plan for, in two processes."""

import multiprocessing
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging as hf_logging

from server.ending import end
from server.engine.sequence import ScheduledChunk, Sequence
from server.loading import open_runner
from server.parallel.group import Place, join
from steering.bank import ColumnBank
from steering.pretrained import _open_weights
from tests.steering.families import FAMILIES, VOCABULARY

PROCESSES = 2
CPU = torch.device("cpu")
WITHOUT_PLAN = {"gpt2"}


def sharded_families() -> list[str]:
    return [name for name in FAMILIES if name not in WITHOUT_PLAN]


def tiny(name: str) -> Any:
    """With heads for two processes, and a vocabulary that is not to be shared equally."""
    family = FAMILIES[name]
    more = {"num_key_value_heads": 2} if "num_key_value_heads" in family.settings else {}
    config = getattr(transformers, family.config)(**family.settings | more | {"num_attention_heads": 4})
    torch.manual_seed(1)
    return getattr(transformers, family.model)(config).eval()


def ids() -> torch.Tensor:
    return torch.arange(3, 3 + 40) % VOCABULARY


def compare_with_whole(folder: Path) -> None:
    """Raises AssertionError where logits differ."""
    wanted = {}
    for name in sharded_families():
        model = tiny(name)
        model.save_pretrained(folder / name)
        with torch.inference_mode():
            wanted[name] = model(input_ids=ids()[None], use_cache=False).logits[0]
    spawn = multiprocessing.get_context("spawn")
    places = [Place(rank, PROCESSES, folder / "group") for rank in range(PROCESSES)]
    processes = [spawn.Process(target=_run, args=(place, folder), daemon=True) for place in places]
    for process in processes:
        process.start()
    wait([process.sentinel for process in processes])
    for process in processes:  # where one has failed the other waits for it
        process.join(10)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * PROCESSES
    for name, logits in wanted.items():
        for rank in range(PROCESSES):
            found = torch.load(folder / f"{name}-{rank}.pt")
            away = float((found - logits).norm() / logits.norm())
            assert away < 1e-5, f"{name} in process {rank}: {away:g}"


def _run(place: Place, folder: Path) -> None:
    try:
        _compute(place, folder)
    except Exception:
        traceback.print_exc()
        end(1)
    end(0)


def _compute(place: Place, folder: Path) -> None:
    from transformers.distributed.configuration_utils import DistributedConfig

    torch.set_num_threads(1)
    hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    join(place, CPU)
    for name in sharded_families():
        path = str(folder / name)
        config = transformers.AutoConfig.from_pretrained(path)
        options = {"dtype": "auto", "distributed_config": DistributedConfig(tp_size=PROCESSES)}
        model = _open_weights(path, None, config, CPU, options)
        text = Sequence("text", 0, tuple(ids()[:1].tolist()), continuation=(*ids()[1:].tolist(), 0))
        runner = open_runner(model, ColumnBank(device=CPU, max_tokens=64), name)
        logits, _ = runner.forward((ScheduledChunk(text, 0, len(ids())),))
        torch.save(logits, folder / f"{name}-{place.rank}.pt")
