"""One request to a server that lives only for it, without HTTP."""

import asyncio
from typing import Any, Literal

from server.api.bodies import CompareResponse, GenerateResponse
from server.api.problems import parse
from server.api.schemas import CompareRequest, GenerateRequest
from server.assembly import open_service
from server.config import Settings


def ask(
    settings: Settings, route: Literal["generate", "compare"], body: dict[str, Any]
) -> GenerateResponse | CompareResponse:
    """What the route would answer. Raises ServerError, with one sentence for what is wrong with the body."""
    request: GenerateRequest | CompareRequest = (
        parse(GenerateRequest, body) if route == "generate" else parse(CompareRequest, body)
    )
    service = open_service(settings)
    try:
        answer = asyncio.run(service.generate(request.ask()))
    finally:
        service.engine.stop()
    return GenerateResponse.of(answer) if route == "generate" else CompareResponse.of(answer)
