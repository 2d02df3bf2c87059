"""Who may ask: bearer tokens, pages of other sites, and what a shop's hook aborts with. Plain values; no Flask."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit

from werkzeug.exceptions import HTTPException

from .errors import (
    Forbidden,
    InvalidRequest,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    StreamChatError,
    TooManyStreams,
    Unauthorized,
    UnsupportedMediaType,
)

SITE_HEADERS = ("Sec-Fetch-Site", "Origin")
DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def user_of_token(header: str | None, tokens: tuple[tuple[str | None, str], ...]) -> str:
    """The user id that an Authorization header's bearer token (RFC 6750) stands for: its name, or a part of its hash.

    Every token is compared, each in constant time. Raises Unauthorized.
    """
    scheme, _, given = (header or "").partition(" ")
    found = None
    for name, token in tokens:
        if hmac.compare_digest(given.strip().encode(), token.encode()) and scheme.lower() == "bearer":
            found = name or f"token-{hashlib.sha256(token.encode()).hexdigest()[:8]}"
    if found is None:
        raise Unauthorized
    return found


def check_site(headers: Mapping[str, str], host: str, allowed: tuple[str, ...]) -> str | None:
    """The origin of another site's page that may ask, or None where no other site is involved.

    Browsers say where a request comes from by Sec-Fetch-Site; older ones by Origin alone, whose host is compared with
    Host but not its scheme, since TLS may end at nginx. Raises Forbidden.
    """
    site, origin = (headers.get(name) for name in SITE_HEADERS)
    if origin is not None and origin.lower() in allowed:
        return origin
    if site is not None:
        same = site in ("same-origin", "none")
    else:
        same = origin is None or _is_host(origin, host)
    if not same:
        raise Forbidden("Pages of other sites may not ask here: STREAMCHAT_ORIGINS lists those that may.")
    return None


def _is_host(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    default = DEFAULT_PORTS.get(parts.scheme, "")
    return bool(parts.netloc) and _without(parts.netloc, default) == _without(host, default)


def _without(netloc: str, port: str) -> str:
    return netloc.lower().removesuffix(port) if port else netloc.lower()


def cors_headers(origin: str | None) -> dict[str, str]:
    """What a listed origin's page needs in order to read the answer (Fetch standard, 3.2)."""
    if origin is None:
        return {}
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Credentials": "true",
        "Access-Control-Expose-Headers": (
            "X-Response-Id, X-Stream-Resumable, Idempotency-Replayed, Retry-After, Location"
        ),
        "Vary": "Origin",
    }


def preflight_headers(origin: str | None, method: str = "POST") -> dict[str, str]:
    """The answer to a page's OPTIONS before its request."""
    allowed = f"{method}, OPTIONS"
    if origin is None:
        return {"Allow": allowed}
    return cors_headers(origin) | {
        "Allow": allowed,
        "Access-Control-Allow-Methods": allowed,
        "Access-Control-Allow-Headers": (
            "Authorization, Content-Type, Accept, X-CSRFToken, Last-Event-ID, Idempotency-Key"
        ),
        "Access-Control-Max-Age": "600",
    }


# What a shop's hook raises by flask.abort() is told in our words, with our code.
ABORTED: dict[int, type[StreamChatError]] = {
    error.status: error
    for error in (
        InvalidRequest,
        Unauthorized,
        Forbidden,
        NotFound,
        PayloadTooLarge,
        UnsupportedMediaType,
        TooManyStreams,
        Overloaded,
    )
}


def from_abort(exception: HTTPException) -> StreamChatError | None:
    """Our error for an abort() of a status that we have a code for; None where the shop's own page is meant."""
    kind = ABORTED.get(exception.code or 0)
    if kind is None or exception.response is not None:
        return None
    retry_after = getattr(exception, "retry_after", None)
    return kind(retry_after=retry_after if isinstance(retry_after, int) else None)
