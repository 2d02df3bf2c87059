"""What every view of the blueprint shares: its mount, its errors, its headers, and streams as WSGI responses.

With views, reading and probing the only file that touches `request` and `Response`. The generators it hands out use
neither.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

from flask import Response, current_app, request, stream_with_context
from werkzeug.datastructures import Headers
from werkzeug.exceptions import HTTPException

from .access import SITE_HEADERS, check_site, cors_headers, from_abort, preflight_headers
from .dialects import Dialect
from .encoders import Encoder
from .errors import CallerGone, Interrupted, StreamChatError
from .hangup import Caller
from .mount import Mount

EXTENSION = "streamchat"
# In the WSGI environ: the answer of this request, for its teardown; headers that each response of this request has.
ANSWER = "streamchat.answer"
HEADERS = "streamchat.headers"

# Each keeps one hop from holding pieces back, or a browser from guessing what it reads.
STREAM_HEADERS = {
    "X-Accel-Buffering": "no",
    "Cache-Control": "no-cache, no-transform",
    "X-Content-Type-Options": "nosniff",
    "Content-Encoding": "identity",
}
ERROR_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class StreamResponse(Response):
    """A response that no extension may swallow whole.

    `.data` in an after_request function would read the stream to its end: it raises instead. Flask-Compress would hold
    pieces back: it leaves a response alone that names an encoding, and the name is taken off on the way out.
    """

    implicit_sequence_conversion = False

    def get_wsgi_headers(self, environ: Any) -> Headers:
        headers = super().get_wsgi_headers(environ)
        if headers.get("Content-Encoding") == "identity":
            del headers["Content-Encoding"]
        return headers


class Told(Protocol):
    """An Answer or a Replay."""

    def stream(self) -> Iterator[bytes]: ...

    def close(self, error: StreamChatError | None = None) -> None: ...


def current_mount() -> Mount:
    return cast(Mount, current_app.extensions[EXTENSION][request.blueprint])


def in_dialect(dialect: Dialect, view: Callable[[Mount, str, Dialect], Response]) -> Response:
    mount = current_mount()
    answer_id = mount.make_id()
    headers = request.environ[HEADERS] = {"X-Response-Id": answer_id}
    try:
        origin = check_site(_named(SITE_HEADERS), request.host, mount.settings.origins)
        headers.update(cors_headers(origin))
        return _preflight(origin) if request.method == "OPTIONS" else view(mount, answer_id, dialect)
    except StreamChatError as error:
        return told(mount, error, headers["X-Response-Id"], dialect)
    except HTTPException as exception:
        aborted = from_abort(exception)
        if aborted is None:
            raise
        return told(mount, aborted, headers["X-Response-Id"], dialect)


def _named(names: Sequence[str]) -> dict[str, str]:
    """Those of the request's headers that it has: reading all of them costs more."""
    return {name: request.headers[name] for name in names if name in request.headers}


def _preflight(origin: str | None) -> Response:
    methods = request.url_rule.methods if request.url_rule is not None else None
    response = Response(status=204, headers=preflight_headers(origin, "GET" if "GET" in (methods or ()) else "POST"))
    del response.headers["Content-Type"]  # of nothing: WSGI forbids it
    return response


def identify(response: Response) -> Response:
    """Every response has an id: the shop's own pages for an abort or a bug too."""
    response.headers.update(request.environ.get(HEADERS) or {"X-Response-Id": current_mount().make_id()})
    return response


def streamed(answer: Told, encoder: Encoder, headers: dict[str, str]) -> Response:
    body = answer.stream()
    try:
        next(body)  # waits until the status is decided, and arms the generator's cleanup
    except StreamChatError as error:
        answer.close(error)
        raise
    except BaseException:
        answer.close(Interrupted())
        raise
    response = _response(body, encoder, headers)
    response.call_on_close(answer.close)
    # An after_request function may drop the response, and no close() comes: then its end is the end of the answer.
    weakref.finalize(response, answer.close).atexit = False
    return response


def _response(body: Iterator[bytes], encoder: Encoder, own: dict[str, str]) -> Response:
    if encoder.whole:
        response = Response(b"".join(body), content_type=encoder.content_type, headers=ERROR_HEADERS | own)
        written = current_mount().process.live.attend(Caller.from_environ(request.environ))
        response.call_on_close(written)
        weakref.finalize(response, written).atexit = False
        return response
    headers = STREAM_HEADERS | encoder.headers | own
    return StreamResponse(stream_with_context(body), content_type=encoder.content_type, headers=headers)


def told(mount: Mount, error: StreamChatError, answer_id: str, dialect: Dialect) -> Response:
    if isinstance(error, CallerGone):
        Caller.from_environ(request.environ).hang_up()  # one that only half closed must see no end either
        return Response(status=error.status)
    words = mount.error_text(error, request.accept_languages.best)
    document, content_type = dialect.tell(error, words, answer_id)
    response = Response(json.dumps(document) + "\n", error.status, ERROR_HEADERS, content_type=content_type)
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"  # RFC 9110 11.6.1 asks for it
    return response


def teardown(exception: BaseException | None) -> None:
    """Where an after_request function raised, the response is dropped unseen: the answer ends here."""
    answer = request.environ.get(ANSWER)
    if exception is not None and answer is not None:
        answer.close(Interrupted())
