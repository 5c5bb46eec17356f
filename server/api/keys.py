"""Who may do what: an API key for everything that a client does, an admin key for changing what is served."""

import hmac
from typing import Annotated

from fastapi import Depends
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from server.api.deps import ServiceOf
from server.config import Settings
from server.errors import Forbidden, Unauthorized

_bearer = HTTPBearer(auto_error=False, description="the server's API key or admin key, where it has one")
Given = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


def asks_key(service: ServiceOf, given: Given) -> None:
    """Raises Unauthorized without a key, where the server has an API key. The admin key is one as well."""
    settings = service.settings
    if settings.api_key is not None and not any(_matches(given, settings)):
        raise Unauthorized("This server asks for its API key: send 'Authorization: Bearer KEY'.")


def asks_admin_key(service: ServiceOf, given: Given) -> None:
    """The same for the admin key; a server that has none asks for its API key. Raises Unauthorized, Forbidden."""
    settings = service.settings
    if settings.admin_key is None:
        asks_key(service, given)
        return
    api, admin = _matches(given, settings)
    if admin:
        return
    if api:
        raise Forbidden("This changes what is served: it needs the admin key, not the API key.")
    raise Unauthorized("This changes what is served: send 'Authorization: Bearer ADMIN-KEY'.")


def _matches(given: HTTPAuthorizationCredentials | None, settings: Settings) -> list[bool]:
    """Whether it is the API key, and whether it is the admin key; in a time that tells nothing of either."""
    secret = (given.credentials if given else "").encode()
    keys = (settings.api_key, settings.admin_key)
    return [
        hmac.compare_digest(secret, key.get_secret_value().encode() if key else b"") and key is not None for key in keys
    ]
