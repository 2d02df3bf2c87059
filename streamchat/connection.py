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
from .loop import NEVER, Loop

READ_BYTES = 8192  # of one recv; what a caller that reads nothing makes us hold, with two copies of it
HEAD_BYTES = 65536  # of the response's headers, as DESIGN's limits say


def connect(
    loop: Loop, host: str, port: int, tls: ssl.SSLContext | None, cancellation: Cancellation, until: float
) -> Connection:
    """An open connection. `until` bounds the whole: every address and the TLS handshake.

    Raises httpx2.ConnectError or httpx2.ConnectTimeout.
    """
    failure: httpx2.TransportError = httpx2.ConnectError("no address answered")
    addresses = _addresses(host, port)
    for number, (family, kind, protocol, _, address) in enumerate(addresses):
        cancellation.check()
        connection = Connection(loop, _socket(family, kind, protocol), cancellation)
        try:
            connection.dial(address, _share(until, len(addresses) - number))
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


def _share(until: float, addresses: int) -> float:
    """When the first of so many addresses has used up its part: one that is silent leaves time for the next."""
    now = time.monotonic()
    return until if until == NEVER else now + (until - now) / addresses


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
        cancellation = self._cancellation
        self.rest()  # wrap_socket closes the descriptor where it fails
        try:
            self._sock = context.wrap_socket(self._sock, server_hostname=host, do_handshake_on_connect=False)
        except OSError as failure:  # it was cut meanwhile
            raise httpx2.ConnectError(type(failure).__name__) from None
        self._tls = True
        if cancellation is not None:
            self.serve(cancellation)
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
            if self._pending():
                time.sleep(0)  # TLS holds more at full speed: without a wait no other greenlet would run
            elif not self._waiter.readable(until):
                return None
            try:
                data = self._sock.recv(READ_BYTES)
                return self._with_more(data) if self._tls and data else data
            except (BlockingIOError, ssl.SSLWantReadError):
                continue  # half a TLS record
            except ssl.SSLWantWriteError:
                if not self._waiter.writable(until):
                    return None
            except ssl.SSLEOFError:
                return b""  # the end without close_notify: whether it is a cut is for the framing to say
            except OSError as error:
                raise httpx2.ReadError(type(error).__name__) from None

    def _with_more(self, data: bytes) -> bytes:
        """One recv brings one TLS record, which may hold one piece: those that are there already come along.

        An end or a failure that comes behind them is met again by the next recv.
        """
        assert isinstance(self._sock, ssl.SSLSocket)
        records, size = [data], len(data)
        with contextlib.suppress(OSError):
            while size < READ_BYTES and (more := self._sock.recv(READ_BYTES - size)):
                records.append(more)
                size += len(more)
        return b"".join(records)

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
        self.spoilt = False  # more came, or less went, than belongs to this exchange
        self._keep_alive = False
        self._head_bytes = 0
        self.on_body = self.pieces.append  # before the parser, which looks its callbacks up once
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Raises httpx2.RemoteProtocolError for what is not HTTP/1.1, and for a head over HEAD_BYTES."""
        in_head = not self.head_complete
        if in_head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if not self.complete:
                raise httpx2.RemoteProtocolError("not HTTP/1.1") from None
            self.spoilt = True
        if in_head and self._size_of_head() > HEAD_BYTES:
            raise httpx2.RemoteProtocolError("the response's headers are too large")

    def _size_of_head(self) -> int:
        """What was fed until the head is complete; then its headers, since some of that may be body."""
        if not self.head_complete:
            return self._head_bytes
        return sum(len(name) + len(value) + 4 for name, value in self.headers)

    def end(self) -> None:
        """The connection ended. Raises httpx2.RemoteProtocolError where the body was to go on."""
        if not self.complete and not (self.head_complete and self.until_close):
            raise httpx2.RemoteProtocolError("the connection ended before the response did")
        self.complete = True

    def on_message_begin(self) -> None:
        if self.complete:
            raise ValueError("a second response")  # stops the parser; its body would be taken for the first one's

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.head_complete:  # a trailer is of no use to us
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
        self._keep_alive = self._parser.should_keep_alive()  # it knows no more once this call is over

    def may_be_kept(self) -> bool:
        return self.complete and self._keep_alive and not self.until_close and not self.spoilt


def write_head(request: httpx2.Request) -> bytes:
    """The request line and headers, as RFC 9112 writes them.

    Raises httpx2.LocalProtocolError for a header that would split the head; it is not named, it may hold the key.
    """
    lines = [b"%s %s HTTP/1.1" % (request.method.encode("ascii"), request.url.raw_path)]
    for name, value in request.headers.raw:
        line = b"%s: %s" % (name, value)
        if any(byte in line for byte in (b"\r", b"\n", b"\0")):
            raise httpx2.LocalProtocolError("a header holds a line break or NUL")
        lines.append(line)
    return b"\r\n".join(lines) + b"\r\n\r\n"


def monotonic_in(seconds: float | None) -> float:
    """The monotonic time `seconds` from now; never for None."""
    return float("inf") if seconds is None else time.monotonic() + seconds
