"""Tables of cosines and sines say what is computed for each position, and what is no function of positions is left."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from server.layers.rotary_table import FIXED, LONGEST, SHORTEST, RotaryTable, tabulate_rotary
from tests.server.test_architectures import tiny

KINDS = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 3.0},
    "longrope": {"factor": 3.0, "long_factor": [2.0] * 4, "short_factor": [1.0] * 4},
    "llama3": {
        "factor": 3.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def embedding(kind: str) -> LlamaRotaryEmbedding:
    rope = {"rope_type": kind, "rope_theta": 1e4, **KINDS[kind]}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
    return LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=rope))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", sorted(FIXED))
def test_a_table_says_what_is_computed(kind: str, dtype: torch.dtype) -> None:
    holder, own, x = torch.nn.Sequential(embedding(kind)), embedding(kind), torch.zeros(1, 1, 32, dtype=dtype)
    assert tabulate_rotary(holder) == 1
    assert tabulate_rotary(holder) == 0, "again, and nothing changes"
    for positions in ([0], [5, 5, 2], [SHORTEST - 1], [SHORTEST], [5000, 1], [LONGEST - 1], [LONGEST, 2], []):
        places = torch.tensor([positions], dtype=torch.int64)
        for found, expected in zip(holder[0](x, position_ids=places), own(x, places), strict=True):
            assert found.shape == expected.shape
            assert found.dtype == dtype
            assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_a_position_has_the_same_bits_beside_any_others() -> None:
    table = RotaryTable(embedding("default"))
    alone, _ = table(torch.zeros(1), torch.tensor([[77]]))
    for others in ([77, 3], list(range(200))):
        found, _ = table(torch.zeros(1), torch.tensor([others]))
        assert torch.equal(found[0, others.index(77)], alone[0, 0])


def test_a_table_has_an_end() -> None:
    table = RotaryTable(embedding("default"))
    table(torch.zeros(1), torch.tensor([[10 * LONGEST]]))
    assert not table._tables
    table(torch.zeros(1), torch.tensor([[LONGEST - 1]]))
    assert [len(cos) for cos, _ in table._tables.values()] == [LONGEST]


def test_what_models_read_of_their_own_is_there() -> None:
    own = embedding("llama3")
    table = RotaryTable(own)
    assert table.config is own.config
    assert table.rope_type == "llama3"
    assert table.inv_freq is own.inv_freq
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = table.nothing_like_this


def test_several_texts_are_computed() -> None:
    places = torch.tensor([[1, 2], [3, 4]])
    own = embedding("default")
    for found, expected in zip(RotaryTable(own)(torch.zeros(1), places), own(torch.zeros(1), places), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - FIXED))
def test_angles_that_change_with_the_length_are_left_alone(kind: str) -> None:
    holder = torch.nn.Sequential(embedding(kind))
    assert tabulate_rotary(holder) == 0
    assert isinstance(holder[0], LlamaRotaryEmbedding)


class Complex(LlamaRotaryEmbedding):
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return torch.complex(*super().forward(x, position_ids))


class Shifting(LlamaRotaryEmbedding):
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(x, position_ids - position_ids.max())


@pytest.mark.parametrize("kind", [Complex, Shifting])
def test_what_makes_something_else_is_left_alone(kind: type) -> None:
    holder = torch.nn.Sequential(embedding("default"))
    holder[0].__class__ = type(f"{kind.__name__}RotaryEmbedding", (kind,), {})
    assert tabulate_rotary(holder) == 0


def test_models_with_kinds_of_layers_have_a_table_for_each() -> None:
    model = tiny("gemma3")
    assert tabulate_rotary(model) == 1
    with torch.no_grad():
        model(torch.arange(9)[None])
    kinds = {more for _, more, _ in model.model.rotary_emb._tables}
    assert {("full_attention",), ("sliding_attention",)} <= kinds
