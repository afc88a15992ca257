"""What a request has to pass before it is looked at: the name it calls the server by, and the key."""

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from megagpt.errors import ConfigError
from megagpt.serve.errors import ApiError

VARIABLE = "MEGAGPT_API_KEY"
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


def read_key(path: str | None, env: Mapping[str, str]) -> bytes | None:
    """The SHA-256 of the API key in the file or in MEGAGPT_API_KEY; None where there is neither. Raises ConfigError."""
    if path is None:
        key, where = env.get(VARIABLE), VARIABLE
        if key is None:
            return None
    else:
        where = path
        try:
            key = Path(path).read_text(encoding="ascii")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is not ASCII"
            raise ConfigError(f"the API key cannot be read from {path}: {reason}") from None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{where} holds no API key; put a word of letters and digits there: openssl rand -hex 32")
    return _digest(key.encode())


def is_loopback(address: str) -> bool:
    """Whether only this host reaches a socket that is bound to ``address``."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def check_key(headers: Mapping[str, str], key: bytes | None) -> None:
    """Raise ApiError with status 401 unless the request has the key of this SHA-256, or none is asked for."""
    if key is None:
        return
    scheme, _, given = headers.get("authorization", "").partition(" ")
    # Hashes are compared, in constant time, so that time tells nothing of the key, its length included.
    matches = hmac.compare_digest(_digest(given.strip().encode("latin-1", "replace")), key)
    if scheme.lower() != "bearer" or not matches:
        said = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
        raise ApiError(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class HostCheck:
    """Lets through what calls a server on loopback by a name of loopback.

    A page of a stranger whose name is made to mean 127.0.0.1 could otherwise read the answers in the user's browser
    (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, refuse) -> None:
        self.app, self._refuse = app, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "")
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
            if name.lower() not in _LOOPBACK_NAMES and not _is_loopback_address(name):
                error = ApiError(403, f"this server is localhost and not {name[:80]!r}; reach it by that name")
                await self._refuse(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _is_loopback_address(name: str) -> bool:
    try:
        return is_loopback(name.strip("[]"))
    except ValueError:
        return False
