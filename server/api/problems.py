"""Every exception becomes one of our errors, and every error one shape."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.api.schemas import GenerateRequest
from server.errors import BadRequest, InvalidField, MethodNotAllowed, NotFound, ServerError

SHOWN = 80  # characters of a client's value in a message
UNIONS = ("prompt", "stop")  # fields of several types: below them pydantic names the type that it tried
KINDS = ("string_type", "list_type")


def error_of(exception: Exception, *, method: str = "", path: str = "") -> ServerError:
    """What the client is told of an exception; what is not foreseen stays in the log."""
    match exception:
        case ServerError():
            return exception
        case RequestValidationError():
            return _invalid(exception.errors())
        case HTTPException(status_code=404):
            return NotFound(f"There is nothing at {path}.")
        case HTTPException(status_code=405):
            return MethodNotAllowed(f"{path} does not take {method}.")
        case HTTPException(status_code=status) if 400 <= status < 500:
            return BadRequest(f"The request cannot be read: {exception.detail}.")
        case _:
            return ServerError("The server failed on this request; its log says more.")


def render(error: ServerError, request_id: str, headers: Mapping[str, str] | None = None) -> Response:
    """{"error": {type, message, param, request_id}}, in ASCII, so that no text a client sent can break it."""
    detail = {"type": error.type, "message": error.message, "param": error.param, "request_id": request_id}
    return Response(
        json.dumps({"error": detail}),
        status_code=error.status,
        headers={**(headers or {}), **error.headers},
        media_type="application/json",
    )


def _invalid(problems: Sequence[Mapping[str, Any]]) -> ServerError:
    first = problems[0]
    if first["type"] == "json_invalid":
        return BadRequest(f"The body is not JSON: {first['ctx']['error']}, at character {first['loc'][-1]}.")
    if tuple(first["loc"]) == ("body",):
        if first["type"] == "missing":
            return InvalidField("The request has no body; send a JSON object.")
        return InvalidField("The body must be a JSON object, sent with 'Content-Type: application/json'.")
    seen: dict[str | int, Mapping[str, Any]] = {}
    for problem in problems:
        # One sentence a field; of a field of several types the problem that went furthest into it.
        key = problem["loc"][1] if problem["loc"][1] in UNIONS else _param(problem["loc"])
        if key not in seen or _depth(problem) > _depth(seen[key]):
            seen[key] = problem
    return InvalidField(" ".join(map(_sentence, seen.values())), param=_param(next(iter(seen.values()))["loc"]))


def _depth(problem: Mapping[str, Any]) -> tuple[int, bool]:
    return len(problem["loc"]), problem["type"] not in KINDS


def _param(loc: Sequence[str | int]) -> str:
    """("body", "messages", 0, "role") -> "messages.0.role"."""
    where = list(loc[1:]) if loc[0] in ("body", "path", "query") else list(loc)
    if where and where[0] in UNIONS:
        where = [where[0], *(part for part in where[1:] if isinstance(part, int))]
    return ".".join(map(str, where))


def _sentence(problem: Mapping[str, Any]) -> str:
    param = _param(problem["loc"])
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(param, GenerateRequest.model_fields, n=1)
        return f"There is no field {_short(param)}" + (f"; did you mean {close[0]!r}?" if close else ".")
    if problem["type"] == "missing":
        return f"{param} is missing."
    if problem["type"] in ("string_too_short", "too_short"):  # every minimum here is 1
        return f"{param} must not be empty."
    message = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    if param in UNIONS and problem["type"] in KINDS:
        message = "should be a string or a list of strings"
    return f"{_short(param, quote=False)} {message}, not {_short(problem['input'])}."


def _short(value: object, *, quote: bool = True) -> str:
    """A client's value, cut to a length that fits into a message."""
    text = repr(value) if quote else str(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
