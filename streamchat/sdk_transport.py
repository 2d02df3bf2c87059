"""httpx2's own HTTP behind the same interface as ours: for proxies, and for clients that a shop made itself.

Slower, by a helper for each body; every promise but speed is kept.
"""

from __future__ import annotations

import contextlib
import queue
import time
import urllib.request
from collections.abc import Iterator
from typing import Any, cast
from urllib.parse import urlsplit

import httpx2

from .cancellation import Cancellation
from .loop import NEVER, Loop
from .transport import BODY, CURRENT, check_head, error_body


class RelayedBody(httpx2.SyncByteStream):
    """A body of any other transport, read in a helper and handed over piece by piece, so that reads can time out."""

    def __init__(
        self, loop: Loop, request: httpx2.Request, response: httpx2.Response, cancellation: Cancellation
    ) -> None:
        self._response = response
        self._pieces: queue.Queue[bytes | Exception] = queue.Queue(maxsize=4)  # a slow caller slows the upstream
        self._end: bytes | Exception | None = None
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
        last: bytes | Exception = b""
        try:
            for piece in cast(httpx2.SyncByteStream, self._response.stream):
                if piece:
                    time.sleep(0)  # under gevent two that hand over through a queue let nobody else run
                    self._put(piece)
        except Exception as error:
            last = error
        finally:
            self._connection.drop()  # first: a closed response's connection may be the next one's at once
            self._response.close()
            self._put(last)

    def _put(self, piece: bytes | Exception) -> None:
        while not self._closed:
            with contextlib.suppress(queue.Full):
                self._pieces.put(piece, timeout=1.0)
                return

    def read(self, until: float) -> bytes | None:
        if self._end is None:
            try:
                piece = self._pieces.get(timeout=None if until == NEVER else max(0.0, until - time.monotonic()))
            except queue.Empty:
                return None
            if isinstance(piece, bytes) and piece:
                return piece
            self._end = piece
        if isinstance(self._end, Exception):
            raise self._end
        return b""

    def __iter__(self) -> Iterator[bytes]:
        return error_body(self)

    def drain(self) -> None:
        """Its connections are not kept."""

    def close(self) -> None:
        """The helper closes the response; the shutdown wakes it where it waits for more. Never waits."""
        self._closed = True
        self._connection.end_connection()
        with contextlib.suppress(queue.Empty):  # and free places where it waits for one
            while True:
                self._pieces.get_nowait()
        with contextlib.suppress(queue.Full):  # the reader too
            self._pieces.put_nowait(b"")


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
