"""A caller on a raw socket: asks, waits for a piece, leaves, or reads to the end of what it is given."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Mapping
from typing import Self

from tests.live.readers import RESET_ON_CLOSE, without_chunks

from .formats import Format, Wire

SECONDS = 45.0  # no cell takes so long: whoever waits longer hangs
SMALL = 4096  # bytes that the kernel takes for a caller that reads nothing


class Caller:
    """One question on its way. `asked` and `ended` are monotonic times."""

    def __init__(
        self,
        port: int,
        format: Format,
        message: str,
        token: str,
        headers: Mapping[str, str] | None = None,
        *,
        source: str = "127.0.0.1",
        slow: bool = False,
    ) -> None:
        self.format = format
        self.received = b""
        self.ended = 0.0
        self.hangs = False
        self._socket = socket.socket()
        if slow:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
        self._socket.settimeout(SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.bind((source, 0))
        self._socket.connect(("127.0.0.1", port))
        self.asked = time.monotonic()
        self._socket.sendall(_request(format, message, token, headers or {}))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def wait_for(self, piece: str) -> None:
        """Reads until the piece stands in what came, or nothing more comes."""
        while piece.encode() not in self.received and self._read():
            pass

    def _read(self) -> bool:
        try:
            data = self._socket.recv(65536)
        except TimeoutError:
            self.hangs = True
            data = b""
        except ConnectionError:
            data = b""
        self.received += data
        return bool(data)

    def rest(self) -> Wire:
        while self._read():
            pass
        self.ended = time.monotonic()
        return self.wire()

    def wire(self) -> Wire:
        """What has come, taken for all there is."""
        head, blank, rest = self.received.partition(b"\r\n\r\n")
        if not blank:
            return Wire()
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        if headers.get("transfer-encoding", "").lower() == "chunked":
            body, whole = without_chunks(rest)
        else:
            body, whole = rest, len(rest) == int(headers.get("content-length", "-1"))
        return Wire(int(lines[0].split()[1]), headers, body, whole)

    # --- ways to leave ---

    def close(self) -> None:
        """By FIN: with nothing unread, or the kernel would send a reset."""
        self._socket.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while self._socket.recv(65536):
                pass
        self._socket.close()

    def reset(self) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self._socket.close()

    def half_close(self) -> None:
        """Says that it sends no more; it still reads."""
        self._socket.shutdown(socket.SHUT_WR)


def _request(format: Format, message: str, token: str, headers: Mapping[str, str]) -> bytes:
    body = json.dumps(format.ask(message)).encode()
    fields = {
        "Host": "127.0.0.1",
        "Authorization": f"Bearer {token}",
        "Accept": format.accept,
        "Content-Type": "application/json",
        "Connection": "close",
        "Content-Length": str(len(body)),
        **headers,
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {format.path} HTTP/1.1\r\n{lines}\r\n".encode() + body
