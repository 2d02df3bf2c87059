"""Connections of `requests` that lead to an address that was checked, not to where a name leads, and read only so much.

Host, SNI and the certificate stay the name's. The descriptor is known before a byte is sent, so that it can be ended.
"""

from __future__ import annotations

import functools
import io
import socket
import ssl
import time
from http.client import HTTPException, HTTPResponse
from typing import Any

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection

from .attempts import Fault
from .cancellation import Cancellation

CONNECT_SECONDS = 3.0  # of one address, so that a silent one leaves time for the next
REPLY_BYTES = 65_536  # that are read, head and body


class Failed(OSError):
    """An attempt that ended before there was a status."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        super().__init__(fault)


class Line:
    """The way to one checked target: its addresses, and until when."""

    def __init__(self, addresses: list[str], port: int, until: float, cancellation: Cancellation) -> None:
        self._addresses = addresses
        self._port = port
        self._until = until
        self._cancellation = cancellation

    def left(self) -> float:
        """Seconds; never 0, which would mean not to block."""
        return max(0.001, self._until - time.monotonic())

    def connect(self) -> socket.socket:
        """A connection to the first address that takes one. No name is resolved here. Raises Failed."""
        fault: Fault = "connection"
        for address in self._addresses:
            self._cancellation.check()
            try:
                return self._dial(address)
            except TimeoutError:
                fault = "timeout"
            except OSError:
                fault = "connection"
        raise Failed(fault)

    def _dial(self, address: str) -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._cancellation.hold_duplicate(sock.fileno())
            sock.settimeout(min(self.left(), CONNECT_SECONDS))
            sock.connect((address, self._port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(self.left())
        except BaseException:
            sock.close()
            raise
        return sock


class Bounded(io.RawIOBase):
    """A reply's bytes; they end after REPLY_BYTES, however many the receiver sends."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._left = REPLY_BYTES
        self.ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        count: int | None = self._raw.readinto(memoryview(buffer)[: self._left]) if self._left else 0
        self._left -= count or 0
        self.ended = self.ended or count == 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class BoundedResponse(HTTPResponse):
    """http.client's, which takes a head that breaks off for a whole one, and an interim reply for the final one."""

    def __init__(self, sock: socket.socket, *arguments: Any, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp.close()
        self._bounded = Bounded(sock.makefile("rb", buffering=0))
        self.fp = io.BufferedReader(self._bounded)

    def begin(self) -> None:
        super().begin()
        while 102 <= self.status < 200:
            self.headers = None  # type: ignore[assignment]  # what `begin` asks for
            super().begin()
        if self._bounded.ended:
            raise HTTPException("the head broke off")
        # Else urllib3 warns of what is wrong with them, and the log would show the URL and the receiver's words.
        self.headers.defects = []
        self.headers.set_payload("")


class Pinned:
    """What both kinds of connections do otherwise: the name stays for Host, SNI and the certificate, no more."""

    response_class: Any = BoundedResponse

    def __init__(self, line: Line, **options: Any) -> None:
        super().__init__(**options)
        self._line = line

    def _new_conn(self) -> socket.socket:
        return self._line.connect()


class PinnedConnection(Pinned, HTTPConnection):
    pass


class PinnedTlsConnection(Pinned, HTTPSConnection):
    pass


CONNECTIONS = {"http": PinnedConnection, "https": PinnedTlsConnection}


class Adapter(HTTPAdapter):
    """requests' own, for one POST: its connections go along the line, not to where a name leads."""

    def __init__(self, line: Line, tls: ssl.SSLContext) -> None:
        super().__init__(pool_connections=1, pool_maxsize=1, max_retries=0)
        self._line = line
        self._tls = tls

    def build_connection_pool_key_attributes(self, *arguments: Any, **options: Any) -> Any:
        host, tls = super().build_connection_pool_key_attributes(*arguments, **options)
        return host, tls | ({"ssl_context": self._tls} if host["scheme"] == "https" else {})

    def cert_verify(self, conn: Any, *_: Any, **__: Any) -> None:
        """The context has its authorities: requests would load them again for every connection."""
        conn.cert_reqs = "CERT_REQUIRED"

    def get_connection_with_tls_context(self, *arguments: Any, **options: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*arguments, **options)
        pool.ConnectionCls = functools.partial(CONNECTIONS[pool.scheme], self._line)
        return pool
