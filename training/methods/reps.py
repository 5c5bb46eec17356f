"""Vectors trained by preference (RePS, Wu et al., 2025, arXiv 2505.20809): reference-free and in both directions.

A vector is trained through the frozen model, on pairs of a positive and a negative answer, y+ and y-, to one prompt x.
Steered by +m v the model is to prefer y+, by -m v it is to prefer y-, each by log-probabilities per token:

    -log sigmoid(b+ / |y+| log p(y+ | x; +m v) - 1 / |y-| log p(y- | x; +m v))
    -log sigmoid(b- / |y-| log p(y- | x; -m v) - 1 / |y+| log p(y+ | x; -m v))

where b+ = max(log p(y- | x) - log p(y+ | x), 1) of the unsteered model, and b- likewise, weigh what it finds less
likely. The multiplier m is drawn anew for each step, so that the vector works at more than one. In the paper the second
line clips the activation's part along v; here it is a negative multiplier, as a request would give it.
"""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.data.samples import Split
from training.errors import FitError
from training.files import content_key, write_bytes, write_tensors
from training.methods.base import FitInputs, Method, MethodConfig, option
from training.progress import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from steering.column import Column
    from steering.types import Site
    from training.activations.tokenization import Encoded
    from training.data.samples import Sample

MULTIPLIERS = (0.5, 1.0, 1.5)  # that a step is drawn from


@dataclass(frozen=True)
class RepsConfig(MethodConfig):
    steps: int = option("of training; default: 200.", default=200, min=1)
    pairs: int = option("in a step; default: 4.", default=4, min=1)
    rate: float = option(
        "of Adam, in units of the difference in means, which it starts at; default: 0.02.", default=0.02, min=0
    )
    seed: int = 0


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, and how far the unsteered model prefers the positive one, in nats."""

    positive: "Encoded"
    negative: "Encoded"
    preference: float = 0.0


def fit(inputs: FitInputs, config: RepsConfig) -> Sequence["Column"]:
    """Site by site, attribute by attribute; the losses are in `reps.jsonl`. With a folder an interrupted fit goes on to
    the same result. Raises FitError where an attribute has no prompt with both sides."""
    import torch

    from steering.column import Column
    from steering.types import Gate

    assert inputs.base is not None, "checked by `fit`"
    columns: list[Column] = []
    told: list[dict[str, Any]] = []
    for site, names in inputs.by_site():
        for name in names:
            sides = inputs.activations.contrasts(site, Split.TRAIN, [name])[name]
            start = sides.positive.mean(0) - sides.negative.mean(0)
            if not start.any():
                raise FitError(
                    f"The two sides of attribute {name!r} have the same mean at {site}: nothing to start from."
                )
            vector = _Trainer(inputs, config, name, site, told).run(start)
            columns.append(Column(name, site, Gate.CONSTANT, vector, torch.zeros_like(vector), 0.0, inputs.keep_norm))
    return columns


def pairs_of(samples: Sequence["Sample"], name: str, split: Split) -> list[tuple["Sample", "Sample"]]:
    """A positive and a negative answer to one prompt each: as many of a prompt as its larger side has."""
    prompts: dict[tuple[Any, ...], tuple[list[Sample], list[Sample]]] = {}
    for sample in samples:
        if sample.attribute == name and sample.split is split:
            prompts.setdefault((sample.prompt, sample.turns), ([], []))[not sample.label].append(sample)
    return [
        (positives[i % len(positives)], negatives[i % len(negatives)])
        for positives, negatives in prompts.values()
        if positives and negatives
        for i in range(max(len(positives), len(negatives)))
    ]


@dataclass
class _Progress:
    """How far a vector is trained, from the difference in means (step 0) on."""

    best: "Tensor"  # [D], in units of that difference
    lowest: float | None  # its loss on dev; None: dev has no pairs
    told: list[dict[str, Any]]
    """Rows of the log."""
    step: int = 0


class _Trainer:
    def __init__(
        self, inputs: FitInputs, config: RepsConfig, name: str, site: "Site", before: list[dict[str, Any]] | None = None
    ) -> None:
        """`before`: the log of those that were trained before this one, to which its own is added."""
        from training.activations.tokenization import encode

        assert inputs.base is not None
        self.inputs, self.config, self.name, self.site = inputs, config, name, site
        self.before = [] if before is None else before
        self.model = inputs.base.model
        base = inputs.base
        self.unjudged: dict[Split, list[Pair]] = {}
        for split in (Split.TRAIN, Split.DEV):
            encoded = [
                tuple(encode(base.tokenizer, one.prompt, one.completion, one.turns, base.chat) for one in pair)
                for pair in pairs_of(inputs.samples, name, split)
            ]
            self.unjudged[split] = [Pair(pair[0], pair[1]) for pair in encoded if all(one.targets for one in pair)]
        if not self.unjudged[Split.TRAIN]:
            raise FitError(
                f"No prompt of attribute {name!r} has a positive and a negative answer in train: reps needs pairs."
            )

    @cached_property
    def pairs(self) -> dict[Split, list[Pair]]:
        """With what the unsteered model prefers."""
        return {split: [self._judged(pair) for pair in own] for split, own in self.unjudged.items()}

    def run(self, start: "Tensor") -> "Tensor":
        """The trained vector [D], on the CPU: the best on dev of those after each tenth of the steps and the start,
        where dev has pairs."""
        import torch

        scale, steps = float(start.norm()), self.config.steps
        vector = (start / scale).to(self.model.device).requires_grad_()
        optimizer = torch.optim.Adam([vector], lr=self.config.rate)
        with _frozen(self.model):
            at = self._resumed(start, vector, optimizer)
            if at is None or at.step < steps:
                at = self._trained(at, vector, optimizer, scale, self._key(start))
        self.before += at.told
        found: Tensor = (scale * at.best).float().cpu()
        return found

    def _trained(self, at: _Progress | None, vector: "Tensor", optimizer: Any, scale: float, key: str) -> _Progress:
        from training.methods.state import Pace

        steps, train, dev = self.config.steps, self.pairs[Split.TRAIN], self.pairs[Split.DEV]
        row = {"attribute": self.name, "site": str(self.site)}
        if at is None:
            at = _Progress(vector.detach().clone(), self._loss_on(dev, vector, scale), [])
            at.told.append({**row, "step": 0, "dev": at.lowest})
        order, every, pace = random.Random(self.config.seed), max(1, steps // 10), Pace()

        def drawn() -> tuple[list[Pair], float]:
            return [train[order.randrange(len(train))] for _ in range(self.config.pairs)], order.choice(MULTIPLIERS)

        for _ in range(at.step):
            drawn()
        with progress_bar(f"reps {self.name}", steps, "steps", shown=self.inputs.progress, done=at.step) as advance:
            while at.step < steps:
                at.step += 1
                chosen, multiplier = drawn()
                loss = self.loss(chosen, scale * vector, multiplier)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                advance(1)
                if at.step % every == 0 or at.step == steps:
                    now = self._loss_on(dev, vector, scale)
                    at.told.append({**row, "step": at.step, "dev": now, "train": float(loss.detach())})
                    if now is None or at.lowest is None or now < at.lowest:
                        at.best, at.lowest = vector.detach().clone(), now
                if at.step == steps or pace.due():
                    self._save(at, vector, optimizer, key)
        return at

    # What an interrupted fit goes on from: a file of each vector, and the log of all.

    def _path(self) -> Path | None:
        name = f"reps-{content_key([self.name, str(self.site)])}.safetensors"
        return self.inputs.folder and self.inputs.folder / name

    def _key(self, start: "Tensor") -> str:
        """Stands for everything that decides the result."""
        rows = [[split.value, list(map(asdict, own))] for split, own in self.unjudged.items()]
        return content_key([self.config.as_dict(), self.inputs.keep_norm, start.tolist(), rows])

    def _resumed(self, start: "Tensor", vector: "Tensor", optimizer: Any) -> _Progress | None:
        """Put the stored state into vector and optimizer; None where there is none. Raises FitError for another
        fit's."""
        from training.methods.state import put_back, read_state

        if (path := self._path()) is None or (stored := read_state(path, self._key(start))) is None:
            return None
        tensors, metadata = stored
        put_back(tensors, {"vector": vector}, optimizer)
        return _Progress(best=tensors["best"].to(vector.device), **json.loads(metadata["progress"]))

    def _save(self, at: _Progress, vector: "Tensor", optimizer: Any, key: str) -> None:
        """The log first: a state never names a step that the log lacks."""
        from training.methods.state import with_moments

        if (path := self._path()) is None:
            return
        log = "".join(json.dumps(row) + "\n" for row in (*self.before, *at.told))
        write_bytes(path.with_name("reps.jsonl"), log.encode())
        told = json.dumps({"step": at.step, "lowest": at.lowest, "told": at.told})
        tensors = with_moments({"vector": vector}, optimizer) | {"best": at.best}
        write_tensors(path, tensors, {"key": key, "progress": told})

    def loss(self, pairs: Sequence[Pair], vector: "Tensor", multiplier: float) -> "Tensor":
        """The mean over pairs, of both directions."""
        import torch
        from torch.nn.functional import logsigmoid

        rows = [one for pair in pairs for one in (pair.positive, pair.negative)]
        lengths = torch.tensor([len(one.targets) for one in rows], device=self.model.device).view(-1, 2)
        away = torch.tensor([pair.preference for pair in pairs], device=self.model.device)
        total = torch.zeros((), device=self.model.device)
        for sign, wanted in ((1.0, 0), (-1.0, 1)):
            scores = self.log_probabilities(rows, vector, sign * multiplier).view(-1, 2) / lengths
            weight = (-sign * away).clamp_min(1)
            total = total - logsigmoid(weight * scores[:, wanted] - scores[:, 1 - wanted]).mean()
        return total

    def log_probabilities(self, rows: Sequence["Encoded"], vector: "Tensor | None", multiplier: float) -> "Tensor":
        """[rows]: of each answer, steered as a generation of it would be."""
        import torch

        from training.activations.tokenization import pad_right
        from training.evaluation.likelihood import steered_mask

        ids, mask = pad_right([row.ids for row in rows], self.model.device)
        acted = steered_mask(rows, _generated()).to(self.model.device)
        with _added(self.model, self.site, vector, multiplier * acted.float(), keep_norm=self.inputs.keep_norm):
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found = []
        for row, own in zip(rows, logits, strict=True):
            answer = own[row.start : row.end].float()
            targets = torch.tensor(row.targets, device=answer.device)
            found.append((answer.gather(1, targets[:, None])[:, 0] - answer.logsumexp(-1)).sum())
        return torch.stack(found)

    def _judged(self, pair: Pair) -> Pair:
        import torch

        with torch.no_grad():
            positive, negative = self.log_probabilities([pair.positive, pair.negative], None, 0.0).tolist()
        return Pair(pair.positive, pair.negative, positive - negative)

    def _loss_on(self, pairs: Sequence[Pair], vector: "Tensor", scale: float) -> float | None:
        import torch

        if not pairs:
            return None
        size = self.config.pairs
        parts = [pairs[at : at + size] for at in range(0, len(pairs), size)]
        with torch.no_grad():
            sums = [float(self.loss(part, scale * vector, 1.0)) * len(part) for part in parts]
        return sum(sums) / len(pairs)


def _generated() -> Any:
    from steering.types import Positions

    return Positions.GENERATED


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No parameter of a model wants a gradient inside."""
    trainable = [one for one in model.parameters() if one.requires_grad]
    for one in trainable:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in trainable:
            one.requires_grad_(True)


@contextmanager
def _added(
    model: Any, site: "Site", vector: "Tensor | None", multipliers: "Tensor", *, keep_norm: bool
) -> Iterator[None]:
    """Inside, a vector [D] x multipliers [rows, tokens] is added at a site of a model, as a column of it would be, and
    gets gradients."""
    import torch

    from steering.operators import gate_codes, steer
    from steering.sites import site_module
    from steering.types import Gate

    if vector is None:
        yield
        return

    def moved(activations: "Tensor") -> "Tensor":
        device = activations.device
        one = vector.to(device)[None]
        found = steer(
            activations.reshape(-1, activations.shape[-1]), one, torch.zeros_like(one), torch.zeros(1, device=device),
            gate_codes([Gate.CONSTANT], device), torch.tensor([keep_norm], device=device),
            multipliers.to(device).reshape(-1, 1),
        )  # fmt: skip
        return found.reshape(activations.shape)

    def output_moved(module: Any, args: Any, output: Any) -> Any:
        return (moved(output[0]), *output[1:]) if isinstance(output, tuple) else moved(output)

    module, side = site_module(model, site)
    if side == "input":
        handle = module.register_forward_pre_hook(lambda _, args: (moved(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(output_moved)
    try:
        yield
    finally:
        handle.remove()


REPS = Method(
    name="reps",
    summary="a vector trained through the model by preference",
    title="reference-free preference steering (RePS, arXiv 2505.20809)",
    config=RepsConfig,
    fit=fit,
    site="residual",
    through_model=True,
    one_place=False,  # it does, but a search would train a vector through the model at every place
)
