"""One pub/sub connection becomes batches and cancels. What it hears it parses itself, many messages a read.

redis-py's own pub/sub costs several times as much a message; its connection still connects, authenticates and sends.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .errors import StoreDown
from .store import Batch

if TYPE_CHECKING:
    from .redis_link import Link

READ_BYTES = 262_144
SUBSCRIBE_AT_ONCE = 500
CONFIRM_WITHIN = 1.6  # seconds; less than the contract's 2, on a busy machine too
LEAST_WAIT = 0.01
# A line that is silent is asked whether it lives: together less than the contract's 2 s.
SILENT_SECONDS = 0.4
PONG_WITHIN = 1.1
NOTHING = -1


class LineLost(Exception):
    """The connection broke, or Redis does not answer on it."""


def frames(data: bytes) -> tuple[list[list[bytes]], bytes]:
    """The whole RESP2 arrays at the beginning of what came, and the rest. Raises LineLost for anything else."""
    found: list[list[bytes]] = []
    find, start, size = data.find, 0, len(data)
    while start < size:
        if data[start] != 42:  # *: an error, which only a connection that is of no more use sends
            raise LineLost
        end = find(b"\r\n", start)
        if end == NOTHING:
            break
        items: list[bytes] = []
        at = end + 2
        for _ in range(int(data[start + 1 : end])):
            end = find(b"\r\n", at)
            if end == NOTHING:
                return found, data[start:]
            if data[at] == 36:  # $
                at, begin = end + 4 + int(data[at + 1 : end]), end + 2
                if at > size:
                    return found, data[start:]
                items.append(data[begin : at - 2])
            else:  # an integer: how many channels there are
                items.append(data[at + 1 : end])
                at = end + 2
        found.append(items)
        start = at
    return found, data[start:]


class Line:
    """The connection. Many may subscribe; one at a time receives. Everything raises LineLost where it is broken."""

    def __init__(self, link: Link) -> None:
        self._connection, self._socket = link.dedicated()
        self._sending = threading.Lock()
        self._unsent = deque[bytes]()  # commands, in order
        self._rest = b""
        self._heard = time.monotonic()
        self._asked = 0.0  # monotonic; 0.0 while no PING waits for its answer
        self.sent = 0
        self.confirmed = 0

    def subscribe(self, channels: Sequence[bytes]) -> int:
        """The value that `confirmed` reaches once Redis has done it."""
        with self._sending:
            for start in range(0, len(channels), SUBSCRIBE_AT_ONCE):
                self._put(b"SUBSCRIBE", *channels[start : start + SUBSCRIBE_AT_ONCE])
            self.sent += len(channels)
            self._send()
            return self.sent

    def unsubscribe(self, channel: bytes) -> None:
        """Goes out with what is sent next, or received. The collector may call it, also in the middle of a `_send`."""
        self._put(b"UNSUBSCRIBE", channel)

    def _put(self, *command: bytes) -> None:
        parts = [b"*%d\r\n" % len(command), *(b"$%d\r\n%b\r\n" % (len(part), part) for part in command)]
        self._unsent.append(b"".join(parts))

    def _send(self) -> None:
        try:
            while self._unsent:
                self._socket.sendall(self._unsent.popleft())
        except OSError:
            raise LineLost from None

    def receive(self, seconds: float) -> list[list[bytes]]:
        """Messages as channel and payload; none after at most so many seconds."""
        now = time.monotonic()
        if not self._asked and now - self._heard >= SILENT_SECONDS:
            self._put(b"PING")
            self._asked = now
        if self._unsent:
            with self._sending:
                self._send()
        due = self._asked + PONG_WITHIN if self._asked else self._heard + SILENT_SECONDS
        data = self._read(min(seconds, due - now))
        if data:
            self._heard, self._asked = time.monotonic(), 0.0
            return self._messages(data)
        if self._asked and time.monotonic() >= self._asked + PONG_WITHIN:
            raise LineLost
        return []

    def _read(self, seconds: float) -> bytes:
        try:
            self._socket.settimeout(max(LEAST_WAIT, seconds))
            data = self._socket.recv(READ_BYTES)
        except TimeoutError:
            return b""
        except OSError:
            raise LineLost from None
        if not data:
            raise LineLost
        return data

    def _messages(self, data: bytes) -> list[list[bytes]]:
        found, self._rest = frames(self._rest + data if self._rest else data)
        messages = []
        for items in found:
            if items[0] == b"message":
                messages.append(items[1:])
            elif items[0] == b"subscribe":
                self.confirmed += 1
        return messages

    def close(self) -> None:
        self._connection.disconnect()


class RedisListener:
    """Whoever waits reads for all: `wait`, or an `add` that nobody reads the confirmation for."""

    def __init__(self, link: Link, prefix: bytes, owner: str) -> None:
        self._link = link
        self._events = prefix + b"events:"
        self._cancels = prefix + b"cancels:" + owner.encode()
        self._wanted: dict[bytes, str] = {}
        self._asked = Counter[bytes]()  # how many that did not fail wanted each since it was last dropped
        self._turn = threading.Condition()
        self._reading = False
        self._connecting = threading.Lock()
        self._line: Line | None = None
        self._lost = False  # until `wait` has said so
        self._closed = False
        self._batches: list[Batch] = []
        self._cancelled: list[str] = []

    def add(self, id: str) -> None:
        channel = self._channel(id)
        until = time.monotonic() + CONFIRM_WITHIN
        with self._turn:
            self._asked[channel] += 1
            self._wanted[channel] = id
        try:
            line = self._connected(until)
            ticket = line.subscribe([channel])
            self._pump(line, until, lambda: line.confirmed >= ticket)
            if line.confirmed < ticket:
                raise LineLost
        except BaseException as error:
            self._unwant(channel)
            if not isinstance(error, LineLost):
                raise
            self._lose(line)
            raise StoreDown from None

    def _unwant(self, channel: bytes) -> None:
        """One that came has failed. Those who came before it or meanwhile go on."""
        with self._turn:
            self._asked[channel] -= 1
            if self._asked[channel] <= 0:
                self._forget(channel)

    def _forget(self, channel: bytes) -> bool:
        self._asked.pop(channel, None)
        return self._wanted.pop(channel, None) is not None

    def _channel(self, id: str) -> bytes:
        return self._events + id.encode("utf-8", "surrogatepass")

    def drop(self, id: str) -> None:
        channel = self._channel(id)
        line = self._line
        if self._forget(channel) and line is not None:
            line.unsubscribe(channel)

    def wait(self, seconds: float) -> tuple[list[Batch], list[str]]:
        now = time.monotonic()
        if not self._lost and not self._closed:
            line = self._connected(now + CONFIRM_WITHIN)
            self._pump(line, now + seconds, lambda: bool(self._batches or self._cancelled))
        with self._turn:
            found = self._batches, self._cancelled
            self._batches, self._cancelled = [], []
            down, self._lost = self._lost and not any(found), self._lost and any(found)
        if down and not self._closed:
            raise StoreDown
        return found

    def close(self) -> None:
        self._closed = True
        line = self._line
        if line is not None:
            self._lose(line)

    def _pump(self, line: Line, until: float, done: Callable[[], bool]) -> None:
        """Receives, or lets another one receive, until it is done, too late, or the line is lost. Once at least."""
        is_late = False
        while True:
            with self._turn:
                left = until - time.monotonic()
                if done() or is_late or self._line is not line:
                    return
                is_late = left <= 0
                if self._reading:
                    self._turn.wait(max(LEAST_WAIT, left))
                    continue
                self._reading = True
            messages: list[list[bytes]] = []
            try:
                messages = line.receive(left)
            except LineLost:
                self._lose(line)
            finally:
                with self._turn:
                    self._sort(messages)
                    self._reading = False
                    self._turn.notify_all()

    def _connected(self, until: float) -> Line:
        if self._line is not None:
            return self._line
        if not self._connecting.acquire(timeout=max(0.0, until - time.monotonic())):
            raise StoreDown
        try:
            line = self._line or self._connect(until)
            with self._turn:
                self._line = None if self._closed else line
            if self._line is None:
                line.close()
                raise StoreDown
            return line
        finally:
            self._connecting.release()

    def _connect(self, until: float) -> Line:
        """A line that hears all that is wanted. What was cancelled while there was none stands in a set."""
        line = Line(self._link)
        try:
            ticket = line.subscribe([self._cancels, *self._wanted])
            while line.confirmed < ticket:
                if time.monotonic() >= until:
                    raise LineLost
                messages = line.receive(until - time.monotonic())
                with self._turn:
                    self._sort(messages)
            missed = self._link.call("SMEMBERS", self._cancels, until=until)
        except LineLost:
            line.close()
            raise StoreDown from None
        except BaseException:
            line.close()
            raise
        with self._turn:
            self._cancelled.extend(id.decode() for id in missed)
        return line

    def _lose(self, line: Line) -> None:
        with self._turn:
            if self._line is line:
                self._line = None
                self._lost = not self._closed
            self._turn.notify_all()
        line.close()

    def _sort(self, messages: list[list[bytes]]) -> None:
        wanted, batches = self._wanted, self._batches
        for channel, payload in messages:
            id = wanted.get(channel)
            if id is not None:
                last, count, events = payload.split(b" ", 2)
                number = int(count)
                batches.append(Batch(id, int(last) - number + 1, number, events))
            elif channel == self._cancels:
                self._cancelled.append(payload.decode())
