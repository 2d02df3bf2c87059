"""Callers: many open answers on raw sockets in one thread. Bytes in, counts and times out; parses as little as it can.

A piece's text is "@" time "~" (see upstream.PIECE): a marker is a piece, in whatever framing it arrives.
"""

from __future__ import annotations

import random
import re
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

READ_BYTES = 262144
MARKER = b"~"
STAMP = re.compile(rb"@(\d{10}\.\d{6})~")
LAST_CHUNK = b"\r\n0\r\n\r\n"
CONNECT_SECONDS = 20.0


@dataclass(slots=True, eq=False)
class Call:
    """One connection of a caller and the answer that is being read on it."""

    sock: socket.socket
    expected: int
    sent_at: float = 0.0
    first_at: float = 0.0
    pieces: int = 0
    last_bytes: bytes = b""
    whole: bool = False
    ended: bool = False


class Asked(Protocol):
    """What the callers of a Load ask of one server, and how many pieces each is told."""

    @property
    def port(self) -> int: ...

    @property
    def pieces(self) -> int: ...

    @property
    def pause(self) -> float: ...

    def request(self) -> bytes:
        """Of one caller."""


@dataclass(frozen=True)
class Question:
    """What every caller asks of one server: the fake upstream's script is in the message."""

    port: int
    pieces: int
    pause: float = 0.0
    hold: float = 0.0

    def request(self) -> bytes:
        body = b'{"message":"pieces=%d;pause=%.6f;hold=%.6f"}' % (self.pieces, self.pause, self.hold)
        head = b"POST /api/get-response HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)


@dataclass
class Tally:
    """What came, over all calls of a Load. The lists grow only while `timing`."""

    asked: int = 0
    begun: int = 0  # have their first piece
    pieces: int = 0
    whole: int = 0
    cut: int = 0
    timing: bool = False
    delays: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)


class Load:
    """Calls that ask the same. `again` lets a caller ask once more as soon as its answer is whole."""

    def __init__(self, asked: Asked, *, again: bool = False) -> None:
        self.tally = Tally()
        self.again = again
        self._asked = asked
        self._poller = select.epoll()
        self._calls: dict[int, Call] = {}
        self._planned: deque[float] = deque()

    @property
    def open(self) -> int:
        """Calls that are not answered yet, also those that are only planned."""
        return len(self._planned) + self.tally.asked - self.tally.whole - self.tally.cut

    @property
    def begun(self) -> bool:
        """Every planned call has its first piece."""
        return not self._planned and self.tally.begun + self.tally.cut >= self.tally.asked

    def plan(self, calls: int, over: float) -> None:
        """So many calls at random times in so many seconds, so that their pieces do not come in step."""
        now, chance = time.monotonic(), random.Random(calls)
        self._planned.extend(sorted(now + over * chance.random() for _ in range(calls)))

    def run(self, until: Callable[[], bool], seconds: float) -> bool:
        """Reads until the condition is true; False where that took longer than so many seconds."""
        deadline = time.monotonic() + seconds
        while not until():
            now = time.monotonic()
            if now >= deadline:
                return False
            while self._planned and self._planned[0] <= now:
                self._planned.popleft()
                self._connect()
            next_time = min(deadline, self._planned[0] if self._planned else deadline)
            for fd, _ in self._poller.poll(max(0.0, next_time - time.monotonic())):
                self._read(self._calls[fd])
        return True

    def run_for(self, seconds: float) -> None:
        self.run(lambda: False, seconds)

    def close(self) -> None:
        for call in self._calls.values():
            call.sock.close()
        self._calls.clear()
        self._poller.close()

    def _connect(self) -> None:
        sock = socket.create_connection(("127.0.0.1", self._asked.port), timeout=CONNECT_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        call = Call(sock, self._asked.pieces)
        self._calls[sock.fileno()] = call
        self._poller.register(sock, select.EPOLLIN)
        self._ask(call)

    def _ask(self, call: Call) -> None:
        call.pieces, call.first_at, call.last_bytes, call.whole, call.ended = 0, 0.0, b"", False, False
        self.tally.asked += 1
        call.sent_at = time.monotonic()
        call.sock.send(self._asked.request())

    def _read(self, call: Call) -> None:
        try:
            data = call.sock.recv(READ_BYTES)
        except ConnectionError:
            data = b""
        now = time.monotonic()
        if data:
            self._count(call, data, now)
            call.last_bytes = (call.last_bytes + data)[-len(LAST_CHUNK) :]
        if not data or call.last_bytes == LAST_CHUNK:
            self._end(call, clean=bool(data))

    def _count(self, call: Call, data: bytes, now: float) -> None:
        count = data.count(MARKER)
        call.pieces += count
        self.tally.pieces += count
        if count and not call.first_at:
            call.first_at = now
            self.tally.begun += 1
            if self.tally.timing:
                self.tally.first.append(now - call.sent_at)
        if self.tally.timing and self._asked.pause:
            # A stamp that is split over two reads is counted, not timed.
            self.tally.delays.extend(now - float(stamp) for stamp in STAMP.findall(data))

    def _end(self, call: Call, clean: bool) -> None:
        if call.ended:  # an idle kept-alive connection that the server closes
            self._poller.unregister(call.sock)
            return
        call.ended = True
        call.whole = clean and call.pieces == call.expected
        self.tally.whole += call.whole
        self.tally.cut += not call.whole
        if not clean:
            self._poller.unregister(call.sock)
        elif self.again and call.whole:
            self._ask(call)
