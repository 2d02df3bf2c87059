"""httpx2's own HTTP behind the same interface as ours: for proxies, and for clients that a shop made itself.

Slower, by a helper for each body; every promise but speed is kept.
"""

from __future__ import annotations

import contextlib
import queue
import time
import urllib.request
from typing import Any
from urllib.parse import urlsplit

import httpx2

from .cancellation import Cancellation
from .loop import NEVER, Loop
from .transport import CURRENT


class RelayedBody:
    """A body of any other transport, read in a helper and handed over piece by piece, so that reads can time out."""

    def __init__(self, loop: Loop, response: httpx2.Response, cancellation: Cancellation) -> None:
        self._response = response
        self._cancellation = cancellation
        self._pieces: queue.Queue[bytes | Exception] = queue.Queue(maxsize=4)  # a slow caller slows the upstream
        self._end: bytes | Exception | None = None
        self._closed = False
        loop.spawn(self._pull)

    def _pull(self) -> None:
        last: bytes | Exception = b""
        try:
            for piece in self._response.iter_raw():
                if piece:
                    self._put(piece)
        except Exception as error:
            last = error
        finally:
            self._response.close()
            self._cancellation.drop()
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

    def drain(self) -> None:
        """Its connections are not kept."""

    def close(self) -> None:
        """The helper closes the response; the shutdown wakes it where it waits for more."""
        self._closed = True
        self._cancellation.end_connection()


class SdkTransport(httpx2.HTTPTransport):
    """httpx2's own HTTP, for proxies; every socket is made known before a byte is sent on it."""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        cancellation = CURRENT.get(None)
        if cancellation is not None:
            request.extensions = {**request.extensions, "trace": _Trace(cancellation)}
        return super().handle_request(request)


class _Trace:
    """httpcore2's trace extension: says when a connection stands."""

    def __init__(self, cancellation: Cancellation) -> None:
        self._cancellation = cancellation

    def __call__(self, name: str, info: dict[str, Any]) -> None:
        if name.endswith("connect_tcp.complete"):
            hold_stream(self._cancellation, info["return_value"])


def hold_stream(cancellation: Cancellation, stream: Any) -> None:
    """Makes the socket of an httpcore2 network stream known to a cancellation, where it has one."""
    sock = stream.get_extra_info("socket") if stream is not None else None
    if sock is not None:
        cancellation.hold_duplicate(sock.fileno())


def proxy_of(url: str) -> str | None:
    """The proxy that the environment names for this URL."""
    parts = urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return None if not proxy or urllib.request.proxy_bypass(parts.hostname or "") else proxy
