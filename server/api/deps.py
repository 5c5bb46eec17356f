"""What handlers depend on: the service, and the keys that a request needs."""

from typing import Annotated, Protocol

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from server.engine_client import CheckpointInfo
from server.errors import Forbidden, Unauthorized
from server.keys import ApiKey
from server.request_record import current_record
from server.service import Service


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


class Changes(Protocol):
    """What changes the loaded checkpoints: the service, or what makes the same change on all replicas of it."""

    async def reload(self, name: str, version: str | None, *, activate: bool = False) -> CheckpointInfo: ...

    async def unload(self, name: str, version: str | None) -> list[str]: ...


def _changes(request: Request) -> Changes:
    changes: Changes = request.app.state.changes
    return changes


ServiceDep = Annotated[Service, Depends(_service)]
ChangesDep = Annotated[Changes, Depends(_changes)]
_bearer = HTTPBearer(auto_error=False, description="the server's API key or admin key, where it has one")
credentials_of = _bearer.__call__
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


# Coroutines, since FastAPI calls functions on threads, and those may all be busy.
async def require_api_key(service: ServiceDep, credentials: Credentials) -> None:
    """For what clients do. An admin key is good for it, too. Raises Unauthorized."""
    if _find(service, credentials) is None and service.keys.asked:
        raise Unauthorized("This server asks for its API key: send 'Authorization: Bearer KEY'.")


async def require_admin_key(service: ServiceDep, credentials: Credentials) -> None:
    """For changes of what is served; where there has never been an admin key, any API key is enough.

    Raises Unauthorized, Forbidden.
    """
    if not service.keys.needs_admin:
        await require_api_key(service, credentials)
        return
    key = _find(service, credentials)
    if key is None:
        raise Unauthorized("This changes what is served: send 'Authorization: Bearer ADMIN-KEY'.")
    if not service.keys.has_admin:
        raise Forbidden(
            "This changes what is served: it needs an admin key, and the server's file of API keys has none any more; "
            "give one of them 'admin = true'."
        )
    if not key.admin:
        raise Forbidden("This changes what is served: it needs the admin key, not the API key.")


def _find(service: Service, credentials: HTTPAuthorizationCredentials | None) -> ApiKey | None:
    """Whose the credentials are; the request's record knows it from now on."""
    key = service.keys.find(credentials.credentials) if credentials else None
    current_record().key = key
    return key
