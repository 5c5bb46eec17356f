"""The model and the losses of MAT-Steer (arXiv 2502.12446): units, gated vectors, loss terms.

Shapes: T attributes; of each a batch of B positives followed by B negatives; D wide; K kernels.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import normalize as unit
from torch.nn.functional import pad

from steering.column import Column
from steering.types import Gate, Site
from training.activations.store import Contrast
from training.methods.mat import GateInit, Init, Kernel, MatConfig, Objective
from training.methods.probe import fit_logistic

MOST_ROWS = 512  # of a side, for a median distance or a log
_BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the multi kernel, times the median distance


@dataclass(frozen=True, eq=False)
class Scaler:
    """The units of the training: activations divided by `scale`, less an `origin` [D] amid them. Each attribute's
    vector and gate are in units of its own data, `ratios` [T, 1] times these, and its gate sees activations less its
    own `centres` [T, D]: whatever the others' data look like, its parameters start and move alike."""

    scale: float
    origin: Tensor
    centres: Tensor
    ratios: Tensor

    @classmethod
    def of(cls, contrasts: Mapping[str, Contrast], standardize: bool, device: str | torch.device = "cpu") -> Self:
        """Without `standardize`, the scale is 1 and gates see the activations as they are."""
        pairs = [(contrast.positive.float(), contrast.negative.float()) for contrast in contrasts.values()]
        middles = torch.stack([(positive.mean(0) + negative.mean(0)) / 2 for positive, negative in pairs])
        origin = middles.mean(0)
        if not standardize:
            ones = torch.ones(len(pairs), 1, device=device)
            return cls(1.0, origin.to(device), torch.zeros_like(middles, device=device), ones)
        squares = [
            torch.stack([(side - middle).square().mean() for side in pair]).mean()
            for middle, pair in zip(middles, pairs, strict=True)
        ]
        spreads = torch.stack(squares).sqrt().clamp_min(1e-12)
        scale = float(spreads.median())
        return cls(
            scale, (origin / scale).to(device), (middles / scale).to(device), spreads[:, None].to(device) / scale
        )

    @cached_property
    def offsets(self) -> Tensor:
        """What gates see of the origin, [T, D]."""
        return self.origin - self.centres

    def apply(self, contrasts: Mapping[str, Contrast]) -> dict[str, Contrast]:
        """Activations in these units, less the origin, on its device."""

        def scaled(side: Tensor) -> Tensor:
            return side.float().to(self.origin.device) / self.scale - self.origin

        return {name: Contrast(scaled(c.positive), scaled(c.negative)) for name, c in contrasts.items()}


@dataclass(frozen=True, eq=False)
class Batch:
    """N rows of each of A attributes (A = T and N = 2B in a training step), less the origin."""

    rows: Tensor
    """[A, N, D]"""
    squares: Tensor
    """[A, N, 2], squared norms of the rows without and with the origin."""
    gram: Tensor
    """[A, N, M], inner products of the rows with the last M of them; M = N in a training step."""

    @classmethod
    def of(cls, rows: Tensor, origin: Tensor, last: int) -> Self:
        return cls(rows, squared_norms(rows, origin), rows @ rows[:, -last:].mT)


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """All rows of all attributes, less the origin."""

    rows: Tensor
    """[R, D]"""
    squares: Tensor
    """[R, 2], as in a batch."""
    sides: Mapping[str, tuple[range, range]]
    """Attribute -> where its positives and its negatives are among the rows."""

    @classmethod
    def of(cls, contrasts: Mapping[str, Contrast], origin: Tensor) -> Self:
        """`contrasts` as `Scaler.apply` gives them."""
        sides, end = {}, 0
        for name, contrast in contrasts.items():
            middle = end + len(contrast.positive)
            sides[name] = range(end, middle), range(middle, middle + len(contrast.negative))
            end = sides[name][1].stop
        rows = torch.cat([side for contrast in contrasts.values() for side in (contrast.positive, contrast.negative)])
        return cls(rows, squared_norms(rows, origin), sides)

    def batch(self, index: Tensor) -> Batch:
        """The rows of `index` [T, 2B]."""
        flat = index.flatten()
        rows, squares = (part.index_select(0, flat).view(*index.shape, -1) for part in (self.rows, self.squares))
        return Batch(rows, squares, rows @ rows.mT)

    def batches(self, size: int, seed: int, epoch: int) -> Iterator[Tensor]:
        """The epoch's batches as indices [T, 2 * size], positives first: balanced, and a smaller side starts over,
        reshuffled, until the largest was seen once. The order comes from the seed and the epoch's number alone, so that
        a resumed fit sees the same batches."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        steps = -(-max(len(side) for sides in self.sides.values() for side in sides) // size)

        def shuffled(side: range) -> Tensor:
            rounds = -(-steps * size // len(side))
            order = torch.cat([torch.randperm(len(side), generator=generator) for _ in range(rounds)])
            return side.start + order[: steps * size].view(steps, size)

        pairs = [torch.cat([shuffled(positive), shuffled(negative)], 1) for positive, negative in self.sides.values()]
        return iter(torch.stack(pairs, 1).to(self.rows.device))


def squared_norms(rows: Tensor, origin: Tensor) -> Tensor:
    """Of rows [.., D] that are seen from the origin [D], and of the rows with it: [.., 2]."""
    own = rows.square().sum(-1)
    return torch.stack([own, own + 2 * rows @ origin + origin @ origin], -1)


# The model: T gated vectors.


@dataclass(frozen=True, eq=False)
class GatedVectors:
    """The trained parameters, in the attributes' own units: vectors [T, D], gate weights [T, D], gate biases [T]."""

    vectors: Tensor
    weights: Tensor
    biases: Tensor
    scaler: Scaler
    normalize: bool

    @classmethod
    def of(cls, parameters: Sequence[Tensor], scaler: Scaler, normalize: bool) -> Self:
        vectors, weights, biases = parameters
        return cls(vectors, weights, biases, scaler, normalize)

    @classmethod
    def start(cls, contrasts: Mapping[str, Contrast], scaler: Scaler, config: MatConfig) -> Self:
        """The model before the first step; random parts come from the seed alone. Contrasts are in the units."""
        generator = torch.Generator().manual_seed(config.seed)
        vectors, weights, biases = [], [], []
        for contrast, offset, ratio in zip(contrasts.values(), scaler.offsets, scaler.ratios, strict=True):
            difference = (contrast.positive.mean(0) - contrast.negative.mean(0)) / ratio
            noise = torch.randn(difference.shape, generator=generator).to(difference.device)
            if config.init is Init.DIFFERENCE:
                vectors.append(difference)
            elif config.init is Init.NORMAL:
                vectors.append(noise)
            else:
                vectors.append(noise / noise.norm() * difference.norm())
            weight, bias = torch.zeros_like(difference), torch.zeros((), device=difference.device)
            if config.gate_init is GateInit.PROBE:
                rows = (torch.cat([contrast.positive, contrast.negative]) + offset) / ratio
                targets = torch.ones(len(rows), device=rows.device)
                targets[: len(contrast.positive)] = 0
                weight, bias = fit_logistic(rows, targets, penalty=max(1.0, 0.1 * len(rows)))
            weights.append(weight)
            biases.append(bias)
        parts = [torch.stack(part).float().requires_grad_() for part in (vectors, weights, biases)]
        return cls.of(parts, scaler, config.normalize)

    def parameters(self) -> list[Tensor]:
        return [self.vectors, self.weights, self.biases]

    def copy(self) -> list[Tensor]:
        return [value.detach().clone() for value in self.parameters()]

    @property
    def shifts(self) -> Tensor:
        """The vectors in the scaler's units, [T, D]."""
        return self.vectors * self.scaler.ratios

    @property
    def slopes(self) -> Tensor:
        """The gates' weights for activations in the scaler's units, [T, D]."""
        return self.weights / self.scaler.ratios

    def columns(self, names: Sequence[str], site: Site) -> tuple[Column, ...]:
        """The same function of activations in their own units."""
        weights = (self.slopes / self.scaler.scale).detach().cpu()
        biases = (self.biases - (self.slopes * self.scaler.centres).sum(1)).detach().cpu()
        vectors = (self.shifts * self.scaler.scale).detach().cpu()
        return tuple(
            Column(
                attribute=name,
                site=site,
                gate=Gate.SIGMOID,
                vector=vectors[index].clone(),
                gate_weight=weights[index].clone(),
                gate_bias=float(biases[index]),
                keep_norm=self.normalize,
            )
            for index, name in enumerate(names)
        )


def steered_distances(model: GatedVectors, batch: Batch, acting: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gates [A, N, T] of every row, squared distances [A, N, M] between all steered rows and the last M, and the inner
    products [T, T] of the vectors.

    `acting` [A, N, T] is 1 where a gate acts on a row, else 0. With gates g [T] and vectors V [T, D], steering makes
    s (n + g V) of a row n, where s keeps its norm. Seen from the origin o, n = o + d, that is s d + c [V; o] with
    coefficients c = [s g, s - 1]. So all distances follow from inner products of d with d, V and o: no steered row,
    which is as wide as the activations, has to be formed. It is what makes a step several times as fast.
    """
    slopes = model.slopes
    basis = torch.cat([model.shifts, model.scaler.origin[None]])
    rows = batch.rows.flatten(0, 1)
    along, among = (rows @ basis.t()).view(*acting.shape[:2], -1), basis @ basis.t()
    biases = model.biases + (slopes * model.scaler.offsets).sum(1)
    gates = torch.addmm(biases, rows, slopes.t()).sigmoid().view(acting.shape)

    moving = pad(gates * acting, (0, 1), value=1.0)  # n + g V is d + these x basis
    moved = along + moving @ among  # its inner products with the basis
    own, with_origin = batch.squares.unbind(-1)
    if model.normalize:
        squares = own + (moving * (along + moved)).sum(-1)
        scale = (with_origin / squares.clamp_min(1e-24)).sqrt()[..., None]
    else:
        scale = torch.ones_like(acting[..., :1])
    coefficients = torch.cat([scale * moving[..., :-1], scale - 1], -1)
    along, reach = scale * along, scale * moved - among[-1]

    last = batch.gram.shape[2]
    scaled = batch.gram * (scale @ scale[:, -last:].mT)
    left, right = torch.cat([coefficients, along], -1), torch.cat([reach, coefficients], -1)
    inner = torch.baddbmm(scaled, left, right[:, -last:].mT)
    if last == inner.shape[1]:
        norms = inner.diagonal(dim1=1, dim2=2)
    else:
        norms = own * scale[..., 0].square() + (coefficients * (along + reach)).sum(-1)
    return gates, squared_distances(inner, norms, norms[:, -last:]), among[:-1, :-1]


# The losses.


def squared_distances(inner: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """[A, N, M] from the inner products [A, N, M] and the squared norms of both sides, [A, N] and [A, M].

    Rounding may leave a little less than 0, which a kernel does not mind.
    """
    return torch.add(rows[:, :, None] + columns[:, None, :], inner, alpha=-2)


def gaussian(squares: Tensor, rates: Tensor) -> Tensor:
    """Kernel values exp(rate x) of squared distances x [A, N, M], for each of `rates` [A, K]: [A, K, N, M]."""
    return torch.exp(squares[:, None] * rates[..., None, None])


def kernel_rates(sigmas: Tensor) -> Tensor:
    """The rates of Gaussian kernels exp(-x / (2 sigma^2)), of the same shape as `sigmas`."""
    return -0.5 / sigmas.square()


def mmd2(x: Tensor, y: Tensor, sigmas: Tensor) -> Tensor:
    """Biased squared maximum mean discrepancy of x [A, N, D] and y [A, M, D] with kernels `sigmas` [A, K]: [A]."""
    count, rows = x.shape[1], torch.cat([x, y], 1)
    rows = rows - rows.mean(1, keepdim=True)  # near the origin, an expanded square loses no digits
    inner = rows @ rows.mT
    norms = inner.diagonal(dim1=1, dim2=2)
    kernel = gaussian(squared_distances(inner, norms, norms), kernel_rates(sigmas)).mean(1)
    within, across = kernel[:, :count, :count].mean((1, 2)), kernel[:, :count, count:].mean((1, 2))
    return within + kernel[:, count:, count:].mean((1, 2)) - 2 * across


def bandwidths(kernel: Kernel, positive: Tensor, negative: Tensor, sigma: float = 2.0) -> Tensor:
    """The sigmas [K] for one attribute's activations [P, D] and [N, D]."""
    if kernel is Kernel.FIXED:
        return torch.tensor([sigma])
    thinned = [rows[:: max(1, len(rows) // MOST_ROWS)][:MOST_ROWS] for rows in (positive, negative)]
    median = median_distance(torch.cat(thinned)).to("cpu")
    return median[None] if kernel is Kernel.MEDIAN else median * torch.tensor(_BANDWIDTHS)


def all_bandwidths(contrasts: Mapping[str, Contrast], scaler: Scaler, config: MatConfig) -> Tensor:
    """Sigmas [T, K] in the scaler's units."""
    fixed = config.sigma / scaler.scale
    rows = [bandwidths(config.kernel, c.positive, c.negative, fixed) for c in contrasts.values()]
    return torch.stack(rows).to(scaler.origin.device)


def median_distance(rows: Tensor) -> Tensor:
    """The median distance between two different rows of [N, D]; 1 where all rows are equal. A scalar."""
    distances = torch.pdist(rows)
    distances = distances[distances > 0]
    return distances.median() if len(distances) else torch.ones(())


def cosines(vectors: Tensor) -> Tensor:
    """Cosines [T, T] between vectors [T, D]; 0 with a zero vector."""
    units = unit(vectors, dim=-1)
    return units @ units.mT


def orthogonality(products: Tensor) -> Tensor:
    """L_ortho, the squared cosines summed over pairs, from the inner products [T, T] of the vectors: a scalar. A zero
    vector has cosine 0."""
    inverse = products.diagonal().clamp_min(1e-24).rsqrt()
    return (products * inverse * inverse[:, None]).triu(1).square().sum()


@dataclass(frozen=True, eq=False)
class Loss:
    """What is minimised: each term is a sum of its parts times the factors that the objective gives them."""

    acting: Tensor
    """[T, 2B, T], 1 where a gate acts."""
    rates: Tensor
    """[T, K], of the kernels."""
    pairs: Tensor
    """[T, K, 2B, 2B], of each pair's kernels in the alignment loss."""
    positive: Tensor
    """[T, 2B, T], of the squares of the gates in L_pos: data of attribute i under gate j; 0 on negatives."""
    sparse: Tensor
    """[T, 2B, T], of the gates themselves in L_sparse; 0 on positives."""
    weights: Tensor
    """[4], of the terms."""

    @classmethod
    def of(cls, config: MatConfig, sigmas: Tensor, unsteered: Tensor) -> Self:
        """`sigmas` [T, K] of the kernels; `unsteered` [T]: the MMD^2 of each attribute without steering, which is the
        unit of `Objective.BALANCED`."""
        count, size = len(unsteered), config.batch
        one, own, side = torch.ones_like(unsteered), torch.eye(count).to(unsteered), torch.ones(size).to(unsteered)
        alignment, penalty = {
            Objective.PAPER: (one, own),
            Objective.REFERENCE: (one / count, torch.ones_like(own) / (count * count * size)),
            Objective.BALANCED: (1 / unsteered, own / size),
        }[config.objective]
        signs = torch.cat([side, -side]) / size
        gates = torch.ones_like(own) if config.joint else own
        pairs = alignment[:, None, None, None] * torch.outer(signs, signs) / sigmas.shape[1]
        on = penalty[:, None].expand(-1, size, -1)
        off = torch.zeros_like(on)
        return cls(
            acting=(signs < 0).to(unsteered)[:, None] * gates[:, None],
            rates=kernel_rates(sigmas),
            pairs=pairs.expand(-1, sigmas.shape[1], -1, -1).contiguous(),
            positive=torch.cat([on, off], 1),
            sparse=torch.cat([off, on], 1),
            weights=unsteered.new_tensor([1.0, config.l_pos, config.l_sparse, config.l_ortho]),
        )

    def __call__(self, model: GatedVectors, batch: Batch) -> Tensor:
        """[4], not weighted: alignment (MMD^2), positive preservation, sparsity, orthogonality."""
        gates, distances, products = steered_distances(model, batch, self.acting)
        alignment = torch.dot(gaussian(distances, self.rates).flatten(), self.pairs.flatten())
        positive = torch.dot(gates.square().flatten(), self.positive.flatten())
        sparse = torch.dot(gates.flatten(), self.sparse.flatten())
        return torch.stack([alignment, positive, sparse, orthogonality(products)])
