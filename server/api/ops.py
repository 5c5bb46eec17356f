"""Health, readiness, and the page at /."""

from fastapi import APIRouter
from starlette.responses import HTMLResponse

from server.api.bodies import HealthBody, ReadyBody
from server.api.deps import ServiceOf
from server.api.home import page
from server.errors import EngineDown

router = APIRouter(tags=["operations"])


@router.get("/healthz")
async def healthz() -> HealthBody:
    """The process answers."""
    return HealthBody()


@router.get("/readyz")
async def readyz(service: ServiceOf) -> ReadyBody:
    """The model is loaded and the engine takes requests; 503 with the reason where it does not."""
    if trouble := service.engine.trouble:
        raise EngineDown(f"Not ready: {trouble}.")
    active = service.registry.active
    return ReadyBody(model=service.model, checkpoint=active.label if active else None)


@router.get("/", include_in_schema=False)
async def home(service: ServiceOf) -> HTMLResponse:
    """What runs here, and a request to copy."""
    active = service.registry.active
    settings = service.settings
    return HTMLResponse(
        page(
            model=service.model,
            checkpoint=active.label if active else None,
            attributes=active.defaults if active else {},
            address=f"http://{settings.host}:{settings.port}",
        )
    )
