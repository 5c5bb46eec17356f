"""What decides activations, as hashes: equal hashes mean that the work was done before."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import torch

from training.activations.tokens import Encoded
from training.data.samples import Sample

# What saving a model changes, and what its weights say better.
_INCIDENTAL = ("_name_or_path", "architectures", "dtype", "transformers_version")
_THREADS = 4


def model_hash(model: Any) -> str:
    """Of the configuration and of every weight, with its name, shape and dtype; where the model came from does not
    matter."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _INCIDENTAL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    with ThreadPoolExecutor(_THREADS) as threads:
        for weight in threads.map(_weight_hash, *zip(*model.named_parameters(), strict=True)):
            digest.update(weight)
    return digest.hexdigest()


def texts_hash(encoded: Sequence[Encoded]) -> str:
    """Of the tokens and of where the answers are in them."""
    digest = hashlib.sha256()
    for row in encoded:
        digest.update(f"{row.start} {row.end} {row.ids}\n".encode())
    return digest.hexdigest()


def samples_hash(samples: Sequence[Sample]) -> str:
    """Of all that is known of the samples, labels and splits included."""
    return hashlib.sha256(json.dumps([asdict(sample) for sample in samples]).encode()).hexdigest()


def _weight_hash(name: str, weight: torch.Tensor) -> bytes:
    digest = hashlib.sha256(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
    digest.update(weight.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.digest()
