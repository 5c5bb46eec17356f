"""docs/api.md, from the OpenAPI document: `python -m server.api_docs` writes it, and docs/fields.md beside it; a test
looks whether they are true."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from server import field_docs
from server.app import bare_app
from server.errors import ServerError, StartupError

PATH = Path(__file__).parents[1] / "docs" / "api.md"
HEAD = """# The HTTP API

Written by `make api-docs` from the OpenAPI document, which a running server has at `/openapi.json` and shows at
`/docs`.

Numbers are finite. Fields that are not listed are refused by name, unless they ask for nothing:
[fields.md](fields.md) has those of other servers. A server with keys asks for `Authorization: Bearer KEY`. A slash at
the end of a path changes nothing. Chat templates, special tokens and `/v1/responses` have a page: [chat.md](chat.md).

## Errors

Every error is `{"error": {"type", "code", "message", "param", "request_id"}}`, with the field at fault in `param`.
`code` is OpenAI's word for what clients act on, else the type.

"""

RANGES = (  # lower and upper limits as OpenAPI names them, with the unit
    ("minimum", "maximum", ""),
    ("exclusiveMinimum", "exclusiveMaximum", ""),
    ("minItems", "maxItems", " items"),
    ("minLength", "maxLength", " characters"),
    ("minProperties", "maxProperties", " items"),
)


def page() -> str:
    document = bare_app().openapi()
    schemas: dict[str, Any] = document["components"]["schemas"]
    parts = [HEAD + _errors()]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts += _operation(f"{method.upper()} {path}", operation, schemas)
    parts.append("## Bodies\n")
    for name in sorted(_named(document["paths"], schemas)):
        parts += _schema(name, schemas[name])
    return "\n".join(parts).rstrip() + "\n"


def _errors() -> str:
    """Every error that a client may get, by status."""
    rows = set()
    kinds = [ServerError]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if kind is not StartupError:
            status = f"{kind.status}" + (f", under /v1 {kind.openai_status}" if kind.openai_status else "")
            rows.add((status, kind.type, kind.openai_code or kind.type))
    table = [f"| {status} | `{name}` | `{code}` |" for status, name, code in sorted(rows)]
    table.append("| other 4xx | the status's own name, as in `unsupported_media_type` (415) | the same |")
    return "\n".join(["| status | `type` | `code` |", "| --- | --- | --- |", *table]) + "\n"


def _operation(title: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {title}\n"
    yield f"{operation['description']}\n"
    for parameter in operation.get("parameters", []):
        yield f"- `{parameter['name']}` ({parameter['in']}): {_type(parameter['schema'])}"
    if operation.get("parameters"):
        yield ""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content:
        yield f"Body: {_type(content['schema'])}\n"
        for example in _examples(content["schema"], schemas):
            yield f"```json\n{json.dumps(example, indent=2)}\n```\n"
    for kind, answer in operation["responses"]["200"].get("content", {}).items():
        yield f"Answer: {_type(answer['schema']) if answer.get('schema') else ''} ({kind})\n"


def _schema(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield f"### {name}\n"
    if "description" in schema:
        yield f"{schema['description']}\n"
    yield "| field | type | default | |"
    yield "| --- | --- | --- | --- |"
    required = schema.get("required", [])
    for field, about in schema.get("properties", {}).items():
        default = "" if field in required or "default" not in about else f"`{json.dumps(about['default'])}`"
        notes = " ".join(part for part in (about.get("description", ""), _limits(about)) if part)
        cells = (f"`{field}`", _type(about), default or ("required" if field in required else ""), notes)
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    yield ""


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type, schema["anyOf"])))
    if schema.get("type") == "array":
        inner = schema.get("prefixItems")
        if inner:
            return f"[{', '.join(map(_type, inner))}]"
        items = _type(schema.get("items", {}))
        return f"list of ({items})" if " or " in items else f"list of {items}"
    if schema.get("type") == "object":
        values = [schema.get("additionalProperties"), *schema.get("patternProperties", {}).values()]
        if kinds := [_type(one) for one in values if isinstance(one, Mapping)]:
            return f"map of {kinds[-1]}"
    return str(schema.get("type", "anything"))


def _limits(schema: Mapping[str, Any]) -> str:
    parts = [schema, *schema.get("anyOf", [])]
    ranges = dict.fromkeys(_range(part, *names) for part in parts for names in RANGES if set(names[:2]) & set(part))
    return f"({', '.join(ranges)})" if ranges else ""


def _range(part: Mapping[str, Any], lower: str, upper: str, unit: str) -> str:
    equal = "" if lower.startswith("exclusive") else "="
    low, high = (_number(part[name]) if name in part else "" for name in (lower, upper))
    if low and high and equal:
        return (f"{low} to {high}" if low != high else low) + unit
    return " and ".join([*([f">{equal} {low}"] if low else []), *([f"<{equal} {high}"] if high else [])]) + unit


def _number(value: float) -> str:
    """A limit for people to read: as a power of two where a float is not exact."""
    return f"{value:,.15g}" if abs(value) < 2**53 else f"{'-' * (value < 0)}2^{math.log2(abs(value)):g}"


def _examples(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> list[Any]:
    for part in [schema, *schema.get("anyOf", [])]:
        if "$ref" in part:
            found: list[Any] = schemas[part["$ref"].rpartition("/")[2]].get("examples", [])
            return found
    return []


def _named(node: Any, schemas: Mapping[str, Any], seen: set[str] | None = None) -> set[str]:
    """The names of all schemas that `node` refers to, at any depth."""
    seen = set() if seen is None else seen
    if isinstance(node, Mapping):
        name = str(node.get("$ref", "")).rpartition("/")[2]
        if name and name not in seen:
            seen.add(name)
            _named(schemas[name], schemas, seen)
        for value in node.values():
            _named(value, schemas, seen)
    elif isinstance(node, list):
        for value in node:
            _named(value, schemas, seen)
    return seen


if __name__ == "__main__":
    PATH.write_text(page(), encoding="utf-8")
    field_docs.PATH.write_text(field_docs.page(), encoding="utf-8")
