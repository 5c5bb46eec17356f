"""The training loop of MAT-Steer (arXiv 2502.12446): steps, the log, what an interrupted fit needs."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from steering.column import Column
from steering.types import Site
from training.activations.store import Contrast
from training.errors import FitError
from training.files import write_bytes, write_tensors
from training.methods.mat import Kernel, MatConfig, Objective
from training.methods.mat_model import (
    MOST_ROWS,
    Batch,
    GatedVectors,
    Loss,
    Scaler,
    TrainingSet,
    all_bandwidths,
    cosines,
    gaussian,
    kernel_rates,
    mmd2,
    squared_distances,
    steered_distances,
)
from training.methods.state import Pace, put_back, read_state, with_moments
from training.progress import progress_bar

log = logging.getLogger(__name__)

CLOSED_GATE = 0.05
_STATE = 2  # what a stored state holds: 2 has the best epoch of each attribute
_PARAMETERS = ("vectors", "weights", "biases")


def train_step(model: GatedVectors, batch: Batch, loss: Loss, optimizer: torch.optim.Optimizer) -> Tensor:
    """One step on one batch; the terms [4] of its loss before it."""
    terms, parameters = loss(model, batch), model.parameters()
    for parameter, gradient in zip(parameters, torch.autograd.grad(terms @ loss.weights, parameters), strict=True):
        parameter.grad = gradient
    optimizer.step()
    return terms.detach()


# The log: enough to see whether it trains.


@dataclass(frozen=True)
class SplitMetrics:
    """One attribute on one split."""

    mmd: float
    """MMD^2 between positives and negatives steered as in the training, as a share of the unsteered one."""
    gate_positive: float
    gate_negative: float
    gate_positive_square: float
    """The mean of its squares, of which L_pos is made."""


@dataclass(frozen=True)
class EpochMetrics:
    epoch: int
    losses: dict[str, float]
    """"loss", the weighted sum, and the terms unweighted: "mmd", "positive", "sparse", "orthogonal"; averaged over the
    epoch's steps."""
    norms: dict[str, float]
    """|theta| of each attribute, in the units of the activations."""
    cosines: dict[str, float]
    """Of each pair of vectors, under "first/second"."""
    train: dict[str, SplitMetrics]
    dev: dict[str, SplitMetrics] | None

    def dev_losses(self, config: MatConfig) -> dict[str, float]:
        """What the balanced objective makes of each attribute on dev, whatever was trained with: the alignment alone is
        lowest for gates that are as open on positives as on negatives, those of the first epoch mostly."""
        return {
            name: side.mmd + config.l_pos * side.gate_positive_square + config.l_sparse * side.gate_negative
            for name, side in (self.dev or {}).items()
        }

    @property
    def closed(self) -> list[str]:
        """Attributes whose gate has closed on the very activations that it should steer."""
        return [name for name, side in self.train.items() if side.gate_negative < CLOSED_GATE]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Self:
        row: dict[str, Any] = json.loads(line)
        for split in ("train", "dev"):
            if row[split] is not None:
                row[split] = {name: SplitMetrics(**side) for name, side in row[split].items()}
        return cls(**row)


def mean_losses(terms: Sequence[Tensor], config: MatConfig) -> dict[str, float]:
    """The terms [4] of an epoch's steps, averaged, and their weighted sum."""
    mmd, positive, sparse, orthogonal = torch.stack(list(terms)).mean(0).tolist()
    loss = mmd + config.l_pos * positive + config.l_sparse * sparse + config.l_ortho * orthogonal
    return {"loss": loss, "mmd": mmd, "positive": positive, "sparse": sparse, "orthogonal": orthogonal}


@dataclass(frozen=True, eq=False)
class WatchedSplit:
    """One attribute on one split, measured after every epoch on (at most 512 + 512 of) its rows."""

    batch: Batch  # A = 1: P positives, then the negatives; the gram is with the negatives
    positives: int  # P
    within: Tensor  # [], the mean kernel between positives
    unsteered: Tensor  # [], MMD^2 without steering, never 0
    acting: Tensor  # [1, P + N, T]: 1 where a gate acts
    rates: Tensor  # [1, K], of the kernels

    @classmethod
    def of(cls, contrast: Contrast, scaler: Scaler, sigmas: Tensor, acting: Tensor) -> Self:
        """`contrast` is in the scaler's units, `sigmas` [K]; `acting` [T] says which gates steer it."""
        sides = (contrast.positive, contrast.negative)
        positive, negative = (rows[:: max(1, -(-len(rows) // MOST_ROWS))][None] for rows in sides)
        rates, count, rows = kernel_rates(sigmas)[None], positive.shape[1], torch.cat([positive, negative], 1)
        batch = Batch.of(rows, scaler.origin, negative.shape[1])
        norms = batch.squares[:, :count, 0]
        within = gaussian(squared_distances(positive @ positive.mT, norms, norms), rates).mean()
        unsteered = mmd2(positive, negative, sigmas[None])[0].clamp_min(1e-6)
        steered = (torch.arange(rows.shape[1], device=acting.device) >= count).to(acting)
        return cls(batch, count, within, unsteered, (steered[:, None] * acting)[None], rates)

    @classmethod
    def all_of(
        cls, contrasts: Mapping[str, Contrast], scaler: Scaler, sigmas: Tensor, joint: bool
    ) -> "dict[str, WatchedSplit]":
        """Every attribute of a split, given in the scaler's units, with their `sigmas` [T, K]."""
        acting = torch.ones(len(sigmas), len(sigmas)) if joint else torch.eye(len(sigmas))
        return {
            name: cls.of(contrast, scaler, sigmas[index], acting[index].to(sigmas))
            for index, (name, contrast) in enumerate(contrasts.items())
        }

    @torch.inference_mode()
    def measure(self, model: GatedVectors, index: int) -> SplitMetrics:
        """`index` is that of the attribute's own gate."""
        gates, distances, _ = steered_distances(model, self.batch, self.acting)
        kernel, count = gaussian(distances, self.rates), self.positives
        mmd = self.within + kernel[:, :, count:].mean() - 2 * kernel[:, :, :count].mean()
        own = gates[0, :, index]
        positive, negative = own[:count], own[count:]
        means = [mmd / self.unsteered, positive.mean(), negative.mean(), positive.square().mean()]
        return SplitMetrics(*torch.stack(means).tolist())


def measure_all(model: GatedVectors, watched: Mapping[str, WatchedSplit]) -> dict[str, SplitMetrics]:
    return {name: one.measure(model, index) for index, (name, one) in enumerate(watched.items())}


# The state of an interrupted fit: one safetensors file, replaced as a whole, and the log beside it.


def fit_key(train: Mapping[str, Contrast], dev: Mapping[str, Contrast] | None, config: MatConfig) -> str:
    """A hash of everything that decides the result."""
    digest = hashlib.sha256(json.dumps([_STATE, config.as_dict()], sort_keys=True).encode())
    for part in (train, dev or {}):
        for name, contrast in part.items():
            digest.update(name.encode())
            for side in (contrast.positive, contrast.negative):
                digest.update(str(tuple(side.shape)).encode())
                digest.update(side.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _named(model: GatedVectors) -> dict[str, Tensor]:
    return dict(zip(_PARAMETERS, model.parameters(), strict=True))


def save_state(
    folder: Path,
    key: str,
    model: GatedVectors,
    optimizer: torch.optim.Optimizer,
    best: Sequence[Tensor],
    history: Sequence[EpochMetrics],
) -> None:
    """The log first: a state never names an epoch that the log lacks."""
    write_bytes(folder / "log.jsonl", "".join(epoch.to_json() + "\n" for epoch in history).encode())
    tensors = with_moments(_named(model), optimizer)
    tensors |= {f"best.{name}": value for name, value in zip(_PARAMETERS, best, strict=True)}
    write_tensors(folder / "state.safetensors", tensors, {"key": key, "epochs": str(len(history))})


def load_state(
    folder: Path, key: str, model: GatedVectors, optimizer: torch.optim.Optimizer
) -> tuple[list[Tensor], list[EpochMetrics]] | None:
    """Put the stored state into model and optimizer; None where there is none. Raises FitError for another fit's."""
    if (stored := read_state(folder / "state.safetensors", key)) is None:
        return None
    tensors, metadata = stored
    put_back(tensors, _named(model), optimizer)
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[: int(metadata["epochs"])]
    best = [tensors[f"best.{name}"].to(model.vectors.device) for name in _PARAMETERS]
    return best, [EpochMetrics.from_json(line) for line in lines]


# The training loop.


@dataclass(frozen=True, eq=False)
class MatFit:
    columns: tuple[Column, ...]
    history: tuple[EpochMetrics, ...]
    """One entry an epoch; entry 0 is the state before the first step."""
    chosen: dict[str, int]
    """Attribute -> the epoch that its column comes from."""


def fit_mat(
    train: Mapping[str, Contrast],
    site: Site,
    config: MatConfig | None = None,
    *,
    dev: Mapping[str, Contrast] | None = None,
    folder: Path | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> MatFit:
    """Fit one sigmoid-gated column an attribute, all at once.

    `train` and `dev`: attribute -> activations at `site`, float32 [P, D] and [N, D]. With `folder`, the state is kept
    there and an interrupted fit continues to the same result; its `log.jsonl` has a line an epoch. Raises FitError
    for activations or settings that cannot be fitted.
    """
    config = config or MatConfig()
    _check(train, dev, config)
    names = tuple(train)
    key = fit_key(train, dev, config) if folder else ""
    scaler = Scaler.of(train, config.standardize, device)
    scaled = scaler.apply(train)
    sigmas = all_bandwidths(scaled, scaler, config)
    watched = WatchedSplit.all_of(scaled, scaler, sigmas, config.joint)
    on_dev = {name: dev[name] for name in names} if dev else {}
    watched_dev = WatchedSplit.all_of(scaler.apply(on_dev), scaler, sigmas, config.joint) if dev else None
    loss = Loss.of(config, sigmas, torch.stack([one.unsteered for one in watched.values()]))
    model = GatedVectors.start(scaled, scaler, config)
    rows = TrainingSet.of(scaled, scaler.origin)
    del scaled  # the training set holds the same rows
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)

    def metrics(epoch: int, terms: Sequence[Tensor]) -> EpochMetrics:
        shifts = model.shifts.detach()
        angles, norms = cosines(shifts).tolist(), (shifts.norm(dim=1) * scaler.scale).tolist()
        return EpochMetrics(
            epoch=epoch,
            losses=mean_losses(terms, config),
            norms=dict(zip(names, norms, strict=True)),
            cosines={f"{a}/{b}": angles[i][j] for i, a in enumerate(names) for j, b in enumerate(names) if i < j},
            train=measure_all(model, watched),
            dev=measure_all(model, watched_dev) if watched_dev else None,
        )

    resumed = load_state(folder, key, model, optimizer) if folder else None
    best, history = resumed or (model.copy(), [metrics(0, _untrained_losses(model, rows, loss, config))])
    pace = Pace()
    with progress_bar("fit", config.epochs, "epochs", shown=progress, done=len(history) - 1) as advance:
        while len(history) <= config.epochs and not _out_of_patience(history, config):
            epoch = len(history)
            batches = rows.batches(config.batch, config.seed, epoch)
            terms = [train_step(model, rows.batch(index), loss, optimizer) for index in batches]
            history.append(metrics(epoch, terms))
            for index, last in enumerate(_best_epochs(history, config).values()):
                if last == epoch:
                    for kept, value in zip(best, model.parameters(), strict=True):
                        kept[index] = value.detach()[index]
            advance(1)
            if folder and pace.due():
                save_state(folder, key, model, optimizer, best, history)
    if folder:
        save_state(folder, key, model, optimizer, best, history)
    chosen = _best_epochs(history, config)
    _warn_of_closed_gates(history, chosen, config)
    if untrained := [repr(name) for name, epoch in chosen.items() if not epoch]:
        log.warning(
            "No epoch was better on dev than the start for %s, which is kept (keep_best): the vector as before "
            "training, its gate half open on everything. More texts help, or another site; without keep_best the last "
            "epoch is kept.",
            " and ".join(untrained),
        )
    final = GatedVectors.of(best, scaler, config.normalize)
    return MatFit(final.columns(names, site), tuple(history), chosen)


def _check(train: Mapping[str, Contrast], dev: Mapping[str, Contrast] | None, config: MatConfig) -> None:
    if not train:
        raise FitError("There is no attribute to fit.")
    widths = {side.shape[1] for c in train.values() for side in (c.positive, c.negative)}
    if len(widths) != 1:
        raise FitError(f"All activations must have one width, got {sorted(widths)}.")
    for name, contrast in train.items():
        if not (len(contrast.positive) and len(contrast.negative)):
            raise FitError(f"Attribute {name!r} needs positive and negative activations.")
        if not (contrast.positive.isfinite().all() and contrast.negative.isfinite().all()):
            raise FitError(f"The activations of attribute {name!r} are not all finite.")
    if dev is not None and set(dev) != set(train):
        raise FitError(f"Train has the attributes {sorted(train)}, dev {sorted(dev)}: they must be the same.")
    if dev is None and config.patience:
        raise FitError("patience needs dev activations, and there are none.")


@torch.no_grad()
def _untrained_losses(model: GatedVectors, rows: TrainingSet, loss: Loss, config: MatConfig) -> list[Tensor]:
    return [loss(model, rows.batch(index)) for index in rows.batches(config.batch, config.seed, epoch=0)]


def _lowest_dev(history: Sequence[EpochMetrics], config: MatConfig) -> dict[str, int]:
    """Attribute -> the epoch with its lowest loss on dev. Where every vector acts on the data of all, one epoch, that
    of the lowest sum: a vector of another epoch is not the one that the others were trained beside."""
    losses = [epoch.dev_losses(config) for epoch in history]
    if config.joint:
        sums = [sum(each.values()) for each in losses]
        return dict.fromkeys(losses[0], sums.index(min(sums)))
    own = {name: [each[name] for each in losses] for name in losses[0]}
    return {name: values.index(min(values)) for name, values in own.items()}


def _best_epochs(history: Sequence[EpochMetrics], config: MatConfig) -> dict[str, int]:
    if config.keep_best and history[0].dev:
        return _lowest_dev(history, config)
    return dict.fromkeys(history[0].train, len(history) - 1)


def _out_of_patience(history: Sequence[EpochMetrics], config: MatConfig) -> bool:
    if config.patience is None:
        return False
    return len(history) - 1 - max(_lowest_dev(history, config).values()) >= config.patience


def _warn_of_closed_gates(history: Sequence[EpochMetrics], chosen: Mapping[str, int], config: MatConfig) -> None:
    for name, epoch in chosen.items():
        if name not in history[epoch].closed:
            continue
        log.warning(
            "The gate of %r is closed: its mean on negatives is %.3f, under %.2f, so steering does next to nothing. %s",
            name,
            history[epoch].train[name].gate_negative,
            CLOSED_GATE,
            advice(config),
        )


def advice(config: MatConfig) -> str:
    """What opens a gate that has closed, beginning with what closes it most often; never what is set already."""
    if config.objective is not Objective.BALANCED:
        return (
            f"Use objective=balanced: under {config.objective} the penalties of open gates outweigh an alignment that "
            "is worth little."
        )
    if config.kernel is Kernel.FIXED:
        return (
            f"Use kernel=median: where activations are farther apart than sigma={config.sigma:g}, the alignment has no "
            "gradient."
        )
    if config.l_sparse > 0 or config.l_pos > 0:
        return (
            f"Lower l_sparse (it is {config.l_sparse:g}), then l_pos ({config.l_pos:g}); if that does not help, the "
            "sides do not differ at this site: take another one."
        )
    return "The sides do not differ at this site: take another layer or site."
