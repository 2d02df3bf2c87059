"""The fake upstream of the matrix: the script of a row, chosen by the message that names row and format."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

from tests.fake_upstream import FakeUpstream, Pause, RecordedRequest, Repeat, Step, answer, done, finish, head, text
from tests.fake_upstream import last_chunk as end
from tests.fake_upstream import usage_chunk as usage

# A step that marks the moment of the fault becomes the steps of one reply.
Script: TypeAlias = "Callable[[Step], Step]"

FIRST = "Hel"
PIECES = (FIRST, "lo, ", "world", "!")
WHOLE = "".join(PIECES)
PACE = 0.1  # seconds between the pieces of a long answer


def good(mark: Step = b"") -> Step:
    return answer(PIECES)


def words(seconds: float) -> list[str]:
    """The pieces of an answer that takes so long."""
    return [FIRST, *(f"lo {number} " for number in range(round(seconds / PACE)))]


def lasting(seconds: float) -> Script:
    """A whole answer, a piece each PACE."""
    pieces: list[Step] = [[Pause(PACE), text(piece)] for piece in words(seconds)[1:]]
    return lambda mark: [head(), text(FIRST), *pieces, finish(), usage(19, len(pieces)), done(), end()]


def flood(mark: Step) -> Step:
    """Eight megabytes: more than all buffers on the way hold."""
    return [head(), text(FIRST), mark, Repeat(text("x" * 1023 + " "), 8192), finish(), usage(19, 9), done(), end()]


def message_of(row: str, format: str) -> str:
    return f"{row} | {format}"


def user_of(message: str) -> str:
    """One word, which a log line holds without quotes."""
    return re.sub(r"[^a-z0-9]+", "-", message.lower())


class Model:
    """`scripts` are those of each row; the last one serves all further attempts."""

    def __init__(self, fake: FakeUpstream, scripts: Mapping[str, tuple[Script, ...]]) -> None:
        self.fake = fake
        self._scripts = scripts
        self._marks: dict[str, float] = {}
        self._asked: dict[str, int] = {}
        self._lock = threading.Lock()
        fake.choose = self._choose

    def _choose(self, request: RecordedRequest) -> Step:
        message = request.message
        scripts = self._scripts.get(message.partition(" | ")[0], (good,))
        with self._lock:
            number = self._asked[message] = self._asked.get(message, 0) + 1
        return scripts[min(number, len(scripts)) - 1](self._mark)

    def _mark(self, request: RecordedRequest) -> Step:
        self._marks.setdefault(request.message, time.monotonic())
        return b""

    def marked(self, message: str) -> float | None:
        """When the fault of this cell began, by the upstream's clock."""
        return self._marks.get(message)

    def posts(self, message: str) -> list[RecordedRequest]:
        return [request for request in list(self.fake.requests) if request.message == message]
