"""One connection to the upstream: a socket that never blocks, waits that can end in time, a C parser of HTTP/1.1.

It is as strict as the library that it replaces: certificates are checked, headers cannot be split, sizes are bounded.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

import httptools
import httpx2

from .cancellation import Cancellation
from .loop import Loop

READ_BYTES = 65536
HEAD_BYTES = 65536  # of the response's headers, as DESIGN's limits say


def connect(
    loop: Loop, host: str, port: int, tls: ssl.SSLContext | None, cancellation: Cancellation, until: float
) -> Connection:
    """An open connection. `until` bounds the whole: every address and the TLS handshake.

    Raises httpx2.ConnectError or httpx2.ConnectTimeout.
    """
    failure: httpx2.TransportError = httpx2.ConnectError("no address answered")
    for family, kind, protocol, _, address in _addresses(host, port):
        cancellation.check()
        connection = Connection(loop, _socket(family, kind, protocol), cancellation)
        try:
            connection.dial(address, until)
            cancellation.check()
            if tls is not None:
                connection.secure(tls, host, until)
            return connection
        except httpx2.TransportError as error:
            connection.close()
            failure = error
        except BaseException:
            connection.close()
            raise
    raise failure


def _addresses(host: str, port: int) -> list[Any]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise httpx2.ConnectError(f"the host name cannot be resolved: {type(error).__name__}") from None


def _socket(family: int, kind: int, protocol: int) -> socket.socket:
    try:
        return socket.socket(family, kind, protocol)
    except OSError as error:  # no descriptor left, or a family that this machine lacks
        raise httpx2.ConnectError(type(error).__name__) from None


class Connection:
    """Owns its socket and closes it. One request at a time; `cancellation` is that of the current one."""

    def __init__(self, loop: Loop, sock: socket.socket, cancellation: Cancellation) -> None:
        sock.setblocking(False)
        self._loop = loop
        self._sock = sock
        self._tls = False
        self._waiter = loop.waiter(sock.fileno())
        self._cancellation: Cancellation | None = None
        self.idle_since = 0.0
        self.serve(cancellation)

    def serve(self, cancellation: Cancellation) -> None:
        """From now on this cancellation ends the connection."""
        self._cancellation = cancellation
        cancellation.hold(self._sock.fileno())

    def rest(self) -> None:
        """Nobody's cancellation reaches the connection any more."""
        if self._cancellation is not None:
            self._cancellation.drop()
            self._cancellation = None

    def close(self) -> None:
        self.rest()
        self._waiter.close()
        with contextlib.suppress(OSError):
            self._sock.close()

    def is_stale(self, now: float, longest: float) -> bool:
        """An idle connection with something to read was closed, or speaks out of turn: it cannot carry a request."""
        return now - self.idle_since > longest or self._loop.is_readable(self._sock.fileno())

    def dial(self, address: Any, until: float) -> None:
        with contextlib.suppress(BlockingIOError):
            self._try(self._sock.connect, address, error=httpx2.ConnectError)
        if not self._waiter.writable(until):
            raise httpx2.ConnectTimeout("no connection in time")
        if code := self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise httpx2.ConnectError(f"errno {code}")
        with contextlib.suppress(OSError):  # not every family has it
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def secure(self, context: ssl.SSLContext, host: str, until: float) -> None:
        """The handshake; name, expiry and authority are the context's to check."""
        self._sock = context.wrap_socket(self._sock, server_hostname=host, do_handshake_on_connect=False)
        self._tls = True
        assert isinstance(self._sock, ssl.SSLSocket)
        self._repeat(self._sock.do_handshake, until, httpx2.ConnectError, httpx2.ConnectTimeout)

    def send(self, data: bytes, until: float) -> None:
        view = memoryview(data)

        def send_some() -> int:
            return self._sock.send(view)

        while view:
            view = view[self._repeat(send_some, until, httpx2.WriteError, httpx2.WriteTimeout) :]

    def receive(self, until: float) -> bytes | None:
        """What one recv brings; b"" at the end, None when the time is up. Waits first: see DESIGN section 5."""
        while True:
            if not self._pending() and not self._waiter.readable(until):
                return None
            try:
                return self._sock.recv(READ_BYTES)
            except (BlockingIOError, ssl.SSLWantReadError):
                continue  # half a TLS record
            except ssl.SSLWantWriteError:
                self._waiter.writable(until)
            except ssl.SSLEOFError:
                return b""  # the end without close_notify: whether it is a cut is for the framing to say
            except OSError as error:
                raise httpx2.ReadError(type(error).__name__) from None

    def _pending(self) -> bool:
        return self._tls and self._sock.pending() > 0  # type: ignore[attr-defined]

    def _repeat(
        self,
        action: Callable[[], Any],
        until: float,
        error: type[httpx2.TransportError],
        late: type[httpx2.TimeoutException],
    ) -> Any:
        while True:
            try:
                return self._try(action, error=error)
            except (BlockingIOError, ssl.SSLWantWriteError):
                ready = self._waiter.writable(until)
            except ssl.SSLWantReadError:
                ready = self._waiter.readable(until)
            if not ready:
                raise late("not in time")

    @staticmethod
    def _try(action: Callable[..., Any], *arguments: Any, error: type[httpx2.TransportError]) -> Any:
        try:
            return action(*arguments)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLCertVerificationError as failure:
            raise error(f"certificate refused: {failure.verify_message}") from None
        except OSError as failure:
            raise error(type(failure).__name__) from None


class Exchange:
    """Reads one response off a connection. Callbacks of httptools; bytes of the body gather in `pieces`."""

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.status = 0
        self.pieces: list[bytes] = []
        self.head_complete = False
        self.complete = False
        self.until_close = False
        self._head_bytes = 0
        self.on_body = self.pieces.append  # before the parser, which looks its callbacks up once
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Raises httpx2.RemoteProtocolError for what is not HTTP/1.1, and for a head over HEAD_BYTES."""
        if not self.head_complete:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            raise httpx2.RemoteProtocolError("not HTTP/1.1") from None
        if not self.head_complete and self._head_bytes > HEAD_BYTES:
            raise httpx2.RemoteProtocolError("the response's headers are too large")

    def end(self) -> None:
        """The connection ended. Raises httpx2.RemoteProtocolError where the body was to go on."""
        if not self.complete and not (self.head_complete and self.until_close):
            raise httpx2.RemoteProtocolError("the connection ended before the response did")
        self.complete = True

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status < 200:  # RFC 9110 15.2: any number of interim responses may come first
            self.headers.clear()
            return
        self.head_complete = True
        names = {name.lower() for name, _ in self.headers}
        self.until_close = not names & {b"content-length", b"transfer-encoding"}

    def on_message_complete(self) -> None:
        self.complete = self.head_complete

    def may_be_kept(self) -> bool:
        return self.complete and not self.until_close and self._parser.should_keep_alive()


def write_head(request: httpx2.Request) -> bytes:
    """The request line and headers, as RFC 9112 writes them.

    Raises httpx2.LocalProtocolError for a header that would split the head; its value is not named, it may be the key.
    """
    lines = [b"%s %s HTTP/1.1" % (request.method.encode("ascii"), request.url.raw_path)]
    for name, value in request.headers.raw:
        if any(byte in value for byte in (b"\r", b"\n", b"\0")):
            raise httpx2.LocalProtocolError(f"the header {name.decode('latin-1')} holds a line break or NUL")
        lines.append(b"%s: %s" % (name, value))
    return b"\r\n".join(lines) + b"\r\n\r\n"


def monotonic_in(seconds: float | None) -> float:
    """The monotonic time `seconds` from now; never for None."""
    return float("inf") if seconds is None else time.monotonic() + seconds
