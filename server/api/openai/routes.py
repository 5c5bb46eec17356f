"""GET /v1/models, POST /v1/completions, /v1/chat/completions and /v1/responses."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.api.body import BodyRoute
from server.api.deps import ServiceDep, require_api_key
from server.api.openai.formatting import Body, ChatFormatter, CompletionFormatter, OpenAIFormatter, stream_chunks
from server.api.openai.responses_formatting import ResponsesFormatter
from server.api.openai.responses_schemas import ResponseBody, ResponsesRequest
from server.api.openai.schemas import (
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    ModelBody,
    ModelList,
)
from server.api.responses import STREAMS, data_response, json_response, sse_response
from server.engine_client import CheckpointInfo
from server.errors import ServerError, UnknownModel
from server.service import Service

router = APIRouter(prefix="/v1", tags=["openai"], route_class=BodyRoute, dependencies=[Depends(require_api_key)])


@router.get("/models")
async def models(service: ServiceDep) -> ModelList:
    """The base model, which is unsteered, and every loaded checkpoint, which steers by its default multipliers."""
    loaded = (_checkpoint_model(one.label, one, service) for one in (await service.snapshot()).loaded)
    return ModelList(data=[_base_model(service), *loaded])


@router.get("/models/{name:path}")
async def model(name: str, service: ServiceDep) -> ModelBody:
    """One of them; a checkpoint's plain name means what it means in a request."""
    if name == service.model:
        return _base_model(service)
    if loaded := await service.find_checkpoint(name):
        return _checkpoint_model(name, loaded, service)
    raise UnknownModel(f"There is no model {name!r}; GET /v1/models lists those there are.", param="model")


@router.post("/completions", response_model=Completion, responses=STREAMS)
async def completions(body: CompletionRequest, request: Request, service: ServiceDep) -> Response:
    """Continue texts; with `echo` and `logprobs` also the log-probabilities of the given text under the steering."""
    formatter = CompletionFormatter(body, _head("cmpl", body.model, request), service.codec)
    return await _respond(formatter, body, request, service)


@router.post("/chat/completions", response_model=ChatCompletion, responses=STREAMS)
async def chat(body: ChatCompletionRequest, request: Request, service: ServiceDep) -> Response:
    """Answer in a conversation."""
    formatter = ChatFormatter(body, _head("chatcmpl", body.model, request), service.codec)
    return await _respond(formatter, body, request, service)


@router.post("/responses", response_model=ResponseBody, responses=STREAMS)
async def responses(body: ResponsesRequest, request: Request, service: ServiceDep) -> Response:
    """Answer a text or a conversation; nothing is stored."""
    request_id = request.state.request_id
    formatter = ResponsesFormatter(body, f"resp_{request_id}", int(time.time()), service.codec)
    params = body.to_params(service.model)
    with _named_as_in(body):
        if body.stream:
            return sse_response(formatter.events(await service.stream(params), request_id))
        return await json_response(request, service.generate(params), formatter.response)


@contextmanager
def _named_as_in(body: ResponsesRequest) -> Iterator[None]:
    """The service calls a conversation `messages`, and so do its errors; this body has another name for it."""
    try:
        yield
    except ServerError as error:
        error.param = body.field_of(error.param)
        raise


async def _respond(
    formatter: OpenAIFormatter[Body],
    body: CompletionRequest | ChatCompletionRequest,
    request: Request,
    service: Service,
) -> Response:
    params = body.to_params(service.model)
    if body.stream:
        return data_response(stream_chunks(await service.stream(params), formatter), request)
    return await json_response(request, service.generate(params), formatter.response)


def _head(kind: str, model: str, request: Request) -> dict[str, Any]:
    return {"id": f"{kind}-{request.state.request_id}", "created": int(time.time()), "model": model}


def _base_model(service: Service) -> ModelBody:
    facts = service.client.facts
    return ModelBody(id=service.model, created=facts.created, root=service.model, adapter=facts.adapter, attributes={})


def _checkpoint_model(name: str, loaded: CheckpointInfo, service: Service) -> ModelBody:
    return ModelBody(
        id=name,
        created=loaded.created,
        root=service.model,
        adapter=service.client.facts.adapter,
        attributes=dict(loaded.defaults),
    )
