"""POST /generate, /compare and /score."""

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.api.answers import answered
from server.api.bodies import CompareResponse, GenerateResponse, ScoreResponse
from server.api.deps import ServiceOf
from server.api.keys import asks_key
from server.api.schemas import CompareRequest, GenerateRequest, ScoreRequest
from server.api.sse import STREAMS, event_stream

router = APIRouter(tags=["generate"], dependencies=[Depends(asks_key)])


@router.post("/generate", response_model=GenerateResponse, responses=STREAMS)
async def generate(body: GenerateRequest, request: Request, service: ServiceOf) -> Response:
    """Generate, steered by the attribute multipliers of this request; `baseline` adds the unsteered twin."""
    if body.stream:
        return event_stream(await service.stream(body.ask()), GenerateResponse.of, request)
    return await answered(request, service.generate(body.ask()), GenerateResponse.of)


@router.post("/compare", response_model=CompareResponse, responses=STREAMS)
async def compare(body: CompareRequest, request: Request, service: ServiceOf) -> Response:
    """Any number of arms from one reading of the prompt, each compared with the first."""
    if body.stream:
        return event_stream(await service.stream(body.ask()), CompareResponse.of, request)
    return await answered(request, service.generate(body.ask()), CompareResponse.of)


@router.post("/score", response_model=ScoreResponse)
async def score(body: ScoreRequest, request: Request, service: ServiceOf) -> Response:
    """The log-likelihood of given continuations, with the steering that a generation would get."""
    return await answered(request, service.score(body.ask()), ScoreResponse.of)
