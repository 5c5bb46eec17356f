"""A proxy of the environment that stands between a client and a server on this machine or network."""

from ipaddress import ip_address
from socket import gethostname
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass


def proxy_hint(url: str) -> str | None:
    """Names the variable that sends requests for `url` through a proxy, and what keeps them from it. None without one.

    Reads the environment as httpx does.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        bypassed = bool(proxy_bypass(host))
    except (ValueError, OSError):
        return None
    proxies = getproxies()
    scheme = parts.scheme if parts.scheme in proxies else "all"
    if not host or bypassed or scheme not in proxies:
        return None
    proxy = urlsplit(proxies[scheme] if "//" in proxies[scheme] else f"//{proxies[scheme]}")
    where = f"{proxy.hostname}:{proxy.port}" if proxy.port else proxy.hostname  # without a password that may be in it
    local = " A server on this machine is not behind it:" if _is_local(host) else " If the server is not behind it,"
    return (
        f"{scheme.upper()}_PROXY is set in the environment, so that the request went through the proxy {where}."
        f"{local} set NO_PROXY={host}."
    )


def with_proxy_hint(said: str, url: str) -> str:
    """What went wrong, as a sentence, and after it the proxy that `proxy_hint` names."""
    sentence, hint = f"{said.strip().rstrip('.')}.", proxy_hint(url)
    return f"{sentence} {hint}" if hint else sentence


def _is_local(host: str) -> bool:
    if host in ("localhost", gethostname()):
        return True
    try:
        ip = ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return ip.is_loopback or ip.is_unspecified or ip.is_private
