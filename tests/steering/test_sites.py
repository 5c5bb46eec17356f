import re

import pytest
import torch
from torch import nn

from steering import Gate, Site, SiteKind, UnsupportedArchitecture, layers, site_module, site_width, steered
from tests.steering.families import FAMILIES, HIDDEN, LAYERS, VOCABULARY, column, tiny

TOKENS = torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(1))
EVERY_TOKEN = torch.ones(2, 5, dtype=torch.bool)

families = pytest.mark.parametrize("family", FAMILIES)
kinds = pytest.mark.parametrize("kind", SiteKind)


def push(family: str, site: Site, vector: torch.Tensor | None = None):
    """A constant displacement at a site."""
    given = {} if vector is None else {"vector": vector}
    return column(site, FAMILIES[family].width(site.kind), gate=Gate.CONSTANT, keep_norm=False, scale=0.5, **given)


@torch.no_grad()
def run(family: str, *columns, **settings):
    model = tiny(family)
    if not columns:
        return model(TOKENS, **settings)
    with steered(model, columns, [1.0] * len(columns), mask=EVERY_TOKEN):
        return model(TOKENS, **settings)


@families
@kinds
def test_a_site_is_the_module_that_the_family_has_there(family, kind):
    model, site = tiny(family), Site(1, kind)
    module, side = site_module(model, site)
    assert module is model.get_submodule(FAMILIES[family].path(site))
    assert side == ("input" if kind is SiteKind.ATTN_HEADS else "output")
    assert site_width(model, kind) == FAMILIES[family].width(kind)


@families
def test_layers_are_the_blocks_in_order(family):
    model = tiny(family)
    assert layers(model) == list(model.get_submodule(FAMILIES[family].blocks))
    assert len(layers(model)) == LAYERS


@families
@kinds
@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_steering_changes_the_logits(family, kind, layer):
    plain, moved = run(family).logits, run(family, push(family, Site(layer, kind))).logits
    assert torch.isfinite(moved).all()
    assert (plain - moved).abs().amax(dim=-1).min() > 1e-5


@families
@kinds
def test_steering_at_a_layer_leaves_the_layers_before_it_alone(family, kind):
    plain = run(family, output_hidden_states=True).hidden_states
    moved = run(family, push(family, Site(1, kind)), output_hidden_states=True).hidden_states
    assert all(torch.equal(plain[i], moved[i]) for i in (0, 1))
    assert not torch.equal(plain[2], moved[2])


@families
def test_the_residual_site_is_the_next_hidden_state(family):
    vector = torch.linspace(-1, 1, HIDDEN)
    plain = run(family, output_hidden_states=True).hidden_states
    for layer in range(LAYERS - 1):
        moved = run(family, push(family, Site(layer, SiteKind.RESIDUAL), vector), output_hidden_states=True)
        torch.testing.assert_close(moved.hidden_states[layer + 1], plain[layer + 1] + vector)


@families
def test_the_last_residual_site_comes_before_the_final_norm(family):
    model, seen = tiny(family), []
    norm = model.get_submodule(FAMILIES[family].norm)
    watch = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        run(family)
        run(family, push(family, Site(LAYERS - 1, SiteKind.RESIDUAL), torch.ones(HIDDEN)))
    finally:
        watch.remove()
    torch.testing.assert_close(seen[1], seen[0] + 1)


@families
def test_a_push_on_the_heads_is_its_projection_on_the_attention_output(family):
    heads, output = Site(1, SiteKind.ATTN_HEADS), Site(1, SiteKind.ATTN_OUTPUT)
    at_heads = push(family, heads)
    projection = tiny(family).get_submodule(FAMILIES[family].path(heads))
    stored = projection.weight.detach()
    weight = stored if isinstance(projection, nn.Linear) else stored.T
    at_output = push(family, output, weight @ at_heads.vector)
    assert (run(family).logits - run(family, at_heads).logits).abs().max() > 1e-4
    torch.testing.assert_close(run(family, at_heads).logits, run(family, at_output).logits, atol=2e-5, rtol=1e-4)


@families
@kinds
def test_the_next_module_gets_exactly_the_steered_activation(family, kind):
    site, model, seen = Site(1, kind), tiny(family), []
    module = model.get_submodule(FAMILIES[family].path(site))
    if kind is SiteKind.ATTN_HEADS:
        watch = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    else:
        watch = module.register_forward_hook(
            lambda module, args, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
        )
    pushed = push(family, site)
    try:
        run(family)
        run(family, pushed)
    finally:
        watch.remove()
    torch.testing.assert_close(seen[1], seen[0] + pushed.vector, atol=1e-6, rtol=0)


def test_an_unknown_architecture_is_refused_by_its_name_and_what_was_looked_for():
    class Strange(nn.Module):
        pass

    with pytest.raises(
        UnsupportedArchitecture, match=re.escape("Strange has no list of decoder blocks at model.layers")
    ):
        layers(Strange())


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (SiteKind.ATTN_OUTPUT, "no self-attention sub-layer named self_attn, attn or attention"),
        (SiteKind.MLP_OUTPUT, "no feed-forward sub-layer named mlp, block_sparse_moe or feed_forward"),
    ],
)
def test_a_block_without_the_sub_layer_is_refused_by_what_was_looked_for(kind, named):
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.h = nn.ModuleList([nn.Linear(2, 2)])

    with pytest.raises(UnsupportedArchitecture, match=rf"layer 0 of Strange \(Linear\) has {named}"):
        site_module(Strange(), Site(0, kind))


def test_an_attention_without_a_known_projection_is_refused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.Identity()

    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.h = nn.ModuleList([Block()])

    with pytest.raises(UnsupportedArchitecture, match="no attention output projection named o_proj, c_proj, dense or"):
        site_module(Strange(), Site(0, SiteKind.ATTN_HEADS))


def test_a_layer_that_the_model_lacks_is_refused():
    with pytest.raises(UnsupportedArchitecture, match=r"layers 0 to 2: there is no layer 3 for site 3\.residual"):
        site_module(tiny("llama"), Site(3, SiteKind.RESIDUAL))


def test_blocks_that_add_the_residual_inside_are_steered_at_the_residual_only():
    class BloomBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Identity()

    class Bloom(nn.Module):
        def __init__(self):
            super().__init__()
            self.h = nn.ModuleList([BloomBlock()])

    model = Bloom()
    assert site_module(model, Site(0, SiteKind.RESIDUAL)) == (model.h[0], "output")
    with pytest.raises(UnsupportedArchitecture, match="only residual"):
        site_module(model, Site(0, SiteKind.MLP_OUTPUT))
