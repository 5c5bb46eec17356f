"""What becomes of the fields of OpenAI's, vLLM's and llama.cpp's request bodies.

A field that a route's schema has is supported. Of the others this table says which values ask for nothing, so that
clients may send them; every other value is refused by name. docs/fields.md is made of it (`server/field_docs.py`).
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OPENAI, VLLM, LLAMA = "OpenAI", "vLLM", "llama.cpp"


@dataclass(frozen=True)
class KnownField:
    """A field, and which of its values ask for nothing. Null always does."""

    name: str
    origin: str  # whose body it belongs to
    neutral: tuple[object, ...] = ()
    not_beside: tuple[str, ...] = ()  # unless one of these fields asks for something
    ignored: bool = False  # every value asks for nothing of this server
    idle_without: tuple[str, ...] = ()  # every value does where each of these fields asks for nothing, too
    same_as: str = ""  # the value of this field does
    instead: tuple[str, ...] = ()  # fields of this server that do the same, the first one that a route has
    note: str = ""

    def asks(self, value: object, body: Mapping[str, Any]) -> bool:
        """Whether a value in a body asks for something."""
        if value is None or self.ignored:
            return False
        if any(_equal(value, neutral) for neutral in self.neutral):
            return _any_asks(self.not_beside, body)
        if self.same_as and _equal(value, body.get(self.same_as)):
            return False
        return not self.idle_without or _any_asks(self.idle_without, body)

    @property
    def passing(self) -> tuple[str, ...]:
        """The values that ask for nothing, as JSON or in words."""
        values = [json.dumps(value) for value in self.neutral]
        return (*values, f"the value of {self.same_as}") if self.same_as else tuple(values)

    def refusal(self, name: str, supported: Collection[str]) -> str:
        """Why a value is refused by a route that does not have the field. `name`: with the fields that it is in;
        `supported`: the fields that the route has."""
        passing = f", or send {' or '.join(self.passing)}, which asks for nothing" if self.passing else ""
        instead = next((f"; {other!r} does it here" for other in self.instead if other in supported), "")
        return f"{name} is not supported: leave it out{passing}{instead}."


def _fields(*known: KnownField) -> Mapping[str, KnownField]:
    return {one.name: one for one in known}


LABEL = "a label"
CACHE = "about a cache: the answer is the same"
OFF = "a setting of something that is off"

BODY_FIELDS = _fields(
    # OpenAI's, in the order of the alphabet
    KnownField("audio", OPENAI, neutral=({},)),
    KnownField("best_of", OPENAI, neutral=(1,), same_as="n"),
    KnownField("echo", OPENAI, neutral=(False,)),
    KnownField("frequency_penalty", OPENAI, neutral=(0,)),
    KnownField("function_call", OPENAI, neutral=("none", "auto")),
    KnownField("functions", OPENAI, neutral=([],)),
    KnownField("logit_bias", OPENAI, neutral=({}, [])),
    KnownField("logprobs", OPENAI, neutral=(False,)),
    KnownField("max_completion_tokens", OPENAI, instead=("max_tokens", "max_new_tokens")),
    KnownField(
        "max_tokens", OPENAI, note="`-1`: as many as there is room for", instead=("max_new_tokens", "max_output_tokens")
    ),
    KnownField("messages", OPENAI),
    KnownField("metadata", OPENAI, ignored=True, note=LABEL),
    KnownField("model", OPENAI, instead=("checkpoint",)),
    KnownField("modalities", OPENAI, neutral=(["text"], [])),
    KnownField("moderation", OPENAI, neutral=({},)),
    KnownField("n", OPENAI, neutral=(1,)),
    KnownField("parallel_tool_calls", OPENAI, ignored=True, note="there are no tools"),
    KnownField("prediction", OPENAI, ignored=True, note="a guess that makes an answer faster elsewhere"),
    KnownField("presence_penalty", OPENAI, neutral=(0,)),
    KnownField("prompt", OPENAI),
    KnownField("prompt_cache_key", OPENAI, ignored=True, note=CACHE),
    KnownField("prompt_cache_options", OPENAI, ignored=True, note=CACHE),
    KnownField("prompt_cache_retention", OPENAI, ignored=True, note=CACHE),
    KnownField("reasoning_effort", OPENAI, ignored=True, note="there is one way to answer"),
    KnownField("response_format", OPENAI, neutral=({"type": "text"}, {})),
    KnownField("safety_identifier", OPENAI, ignored=True, note=LABEL),
    KnownField("seed", OPENAI, note="`-1` is a seed as any other"),
    KnownField("service_tier", OPENAI, ignored=True, note="there is one tier"),
    KnownField("stop", OPENAI, neutral=("", [])),
    KnownField("store", OPENAI, ignored=True, note="no answer is stored"),
    KnownField("stream", OPENAI, neutral=(False,)),
    KnownField(
        "stream_options",
        OPENAI,
        neutral=({}, {"include_usage": False}),
        idle_without=("stream",),
        note="the last event of /generate has `usage` anyway",
    ),
    KnownField("suffix", OPENAI, neutral=("",)),
    KnownField("temperature", OPENAI, neutral=(1,)),
    KnownField("tool_choice", OPENAI, neutral=("none", "auto")),
    KnownField("tools", OPENAI, neutral=([],)),
    KnownField("top_logprobs", OPENAI, neutral=(0,), instead=("logprobs",)),
    KnownField("top_p", OPENAI, neutral=(1,)),
    KnownField("user", OPENAI, ignored=True, note=LABEL),
    KnownField("verbosity", OPENAI, neutral=("medium",)),
    KnownField("web_search_options", OPENAI, note="`{}` asks for a search"),
    # OpenAI's /v1/responses
    KnownField("access_programs", OPENAI, neutral=({},)),
    KnownField("background", OPENAI, neutral=(False,)),
    KnownField("background_options", OPENAI, neutral=({},)),
    KnownField("context_management", OPENAI, neutral=([],)),
    KnownField("conversation", OPENAI, note="the conversation goes into `input`"),
    KnownField("image", OPENAI, neutral=({},)),
    KnownField("include", OPENAI, neutral=([],)),
    KnownField("input", OPENAI, instead=("messages", "prompt")),
    KnownField("instructions", OPENAI, neutral=("",)),
    KnownField("max_output_tokens", OPENAI, instead=("max_tokens", "max_new_tokens")),
    KnownField("max_tool_calls", OPENAI, note="there are no tools"),
    KnownField("previous_response_id", OPENAI, note="no answer is stored: the conversation goes into `input`"),
    KnownField("reasoning", OPENAI, ignored=True, note="there is one way to answer"),
    KnownField(
        "text",
        OPENAI,
        neutral=(
            {},
            {"format": {"type": "text"}},
            {"verbosity": "medium"},
            {"format": {"type": "text"}, "verbosity": "medium"},
        ),
    ),
    KnownField("truncation", OPENAI, neutral=("disabled",)),
    # vLLM's
    KnownField("add_generation_prompt", VLLM, neutral=(True,), not_beside=("continue_final_message",)),
    KnownField("add_special_tokens", VLLM),
    KnownField("allowed_token_ids", VLLM, neutral=([],)),
    KnownField("bad_words", VLLM, neutral=([], "")),
    KnownField("cache_salt", VLLM, neutral=("",), note="it keeps a cache apart: not done in silence"),
    KnownField("chat_template", VLLM, neutral=("",)),
    KnownField("chat_template_kwargs", VLLM, neutral=({},)),
    KnownField("continue_final_message", VLLM, neutral=(False,)),
    KnownField("detokenize", VLLM, neutral=(True,)),
    KnownField("documents", VLLM, neutral=([],)),
    KnownField("early_stopping", VLLM, neutral=(False,)),
    KnownField("ec_transfer_params", VLLM, neutral=({},)),
    KnownField("guided_choice", VLLM, neutral=([],)),
    KnownField("guided_decoding_backend", VLLM, ignored=True, note=OFF),
    KnownField("guided_grammar", VLLM, neutral=("",)),
    KnownField("guided_json", VLLM, note="`{}` asks for JSON"),
    KnownField("guided_regex", VLLM, neutral=("",)),
    KnownField("guided_whitespace_pattern", VLLM, ignored=True, note=OFF),
    KnownField("ignore_eos", VLLM, neutral=(False,)),
    KnownField("include_reasoning", VLLM, neutral=(True,)),
    KnownField("include_stop_str_in_output", VLLM, neutral=(False,)),
    KnownField("kv_transfer_params", VLLM, neutral=({},)),
    KnownField("length_penalty", VLLM, neutral=(1,)),
    KnownField("logits_processors", VLLM, neutral=([],)),
    KnownField("logprob_token_ids", VLLM, neutral=([],)),
    KnownField("media_io_kwargs", VLLM, neutral=({},)),
    KnownField("min_p", VLLM, neutral=(0,)),
    KnownField("min_tokens", VLLM, neutral=(0,)),
    KnownField("mm_processor_kwargs", VLLM, neutral=({},)),
    KnownField("priority", VLLM, neutral=(0,)),
    KnownField("prompt_embeds", VLLM, neutral=([],)),
    KnownField("prompt_logprobs", VLLM, neutral=(False,), instead=("echo",)),
    KnownField("repetition_detection", VLLM, neutral=({},)),
    KnownField("repetition_penalty", VLLM, neutral=(1,)),
    KnownField("request_id", VLLM, ignored=True, note="a label; the header `X-Request-Id` names a request here"),
    KnownField("return_mm_kwargs", VLLM, ignored=True, note="there are none"),
    KnownField("return_prompt_text", VLLM, neutral=(False,)),
    KnownField("return_token_ids", VLLM, neutral=(False,), note="/generate gives them"),
    KnownField("return_token_offsets", VLLM, neutral=(False,)),
    KnownField("return_tokens_as_token_ids", VLLM, neutral=(False,)),
    KnownField("routed_experts_prompt_start", VLLM, neutral=(0,)),
    KnownField("session_id", VLLM, ignored=True, note=LABEL),
    KnownField("skip_special_tokens", VLLM, neutral=(True,)),
    KnownField("spaces_between_special_tokens", VLLM, neutral=(True,), idle_without=("skip_special_tokens",)),
    KnownField("stop_token_ids", VLLM, neutral=([],)),
    KnownField("stream_interval", VLLM, neutral=(1,), note="the server's setting `stream_interval`"),
    KnownField("structured_outputs", VLLM, neutral=({},)),
    KnownField("thinking_token_budget", VLLM, neutral=(-1,)),
    KnownField("top_k", VLLM, neutral=(-1, 0)),
    KnownField("truncate_prompt_tokens", VLLM),
    KnownField("truncation_side", VLLM, ignored=True, note="nothing is truncated"),
    KnownField("use_beam_search", VLLM, neutral=(False,)),
    KnownField("vllm_xargs", VLLM, neutral=({},)),
    KnownField("watermarking", VLLM, neutral=(False,)),
    # llama.cpp's
    KnownField("adaptive_decay", LLAMA, ignored=True, note=OFF),
    KnownField("adaptive_target", LLAMA, neutral=(-1,)),
    KnownField("cache_prompt", LLAMA, ignored=True, note=CACHE),
    KnownField("dry_allowed_length", LLAMA, ignored=True, note=OFF),
    KnownField("dry_base", LLAMA, ignored=True, note=OFF),
    KnownField("dry_multiplier", LLAMA, neutral=(0,)),
    KnownField("dry_penalty_last_n", LLAMA, ignored=True, note=OFF),
    KnownField("dry_sequence_breakers", LLAMA, ignored=True, note=OFF),
    KnownField("dynatemp_exponent", LLAMA, ignored=True, note=OFF),
    KnownField("dynatemp_range", LLAMA, neutral=(0,)),
    KnownField("grammar", LLAMA, neutral=("",)),
    KnownField("grammar_lazy", LLAMA, ignored=True, note=OFF),
    KnownField("grammar_triggers", LLAMA, ignored=True, note=OFF),
    KnownField("id_slot", LLAMA, ignored=True, note="there are no slots"),
    KnownField("image_data", LLAMA, neutral=([],)),
    KnownField("json_schema", LLAMA, note="`{}` asks for JSON"),
    KnownField("lora", LLAMA, neutral=([],)),
    KnownField("min_keep", LLAMA, neutral=(0,)),
    KnownField("mirostat", LLAMA, neutral=(0,)),
    KnownField("mirostat_eta", LLAMA, ignored=True, note=OFF),
    KnownField("mirostat_tau", LLAMA, ignored=True, note=OFF),
    KnownField("n_cache_reuse", LLAMA, ignored=True, note=CACHE),
    KnownField("n_cmpl", LLAMA, neutral=(1,), instead=("n",)),
    KnownField("n_indent", LLAMA, neutral=(0,)),
    KnownField("n_keep", LLAMA, neutral=(0, -1), note="a text ends where the model has no room"),
    KnownField("n_predict", LLAMA, instead=("max_tokens", "max_new_tokens")),
    KnownField("n_probs", LLAMA, neutral=(0,), instead=("logprobs",)),
    KnownField("post_sampling_probs", LLAMA, neutral=(False,)),
    KnownField(
        "repeat_last_n",
        LLAMA,
        neutral=(-1,),
        idle_without=("repeat_penalty", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    ),
    KnownField("repeat_penalty", LLAMA, neutral=(1,), instead=("repetition_penalty",)),
    KnownField("response_fields", LLAMA, neutral=([],)),
    KnownField("return_progress", LLAMA, neutral=(False,)),
    KnownField("return_tokens", LLAMA, neutral=(False,), note="/generate gives them"),
    KnownField("samplers", LLAMA, note="the order of the rules is that of docs/fields.md"),
    KnownField("sse_ping_interval", LLAMA, neutral=(-1,)),
    KnownField("t_max_predict_ms", LLAMA, neutral=(0,)),
    KnownField("t_max_prompt_ms", LLAMA, neutral=(0,)),
    KnownField("tfs_z", LLAMA, neutral=(1,)),
    KnownField("timings_per_token", LLAMA, neutral=(False,)),
    KnownField("top_n_sigma", LLAMA, neutral=(-1, 0)),
    KnownField("typical_p", LLAMA, neutral=(1,)),
    KnownField("verbose", LLAMA, neutral=(False,)),
    KnownField("xtc_probability", LLAMA, neutral=(0,)),
    KnownField("xtc_threshold", LLAMA, ignored=True, note=OFF),
)
MESSAGE_FIELDS = _fields(
    KnownField("annotations", OPENAI, ignored=True, note=LABEL),
    KnownField("audio", OPENAI, neutral=({},)),
    KnownField("cache_control", OPENAI, ignored=True, note=CACHE),
    KnownField("function_call", OPENAI, neutral=({},)),
    KnownField("id", OPENAI, ignored=True, note=LABEL),
    KnownField("name", OPENAI, ignored=True, note=LABEL),
    KnownField("reasoning", VLLM, neutral=("",)),
    KnownField("reasoning_content", VLLM, neutral=("",)),
    KnownField("refusal", OPENAI, neutral=("",)),
    KnownField("tool_call_id", OPENAI, ignored=True, note=LABEL),
    KnownField("tool_calls", OPENAI, neutral=([],)),
)
PART_FIELDS = _fields(
    KnownField("annotations", OPENAI, ignored=True, note=LABEL),
    KnownField("cache_control", OPENAI, ignored=True, note=CACHE),
    KnownField("id", OPENAI, ignored=True, note=LABEL),
)
STREAM_FIELDS = _fields(
    KnownField("continuous_usage_stats", VLLM, neutral=(False,)),
    KnownField("include_obfuscation", OPENAI, ignored=True, note="nothing is padded"),
)


def _any_asks(names: Sequence[str], body: Mapping[str, Any]) -> bool:
    return any(BODY_FIELDS[name].asks(body[name], body) for name in names if name in body)


def _equal(value: object, other: object) -> bool:
    """As in JSON: 1 is 1.0, and not true."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def known_field(loc: Sequence[str | int]) -> KnownField | None:
    """The field at a place in a request's body, as in ("messages", 0, "name")."""
    match [part for part in loc if isinstance(part, str)]:
        case [name]:
            return BODY_FIELDS.get(name)
        case ["messages", name]:
            return MESSAGE_FIELDS.get(name)
        case ["messages", "content", *_, name]:
            return PART_FIELDS.get(name)
        case ["stream_options", name]:
            return STREAM_FIELDS.get(name)
    return None


def without_neutral(given: Any, known: Mapping[str, KnownField], supported: Collection[str]) -> Any:
    """A body as its schema takes it: without the fields that ask for nothing, be they supported or not. What is no
    JSON object is returned as it is."""
    if not isinstance(given, Mapping):
        return given
    kept = {}
    for name, value in given.items():
        field = known.get(name, KnownField(name, ""))
        if name in supported:  # the schema checks what it has, also where it is idle
            field = KnownField(name, "", field.neutral, field.not_beside)
        if field.asks(value, given):
            kept[name] = value
    return kept
