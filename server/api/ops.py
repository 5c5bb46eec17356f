"""Health, readiness, and the page at /."""

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from server.api.bodies import HealthBody, ReadyBody
from server.api.deps import ServiceOf
from server.api.home import page
from server.errors import EngineDown

router = APIRouter(tags=["operations"])


# A HEAD is a GET whose answer has no body; the server drops it.


@router.get("/healthz")
@router.head("/healthz", include_in_schema=False)
async def healthz() -> HealthBody:
    """The process answers."""
    return HealthBody()


@router.get("/readyz")
@router.head("/readyz", include_in_schema=False)
async def readyz(service: ServiceOf) -> ReadyBody:
    """The model is loaded and the engine takes requests; 503 with the reason where it does not."""
    if trouble := service.engine.trouble:
        raise EngineDown(f"Not ready: {trouble}.")
    active = service.registry.active
    return ReadyBody(model=service.model, checkpoint=active.label if active else None)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: ServiceOf) -> Response:
    """Counters, gauges and histograms, for Prometheus."""
    return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


@router.get("/", include_in_schema=False)
@router.head("/", include_in_schema=False)
async def home(request: Request, service: ServiceOf) -> HTMLResponse:
    """What runs here, and a request to copy."""
    active = service.registry.active
    return HTMLResponse(
        page(
            model=service.model,
            checkpoint=active.label if active else None,
            attributes=active.defaults if active else {},
            address=str(request.base_url),
        )
    )
