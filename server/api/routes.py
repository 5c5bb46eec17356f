"""The native routes: generation, checkpoints, tokens, operations."""

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

from server import formatting
from server.api.body import BodyRoute
from server.api.deps import ChangesDep, ServiceDep, require_admin_key, require_api_key
from server.api.responses import STREAMS, event_response, json_response, to_json
from server.engine_client import CheckpointEntry, EngineSnapshot, why_none_is_active
from server.errors import EngineDown, UnknownCheckpoint
from server.formatting import Formatter
from server.schemas import (
    CheckpointListBody,
    CheckpointVersionsBody,
    CompareRequest,
    CompareResponse,
    DetokenizeBody,
    DetokenizeRequest,
    GenerateRequest,
    GenerateResponse,
    HealthBody,
    JudgeRequest,
    JudgeResponse,
    LoadedBody,
    ReadyBody,
    ScoreRequest,
    ScoreResponse,
    TokenizeBody,
    TokenizeRequest,
    TokenizerInfoBody,
    UnloadedBody,
    VersionRequest,
)
from server.service import Service

NONE_IS_ACTIVE = "No checkpoint is active: requests that name none are not steered. GET /checkpoints tells more."
READS, CHANGES = [Depends(require_api_key)], [Depends(require_admin_key)]
generation = APIRouter(tags=["generate"], route_class=BodyRoute, dependencies=READS)
checkpoints = APIRouter(prefix="/checkpoints", tags=["checkpoints"], route_class=BodyRoute)
tokens = APIRouter(tags=["tokens"], route_class=BodyRoute, dependencies=READS)
operations = APIRouter(tags=["operations"])


@generation.post("/generate", response_model=GenerateResponse, responses=STREAMS)
async def generate(body: GenerateRequest, request: Request, service: ServiceDep) -> Response:
    """Generate, steered by the attribute multipliers of this request; `baseline` adds the unsteered answer."""
    formatter, params = Formatter(service.codec), body.to_params()
    if body.stream:
        return event_response(await service.stream(params), formatter.token, formatter.generate_response, request)
    return await json_response(request, service.generate(params), formatter.generate_response)


@generation.post("/compare", response_model=CompareResponse, responses=STREAMS)
async def compare(body: CompareRequest, request: Request, service: ServiceDep) -> Response:
    """Any number of arms from one reading of the prompt, each compared with the first."""
    formatter, params = Formatter(service.codec), body.to_params()
    if body.stream:
        return event_response(await service.stream(params), formatter.token, formatter.compare_response, request)
    return await json_response(request, service.generate(params), formatter.compare_response)


@generation.post("/score", response_model=ScoreResponse)
async def score(body: ScoreRequest, request: Request, service: ServiceDep) -> Response:
    """The log-likelihood of given continuations, with the steering that a generation would get."""
    return await json_response(request, service.score(body.to_params()), Formatter(service.codec).score_response)


@generation.post("/judge")
async def judge(body: JudgeRequest, service: ServiceDep) -> JudgeResponse:
    """What the server's judge says of texts as answers to a prompt: of the embedded demo, its exact oracle."""
    return JudgeResponse(verdicts=await service.verdicts(body.prompt, body.texts))


@checkpoints.get("", dependencies=READS, name="checkpoints", response_model=CheckpointListBody)
async def list_checkpoints(request: Request, service: ServiceDep) -> Response:
    """Every complete checkpoint folder: which are loaded, which is active, which cannot be loaded and why."""

    async def listed() -> tuple[list[CheckpointEntry], EngineSnapshot]:
        return await service.checkpoints(), await service.snapshot()

    def body(found: tuple[list[CheckpointEntry], EngineSnapshot]) -> CheckpointListBody:
        entries, active = found[0], found[1].active
        return CheckpointListBody(
            active=active.label if active else None,
            checkpoints=list(map(formatting.checkpoint, entries)),
            note=None if active else why_none_is_active(entries),
        )

    return await json_response(request, listed(), body)


@checkpoints.get("/{name}", dependencies=READS, response_model=CheckpointVersionsBody)
async def checkpoint(name: str, request: Request, service: ServiceDep) -> Response:
    """Every version of one checkpoint, with how it was trained and evaluated."""

    def body(entries: list[CheckpointEntry]) -> CheckpointVersionsBody:
        if not entries:
            raise UnknownCheckpoint(f"There is no checkpoint {name!r}.", param="name")
        return CheckpointVersionsBody(name=name, versions=list(map(formatting.checkpoint_detail, entries)))

    return await json_response(request, service.checkpoints(name), body)


@checkpoints.post("/{name}/load", dependencies=CHANGES)
async def load(name: str, changes: ChangesDep, body: VersionRequest | None = None) -> LoadedBody:
    """Load a version (absent: the newest) as its folder is now. Requests that run finish on what they began with."""
    return formatting.loaded(await changes.reload(name, body.version if body else None))


@checkpoints.post("/{name}/activate", dependencies=CHANGES)
async def activate(name: str, changes: ChangesDep, body: VersionRequest | None = None) -> LoadedBody:
    """The same, and requests that name no checkpoint get it from now on."""
    return formatting.loaded(await changes.reload(name, body.version if body else None, activate=True))


@checkpoints.delete("/{name}", dependencies=CHANGES)
async def unload(name: str, changes: ChangesDep, query: Annotated[VersionRequest, Query()]) -> UnloadedBody:
    """Take a version (absent: all) out of the device's memory; the folder stays, and a request loads it again."""
    return UnloadedBody(unloaded=await changes.unload(name, query.version))


@tokens.post("/tokenize", response_model=TokenizeBody)
async def tokenize(body: TokenizeRequest, service: ServiceDep) -> Response:
    """The tokens of a text or a conversation: those that a request to generate from it would have."""

    def answer(ids: tuple[int, ...]) -> bytes:
        return to_json(partial(formatting.tokenized, service.codec, names=bool(body.return_token_strs)), ids)

    return Response(await service.tokenize(body.to_params(), body.model, answer), media_type="application/json")


@tokens.post("/detokenize")
async def detokenize(body: DetokenizeRequest, service: ServiceDep) -> DetokenizeBody:
    """The text of tokens, special ones included."""
    return DetokenizeBody(prompt=await service.detokenize(body.tokens, body.model))


@tokens.get("/tokenizer_info")
def tokenizer_info(service: ServiceDep) -> TokenizerInfoBody:
    """The tokenizer's special tokens and its chat template."""
    return formatting.tokenizer_info(service.codec)


# A HEAD is a GET whose body the server drops.
@operations.get("/healthz")
@operations.head("/healthz", include_in_schema=False)
async def healthz() -> HealthBody:
    """The process answers."""
    return HealthBody()


@operations.get("/health")
@operations.head("/health", include_in_schema=False)
async def health(service: ServiceDep) -> HealthBody:
    """The engine takes requests, as vLLM's route of this name says it; 503 with the reason where it does not."""
    await _ready(service)
    return HealthBody()


@operations.get("/readyz")
@operations.head("/readyz", include_in_schema=False)
async def readyz(service: ServiceDep) -> ReadyBody:
    """The model is loaded and the engine takes requests; 503 with the reason where it does not."""
    active = (await _ready(service)).active
    return ReadyBody(
        model=service.model, checkpoint=active.label if active else None, note=None if active else NONE_IS_ACTIVE
    )


async def _ready(service: Service) -> EngineSnapshot:
    """Raises EngineDown where no request can be served."""
    now = await service.snapshot()
    if now.trouble:
        raise EngineDown(f"Not ready: {now.trouble}.")
    return now


@operations.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: ServiceDep) -> Response:
    """Counters, gauges and histograms, for Prometheus."""
    return Response(service.metrics.exposition(await service.snapshot()), media_type=CONTENT_TYPE_LATEST)
