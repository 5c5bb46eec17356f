"""Two Gaussian clouds for each attribute, which differ along one of T orthogonal directions.

Within an attribute's data the other attributes are mixed, as they are in real data. `neutral` lies between.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.activations.store import Contrast


@dataclass(frozen=True, eq=False)
class Clouds:
    directions: Tensor  # [T, D], orthonormal
    train: dict[str, Contrast]
    dev: dict[str, Contrast]
    neutral: dict[str, Tensor]


def make_clouds(width: int = 64, norm: float = 10.0, count: int = 200, attributes: int = 3, seed: int = 0) -> Clouds:
    generator = torch.Generator().manual_seed(seed)
    spread = 0.7 * norm / width**0.5
    directions = torch.linalg.qr(torch.randn(width, attributes, generator=generator))[0].T
    middle = torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0) * 0.7 * norm

    def cloud(own: int, side: float, rows: int) -> Tensor:
        signs = 2.0 * torch.randint(0, 2, (rows, attributes), generator=generator) - 1
        signs[:, own] = side
        return middle + spread * torch.randn(rows, width, generator=generator) + 2 * spread * signs @ directions

    def contrasts(rows: int) -> dict[str, Contrast]:
        return {f"a{own}": Contrast(cloud(own, 1, rows), cloud(own, -1, rows)) for own in range(attributes)}

    train, dev = contrasts(count), contrasts(count)
    return Clouds(directions, train, dev, {f"a{own}": cloud(own, 0, count) for own in range(attributes)})
