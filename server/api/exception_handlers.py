"""Every exception becomes a ServerError, and every ServerError the same JSON: {"error": {...}}."""

import difflib
import json
import re
import reprlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.api.openai.responses_schemas import ResponsesRequest
from server.api.openai.schemas import ChatCompletionRequest, CompletionRequest
from server.errors import (
    BodyTooLarge,
    InvalidField,
    MethodNotAllowed,
    NotFound,
    Refused,
    ServerError,
    UnsupportedField,
)
from server.fields import KnownField, known_field
from server.request_record import current_record
from server.schemas import (
    CompareRequest,
    DetokenizeRequest,
    GenerateRequest,
    JudgeRequest,
    LenientRequest,
    ScoreRequest,
    StrictRequest,
    TokenizeRequest,
    VersionRequest,
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
REQUESTS: Mapping[str, type[StrictRequest]] = {  # body by route; others: as `_body_of` says
    "/compare": CompareRequest,
    "/score": ScoreRequest,
    "/judge": JudgeRequest,
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatCompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
SHORT = reprlib.Repr()  # of what is cut afterwards, so that no more is written than will be shown
SHORT.maxlist, SHORT.maxdict, SHORT.maxstring = MAX_VALUE // 2, MAX_VALUE // 4, 2 * MAX_VALUE
KEY = "[key]"  # in a location: it is not the value that is wrong but its name
NO_OBJECT = ("dict_type", "model_type", "model_attributes_type")
OBJECTS = {"logit_bias": 'an object of biases by token id, as in {"42": -100}'}
WRONG_TYPE = ("string_type", "list_type")
TYPE_OF_VALUE = re.compile(r"^(Input|String|List|Dictionary) ")  # as pydantic begins its sentences
REQUEST_ID = "x-request-id"
JSON_TYPE = re.compile(r"application/([\w.-]+\+)?json")
TYPE_NAME = re.compile(r"^str$|^constrained-|\[")  # as pydantic writes the members of a union


def add_exception_handlers(app: FastAPI) -> None:
    """For what handlers and the framework raise; `RequestMiddleware` answers for the rest."""
    for kind in (ServerError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _handle)


async def _handle(request: Request, exception: Exception) -> Response:
    path = request.url.path
    error = to_server_error(exception, method=request.method, path=path)
    headers = exception.headers if isinstance(exception, HTTPException) else None
    return error_response(error, request.state.request_id, headers, path=path)


def not_json(request: Request) -> ServerError | None:
    """Why a body is not taken that does not call itself JSON."""
    given = request.headers.get("content-type", "")
    if JSON_TYPE.fullmatch(given.partition(";")[0].strip().lower()):
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
        case HTTPException(status_code=status) if 400 <= status < 500:
            return Refused(f"The request is refused: {exception.detail}.", status)
        case _:
            return ServerError("The server failed on this request; its log says more.")


def parse(kind: type[Body], body: Mapping[str, Any]) -> Body:
    """Validates a body that did not come over HTTP. Raises InvalidField with the sentences of the routes."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise invalid_body(error, "") from None


def invalid_body(error: ValidationError, path: str) -> ServerError:
    """For the client of a route, what its schema says of a body."""
    return _invalid([{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False)], path)


def new_request_id() -> str:
    return f"req-{secrets.token_hex(8)}"


def error_json(error: ServerError, request_id: str) -> str:
    """{"error": {type, code, message, param, request_id}}, in ASCII, so that no text a client sent can break it."""
    return json.dumps({"error": error_detail(error, request_id)})


def error_detail(error: ServerError, request_id: str) -> dict[str, str | None]:
    """What `error` holds in a body or an event. Whatever a client is told comes by here: the record has it, too."""
    current_record().outcome = error.type
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


def _invalid(problems: Sequence[Mapping[str, Any]], path: str) -> ServerError:
    first = problems[0]
    if tuple(first["loc"]) == ("body",):
        if first["type"] == "missing":
            return InvalidField("The request has no body; send a JSON object.")
        if first["type"] == "string_unicode":
            return InvalidField("The name of a field holds half of a surrogate pair, which is no character.")
        if first["type"] == "too_long":
            return InvalidField(f"The body has too many fields; at most {first['ctx']['max_length']} are taken.")
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


def _body_of(path: str) -> type[StrictRequest]:
    if path.startswith("/checkpoints/"):
        return VersionRequest
    return VoteRequest if path.startswith("/studies/") else REQUESTS.get(path, GenerateRequest)


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
        fields = _fields_beside(problem["loc"], path)
        if known := _known(problem["loc"], path):
            return known.refusal(param, fields)
        # Only short names are searched for: a long one is no misspelt field.
        name = param.rpartition(".")[2]
        close = difflib.get_close_matches(name, fields, n=1) if len(name) <= MAX_VALUE else []
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
    message = TYPE_OF_VALUE.sub("", str(problem["msg"]))
    of_several = len(problem["loc"]) > len(_down_to_union(problem["loc"]))
    if of_several and problem["type"] in WRONG_TYPE and (kinds := UNIONS.get(param.rpartition(".")[2])):
        message = f"should be {kinds}"
    if problem["type"] in NO_OBJECT:
        message = f"should be {OBJECTS.get(param, 'an object')}"
    return f"{_short(param, quote=False)} {message}, not {_short(problem['input'])}."


def _fields_beside(loc: Sequence[str | int], path: str) -> list[str]:
    """The fields of the object that has the field at `loc`; none where it may be one of several kinds."""
    if loc[0] != "body":
        return ["version"]
    kinds: list[type[BaseModel]] = [_body_of(path)]
    for part in _parts(loc)[:-1]:
        if isinstance(part, str):
            kinds = [kind for one in kinds if part in one.model_fields for kind in _models(one.model_fields[part])]
    return [*kinds[0].model_fields] if len(kinds) == 1 else []


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Those in a type, as in list[Message] | None."""
    annotation = getattr(annotation, "annotation", annotation)  # of a field
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _models(part)]


def _short(value: object, *, quote: bool = True) -> str:
    """A client's value, cut to a length that fits into a message; the rest of a long one is not looked at."""
    if isinstance(value, list | dict):
        return _cut(SHORT.repr(value), MAX_VALUE)
    start = value[: MAX_VALUE + 1] if isinstance(value, str) else value
    return _cut(repr(start) if quote else str(start), MAX_VALUE)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + "..."
