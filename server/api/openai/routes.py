"""GET /v1/models, POST /v1/completions and /v1/chat/completions."""

import time
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.api.answers import answered
from server.api.deps import ServiceOf
from server.api.keys import asks_key
from server.api.openai.requests import ChatRequest, CompletionRequest
from server.api.openai.responses import ChatCompletion, Completion, ModelBody, ModelList
from server.api.openai.writers import ChatWriter, CompletionWriter, Whole, Writer, chunks
from server.api.sse import STREAMS, data_stream
from server.errors import UnknownModel
from server.registry import Loaded
from server.service import Service

router = APIRouter(prefix="/v1", tags=["openai"], dependencies=[Depends(asks_key)])


@router.get("/models")
def models(service: ServiceOf) -> ModelList:
    """The base model, which is unsteered, and every loaded checkpoint, which steers by its default multipliers."""
    loaded = (_body(one.label, one, service) for one in service.registry.loaded)
    return ModelList(data=[_base(service), *loaded])


@router.get("/models/{name:path}")
def model(name: str, service: ServiceOf) -> ModelBody:
    """One of them; a checkpoint's plain name means what it means in a request."""
    if name == service.model:
        return _base(service)
    if loaded := service.registry.known_as(name):
        return _body(name, loaded, service)
    raise UnknownModel(f"There is no model {name!r}; GET /v1/models lists those there are.", param="model")


@router.post("/completions", response_model=Completion, responses=STREAMS)
async def completions(body: CompletionRequest, request: Request, service: ServiceOf) -> Response:
    """Continue texts; with `echo` and `logprobs` also the log-probabilities of the given text under the steering."""
    return await _answered(CompletionWriter(body, _head("cmpl", body.model, request)), body, request, service)


@router.post("/chat/completions", response_model=ChatCompletion, responses=STREAMS)
async def chat(body: ChatRequest, request: Request, service: ServiceOf) -> Response:
    """Answer in a conversation."""
    return await _answered(ChatWriter(body, _head("chatcmpl", body.model, request)), body, request, service)


async def _answered(
    writer: Writer[Whole], body: CompletionRequest | ChatRequest, request: Request, service: Service
) -> Response:
    if body.stream:
        return data_stream(chunks(await service.stream(body.ask(service.model)), writer), request)
    return await answered(request, service.generate(body.ask(service.model)), writer.whole)


def _head(kind: str, model: str, request: Request) -> dict[str, Any]:
    return {"id": f"{kind}-{request.state.request_id}", "created": int(time.time()), "model": model}


def _base(service: Service) -> ModelBody:
    return ModelBody(id=service.model, created=service.created, root=service.model, attributes={})


def _body(name: str, loaded: Loaded, service: Service) -> ModelBody:
    return ModelBody(id=name, created=loaded.created, root=service.model, attributes=loaded.defaults)
