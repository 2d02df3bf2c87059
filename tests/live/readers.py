"""Callers: one question to a server, and what each kind of reader can tell of the answer. They share no HTTP code.

A reader never says that an answer is whole when its own library would complain.
"""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import struct
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import requests

TEXT, SSE, NDJSON, JSON = "text/plain", "text/event-stream", "application/x-ndjson", "application/json"
FORMATS = (TEXT, SSE, NDJSON, JSON)
PATH = "/api/get-response"
SECONDS = 60.0  # no answer of a test takes so long: whoever waits longer hangs
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 seconds: close() sends RST


@dataclass(frozen=True)
class Seen:
    """An answer as its caller saw it; `whole` is False where the reader says that it was cut."""

    status: int
    content_type: str
    body: bytes
    whole: bool
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def kind(self) -> str:
        return self.content_type.partition(";")[0]

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events of an SSE or NDJSON body, heartbeats left out."""
        lines = self.body.decode().splitlines()
        if self.kind == SSE:
            lines = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        events = [json.loads(line) for line in lines if line]
        return [event for event in events if event["type"] != "heartbeat"]

    @property
    def document(self) -> dict[str, Any]:
        document = json.loads(self.body)
        assert isinstance(document, dict)
        return document


def question(message: str) -> bytes:
    return json.dumps({"message": message}).encode()


def head_of(body: bytes, accept: str, path: str = PATH, extra: str = "", version: str = "1.1") -> bytes:
    """A request as it stands on the wire. `extra`: further header lines, each with its CRLF."""
    return (
        f"POST {path} HTTP/{version}\r\nHost: 127.0.0.1\r\nAccept: {accept}\r\n"
        f"Content-Type: application/json\r\n{extra}Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def by_http_client(port: int, message: str, accept: str) -> Seen:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        headers = {"Accept": accept, "Content-Type": "application/json"}
        connection.request("POST", PATH, question(message), headers)
        return finish_reading(connection.getresponse())
    finally:
        connection.close()


def finish_reading(response: http.client.HTTPResponse) -> Seen:
    body, whole = b"", True
    try:
        while piece := response.read1(65536):
            body += piece
    except (http.client.IncompleteRead, ConnectionResetError):
        whole = False
    response.close()  # read1() leaves it open where Content-Length is used up: the connection could not be used again
    kind = response.headers.get("Content-Type", "")
    return Seen(response.status, kind, body, whole, dict(response.headers.items()))


def by_requests(port: int, message: str, accept: str) -> Seen:
    headers, body, whole = {"Accept": accept, "Content-Type": "application/json"}, b"", True
    url = f"http://127.0.0.1:{port}{PATH}"
    with requests.post(url, question(message), headers=headers, stream=True, timeout=SECONDS) as response:
        try:
            for piece in response.iter_content(None):
                body += piece
        except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ConnectionError):
            whole = False
        kind = response.headers.get("Content-Type", "")
        return Seen(response.status_code, kind, body, whole, dict(response.headers))


def by_curl(port: int, message: str, accept: str, *options: str) -> Seen:
    program = shutil.which("curl")
    assert program, "curl is missing: install Debian's package curl"
    command = [program, "-sS", "-N", "-i", "--max-time", str(SECONDS), *options, "-H", f"Accept: {accept}"]
    command += ["-H", "Content-Type: application/json", "-d", question(message).decode()]
    ended = subprocess.run([*command, f"http://127.0.0.1:{port}{PATH}"], capture_output=True, check=False)
    assert ended.stdout.startswith(b"HTTP/1."), ended.stderr
    head, _, body = ended.stdout.partition(b"\r\n\r\n")
    return _seen(head, body, whole=ended.returncode == 0)


def by_socket(port: int, message: str, accept: str, version: str = "1.1") -> Seen:
    """Reads the wire itself: nothing may stand before, in or after the one response."""
    with socket.create_connection(("127.0.0.1", port), timeout=SECONDS) as caller:
        caller.sendall(head_of(question(message), accept, extra="Connection: close\r\n", version=version))
        wire, ended = read_to_the_end(caller)
    assert wire.startswith(b"HTTP/1."), wire
    assert wire.count(b"HTTP/1.") == 1, wire
    head, _, rest = wire.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        body, whole = without_chunks(rest)
        return _seen(head, body, whole)
    length = _fields(head).get("content-length")
    return _seen(head, rest, whole=ended if length is None else len(rest) == int(length))


def read_to_the_end(caller: socket.socket) -> tuple[bytes, bool]:
    """All bytes, and whether they ended by FIN."""
    wire = b""
    try:
        while piece := caller.recv(65536):
            wire += piece
    except ConnectionResetError:
        return wire, False
    return wire, True


def without_chunks(rest: bytes) -> tuple[bytes, bool]:
    """The body, and whether its last chunk came (RFC 9112, 7.1)."""
    body = b""
    while b"\r\n" in rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            return body, rest == b"\r\n"
        body, rest = body + rest[:length], rest[length + 2 :]
    return body, False


def _fields(head: bytes) -> dict[str, str]:
    lines = head.decode("latin-1").split("\r\n")[1:]
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _seen(head: bytes, body: bytes, whole: bool) -> Seen:
    fields = _fields(head)
    return Seen(int(head.split()[1]), fields.get("content-type", ""), body, whole, fields)


Reader = Callable[[int, str, str], Seen]
READERS: dict[str, Reader] = {
    "http.client": by_http_client,
    "requests": by_requests,
    "curl": by_curl,
    "socket": by_socket,
}
