"""What handlers depend on: the service, and the keys that a request needs."""

import hmac
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from server.config import Settings
from server.errors import Forbidden, Unauthorized
from server.service import Service


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(_service)]
_bearer = HTTPBearer(auto_error=False, description="the server's API key or admin key, where it has one")
credentials_of = _bearer.__call__
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def require_api_key(service: ServiceDep, credentials: Credentials) -> None:
    """For what clients do. The admin key is good for it, too. Raises Unauthorized."""
    settings = service.settings
    if settings.api_key is not None and not any(_matches(credentials, settings)):
        raise Unauthorized("This server asks for its API key: send 'Authorization: Bearer KEY'.")


def require_admin_key(service: ServiceDep, credentials: Credentials) -> None:
    """For changes of what is served; without an admin key the API key is enough. Raises Unauthorized, Forbidden."""
    settings = service.settings
    if settings.admin_key is None:
        require_api_key(service, credentials)
        return
    api, admin = _matches(credentials, settings)
    if admin:
        return
    if api:
        raise Forbidden("This changes what is served: it needs the admin key, not the API key.")
    raise Unauthorized("This changes what is served: send 'Authorization: Bearer ADMIN-KEY'.")


def _matches(credentials: HTTPAuthorizationCredentials | None, settings: Settings) -> list[bool]:
    """Whether they are the API key, and whether the admin key; compared in constant time."""
    secret = (credentials.credentials if credentials else "").encode()
    keys = (settings.api_key, settings.admin_key)
    return [
        hmac.compare_digest(secret, key.get_secret_value().encode() if key else b"") and key is not None for key in keys
    ]
