"""The port that a server listens at. Nothing here imports the model's libraries: that it is taken is said at once."""

import errno
import logging
import socket
from ipaddress import ip_address
from typing import Any

from server.config import Settings
from server.errors import StartupError

log = logging.getLogger(__name__)
BACKLOG = 2048  # connections that wait to be taken, as uvicorn has it
# After the drain:
LAST_WORDS_S = 0.5  # for clients to read that their request has failed
FORCED_S = 1.5  # the end of the process


def listen(settings: Settings) -> socket.socket:
    """A bound socket; it takes connections once the server runs. Raises StartupError."""
    where = f"{settings.host} port {settings.port}"
    try:
        bound = _bind(settings.host, settings.port)
    except (OSError, UnicodeError) as error:  # the second for a host that no name may be
        raise _cannot_listen(where, error) from error
    if not settings.asks_for_key and not ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback:
        log.warning(
            "%s can be reached from other machines, and the server asks nobody for a key: set MATSTEER_API_KEY", where
        )
    return bound


def _cannot_listen(where: str, error: Exception) -> StartupError:
    why = error.strerror if isinstance(error, OSError) else error
    advice = ""
    if isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.EACCES):
        taken = error.errno == errno.EADDRINUSE
        advice = " Another server has this port: stop it, or choose" if taken else " Choose"
        advice += " another port with --port (MATSTEER_PORT); for make serve: `make serve PORT=8001`."
    return StartupError(f"The server cannot listen on {where}: {why}.{advice}")


def address_of(bound: socket.socket) -> str:
    """The URL at which a browser on this machine finds the server."""
    host, port = bound.getsockname()[:2]
    ip = ip_address(host.partition("%")[0])
    if ip.is_unspecified:  # all addresses: a browser can open none of that name
        host = "127.0.0.1" if ip.version == 4 else "::1"
    return f"http://[{host}]:{port}" if ip.version == 6 else f"http://{host}:{port}"


def _bind(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    return _bound(socket.socket(family, kind, protocol), address)


def _bound(made: socket.socket, address: Any) -> socket.socket:
    try:
        # Otherwise closed connections of a server that has just stopped block the address for a minute.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


def bind_again(bound: socket.socket) -> socket.socket:
    """One more socket at the same address: the system spreads new connections over all that listen. Raises
    StartupError."""
    try:
        made = socket.socket(bound.family, bound.type, bound.proto)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        return _bound(made, bound.getsockname())
    except (OSError, AttributeError) as error:  # the second where the system has no such option
        raise _cannot_listen(address_of(bound), error) from error


def claim(bound: socket.socket) -> None:
    """Listens. Raises StartupError where another server had bound the port as well, and was faster."""
    try:
        bound.listen(BACKLOG)
    except OSError as error:  # uvloop would say nothing
        raise _cannot_listen(address_of(bound), error) from error
