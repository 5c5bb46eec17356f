"""The ways to generate that are compared. Each takes requests and returns when the last one is answered."""

import importlib
import itertools
import json
import os
import queue
import statistics
import subprocess
import tempfile
import time
from collections import abc
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.workload import Request, columns, llama
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.engine.sequence import Event, Finished, SamplingParams, Sequence, SteeringParams
from server.loading import open_runner
from server.memory import choose_block_size
from steering.bank import ColumnBank
from steering.hook import steered
from steering.operators import steer
from steering.types import SequenceSteering


class Contender(Protocol):
    """`subset`: answers only this many requests, because it is slow; None: all."""

    name: str
    subset: int | None

    def __call__(self, requests: abc.Sequence[Request]) -> None: ...

    def close(self) -> None: ...


class Ours:
    """The engine: its thread, scheduler, cache and hooks, without HTTP."""

    subset: int | None = None

    def __init__(
        self,
        shape: str,
        dtype: torch.dtype,
        rows: int,
        *,
        mixes: abc.Sequence[tuple[float, ...]] = ((1.0, 0.5, -0.5),),
        max_num_batched_tokens: int = 512,
        block_size: int | None = None,
        native: bool = True,
        context: int = 512,
        cache_tokens: int | None = None,
        loaded: bool = True,
        device: torch.device | str = "cpu",
        name: str = "mat-steer, steered",
    ) -> None:
        """`mixes`: the multipliers that the requests ask for in turn; none: unsteered. `context`: the longest text.
        `cache_tokens`: that the cache has room for; None: half as many again as all rows can use. `loaded`: the columns
        are in the bank, whether or not they are asked for. `native`: with the kernels that are compiled for a CPU."""
        self.name = name
        model = llama(shape, dtype, device)
        # A step only looks its tokens up in the input embedding, unless that gives the logits as well.
        looked_up = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.nbytes
        self.weight_bytes = sum(parameter.nbytes for parameter in model.parameters()) - looked_up
        self.bank = ColumnBank(device=device, max_tokens=max(512, max_num_batched_tokens))
        runner = open_runner(model, self.bank, shape, native=native)
        runner.steering.install()
        self.token_bytes = runner.attention.token_bytes
        size = block_size or choose_block_size(runner)
        num_blocks = -(-cache_tokens // size) if cache_tokens else max(8, 3 * rows // 2) * -(-context // size)
        graph_rows = rows if self.bank.device.type == "cuda" else 0
        self.blocks = runner.allocate(num_blocks, size, graph_rows=graph_rows, max_model_len=context)
        self.cache_bytes = sum(pool.keys.nbytes + pool.values.nbytes for pool in runner.attention.pools.values())
        self.runner, self.model = runner, model
        self.unsteered = [SteeringParams()]
        self._handle = self.bank.add(columns(shape)) if loaded else None
        self.steering = self.steered_by(mixes) if loaded and mixes else self.unsteered
        self.engine = Engine(
            runner,
            Scheduler(self.blocks, max_num_seqs=rows, max_num_batched_tokens=max_num_batched_tokens),
            eos=frozenset(),
            decode=lambda ids: "",
            queue_limit=10**6,
        )
        self._names = itertools.count()
        self.engine.start()
        start = time.perf_counter()
        self.engine.warm_up().result()
        self.warm_up_seconds = time.perf_counter() - start  # that the captures of the graphs took, and the first steps

    def __call__(self, requests: abc.Sequence[Request]) -> None:
        self.answers(requests)

    def close(self) -> None:
        self.engine.stop()

    def steered_by(self, mixes: abc.Iterable[tuple[float, ...]]) -> list[SteeringParams]:
        """Each of the mixes of multipliers, for what `steering` is to be."""
        assert self._handle is not None, "there are no columns"
        return [SteeringParams(SequenceSteering.of([(self._handle, mix)])) for mix in mixes]

    def sequence(self, index: int, request: Request, *, stream: bool = False) -> Sequence:
        params = SamplingParams(max_new_tokens=request.new, temperature=0)
        steering = self.steering[index % len(self.steering)]
        return Sequence(f"bench-{next(self._names)}", index, request.prompt, params, steering, stream=stream)

    def answers(self, requests: abc.Sequence[Request], *, keep: bool = False) -> list[Finished]:
        """In the order in which they end. `keep`: prompts that were read before are not read anew."""
        if not keep:
            self.blocks.reset_prefix_cache()  # between runs nothing is running
        told: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.engine.submit([self.sequence(index, request) for index, request in enumerate(requests)], told.put)
        events = [told.get() for _ in requests]
        finished = [event for event in events if isinstance(event, Finished)]
        assert len(finished) == len(requests), events
        return finished


class Generate:
    """transformers.generate: batches of a fixed number of rows, each until its longest answer ends."""

    subset: int | None = None

    def __init__(
        self, shape: str, dtype: torch.dtype, rows: int, *, device: torch.device | str = "cpu", model: Any = None
    ) -> None:
        """`model`: that of the shape, where there is one already."""
        self.name = f"transformers.generate, static batches of {rows}"
        self._model: Any = model or llama(shape, dtype, device)
        self._device = device
        self._shape = shape
        self._rows = rows

    def close(self) -> None:
        pass

    def __call__(self, requests: abc.Sequence[Request]) -> None:
        for start in range(0, len(requests), self._rows):
            batch = requests[start : start + self._rows]
            width = max(len(one.prompt) for one in batch)
            ids = torch.tensor([[0] * (width - len(one.prompt)) + list(one.prompt) for one in batch]).to(self._device)
            mask = torch.tensor([[0] * (width - len(one.prompt)) + [1] * len(one.prompt) for one in batch]).to(
                self._device
            )
            with torch.inference_mode(), steered(self._model, columns(self._shape), (1.0, 0.5, -0.5)):
                self._model.generate(
                    ids, attention_mask=mask, do_sample=False, max_new_tokens=max(one.new for one in batch)
                )


class ContinuousBatching:
    """transformers' own continuous batching, unsteered: it has no place for multipliers."""

    subset: int | None = None

    def __init__(self, shape: str, dtype: torch.dtype, rows: int) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.name = "transformers' continuous batching, unsteered"
        self._model: Any = llama(shape, dtype)
        self._model.set_attn_implementation("paged|sdpa")
        self._generation: Any = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, max_new_tokens=128, eos_token_id=-1, pad_token_id=0
        )
        self._config = ContinuousBatchingConfig(max_requests_per_batch=rows, max_batch_tokens=512, num_blocks=256)

    def close(self) -> None:
        pass

    def __call__(self, requests: abc.Sequence[Request]) -> None:
        manager = self._model.init_continuous_batching(
            generation_config=self._generation, continuous_batching_config=self._config
        )
        manager.start()
        try:
            for one in requests:
                manager.add_request(list(one.prompt), max_new_tokens=one.new)
            left = len(requests)
            while left:
                result = manager.get_result(timeout=60)
                assert result is not None, "continuous batching gives no answer"
                left -= result.is_finished()
        finally:
            manager.stop(block=True)


class Pyvene:
    """One request after the other through pyvene, as the method's published code does."""

    subset: int | None = 4
    name = "pyvene, one by one"

    def __init__(
        self, shape: str, dtype: torch.dtype, rows: int, *, device: torch.device | str = "cpu", model: Any = None
    ) -> None:
        """`model`: that of the shape, where there is one already."""
        pyvene: Any = importlib.import_module("pyvene")  # optional

        made = columns(shape)
        vectors, weights, biases, kinds, keep = [
            part.to(device)
            for part in (
                torch.stack([column.vector for column in made]),
                torch.stack([column.gate_weight for column in made]),
                torch.tensor([column.gate_bias for column in made]),
                torch.tensor([column.gate.code for column in made], dtype=torch.int8),
                torch.tensor([column.keep_norm for column in made]),
            )
        ]
        mix = torch.tensor([[1.0, 0.5, -0.5]], device=device)
        self._device = device

        class MatSteer(pyvene.ConstantSourceIntervention):  # type: ignore[misc]
            def __init__(self, **options: Any) -> None:
                super().__init__(**options, keep_last_dim=True)

            def forward(self, base: Tensor, source: Any = None, subspaces: Any = None, **_: Any) -> Tensor:
                tokens = base.reshape(-1, base.shape[-1])
                return steer(tokens, vectors, weights, biases, kinds, keep, mix.expand(len(tokens), -1)).reshape(
                    base.shape
                )

        layer = made[0].site.layer
        self._model: Any = pyvene.IntervenableModel(
            [{"component": f"model.layers[{layer}].self_attn.o_proj.output", "intervention": MatSteer()}],
            model=model or llama(shape, dtype, device),
        )

    def close(self) -> None:
        pass

    def __call__(self, requests: abc.Sequence[Request]) -> None:
        for one in requests:
            ids = torch.tensor([one.prompt]).to(self._device)
            base = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with torch.inference_mode():
                _, out = self._model.generate(
                    base, unit_locations=None, max_new_tokens=one.new, do_sample=False, intervene_on_prompt=True
                )
            assert out.shape[1] == len(one.prompt) + one.new


class Vllm:
    """vLLM's CPU build, unsteered, in a process and a Python of its own."""

    subset: int | None = None

    def __init__(self, python: str, shape: str, dtype: torch.dtype, rows: int, *, compiled: bool) -> None:
        self.name = f"vLLM on the CPU, {'compiled' if compiled else 'eager'}, unsteered"
        self._folder = tempfile.TemporaryDirectory()
        llama(shape, dtype).save_pretrained(self._folder.name)
        worker = Path(__file__).with_name("vllm_worker.py")
        libraries = [str(path) for path in Path(python).parents[1].rglob("libiomp5.so")]
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            **({"LD_PRELOAD": libraries[0]} if libraries else {}),
        }
        self._process = subprocess.Popen(
            [python, str(worker), self._folder.name, str(dtype)[6:], str(rows), "compiled" if compiled else "eager"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self._expect("ready")

    def __call__(self, requests: abc.Sequence[Request]) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps([[one.prompt, one.new] for one in requests]) + "\n")
        self._process.stdin.flush()
        self._expect("done")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()

    def _expect(self, word: str) -> None:
        assert self._process.stdout
        if self._process.stdout.readline().strip() != word:
            raise RuntimeError("vLLM's process has ended; its reason is above")


def product_seconds(model: nn.Module, tokens: int, dtype: torch.dtype, repeat: int = 20) -> float:
    """What the products of a model's (packed) linear layers with so many tokens take, seconds: the floor of a step."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "in_features")]
    inputs = {layer.in_features: torch.randn(1, tokens, layer.in_features, dtype=dtype) for layer in layers}
    times = []
    with torch.inference_mode():
        for _ in range(repeat):
            start = time.perf_counter()
            for layer in layers:
                layer(inputs[layer.in_features])
            times.append(time.perf_counter() - start)
    return statistics.median(times)
