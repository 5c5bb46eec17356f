"""What docs/scaling.md says of memory is what the engine takes."""

from benchmarks.sizing import ELEMENT_BYTES, PAGE, SHAPES, WRITTEN, Shape, tables
from server.loading import open_runner
from steering.bank import ColumnBank
from tests.server.conftest import tiny_llama


def test_bytes_of_a_token_are_the_engines_own() -> None:
    model = tiny_llama(64)
    config = model.config
    shape = Shape("tiny", 0, config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
    runner = open_runner(model, ColumnBank(device="cpu", max_tokens=8), "tiny")
    assert shape.token_bytes * model.dtype.itemsize == runner.attention.token_bytes * ELEMENT_BYTES


def test_weights_and_cache_share_the_memory() -> None:
    shape = next(one for one in SHAPES if one.name == "Llama 3.1 8B")
    assert shape.token_bytes == 131072
    assert round(shape.weights_gib, 1) == 15.0
    assert shape.cache_tokens(10) == 0, "the weights alone do not fit"
    assert shape.cache_tokens(80, 2) > 2 * shape.cache_tokens(80)


def test_the_page_has_the_tables_that_are_computed() -> None:
    assert f"{WRITTEN[0]}\n{tables()}\n{WRITTEN[1]}" in PAGE.read_text(encoding="utf-8")
