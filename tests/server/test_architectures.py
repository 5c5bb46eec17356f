"""What the engine says is what `transformers` says, token for token, in every architecture that it claims."""

import random
from typing import Any

import pytest
import torch
import transformers

from server.engine.sequence import SamplingParams, Sequence, SteeringParams
from server.errors import StartupError
from server.loading import max_model_len, open_runner
from steer_ops import PAGED_ATTENTION_PREFILL
from steer_ops import plain as references
from steering.bank import ColumnBank
from steering.column import Column
from steering.types import Gate, SequenceSteering, Site
from tests.server.desk import Desk, sequence
from tests.server.reference import greedy, plain
from tests.steering.families import FAMILIES, GROUPED, HIDDEN, LAYERS, VOCABULARY, Family

WINDOW = 7  # shorter than most of the prompts
SLIDING: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW},
    "gemma3": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": {"sliding_window": WINDOW},
    "starcoder2": {"sliding_window": WINDOW},
    "cohere2": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
}
MORE = {
    "llama with scaled rotary embeddings": Family(
        "LlamaForCausalLM",
        "LlamaConfig",
        GROUPED
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    # Reads its rotary embedding's settings in every pass.
    "granite_swa": Family(
        "GraniteSWAForCausalLM",
        "GraniteSWAConfig",
        GROUPED
        | {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "stablelm": Family("StableLmForCausalLM", "StableLmConfig", GROUPED),  # turns a quarter of each head
    "gpt_oss": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        GROUPED
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}
# Gemma's residual stream is wide, and a norm behind the attention takes the rest of what is done to its output.
SITES = {"gemma": ("residual", 20.0), "gemma2": ("residual", 20.0), "gemma3": ("residual", 20.0)}


def tiny(name: str, layers: int = LAYERS) -> Any:
    family = {**FAMILIES, **MORE}[name]
    settings = family.settings | SLIDING.get(name, {}) | {"bos_token_id": None, "eos_token_id": None}
    settings |= {"n_layer" if name == "gpt2" else "num_hidden_layers": layers}
    if kinds := settings.get("layer_types"):
        settings["layer_types"] = kinds[:layers]
    config = getattr(transformers, family.config)(**settings)
    torch.manual_seed(1)
    model = getattr(transformers, family.model)(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.25)  # wide enough for logits without ties
    return model


def sequences(number: random.Random, steering: list[SteeringParams]) -> list[Sequence]:
    """Prompts of 1 to 40 tokens, some with a common beginning; answers of 1 to 20."""
    stem = tuple(number.randrange(3, VOCABULARY) for _ in range(20))
    made = []
    for index in range(10):
        own = tuple(number.randrange(3, VOCABULARY) for _ in range(number.randint(1, 20)))
        prompt = stem[: number.choice((0, 0, 5, 20))] + own
        made.append(greedy_sequence(prompt, number.randint(1, 20), steering[index % len(steering)]))
    return [*made, *(greedy_sequence(stem, 8, one) for one in steering)]


def greedy_sequence(prompt: tuple[int, ...], new: int, steering: SteeringParams) -> Sequence:
    params = SamplingParams(max_new_tokens=new, temperature=0)
    return sequence(prompt, sampling_params=params, steering_params=steering)


def prefill_by_its_reference(patch: pytest.MonkeyPatch) -> None:
    """As on a GPU, steps with prompts among them are static too; what attends to those there stands for a kernel."""

    def prefill(*args: Any, **rules: Any) -> None:
        references.paged_attention_prefill(*args, **rules)

    patch.setitem(PAGED_ATTENTION_PREFILL._chosen, ("cpu", torch.float32), prefill)


def columns(name: str, layer: int = 1) -> list[Column]:
    site, scale = SITES.get(name, ("attn_output", 2.0))
    generator = torch.Generator().manual_seed(3)

    def column(attribute: str, gate: Gate) -> Column:
        return Column(
            attribute=attribute,
            site=Site.parse(f"{layer}.{site}"),
            gate=gate,
            vector=scale * torch.randn(HIDDEN, generator=generator),
            gate_weight=torch.randn(HIDDEN, generator=generator),
            gate_bias=0.1,
            keep_norm=True,
            range=(-2.0, 2.0),
        )

    return [column("kind", Gate.SIGMOID), column("fair", Gate.CONSTANT)]


@pytest.mark.parametrize("attention", ["native", "torch", "static"])
@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_sequences_equal_the_plain_model_whatever_happens_to_them(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed lengths and steerings, random arrivals, chunked prompts, shared beginnings, a cache that is too small;
    with the kernel for CPUs, and as on a GPU, where each step is begun before the tokens of the one before are known,
    with PyTorch's attention and with the steps that are captured there."""
    reference = tiny(name)
    if attention == "static":
        prefill_by_its_reference(monkeypatch)
    options = {"native": attention == "native", "graphs": attention == "static", "ahead": attention != "native"}
    desk = Desk(tiny(name), num_blocks=16, block_size=4, max_num_seqs=6, max_num_batched_tokens=12, **options)
    handle = desk.bank.add(columns(name))
    mixes = [(1.0, 0.0), (-1.0, 1.5)]
    steering = [SteeringParams(), *(SteeringParams(SequenceSteering.of([(handle, mix)])) for mix in mixes)]
    number = random.Random(0)
    asked = sequences(number, steering)
    texts = desk.run(asked, arrivals=[number.randint(0, 40) for _ in asked])
    assert desk.scheduler.preemptions, "the cache was not small enough to prove anything"
    assert desk.blocks.cached_tokens > 40
    assert desk.begun_ahead > 10 or not desk.ahead
    moved = 0
    for one, text in texts.items():
        new, columns_of = one.sampling_params.max_new_tokens, one.steering_params.columns
        unsteered = plain(reference, one.prompt_token_ids, new=new)
        if not columns_of.slots:
            assert text == unsteered, one
            assert desk.steered(one) == 0
            continue
        multipliers = dict(zip(("kind", "fair"), columns_of.parts[0][1], strict=True))
        assert text == greedy(reference, one.prompt_token_ids, columns(name), multipliers, new=new, eos=None), one
        assert desk.steered(one) == new
        moved += text != unsteered
    assert moved > 4, "the test steers too weakly to prove anything"


@pytest.mark.parametrize(
    ("model", "config", "settings"),
    [
        ("GPTJForCausalLM", "GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}),
        ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 2}),
        ("MptForCausalLM", "MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 2}),
        ("MambaForCausalLM", "MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
        (
            "FalconForCausalLM",
            "FalconConfig",
            {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "alibi": True},
        ),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_with_a_sentence(
    model: str, config: str, settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(vocab_size=61, **settings)).eval()
    with pytest.raises(StartupError, match=rf"The model 'odd' \({model}\) cannot be served: .*\.$"):
        open_runner(made, ColumnBank(device="cpu", max_tokens=64), "odd")


def test_rotary_embeddings_that_depend_on_the_longest_text_bound_every_text() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    config = transformers.LlamaConfig(**(GROUPED | {"rope_parameters": rope}))
    model = transformers.LlamaForCausalLM(config)
    assert max_model_len(model, 64) == 32
    assert max_model_len(model, None) == 32
    assert max_model_len(tiny("llama"), 64) == 64
    assert max_model_len(tiny("gemma3"), 64) == 64
