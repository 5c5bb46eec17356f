"""docs/fields.md, from the table of `server/fields.py` and the schemas: `python -m server.api_docs` writes it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from server.api.openai.responses_schemas import ResponsesRequest
from server.api.openai.schemas import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    StreamOptions,
)
from server.fields import BODY_FIELDS, MESSAGE_FIELDS, PART_FIELDS, STREAM_FIELDS, KnownField
from server.schemas import GenerateRequest, LenientRequest, ScoreRequest, TextContentPart

PATH = Path(__file__).parents[1] / "docs" / "fields.md"
HEAD = """# What becomes of each field

Written by `make api-docs` from `server/fields.py` and the schemas of the requests.

Of the fields that OpenAI's, vLLM's and llama.cpp's request bodies have:

- **yes**: supported. Types, limits and defaults are in [api.md](api.md).
- **ignored**: every value passes and has no effect. Such a field labels or routes a request, or belongs to something
  that is off.
- **no**: refused by a 400 that names the field, except for the values that ask for nothing.

Null always asks for nothing: the field counts as absent, whatever its name. A field that is in no table and not in
[api.md](api.md) is refused: by a 400 on `/v1`, by a 422 elsewhere. `/compare` takes what `/generate` takes; values
that ask for nothing, and labels, pass on `/tokenize` and `/detokenize`, too.

## How the sampling fields act together

1. `min_tokens`: before so many tokens, those that end the answer (the model's own, `stop_token_ids`) cannot be sampled,
   and `stop` ends nothing.
2. `logit_bias`, then `repetition_penalty` (of tokens in the prompt or the answer), `frequency_penalty` and
   `presence_penalty` (of tokens in the answer): the order of vLLM.
3. `temperature`, `top_k`, `top_p`, `min_p`: the order of transformers.

Log-probabilities are the model's own, as it is steered, before all of them.

## How an answer ends

An answer ends with a token that ends it, with the first `stop` text that is complete, or with its length.

- `stop` texts may be of any number of tokens, and may be, begin with, or contain special tokens, whether the answer
  shows those or not.
- The answer is what stands before the stop text. With `include_stop_str_in_output` it goes up to its end; a token that
  ends it is then shown too, a special one only with `"skip_special_tokens": false`.
- With `"skip_special_tokens": false` special tokens are part of the answer. The one that ends it is not.
- Tokens of the stop text, and the one that ends the answer, count in `usage`, and are in `token_ids` and `logprobs`.
- In a stream, text is held back as long as it may be the beginning of a stop text. Its pieces put together are the
  answer.
"""
ROUTES: Mapping[str, type[LenientRequest]] = {
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/generate": GenerateRequest,
    "/score": ScoreRequest,
}
PARTS: Mapping[str, tuple[Mapping[str, KnownField], type[LenientRequest]]] = {
    "A message": (MESSAGE_FIELDS, ChatMessage),
    "A text part of a message's content": (PART_FIELDS, TextContentPart),
    "stream_options": (STREAM_FIELDS, StreamOptions),
}


def page() -> str:
    parts = [HEAD, "## The body\n", *_table(BODY_FIELDS, ROUTES)]
    for title, (known, schema) in PARTS.items():
        parts += [f"## {title}\n", *_table(known, {"what becomes of it": schema})]
    return "\n".join(parts).rstrip() + "\n"


def status(known: KnownField, schema: type[LenientRequest]) -> str:
    """What becomes of a field of a body that has this schema."""
    if known.name in schema.model_fields:
        return "yes"
    return "ignored" if known.ignored else "no"


def _table(known: Mapping[str, KnownField], schemas: Mapping[str, type[LenientRequest]]) -> Iterator[str]:
    yield f"| field | of | {' | '.join(schemas)} | asks for nothing | |"
    yield "| --- " * (len(schemas) + 4) + "|"
    for field in sorted(_with_supported(known, schemas), key=lambda one: one.name):
        statuses = [status(field, schema) for schema in schemas.values()]
        notes = field.note
        if field.instead and "no" in statuses:
            elsewhere = f"send {' or '.join(f'`{other}`' for other in field.instead)} instead"
            notes = f"{notes}; where there is none, {elsewhere}" if notes else elsewhere
        cells = (f"`{field.name}`", field.origin, *statuses, _passing(field), notes)
        yield f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|"
    yield ""


def _with_supported(known: Mapping[str, KnownField], schemas: Mapping[str, type[LenientRequest]]) -> list[KnownField]:
    """In the parts of a body every field is somebody else's; the body has our own besides, which are in api.md."""
    if known is BODY_FIELDS:
        return [*known.values()]
    names = {name for schema in schemas.values() for name in schema.model_fields}
    return [*known.values(), *(KnownField(name, "OpenAI") for name in names - known.keys())]


def _passing(field: KnownField) -> str:
    values = [f"`{json.dumps(value)}`" for value in field.neutral]
    if field.same_as:
        values.append(f"the value of `{field.same_as}`")
    if field.idle_without:
        others = ", ".join(f"`{other}`" for other in field.idle_without)
        values.append(f"any value where nothing is asked for by {others}")
    return ", ".join(values)
