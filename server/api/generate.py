"""POST /generate."""

from fastapi import APIRouter, Request
from starlette.responses import StreamingResponse

from server.api.bodies import GenerateResponse
from server.api.deps import ServiceOf
from server.api.disconnect import unless_gone
from server.api.schemas import GenerateRequest
from server.api.sse import event_stream

router = APIRouter(tags=["generate"])


@router.post("/generate", response_model=GenerateResponse)
async def generate(body: GenerateRequest, request: Request, service: ServiceOf) -> GenerateResponse | StreamingResponse:
    """Generate, steered by the attribute multipliers of this request; `baseline` adds the unsteered twin."""
    if body.stream:
        return event_stream(await service.stream(body.ask()), request)
    return GenerateResponse.of(await unless_gone(request, service.generate(body.ask())))
