"""A fake OpenAI-compatible upstream for load: few system calls, no framework, each event in an HTTP chunk of its own.

    python -m bench.upstream [CERTIFICATE.pem]     prints its port

The conversation says what is answered: "pieces=100;pause=0.05;hold=0" is 100 pieces, 0.05 s between two, and so many
seconds of silence before the end. Without a pause everything is sent as fast as it is taken.
A piece's text is PIECE: the time.monotonic() of its sending, of a fixed length.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import re
import select
import socket
import ssl
import sys
import time

SLICE = 65536  # at full speed, what one stream sends before it is another's turn
PIECE = b"@%017.6f~"
SCRIPT = re.compile(rb"pieces=(\d+);pause=([\d.]+);hold=([\d.]+)")
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)

# The fields and the length (about 300 bytes) of what OpenAI sends.
EVENT = (
    b'data: {"id":"chatcmpl-CqG7mZ0aT4hJ1yVtqXkW9sYb3LrEd","object":"chat.completion.chunk","created":1790000000,'
    b'"model":"gpt-4.1-mini-2025-04-14","service_tier":"default","system_fingerprint":"fp_4fce0778af",'
    b'"choices":[%b],"usage":%b}\n\n'
)
CHOICE = b'{"index":0,"delta":%b,"logprobs":null,"finish_reason":%b}'
USAGE = b'{"prompt_tokens":19,"completion_tokens":10,"total_tokens":29}'


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(delta: bytes, finish_reason: bytes = b"null") -> bytes:
    return http_chunk(EVENT % (CHOICE % (delta, finish_reason), b"null"))


HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
    + event(b'{"role":"assistant","content":"","refusal":null}')
)
BEFORE, AFTER = event(b'{"content":"%b"}' % (PIECE % 0)).split(PIECE % 0)
FINISH = event(b"{}", b'"stop"')
USAGE_EVENT = http_chunk(EVENT % (b"", USAGE))
END = http_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


def piece() -> bytes:
    return BEFORE + PIECE % time.monotonic() + AFTER


class Connection:
    """One connection of the server under test, request after request."""

    __slots__ = ("closed", "handshaken", "hold", "inbox", "left", "outbox", "pause", "sock", "tail", "watched")

    def __init__(self, sock: socket.socket, handshaken: bool) -> None:
        self.sock = sock
        self.handshaken = handshaken
        self.closed = False
        self.inbox = b""
        self.outbox = memoryview(b"")
        self.left = 0
        self.pause = self.hold = 0.0
        self.tail = b""
        self.watched = select.EPOLLIN

    def take_request(self, data: bytes) -> bool:
        """True when a request is complete; then `outbox` holds what is sent at once."""
        self.inbox += data
        head, separator, body = self.inbox.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if not separator or length is None or len(body) < int(length[1]):
            return False
        script = SCRIPT.search(body)
        assert script is not None, "the conversation does not say what to answer"
        self.left, self.pause, self.hold = int(script[1]), float(script[2]), float(script[3])
        self.tail = FINISH + (USAGE_EVENT if b'"include_usage"' in body else b"") + END
        self.inbox = b""
        if self.pause or self.hold:
            self.outbox = memoryview(HEAD + piece())
            self.left -= 1
        else:
            self.outbox = memoryview(HEAD + piece() * self.left + self.tail)
            self.left = -1
        return True

    def next_part(self) -> bytes:
        """What is due now; `left` is -1 after the end."""
        self.left -= 1
        return piece() if self.left >= 0 else self.tail

    def wait(self) -> float:
        """How long until the next part."""
        return self.pause if self.left > 0 else self.hold or self.pause


class Upstream:
    """One epoll and one heap of what is due."""

    def __init__(self, listener: socket.socket, tls: ssl.SSLContext | None) -> None:
        self._listener = listener
        self._tls = tls
        self._poller = select.epoll()
        self._poller.register(listener, select.EPOLLIN)
        self._connections: dict[int, Connection] = {}
        self._due: list[tuple[float, int, Connection]] = []

    def run(self) -> None:
        while True:
            self._wait()
            for fd, mask in self._poller.poll(0):
                self._ready(fd, mask)
            self._send_due()

    def _wait(self) -> None:
        """epoll's own time limit is in milliseconds, and would send several streams' pieces at once."""
        left = self._due[0][0] - time.monotonic() if self._due else None
        if left is None or left > 0:
            select.select([self._poller], [], [], left)

    def _ready(self, fd: int, mask: int) -> None:
        if fd == self._listener.fileno():
            self._accept()
            return
        connection = self._connections[fd]
        try:
            if not connection.handshaken:
                connection.sock.do_handshake()  # type: ignore[attr-defined]
                connection.handshaken = True
            if mask & select.EPOLLOUT:
                self._flush(connection)
            if mask & ~select.EPOLLOUT:
                self._read(connection)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        except OSError:
            self._close(connection)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = self._listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._tls is not None:
                    sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                sock.setblocking(False)
                self._connections[sock.fileno()] = Connection(sock, handshaken=self._tls is None)
                self._poller.register(sock, select.EPOLLIN)

    def _read(self, connection: Connection) -> None:
        while True:  # TLS may hold more than epoll knows of
            data = connection.sock.recv(SLICE)
            if not data:
                self._close(connection)
                return
            if connection.take_request(data):
                self._flush(connection)
                if connection.left >= 0:
                    self._plan(connection, time.monotonic() + connection.wait())

    def _plan(self, connection: Connection, due: float) -> None:
        heapq.heappush(self._due, (due, id(connection), connection))

    def _send_due(self) -> None:
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            due, _, connection = heapq.heappop(self._due)
            if connection.closed:
                continue
            connection.outbox = memoryview(bytes(connection.outbox) + connection.next_part())
            try:
                self._flush(connection)
            except OSError:
                self._close(connection)
                continue
            if connection.left >= 0:
                self._plan(connection, due + connection.wait())

    def _flush(self, connection: Connection) -> None:
        """Sends one slice; epoll says when there may be more."""
        with contextlib.suppress(BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            connection.outbox = connection.outbox[connection.sock.send(connection.outbox[:SLICE]) :]
        watched = select.EPOLLIN | (select.EPOLLOUT if connection.outbox else 0)
        if watched != connection.watched:
            connection.watched = watched
            self._poller.modify(connection.sock, watched)

    def _close(self, connection: Connection) -> None:
        connection.closed = True
        fd = connection.sock.fileno()
        self._poller.unregister(fd)
        del self._connections[fd]
        connection.sock.close()


def main() -> None:
    tls = None
    if len(sys.argv) > 1:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(sys.argv[1])
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    listener.setblocking(False)
    print(listener.getsockname()[1], flush=True)
    gc.freeze()
    gc.disable()  # there are no cycles here, and a collection would be seen as latency
    with contextlib.suppress(KeyboardInterrupt):
        Upstream(listener, tls).run()


if __name__ == "__main__":
    main()
