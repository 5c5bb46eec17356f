import pytest
import torch
from torch import nn

from steering import (
    UNSTEERED,
    ColumnBank,
    Gate,
    HookError,
    SequenceSteering,
    Site,
    SiteKind,
    Steering,
    UnsupportedArchitecture,
    steer,
    trace,
)
from steering.operators import Trace
from tests.steering.families import HIDDEN, LAYERS, VOCABULARY, column, hooks, tiny

MIDDLE = Site(1, SiteKind.ATTN_OUTPUT)
EVERYWHERE = [Site(layer, kind) for layer in range(LAYERS) for kind in SiteKind]
TOKENS = torch.randint(3, VOCABULARY, (3, 4), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def model():
    model = tiny("llama")
    before = hooks(model)
    yield model
    assert hooks(model) == before, "a hook was left behind"


def bank_for(*sites: Site, tokens: int = 12) -> tuple[ColumnBank, SequenceSteering]:
    """A bank with one column at each site, and a row that uses them all."""
    bank = ColumnBank(device="cpu", max_tokens=tokens, spare=1)
    handle = bank.add([column(site, seed=i, scale=2.0) for i, site in enumerate(sites)])
    return bank, SequenceSteering.of([(handle, [1.0] * len(sites))])


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens).logits


def each_token(*rows: int) -> list[int]:
    """The row of every token of TOKENS."""
    return [row for row in rows for _ in range(TOKENS.shape[1])]


def test_hooks_are_removed_after_the_block(model):
    before = hooks(model)
    with Steering(model, bank_for(*EVERYWHERE)[0]):
        assert hooks(model) == before + len(EVERYWHERE)
    assert hooks(model) == before


def test_hooks_are_removed_after_an_exception(model):
    before = hooks(model)
    with pytest.raises(KeyboardInterrupt), Steering(model, bank_for(*EVERYWHERE)[0]):
        raise KeyboardInterrupt
    assert hooks(model) == before


def test_nested_blocks_remove_their_own_hooks_only(model):
    before = hooks(model)
    with Steering(model, bank_for(MIDDLE)[0]):
        with pytest.raises(RuntimeError), Steering(model, bank_for(MIDDLE)[0]):
            raise RuntimeError
        assert hooks(model) == before + 1
    assert hooks(model) == before


def test_installing_and_removing_twice_is_the_same_as_once(model):
    before = hooks(model)
    steering = Steering(model, bank_for(MIDDLE)[0])
    assert steering.install() is steering.install()
    assert hooks(model) == before + 1
    steering.remove()
    steering.remove()
    assert hooks(model) == before
    assert steering.bank.listeners == []


def test_a_model_is_what_it_was_after_the_block(model):
    before = logits(model)
    bank, row = bank_for(*EVERYWHERE)
    with Steering(model, bank):
        bank.fill([row], each_token(0, 0, 0))
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)


def test_a_site_that_the_model_lacks_leaves_no_hook(model):
    bank, _ = bank_for(MIDDLE, Site(99, SiteKind.RESIDUAL))
    with pytest.raises(UnsupportedArchitecture, match="layer 99"):
        Steering(model, bank).install()
    assert bank.listeners == []


def test_columns_of_the_wrong_width_are_refused(model):
    bank = ColumnBank(device="cpu", max_tokens=4)
    bank.add([column(MIDDLE, HIDDEN + 1)])
    with pytest.raises(HookError, match=r"site 1\.attn_output of LlamaForCausalLM has width 32, its columns have 33"):
        Steering(model, bank).install()


def test_installed_hooks_follow_the_bank(model):
    before, plain = hooks(model), logits(model)
    bank = ColumnBank(device="cpu", max_tokens=12)
    with Steering(model, bank):
        assert hooks(model) == before
        handle = bank.add([column(MIDDLE, scale=2.0)])
        assert hooks(model) == before + 1
        bank.fill([SequenceSteering.of([(handle, [1.0])])], each_token(0, 0, 0))
        assert not torch.equal(logits(model), plain)
        bank.remove(handle)
        assert hooks(model) == before
        assert torch.equal(logits(model), plain)


def test_columns_that_the_model_has_no_site_for_do_not_stay_in_an_installed_bank(model):
    bank, _ = bank_for(MIDDLE)
    with Steering(model, bank):
        with pytest.raises(UnsupportedArchitecture):
            bank.add([column(Site(99, SiteKind.RESIDUAL))])
        assert bank.sites == (MIDDLE,)
        bank.check()
        bank.add([column(Site(0, SiteKind.RESIDUAL))])


def test_rows_of_one_batch_are_steered_each_its_own_way(model):
    bank = ColumnBank(device="cpu", max_tokens=12)
    first, second = bank.add([column(MIDDLE, seed=1, scale=2.0)]), bank.add([column(MIDDLE, seed=2, scale=2.0)])
    rows = [SequenceSteering.of([(first, [1.5])]), UNSTEERED, SequenceSteering.of([(first, [-1.0]), (second, [2.0])])]
    plain = logits(model)
    with Steering(model, bank):
        bank.fill(rows, each_token(0, 1, 2))
        mixed = logits(model)
        for i, row in enumerate(rows):
            bank.fill([row], each_token(0, 0, 0))
            torch.testing.assert_close(mixed[i], logits(model)[i], atol=1e-5, rtol=1e-5)
    assert torch.equal(mixed[1], plain[1])
    assert not torch.equal(mixed[0], plain[0])


def test_an_unsteered_row_is_bit_identical_beside_steered_ones_at_every_site(model):
    plain = logits(model)
    bank, row = bank_for(*EVERYWHERE)
    with Steering(model, bank):
        bank.fill([row, UNSTEERED], each_token(0, 1, 0))
        mixed = logits(model)
    assert torch.equal(mixed[1], plain[1])


def test_only_the_listed_tokens_are_steered(model):
    plain = logits(model)
    bank, row = bank_for(Site(LAYERS - 1, SiteKind.RESIDUAL))
    with Steering(model, bank):
        bank.fill([row], [-1, 0, -1, -1] * 3)
        moved = logits(model)
    assert torch.equal(moved[:, [0, 2, 3]], plain[:, [0, 2, 3]])
    assert not torch.equal(moved[:, 1], plain[:, 1])


def test_the_hook_does_what_the_operator_says(model):
    bank, row = bank_for(MIDDLE)
    module, seen = model.model.layers[1].self_attn, []
    watch = module.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    try:
        logits(model)
        with Steering(model, bank):
            bank.fill([row], each_token(0, 0, 0))
            logits(model)
    finally:
        watch.remove()
    at = bank.at(MIDDLE)
    flat = seen[0].reshape(-1, HIDDEN)
    expected = steer(flat, at.vectors, at.weights, at.biases, at.kinds, at.keep_norm, at.multipliers)
    assert torch.allclose(seen[1].reshape(-1, HIDDEN), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_stays_in_its_dtype(dtype):
    block = Toy().to(dtype)
    bank = ColumnBank(device="cpu", max_tokens=4)
    handle = bank.add([column(Site(0, SiteKind.RESIDUAL), 4)])
    with Steering(block, bank):
        bank.fill([SequenceSteering.of([(handle, [1.0])])] * 2)
        assert block(torch.ones(2, 4, dtype=dtype)).dtype == dtype


class Config:
    hidden_size = 4


class Layer(nn.Module):
    """A block that returns more than activations, as blocks of mixtures of experts once did."""

    def __init__(self, keywords: bool):
        super().__init__()
        self.self_attn = nn.Module()
        self.self_attn.o_proj = nn.Linear(4, 4, bias=False)
        self.keywords = keywords

    def forward(self, x):
        projection = self.self_attn.o_proj
        return (projection(input=x) if self.keywords else projection(x)), "router logits"


class Toy(nn.Module):
    def __init__(self, keywords: bool = False):
        super().__init__()
        self.config = Config()
        self.h = nn.ModuleList([Layer(keywords)])

    def forward(self, x):
        x, rest = self.h[0](x)
        assert rest == "router logits"
        return x


@torch.no_grad()
def test_tuples_keep_their_other_elements_and_keyword_inputs_are_steered():
    x = torch.ones(2, 4)
    for site in (Site(0, SiteKind.RESIDUAL), Site(0, SiteKind.ATTN_HEADS)):
        for toy in (Toy(), Toy(keywords=True)):
            bank = ColumnBank(device="cpu", max_tokens=4)
            row = SequenceSteering.of([(bank.add([column(site, 4)]), [1.0])])
            with Steering(toy, bank):
                plain = toy(x)
                bank.fill([UNSTEERED, row])
                moved = toy(x)
            assert torch.equal(moved[0], plain[0])
            assert not torch.equal(moved[1], plain[1])


def test_a_token_counts_once_however_many_sites_and_columns_act_on_it(model):
    bank = ColumnBank(device="cpu", max_tokens=12)
    handle = bank.add([column(site, seed=i) for i, site in enumerate([*EVERYWHERE, MIDDLE, MIDDLE])])
    everything = SequenceSteering.of([(handle, [1.0] * len(handle))])
    late = SequenceSteering.of([(handle, [0.0] * 9 + [0.5] + [0.0] * 4)])
    with Steering(model, bank) as steering:
        bank.fill([everything, UNSTEERED, late], [0, 0, -1, -1] + [1] * 4 + [2] * 4)
        logits(model)
        assert steering.steered_tokens.tolist() == [1, 1, 0, 0] + [0] * 4 + [1] * 4
        logits(model)
        assert bank.take_counts().tolist() == [2, 2, 0, 0] + [0] * 4 + [2] * 4
        assert steering.steered_tokens.sum() == 0


def test_without_hooks_nothing_is_counted(model):
    bank, row = bank_for(MIDDLE)
    bank.fill([row], each_token(0, 0, 0))
    logits(model)
    assert bank.take_counts().sum() == 0


def test_a_forward_larger_than_the_bank_is_refused(model):
    bank, _ = bank_for(MIDDLE, tokens=11)
    with Steering(model, bank), pytest.raises(HookError, match="12 tokens met a bank for 11"):
        logits(model)


def test_a_forward_smaller_than_the_batch_is_refused(model):
    bank, row = bank_for(MIDDLE)
    bank.fill([row], each_token(0, 0, 0))
    with Steering(model, bank), pytest.raises(HookError, match="4 tokens met multipliers for 12"):
        logits(model, TOKENS[:1])


def test_a_bank_that_grows_between_steps_steers_on(model):
    bank, row = bank_for(MIDDLE, tokens=4)
    with Steering(model, bank):
        bank.reserve(12)
        bank.fill([row], each_token(0, 0, 0))
        before = logits(model)
        bank.add([column(MIDDLE, seed=i) for i in range(10)])
        torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)


def test_steering_works_in_inference_mode_and_with_gradients(model):
    bank, row = bank_for(*EVERYWHERE)
    with Steering(model, bank):
        bank.fill([row], each_token(0, 0, 0))
        with torch.inference_mode():
            inside = model(TOKENS).logits
        outside = model(TOKENS).logits
    assert outside.requires_grad
    assert torch.allclose(inside, outside, rtol=1e-4, atol=1e-5)


def test_the_hook_never_looks_at_a_value_on_the_device():
    toy = Toy().to("meta")
    site = Site(0, SiteKind.RESIDUAL)
    bank = ColumnBank(device="meta", max_tokens=4)
    row = SequenceSteering.of(
        [(bank.add([column(site, 4, gate=gate, seed=i) for i, gate in enumerate(Gate)]), [1.0] * len(Gate))]
    )
    with Steering(toy, bank, traced=True):
        bank.fill([row, UNSTEERED])
        assert toy(torch.ones(2, 4, device="meta")).shape == (2, 4)


def test_hidden_states_are_what_the_next_layer_sees(model):
    bank, row = bank_for(Site(0, SiteKind.RESIDUAL))
    with torch.no_grad(), Steering(model, bank):
        plain = model(TOKENS, output_hidden_states=True).hidden_states[1]
        bank.fill([row], each_token(0, 0, 0))
        assert not torch.equal(model(TOKENS, output_hidden_states=True).hidden_states[1], plain)


def test_trace_records_what_the_last_forward_did(model):
    bank, row = bank_for(MIDDLE)
    module, seen = model.model.layers[1].self_attn, []
    watch = module.register_forward_hook(lambda module, args, out: seen.append(out[0].reshape(-1, HIDDEN)))
    try:
        logits(model)
    finally:
        watch.remove()
    with Steering(model, bank, traced=True) as steering:
        bank.fill([row], [0, -1] * 6)
        logits(model)
        found = Trace(*steering.traces[MIDDLE].unbind(dim=2))
    at = bank.at(MIDDLE)
    expected = trace(seen[0], at.vectors, at.weights, at.biases, at.kinds, at.multipliers)
    for name in ("gates", "strengths", "delta_norms", "cosines"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert found.strengths[0, 0] != 0
    assert found.strengths[1, 0] == 0


def test_nothing_is_traced_unless_asked(model):
    bank, row = bank_for(MIDDLE)
    with Steering(model, bank) as steering:
        bank.fill([row], each_token(0, 0, 0))
        logits(model)
        assert steering.traces == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_serves_every_later_batch():
    toy = Toy().cuda()
    site = Site(0, SiteKind.RESIDUAL)
    bank = ColumnBank(device="cuda", max_tokens=4)
    handle = bank.add([column(site, 4)])
    x = torch.ones(4, 4, device="cuda")
    with torch.no_grad(), Steering(toy, bank):
        plain = toy(x).clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            toy(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = toy(x)
        later = bank.add([column(site, 4, seed=1)])  # fits the spare columns: no new capture
        for rows in ([(handle, 1.0), (later, 2.0)], [(later, -1.0)], []):
            bank.fill([SequenceSteering.of([(part, [value])]) for part, value in rows])
            bank.take_counts()
            graph.replay()
            assert bank.take_counts(4).tolist() == [1] * len(rows) + [0] * (4 - len(rows))
            torch.testing.assert_close(out, toy(x))
            assert torch.equal(out[len(rows) :], plain[len(rows) :])
