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
from typing import NamedTuple, Protocol

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


class Route(NamedTuple):
    """Whom a connection reaches."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: httpx2.URL) -> Route:
        return cls(url.scheme, url.host, url.port or (443 if url.scheme == "https" else 80))


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
        self._idle: dict[Route, list[Connection]] = {}

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """For an httpx2 client. Raises what `ask` raises."""
        timeout: dict[str, float | None] = request.extensions.get("timeout", {})
        connect_by, read_by = (monotonic_in(timeout.get(name)) for name in ("connect", "read"))
        cancellation = CURRENT.get(None) or Cancellation()
        whole = write_head(request) + b"".join(_sync(request))
        body = self.ask(Route.of(request.url), whole, cancellation, connect_by, read_by)
        return httpx2.Response(body.status, headers=body.raw_headers, stream=body, extensions={BODY: body})

    def ask(
        self, route: Route, request: bytes, cancellation: Cancellation, connect_by: float, read_by: float
    ) -> FastBody:
        """Sends a whole request, head and content; the body of the response, when its head is here.

        Raises an httpx2.TransportError: PoolTimeout at once where the pool is full, since waiting for a place would
        hold the caller up.
        """
        self._enter()
        try:
            return self._exchange(route, request, cancellation, connect_by, read_by)
        except BaseException:
            self._leave()
            raise

    def _exchange(
        self, route: Route, request: bytes, cancellation: Cancellation, connect_by: float, read_by: float
    ) -> FastBody:
        connection = self._connection(route, cancellation, connect_by)
        exchange = Exchange()
        try:
            try:
                connection.send(request, read_by)
            except httpx2.WriteError:
                exchange.spoilt = True  # an upstream that says no may do so, and close, before it has read all
            while not exchange.head_complete:
                _advance(connection, exchange, read_by, late=httpx2.ReadTimeout("no response in time"))
        except BaseException:
            connection.close()
            raise
        return FastBody(self, connection, exchange, route)

    def _connection(self, route: Route, cancellation: Cancellation, until: float) -> Connection:
        if route.scheme not in ("http", "https"):
            raise httpx2.UnsupportedProtocol("the base URL must begin with http:// or https://")
        kept = self._take(route)
        if kept is not None:
            kept.serve(cancellation)
            return kept
        tls = self._context() if route.scheme == "https" else None
        return connect(self._loop, route.host, route.port, tls, cancellation, until)

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:  # loading the authorities takes tens of milliseconds: once
            self._tls = ssl.create_default_context()
        return self._tls

    def _take(self, route: Route) -> Connection | None:
        idle, now = self._idle.get(route, []), time.monotonic()
        while idle:
            with contextlib.suppress(IndexError):  # another thread was faster
                connection = idle.pop()
                if not connection.is_stale(now, KEEP_SECONDS):
                    return connection
                connection.close()
        return None

    def give_back(self, route: Route, connection: Connection, kept: bool) -> None:
        """The one way out of `_live`: called once by each body."""
        self._leave()
        if not kept:
            connection.close()
            return
        connection.rest()
        connection.idle_since = time.monotonic()
        self._idle.setdefault(route, []).append(connection)

    def reap(self) -> None:
        """Closes what has been idle for too long; the oldest stand first. Never waits."""
        now = time.monotonic()
        for idle in list(self._idle.values()):
            with contextlib.suppress(IndexError):  # another thread was faster
                while now - idle[0].idle_since > KEEP_SECONDS:
                    idle.pop(0).close()

    def connections(self) -> dict[str, int]:
        return {"active": self._live, "idle": sum(len(idle) for idle in list(self._idle.values()))}

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

    def __init__(self, transport: FastTransport, connection: Connection, exchange: Exchange, route: Route) -> None:
        self.status = exchange.status
        self.raw_headers = exchange.headers
        self._transport = transport
        self._connection = connection
        self._exchange = exchange
        self._route = route
        self._closed = False

    def headers(self) -> dict[str, str]:
        """By their names in small letters; the last one of a name."""
        return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self.raw_headers}

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
            self._transport.give_back(self._route, self._connection, self._exchange.may_be_kept())
