"""MAT-Steer: gated steering vectors for several attributes, learned together (arXiv 2502.12446).

What goes wrong first: an MMD^2 is at most 2 an attribute, while the penalties of the paper's objective are sums over
the batch, so closing every gate (0.00 on positives and negatives) is its cheapest solution; with a kernel much narrower
than the distances between activations, the MMD has no gradient to object with. The log shows both, a closed gate is
warned about, and the defaults (`Objective.BALANCED`, a kernel as wide as the data, vectors that start at the difference
of the means, each attribute's data steered with its own vector) avoid them.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from steering.types import Column, Site
from training.activations.store import Contrast
from training.errors import FitError
from training.methods.mat_config import MatConfig
from training.methods.mat_criterion import Criterion
from training.methods.mat_data import Frame, Rows, Table
from training.methods.mat_log import DEAD_GATE, Epoch, cosines_of, mean_losses, norms_of
from training.methods.mat_model import Model, kernel_widths, start
from training.methods.mat_state import fit_key, load_state, save_state
from training.methods.mat_watch import inspect, watch
from training.progress import progress_bar

log = logging.getLogger(__name__)

_SAVE_SECONDS = 2.0


@dataclass(frozen=True, eq=False)
class MatFit:
    columns: tuple[Column, ...]
    history: tuple[Epoch, ...]
    """One entry an epoch; entry 0 is the state before the first step."""
    chosen: int
    """The epoch that the columns come from."""


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
    frame = Frame.of(train, config.standardize, device)
    table = Table.of(train, frame)
    train = table.contrasts()
    sigmas = kernel_widths(train, frame, config)
    watched = watch(train, frame, sigmas, config.joint)
    watched_dev = dev and watch(_framed({name: dev[name] for name in names}, frame), frame, sigmas, config.joint)
    criterion = Criterion.of(config, sigmas, torch.stack([one.unsteered for one in watched.values()]))

    model = start(train, frame, config)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)

    def summary(epoch: int, terms: list[Tensor]) -> Epoch:
        return Epoch(
            epoch=epoch,
            losses=mean_losses(terms, config),
            norms=norms_of(model, names),
            cosines=cosines_of(model, names),
            train=inspect(model, watched),
            dev=inspect(model, watched_dev) if watched_dev else None,
        )

    resumed = load_state(folder, key, model, optimizer) if folder else None
    best, history = resumed or (_copy(model), [summary(0, _untrained(model, table, criterion))])
    saved = time.monotonic()
    with progress_bar("fit", config.epochs, "epochs", shown=progress, done=len(history) - 1) as advance:
        while len(history) <= config.epochs and not _stalled(history, config):
            epoch, terms = len(history), []
            for batch in table.batches(config.batch, config.seed, epoch):
                terms.append(step(model, table.rows(batch), criterion, optimizer))
            history.append(summary(epoch, terms))
            if _best(history, config) == epoch:
                best = _copy(model)
            advance(1)
            if folder and time.monotonic() - saved >= _SAVE_SECONDS:
                save_state(folder, key, model, optimizer, best, history)
                saved = time.monotonic()
    if folder:
        save_state(folder, key, model, optimizer, best, history)
    chosen = _best(history, config)
    _warn(history[chosen])
    final = Model.of(best, frame, config.normalize)
    return MatFit(final.columns(names, site), tuple(history), chosen)


@torch.inference_mode()
def step(model: Model, rows: Rows, criterion: Criterion, optimizer: torch.optim.Optimizer) -> Tensor:
    """One step on one batch; the terms [4] of its loss before it."""
    losses = criterion(model, rows)
    for parameter, gradient in zip(model.parameters(), losses.gradient, strict=True):
        parameter.grad = gradient
    optimizer.step()
    return losses.terms


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
    if dev is None and (config.keep_best or config.patience):
        raise FitError("keep_best and patience need dev activations, and there are none.")


def _untrained(model: Model, table: Table, criterion: Criterion) -> list[Tensor]:
    batches = table.batches(criterion.config.batch, criterion.config.seed, epoch=0)
    return [criterion(model, table.rows(batch)).terms for batch in batches]


def _framed(contrasts: Mapping[str, Contrast], frame: Frame) -> dict[str, Contrast]:
    return {name: Contrast(frame.apply(c.positive), frame.apply(c.negative)) for name, c in contrasts.items()}


def _copy(model: Model) -> list[Tensor]:
    return [value.clone() for value in model.parameters()]


def _best(history: list[Epoch], config: MatConfig) -> int:
    if not config.keep_best:
        return len(history) - 1
    return min(range(len(history)), key=lambda i: history[i].dev_mmd or 0.0)


def _stalled(history: list[Epoch], config: MatConfig) -> bool:
    if config.patience is None:
        return False
    best = min(range(len(history)), key=lambda i: history[i].dev_mmd or 0.0)
    return len(history) - 1 - best >= config.patience


def _warn(epoch: Epoch) -> None:
    for name in epoch.dead:
        log.warning(
            "The gate of %r is closed: its mean on negatives is %.3f, under %.2f, so steering does next to nothing. "
            "Lower l_sparse or l_pos, or use objective=balanced.",
            name,
            epoch.train[name].gate_negative,
            DEAD_GATE,
        )
