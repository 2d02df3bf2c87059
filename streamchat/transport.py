"""Requests of the SDK become streamed bodies that can be read with a time limit, over connections that are kept.

An httpx2 transport. A body's owner closes it, once; then its connection goes back to the pool or is closed.
"""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

import httpx2

from .cancellation import Cancellation
from .connection import HEAD_BYTES, Connection, Exchange, connect, monotonic_in, write_head
from .loop import Loop

BODY = "streamchat.body"  # the key of a response's extensions under which a Body stands
ERROR_BYTES = 65536  # of the body of an error: enough for any error object
ERROR_SECONDS = 2.0
KEEP_SECONDS = 60.0  # an idle connection; one that the upstream closed sooner is seen and dropped
DRAIN_SECONDS = 0.05  # how long the end of a body may take after [DONE], so that its connection can be kept
DRAIN_STEP = 0.002  # asked so often: a wait of the loop's may end later than the whole time is long

# Who may end the request that this greenlet or thread is about to send: the SDK passes nothing of ours on.
CURRENT: ContextVar[Cancellation] = ContextVar("streamchat_cancellation")


class Body(Protocol):
    def read(self, until: float) -> bytes | None:
        """Bytes of the body, b"" at its end, None at the monotonic time `until`. Raises httpx2.TransportError."""

    def drain(self) -> None:
        """To be called after the last piece that is wanted, if the connection is to be kept."""

    def close(self) -> None:
        """Gives the connection back, or closes it. Idempotent."""


class FastTransport(httpx2.BaseTransport):
    """HTTP/1.1 over plain or TLS sockets, with at most `most` connections in use.

    Starting and ending a request costs the same however many are running.
    """

    def __init__(self, loop: Loop, most: int, tls: ssl.SSLContext | None = None) -> None:
        self._loop = loop
        self._most = most
        self._tls = tls
        self._live = 0
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, str, int], list[Connection]] = {}

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Raises httpx2.PoolTimeout at once where the pool is full: waiting for a place would hold the caller up."""
        self._enter()
        try:
            return self._exchange(request)
        except BaseException:
            self._leave()
            raise

    def _exchange(self, request: httpx2.Request) -> httpx2.Response:
        head, content = write_head(request), b"".join(_sync(request))
        timeout: dict[str, float | None] = request.extensions.get("timeout", {})
        connection, key = self._connection(request, monotonic_in(timeout.get("connect")))
        exchange = Exchange()
        try:
            until = monotonic_in(timeout.get("read"))
            try:
                connection.send(head + content, until)
            except httpx2.WriteError:
                exchange.spoilt = True  # an upstream that says no may do so, and close, before it has read all
            while not exchange.head_complete:
                _advance(connection, exchange, until, late=httpx2.ReadTimeout("no response in time"))
        except BaseException:
            connection.close()
            raise
        body = FastBody(self, connection, exchange, key)
        return httpx2.Response(exchange.status, headers=exchange.headers, stream=body, extensions={BODY: body})

    def _connection(self, request: httpx2.Request, until: float) -> tuple[Connection, tuple[str, str, int]]:
        url = request.url
        if url.scheme not in ("http", "https"):
            raise httpx2.UnsupportedProtocol("the base URL must begin with http:// or https://")
        secure = url.scheme == "https"
        key = (url.scheme, url.host, url.port or (443 if secure else 80))
        cancellation = CURRENT.get(None) or Cancellation()
        kept = self._take(key)
        if kept is not None:
            kept.serve(cancellation)
            return kept, key
        return connect(self._loop, key[1], key[2], self._context() if secure else None, cancellation, until), key

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:  # loading the authorities takes tens of milliseconds: once
            self._tls = ssl.create_default_context()
        return self._tls

    def _take(self, key: tuple[str, str, int]) -> Connection | None:
        idle, now = self._idle.get(key, []), time.monotonic()
        while idle:
            with contextlib.suppress(IndexError):  # another thread was faster
                connection = idle.pop()
                if not connection.is_stale(now, KEEP_SECONDS):
                    return connection
                connection.close()
        return None

    def give_back(self, key: tuple[str, str, int], connection: Connection, kept: bool) -> None:
        """The one way out of `_live`: called once by each body."""
        self._leave()
        if not kept:
            connection.close()
            return
        connection.rest()
        connection.idle_since = time.monotonic()
        self._idle.setdefault(key, []).append(connection)

    def reap(self) -> None:
        """Closes what has been idle for too long; the oldest stand first. Never waits."""
        now = time.monotonic()
        for idle in list(self._idle.values()):
            with contextlib.suppress(IndexError):  # another thread was faster
                while now - idle[0].idle_since > KEEP_SECONDS:
                    idle.pop(0).close()

    def _enter(self) -> None:
        with self._lock:
            if self._live >= self._most:
                raise httpx2.PoolTimeout("all connections are in use")
            self._live += 1

    def _leave(self) -> None:
        with self._lock:
            self._live -= 1

    def close(self) -> None:
        for idle in self._idle.values():
            while idle:
                idle.pop().close()


def _sync(request: httpx2.Request) -> httpx2.SyncByteStream:
    assert isinstance(request.stream, httpx2.SyncByteStream)
    return request.stream


def _advance(connection: Connection, exchange: Exchange, until: float, late: Exception | None = None) -> bool:
    """Feeds what one recv brings; False when the time is up, unless `late` is to be raised."""
    data = connection.receive(until)
    if data is None:
        if late is not None:
            raise late
        return False
    if data:
        exchange.feed(data)
    else:
        exchange.end()
    return True


def check_head(response: httpx2.Response) -> None:
    """The same limit for a head that a library has read; closes the response, and raises, where it is over."""
    if sum(len(name) + len(value) + 4 for name, value in response.headers.raw) > HEAD_BYTES:
        response.close()
        raise httpx2.RemoteProtocolError("the response's headers are too large")


def error_body(body: Body) -> Iterator[bytes]:
    """For the SDK, which reads the bodies of errors whole: at most ERROR_BYTES in ERROR_SECONDS.

    Where it is cut there, or by the upstream, the status says enough.
    """
    left, until = ERROR_BYTES, time.monotonic() + ERROR_SECONDS
    with contextlib.suppress(httpx2.TransportError):
        while left > 0 and (data := body.read(until)):
            yield data[:left]
            left -= len(data)


class FastBody(httpx2.SyncByteStream):
    """The body of a response of FastTransport."""

    def __init__(
        self, transport: FastTransport, connection: Connection, exchange: Exchange, key: tuple[str, str, int]
    ) -> None:
        self._transport = transport
        self._connection = connection
        self._exchange = exchange
        self._key = key
        self._closed = False

    def read(self, until: float) -> bytes | None:
        exchange = self._exchange
        while not exchange.pieces:
            if exchange.complete:
                return b""
            if not _advance(self._connection, exchange, until):
                return None
            if not exchange.pieces and time.monotonic() >= until:
                return None  # bytes without a body could go on for ever
        data = exchange.pieces[0] if len(exchange.pieces) == 1 else b"".join(exchange.pieces)
        exchange.pieces.clear()
        return data

    def __iter__(self) -> Iterator[bytes]:
        return error_body(self)

    def drain(self) -> None:
        """Reads the end of a body that has said all, for a short time: only then can its connection be kept."""
        until = time.monotonic() + DRAIN_SECONDS
        with contextlib.suppress(httpx2.TransportError):
            while not self._exchange.complete and time.monotonic() < until:
                if not _advance(self._connection, self._exchange, until=0):
                    time.sleep(DRAIN_STEP)
                self._exchange.pieces.clear()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._transport.give_back(self._key, self._connection, self._exchange.may_be_kept())
