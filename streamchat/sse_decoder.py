"""Bytes of server-sent events become (type, data) pairs, however they were split. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .errors import UpstreamMalformed

EVENT_BYTES = 1 << 20  # one event; the longest seen carry a whole tool call, some 100 KB


class SseDecoder:
    """Bytes to (event type, data) pairs by WHATWG HTML 9.2.6: any line end, comments and unknown fields dropped."""

    def __init__(self) -> None:
        self._rest = b""
        self._after_cr = False
        self._first = True
        self._type = b""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> Iterable[tuple[bytes, bytes]]:
        """Raises UpstreamMalformed for an event over EVENT_BYTES. An event without data is not dispatched."""
        plain = self._plain(self._rest + data)
        return self._lines(data) if plain is None else plain

    def _plain(self, data: bytes) -> list[tuple[bytes, bytes]] | None:
        """What nearly all servers send: events of one `data: ` line, ended by LF LF. None for anything else."""
        within = self._first or self._after_cr or self._type or self._data
        if within or b"\r" in data or len(data) > EVENT_BYTES or (end := data.rfind(b"\n\n")) < 0:
            return None
        events = data[:end].split(b"\n\n")
        for event in events:  # a loop, since all() of a generator costs as much again
            if not event.startswith(b"data: ") or b"\n" in event:
                return None
        self._rest = data[end + 2 :]
        return [(b"", event[6:]) for event in events]

    def _lines(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]  # the second half of a CRLF
            self._after_cr = False
            if not data:
                return
        if data:
            self._after_cr = data.endswith(b"\r")
        lines = (self._rest + data).splitlines(keepends=True)  # of bytes: CR, LF and CRLF only
        self._rest = lines.pop() if lines and lines[-1][-1:] not in b"\r\n" else b""
        for line in lines:
            self._size += len(line)
            if self._size > EVENT_BYTES:
                raise UpstreamMalformed
            yield from self._line(line.rstrip(b"\r\n"))
        if self._size + len(self._rest) > EVENT_BYTES:
            raise UpstreamMalformed

    def _line(self, line: bytes) -> Iterator[tuple[bytes, bytes]]:
        if self._first:
            self._first = False
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            if self._data:
                yield self._type, b"\n".join(self._data)
            self._type, self._data, self._size = b"", [], 0
        elif line.startswith(b"data:"):
            value = line[6:] if line[5:6] == b" " else line[5:]
            self._data.append(value)
        elif line.startswith(b"event:"):
            self._type = line[6:].removeprefix(b" ")
        elif line == b"data":  # without a colon: the field with an empty value
            self._data.append(b"")
        elif line == b"event":
            self._type = b""
