"""POST /generate."""

from fastapi import APIRouter, Request

from server.api.bodies import GenerateResponse
from server.api.deps import ServiceOf
from server.api.disconnect import unless_gone
from server.api.schemas import GenerateRequest

router = APIRouter(tags=["generate"])


@router.post("/generate")
async def generate(body: GenerateRequest, request: Request, service: ServiceOf) -> GenerateResponse:
    """Generate, steered by the attribute multipliers of this request; `baseline` adds the unsteered twin."""
    return GenerateResponse.of(await unless_gone(request, service.generate(body.ask())))
