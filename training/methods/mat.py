"""MAT-Steer: gated steering vectors for several attributes, learned together (arXiv 2502.12446).

What goes wrong first: an MMD^2 is at most 2 an attribute, while the penalties of the paper's objective are sums over
the batch, so closing every gate (0.00 on positives and negatives) is its cheapest solution; with a kernel much narrower
than the distances between activations, the MMD has no gradient to object with. The log shows both, a closed gate is
warned about, and the defaults (`Objective.BALANCED`, a kernel as wide as the data, vectors that start at the difference
of the means, each attribute's data steered with its own vector) avoid them.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from steering.types import Column, Site
from training.activations import Contrast
from training.errors import FitError
from training.losses import Terms, terms
from training.methods.mat_config import MatConfig
from training.methods.mat_log import DEAD_GATE, Epoch, cosines_of, inspect, loss_row, mean_losses, norms_of
from training.methods.mat_model import Frame, Model, kernel_widths, own_gates, start, unsteered_mmd
from training.methods.mat_state import fit_key, load_state, save_state
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
    train, dev = _framed(train, frame), dev and _framed({name: dev[name] for name in names}, frame)
    sigmas = kernel_widths(train, frame, config)
    watched = [(part, unsteered_mmd(part, sigmas)) for part in (train, dev) if part]
    unsteered = watched[0][1]

    model = start(train, frame, config)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)

    def summary(epoch: int, losses: dict[str, float]) -> Epoch:
        sides = [inspect(model, part, sigmas, unit, config.joint) for part, unit in watched]
        return Epoch(
            epoch=epoch,
            losses=losses,
            norms=norms_of(model, names, frame),
            cosines=cosines_of(model, names),
            train=sides[0],
            dev=sides[1] if dev else None,
        )

    resumed = load_state(folder, key, model, optimizer) if folder else None
    best, history = resumed or (_copy(model), [summary(0, _untrained(model, train, sigmas, unsteered, config))])
    saved = time.monotonic()
    with progress_bar("fit", config.epochs, "epochs", shown=progress, done=len(history) - 1) as advance:
        while len(history) <= config.epochs and not _stalled(history, config):
            epoch, rows = len(history), []
            for batch in _batches(train, config, epoch):
                optimizer.zero_grad(set_to_none=True)
                loss, parts = step_loss(model, batch, sigmas, unsteered, config)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                rows.append(loss_row(loss, parts))
            history.append(summary(epoch, mean_losses(rows)))
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
    final = Model.of(best, frame.centre, config.normalize)
    return MatFit(final.columns(names, site, frame), tuple(history), chosen)


def step_loss(
    model: Model, batch: tuple[Tensor, Tensor], sigmas: Tensor, unsteered: Tensor, config: MatConfig
) -> tuple[Tensor, Terms]:
    """The weighted loss of one batch (positives, negatives, each [T, B, D]), and its terms."""
    positive, negative = batch
    positive_gates, negative_gates = model.gates(positive), model.gates(negative)
    parts = terms(
        config.objective,
        positive=positive,
        steered=model.steer(negative, negative_gates if config.joint else own_gates(negative_gates)),
        positive_gates=positive_gates,
        negative_gates=negative_gates,
        vectors=model.vectors,
        sigmas=sigmas,
        unsteered_mmd=unsteered,
    )
    penalties = config.l_pos * parts.positive + config.l_sparse * parts.sparse + config.l_ortho * parts.orthogonal
    return parts.mmd + penalties, parts


def _batches(contrasts: Mapping[str, Contrast], config: MatConfig, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The epoch's balanced batches; a smaller side starts over, reshuffled, until the largest was seen once.

    The order comes from the seed and the epoch's number alone, so that a resumed fit sees the same batches.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    sides = [(c.positive, c.negative) for c in contrasts.values()]
    steps = -(-max(len(side) for pair in sides for side in pair) // config.batch)

    def shuffled(rows: Tensor) -> Tensor:
        count, rounds = steps * config.batch, -(-steps * config.batch // len(rows))
        order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(rounds)])[:count]
        return rows[order.to(rows.device)].view(steps, config.batch, -1)

    pairs = [(shuffled(positive), shuffled(negative)) for positive, negative in sides]
    positives, negatives = (torch.stack([pair[side] for pair in pairs], dim=1) for side in (0, 1))
    return zip(positives, negatives, strict=True)


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


@torch.no_grad()
def _untrained(
    model: Model, train: Mapping[str, Contrast], sigmas: Tensor, unsteered: Tensor, config: MatConfig
) -> dict[str, float]:
    batches = _batches(train, config, epoch=0)
    return mean_losses([loss_row(*step_loss(model, batch, sigmas, unsteered, config)) for batch in batches])


def _framed(contrasts: Mapping[str, Contrast], frame: Frame) -> dict[str, Contrast]:
    return {name: frame.apply(contrast) for name, contrast in contrasts.items()}


def _copy(model: Model) -> list[Tensor]:
    return [value.detach().clone() for value in model.parameters()]


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
