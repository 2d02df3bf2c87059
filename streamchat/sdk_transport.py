"""httpx2's own HTTP behind the same interface as ours: for proxies, and for clients that a shop made itself.

Slower, by a helper for each body; every promise but speed is kept.
"""

from __future__ import annotations

import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any, cast
from urllib.parse import urlsplit

import httpx2

from .cancellation import Cancellation
from .loop import NEVER, Loop
from .transport import BODY, CURRENT, check_head, error_body

AHEAD_BYTES = 8192  # that the helper may hold and more is not asked for; as much as one read over our own transport


class RelayedBody(httpx2.SyncByteStream):
    """A body of any other transport, read in a helper, so that reads can time out.

    A read takes all that has come: one that joins pieces rests between its reads, and would fall behind else.
    """

    def __init__(
        self, loop: Loop, request: httpx2.Request, response: httpx2.Response, cancellation: Cancellation
    ) -> None:
        self._response = response
        self._pieces: list[bytes] = []
        self._size = 0
        self._changed = threading.Condition()
        self._ended = False
        self._failure: Exception | None = None
        self._closed = False
        # Of its own, so that the helper can drop it late: by then the answer may hold another connection.
        self._connection = Cancellation()
        # httpx2 looks when it begins to read. The limits of `read` are the caller's; this one breaks the stream.
        request.extensions.get("timeout", {})["read"] = None
        hold_stream(self._connection, response)
        cancellation.then(self.close)
        cancellation.drop()
        loop.spawn(self._pull)

    def _pull(self) -> None:
        try:
            for piece in cast(httpx2.SyncByteStream, self._response.stream):
                time.sleep(0)  # under gevent two that hand over to each other let nobody else run
                if not self._put(piece):
                    break
        except Exception as error:
            self._failure = error
        finally:
            self._connection.drop()  # first: a closed response's connection may be the next one's at once
            self._response.close()
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _put(self, piece: bytes) -> bool:
        """Waits for a place: a slow caller slows the upstream. False where nobody reads any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._size < AHEAD_BYTES or self._closed)
            if piece and not self._closed:
                self._pieces.append(piece)
                self._size += len(piece)
                self._changed.notify_all()
            return not self._closed

    def read(self, until: float) -> bytes | None:
        timeout = None if until == NEVER else max(0.0, until - time.monotonic())
        with self._changed:
            if not self._changed.wait_for(lambda: self._pieces or self._ended or self._closed, timeout):
                return None
            data = b"".join(self._pieces)
            self._pieces.clear()
            self._size = 0
            self._changed.notify_all()
        if not data and self._failure is not None:
            raise self._failure
        return data

    def __iter__(self) -> Iterator[bytes]:
        return error_body(self)

    def drain(self) -> None:
        """Its connections are not kept."""

    def close(self) -> None:
        """The helper closes the response; the shutdown wakes it where it waits for more. Never waits."""
        self._connection.end_connection()
        with self._changed:
            self._closed = True
            self._pieces.clear()
            self._size = 0
            self._changed.notify_all()


class SdkTransport(httpx2.HTTPTransport):
    """httpx2's own HTTP, for proxies; every socket is made known before a byte is sent on it."""

    def __init__(self, loop: Loop, most: int, proxy: str | None) -> None:
        # A connection is made known when it is made: none is used twice.
        super().__init__(proxy=proxy, limits=httpx2.Limits(max_connections=most, max_keepalive_connections=0))
        self._loop = loop

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        cancellation = CURRENT.get(None) or Cancellation()
        request.extensions = {**request.extensions, "trace": _Trace(cancellation)}
        response = super().handle_request(request)
        check_head(response)
        body = RelayedBody(self._loop, request, response, cancellation)
        return httpx2.Response(response.status_code, headers=response.headers, stream=body, extensions={BODY: body})


class _Trace:
    """httpcore2's trace extension: says when a connection stands."""

    def __init__(self, cancellation: Cancellation) -> None:
        self._cancellation = cancellation

    def __call__(self, name: str, info: dict[str, Any]) -> None:
        if name.endswith("connect_tcp.complete"):
            _hold(self._cancellation, info["return_value"])


def hold_stream(cancellation: Cancellation, response: httpx2.Response) -> None:
    """Makes the socket under a response known to a cancellation, where it has one."""
    try:
        _hold(cancellation, response.extensions.get("network_stream"))
    except OSError:  # no descriptor left
        response.close()
        raise


def _hold(cancellation: Cancellation, stream: Any) -> None:
    sock = stream.get_extra_info("socket") if stream is not None else None
    if sock is not None:
        cancellation.hold_duplicate(sock.fileno())


def proxy_of(url: str) -> str | None:
    """The proxy that the environment names for this URL."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"  # curl and others take a bare host and port
