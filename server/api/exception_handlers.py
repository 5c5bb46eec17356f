"""Every exception becomes a ServerError, and every ServerError the same JSON: {"error": {...}}."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.api.openai.responses_schemas import ResponsesRequest
from server.api.openai.schemas import ChatCompletionRequest, CompletionRequest
from server.errors import (
    BadRequest,
    BodyTooLarge,
    InvalidField,
    MethodNotAllowed,
    NotFound,
    Refused,
    ServerError,
    UnsupportedField,
)
from server.fields import KnownField, known_field
from server.schemas import (
    CompareRequest,
    DetokenizeRequest,
    GenerateRequest,
    JudgeRequest,
    LenientRequest,
    ScoreRequest,
    StrictRequest,
    TokenizeRequest,
    VoteRequest,
)

Body = TypeVar("Body", bound=StrictRequest)
MAX_VALUE = 80  # characters of a client's value in a message
MAX_DESCRIBED = 5  # problems of one request
MAX_MESSAGE, MAX_PARAM = 500, 200  # characters
UNIONS = {  # fields of several types; in the location of an error pydantic adds the type that it tried
    "prompt": "a string or a list of strings",
    "stop": "a string or a list of strings",
    "content": "a string or a list of parts",
    "input": "a string or a list of items",
}
REQUESTS: Mapping[str, type[StrictRequest]] = {  # body by route
    "/compare": CompareRequest,
    "/score": ScoreRequest,
    "/judge": JudgeRequest,
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
KEY = "[key]"  # in a location: it is not the value that is wrong but its name
WRONG_TYPE = ("string_type", "list_type")
JSON_TYPE = re.compile(r"application/([\w.-]+\+)?json")
TYPE_NAME = re.compile(r"^str$|^constrained-|\[")  # as pydantic writes the members of a union


def add_exception_handlers(app: FastAPI) -> None:
    """For what handlers and the framework raise; `RequestMiddleware` answers for the rest."""
    for kind in (ServerError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _handle)


async def _handle(request: Request, exception: Exception) -> Response:
    path = request.url.path
    error = _wrong_content_type(request, exception) or to_server_error(exception, method=request.method, path=path)
    headers = exception.headers if isinstance(exception, HTTPException) else None
    return error_response(error, request.state.request_id, headers, path=path)


def _wrong_content_type(request: Request, exception: Exception) -> ServerError | None:
    """The framework hands a body that does not call itself JSON to the route as bytes, which no route takes."""
    if not isinstance(exception, RequestValidationError):
        return None
    first = exception.errors()[0]
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if tuple(first["loc"]) != ("body",) or first["type"] == "missing" or JSON_TYPE.fullmatch(kind):
        return None
    sent = f"not {_short(given)}" if given else "and this one has no Content-Type"
    return Refused(f"The body must be JSON, sent with 'Content-Type: application/json', {sent}.", 415)


def to_server_error(exception: Exception, *, method: str = "", path: str = "") -> ServerError:
    """The error for the client. Of an exception that nobody expected it says nothing; the log does."""
    match exception:
        case ServerError():
            return exception
        case RequestValidationError():
            return _invalid(exception.errors(), path)
        case HTTPException(status_code=404):
            return NotFound(f"There is nothing at {path}.")
        case HTTPException(status_code=405):
            return MethodNotAllowed(f"{path} does not take {method}.")
        case HTTPException(status_code=413):
            return BodyTooLarge(exception.detail)
        case HTTPException(status_code=400):
            return BadRequest(f"The request cannot be read: {_unread(exception)}.")
        case HTTPException(status_code=status) if 400 <= status < 500:
            return Refused(f"The request is refused: {exception.detail}.", status)
        case _:
            return ServerError("The server failed on this request; its log says more.")


def _body_of(path: str) -> type[StrictRequest]:
    return VoteRequest if path.startswith("/studies/") else REQUESTS.get(path, GenerateRequest)


def parse(kind: type[Body], body: Mapping[str, Any]) -> Body:
    """Validates a body that did not come over HTTP. Raises InvalidField with the sentences of the routes."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _invalid([{**one, "loc": ("body", *one["loc"])} for one in error.errors()], "") from None


def error_json(error: ServerError, request_id: str) -> str:
    """{"error": {type, code, message, param, request_id}}, in ASCII, so that no text a client sent can break it."""
    return json.dumps({"error": error_detail(error, request_id)})


def error_detail(error: ServerError, request_id: str) -> dict[str, str | None]:
    """What `error` holds in a body or an event."""
    return {
        "type": error.type,
        "code": error.code,
        "message": _cut(error.message, MAX_MESSAGE),
        "param": None if error.param is None else _cut(error.param, MAX_PARAM),
        "request_id": request_id,
    }


def error_response(
    error: ServerError, request_id: str, headers: Mapping[str, str] | None = None, *, path: str = ""
) -> Response:
    """The HTTP response for an error; `path`: of the request, since some have OpenAI's status under /v1."""
    status = error.openai_status if error.openai_status is not None and path.startswith("/v1/") else error.status
    return Response(
        error_json(error, request_id),
        status_code=status,
        headers={**(headers or {}), **error.headers},
        media_type="application/json",
    )


def _unread(exception: HTTPException) -> str:
    """Why a body could not be parsed, which the framework's own sentence leaves out."""
    match exception.__cause__:
        case UnicodeDecodeError():
            return "its body is not JSON in UTF-8"
        case RecursionError():
            return "its JSON is nested too deeply"
        case ValueError():  # what is JSON, and yet more than Python reads
            return "its JSON holds a number with too many digits"
        case _:
            return exception.detail


def _invalid(problems: Sequence[Mapping[str, Any]], path: str) -> ServerError:
    first = problems[0]
    if first["type"] == "json_invalid":
        return BadRequest(f"The body is not JSON: {first['ctx']['error']}, at character {first['loc'][-1]}.")
    if tuple(first["loc"]) == ("body",):
        if first["type"] == "missing":
            return InvalidField("The request has no body; send a JSON object.")
        if first["type"] == "string_unicode":
            return InvalidField("The name of a field holds half of a surrogate pair, which is no character.")
        return InvalidField("The body must be a JSON object.")
    seen: dict[str, Mapping[str, Any]] = {}
    for problem in problems:
        # One sentence a field; of a field of several types the problem that went furthest into it.
        key = _param(_down_to_union(problem["loc"]))
        if key not in seen or _depth(problem) > _depth(seen[key]):
            seen[key] = problem
    described = list(seen.values())[:MAX_DESCRIBED]
    sentences = [_sentence(problem, path) for problem in described]
    if more := len(seen) - len(described):
        sentences.append(f"And {more} more.")
    extra = described[0]["type"] == "extra_forbidden"
    unsupported = extra and (path.startswith("/v1/") or _known(described[0]["loc"], path))
    kind = UnsupportedField if unsupported else InvalidField
    return kind(" ".join(sentences), param=_param(described[0]["loc"]))


def _known(loc: Sequence[str | int], path: str) -> KnownField | None:
    """The field of other servers at fault, where the route may be asked for such."""
    lenient = loc[0] == "body" and issubclass(_body_of(path), LenientRequest)
    return known_field(_parts(loc)) if lenient else None


def _depth(problem: Mapping[str, Any]) -> tuple[int, bool]:
    return len(problem["loc"]), problem["type"] not in WRONG_TYPE


def _param(loc: Sequence[str | int]) -> str:
    """("body", "messages", 0, "role") -> "messages.0.role"."""
    return ".".join(map(str, _parts(loc)))


def _parts(loc: Sequence[str | int]) -> list[str | int]:
    """Without where it was sent, and without the types that pydantic has tried."""
    where = list(loc[1:]) if loc[0] in ("body", "path", "query") else list(loc)
    above = len(_down_to_union(where))
    where = where[:-1] if where[-1:] == [KEY] else where
    where[above:] = [part for part in where[above:] if not (isinstance(part, str) and TYPE_NAME.search(part))]
    return where


def _down_to_union(loc: Sequence[str | int]) -> Sequence[str | int]:
    return next((loc[: index + 1] for index, part in enumerate(loc) if part in UNIONS), loc)


def _sentence(problem: Mapping[str, Any], path: str) -> str:
    param = _param(problem["loc"])
    if problem["type"] == "extra_forbidden":
        # Only short names are searched for: a long one is no misspelt field.
        fields = [*_body_of(path).model_fields] if problem["loc"][0] == "body" else ["version"]
        if known := _known(problem["loc"], path):
            return known.refusal(param, fields)
        close = difflib.get_close_matches(param, fields, n=1) if len(param) <= MAX_VALUE and "." not in param else []
        return f"There is no field {_short(param)}" + (f"; did you mean {close[0]!r}?" if close else ".")
    if problem["loc"][-1] == KEY:
        return f"{_short(param, quote=False)} is no id of a token, a whole number from 0 on."
    if problem["type"] == "string_unicode":
        return f"{_short(param, quote=False)} holds half of a surrogate pair, which is no character."
    if problem["type"] == "missing":
        return f"{param} is missing."
    if problem["type"] in ("string_too_short", "too_short"):  # every minimum here is 1
        return f"{param} must not be empty."
    if problem["type"] == "too_long":
        return f"{param} has too many items; at most {problem['ctx']['max_length']} are taken."
    if problem["type"] == "value_error":
        return f"{_short(param, quote=False)}: {str(problem['msg']).removeprefix('Value error, ')}."
    message = str(problem["msg"]).removeprefix("Input ")
    of_several = len(problem["loc"]) > len(_down_to_union(problem["loc"]))
    if of_several and problem["type"] in WRONG_TYPE and (kinds := UNIONS.get(param.rpartition(".")[2])):
        message = f"should be {kinds}"
    return f"{_short(param, quote=False)} {message}, not {_short(problem['input'])}."


def _short(value: object, *, quote: bool = True) -> str:
    """A client's value, cut to a length that fits into a message."""
    return _cut(repr(value) if quote else str(value), MAX_VALUE)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + "..."
