"""What the SDK and the HTTP under it raise becomes one of our errors; the upstream's words end here.

Facts for on-call stay in the trail: a status, a request id, a code word.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

import httpx2
import openai

from .decoder import error_kind, public_code
from .errors import (
    Interrupted,
    Overloaded,
    StreamChatError,
    UpstreamAuth,
    UpstreamError,
    UpstreamFailure,
    UpstreamIncomplete,
    UpstreamMalformed,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from .ledger import Trail

_SAFE_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")

BY_STATUS: dict[int, type[UpstreamFailure]] = {
    401: UpstreamAuth,
    403: UpstreamAuth,
    408: UpstreamError,
    409: UpstreamError,
    429: UpstreamRateLimited,
}
# What lies under the SDK's connection error; the first that fits.
BY_CAUSE: tuple[tuple[type[BaseException], type[StreamChatError]], ...] = (
    (httpx2.PoolTimeout, Overloaded),
    (httpx2.ConnectTimeout, UpstreamUnreachable),
    (httpx2.TimeoutException, UpstreamTimeout),
    (httpx2.LocalProtocolError, UpstreamAuth),  # a key that cannot stand in a header
    (httpx2.RemoteProtocolError, UpstreamIncomplete),
    (httpx2.ReadError, UpstreamIncomplete),
    (httpx2.WriteError, UpstreamIncomplete),
    (httpx2.HTTPError, UpstreamUnreachable),
    (OSError, UpstreamUnreachable),
    (ValueError, UpstreamAuth),  # the SDK refuses headers so
)
_CUT = re.compile("ended|clos|disconnect")  # how h11, httpcore2 and we word a connection that ended too soon


def translate(error: Exception, trail: Trail) -> StreamChatError:
    """The one place where foreign exceptions become ours. Their words are dropped."""
    if isinstance(error, openai.APIStatusError):
        return from_status(error.status_code, error.response.headers, error.body, trail)
    cause = error.__cause__ if isinstance(error, openai.APIConnectionError) and error.__cause__ else error
    kind = next((kind for foreign, kind in BY_CAUSE if isinstance(cause, foreign)), Interrupted)
    if isinstance(cause, httpx2.RemoteProtocolError) and not _CUT.search(str(cause)):
        kind = UpstreamMalformed
    return kind()


def from_status(status: int, headers: Mapping[str, str], error: object, trail: Trail) -> UpstreamFailure:
    """The failure that an HTTP status other than 2xx means; `error` is the error object of its body, if it has one."""
    trail.status = status
    trail.request_id = safe_id(headers)
    trail.code = public_code(error)
    otherwise = BY_STATUS.get(status) or (UpstreamRejected if status < 500 else UpstreamError)
    kind = otherwise if otherwise is UpstreamAuth else error_kind(error, otherwise)
    return kind(retry_after=_retry_after(headers))


def error_of(body: bytes) -> object:
    """The error object in the body of a failed request, as the SDK takes it out; None where there is none."""
    try:
        document = json.loads(body)
    except ValueError:  # UnicodeDecodeError is one
        return None
    return document.get("error", document) if isinstance(document, dict) else document


def _retry_after(headers: Mapping[str, str]) -> int | None:
    """Seconds out of Retry-After (RFC 9110 10.2.3: a number or a date), rounded up; None where it says nothing."""
    value = headers.get("retry-after", "")
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        seconds = float(value) if value[:1].isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
        return max(0, min(86_400, int(-(-seconds // 1))))
    return None


def safe_id(headers: Mapping[str, str]) -> str | None:
    value = headers.get("x-request-id", "")
    return value if _SAFE_ID.fullmatch(value) else None
