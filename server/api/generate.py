"""POST /generate, /compare and /score."""

from fastapi import APIRouter, Depends, Request
from starlette.responses import StreamingResponse

from server.api.bodies import CompareResponse, GenerateResponse, ScoreResponse
from server.api.deps import ServiceOf
from server.api.disconnect import unless_gone
from server.api.keys import asks_key
from server.api.schemas import CompareRequest, GenerateRequest, ScoreRequest
from server.api.sse import STREAMS, event_stream

router = APIRouter(tags=["generate"], dependencies=[Depends(asks_key)])


@router.post("/generate", response_model=GenerateResponse, responses=STREAMS)
async def generate(body: GenerateRequest, request: Request, service: ServiceOf) -> GenerateResponse | StreamingResponse:
    """Generate, steered by the attribute multipliers of this request; `baseline` adds the unsteered twin."""
    if body.stream:
        return event_stream(await service.stream(body.ask()), GenerateResponse.of, request)
    return GenerateResponse.of(await unless_gone(request, service.generate(body.ask())))


@router.post("/compare", response_model=CompareResponse, responses=STREAMS)
async def compare(body: CompareRequest, request: Request, service: ServiceOf) -> CompareResponse | StreamingResponse:
    """Any number of arms from one reading of the prompt, each compared with the first."""
    if body.stream:
        return event_stream(await service.stream(body.ask()), CompareResponse.of, request)
    return CompareResponse.of(await unless_gone(request, service.generate(body.ask())))


@router.post("/score")
async def score(body: ScoreRequest, request: Request, service: ServiceOf) -> ScoreResponse:
    """The log-likelihood of given continuations, with the steering that a generation would get."""
    return ScoreResponse.of(await unless_gone(request, service.score(body.ask())))
