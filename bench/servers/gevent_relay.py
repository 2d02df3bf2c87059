"""A limit: what Python and gevent cost when a relay does nothing else. No Flask, no SDK, no JSON, no checks.

Its arguments are its port and the upstream's base URL.
"""

from __future__ import annotations

import gc
import re
import sys
from urllib.parse import urlsplit

import gevent
from gevent import socket
from gevent.server import StreamServer
from gevent.ssl import PROTOCOL_TLS_CLIENT, SSLContext

# The upstream of the benchmark writes its JSON so, and no escapes in it.
CONTENT = re.compile(rb'"content":"([^"]+)"')
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"\r\n0\r\n\r\n"


class Relay:
    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self.address = (parts.hostname, parts.port)
        self.tls = trusting_context() if parts.scheme == "https" else None
        self.request = f"POST {parts.path}/chat/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n".encode()
        self.idle: list[socket.socket] = []

    def serve(self, caller: socket.socket, _: object) -> None:
        """One connection of a caller, request after request."""
        caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while body := read_request(caller):
            upstream = self.idle.pop() if self.idle else self.connect()
            upstream.sendall(b"%bContent-Length: %d\r\n\r\n%b" % (self.request, len(body), body))
            caller.sendall(HEAD)
            relay(upstream, caller)
            self.idle.append(upstream)

    def connect(self) -> socket.socket:
        upstream = socket.create_connection(self.address)
        upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self.tls.wrap_socket(upstream, server_hostname=self.address[0]) if self.tls else upstream


def trusting_context() -> SSLContext:
    """Without monkey-patching, ssl.create_default_context() would make sockets that block all greenlets."""
    context = SSLContext(PROTOCOL_TLS_CLIENT)
    context.load_default_certs()
    return context


def relay(upstream: socket.socket, caller: socket.socket) -> None:
    """The text of each read is one HTTP chunk; half an event waits for its other half."""
    rest = b""
    while data := upstream.recv(65536):
        data = rest + data
        whole = data.rfind(b"\n\n") + 1  # 0 where no event is complete
        text = b"".join(CONTENT.findall(data, 0, whole))
        rest = data[whole:]
        if text:
            caller.sendall(b"%x\r\n%b\r\n" % (len(text), text))
        if data.endswith(END):
            caller.sendall(b"0\r\n\r\n")
            return
    caller.close()  # cut: the caller must not see a clean end


def read_request(caller: socket.socket) -> bytes:
    """The body of the next request, b"" where the caller has left."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := caller.recv(65536)):
            return b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = LENGTH.search(head)
    while length and len(body) < int(length[1]):
        body += caller.recv(65536)
    return body


if __name__ == "__main__":
    gc.freeze()
    server = StreamServer(("127.0.0.1", int(sys.argv[1])), Relay(sys.argv[2]).serve, backlog=4096)
    gevent.get_hub().NOT_ERROR += (ConnectionError,)
    server.serve_forever()
