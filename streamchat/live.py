"""The answers that this worker is running: how many there may be, who stopped reading, and what happens at its end."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from .cancellation import Cancellation
from .errors import Draining, Interrupted, Overloaded, TooManyStreams
from .hangup import Caller, Hangups
from .loop import Loop

RETRY_AFTER = 5  # seconds; what a full or stopping worker tells callers
LEASE_SPARE = 60.0  # seconds after which an answer that nothing ended loses its slot
LAST_SECONDS = 2.0  # after the drain: the sweep that ends an answer may come a second late
STUCK_SECONDS = 1.0  # a write that takes longer while the worker stops is not waited for


class Running(Protocol):
    """What the sweep needs of an answer."""

    asks: bool  # the model; a reader does not
    cancellation: Cancellation
    caller: Caller
    user: str | None
    started: float  # monotonic
    writing_since: float  # monotonic; 0.0 while nothing is being written

    def caller_stalled(self) -> None: ...

    def tick(self, now: float) -> None:
        """Once a second. May not wait."""

    def release(self) -> None: ...


class Live:
    """One for each mounted blueprint and process. Sweeps once a second, and lets others `tidy` up then."""

    def __init__(
        self,
        loop: Loop,
        most: int,
        write_timeout: float,
        total_timeout: float,
        tidy: Callable[[], None],
        most_of_user: int = 0,
        most_in_all: int = 0,
    ) -> None:
        self.most = most
        self._most_of_user = most_of_user
        self._most_in_all = most_in_all  # of all workers; where those cannot be counted, of this one
        self._users: Counter[str] = Counter()
        self._tidy = tidy
        self.hangups = Hangups(loop, self.sweep)
        self._running: set[Running] = set()
        self._whole: dict[Caller, float] = {}  # callers that are given one body, and since when (monotonic)
        # Threads would count together and then all enter. The collector may end an answer while it is held: reentrant.
        self._lock = threading.RLock()
        self._write_timeout = write_timeout
        self._longest = total_timeout + write_timeout + LEASE_SPARE
        self._is_stopping: Callable[[], bool] | None = None
        self._drain_seconds = 0.0
        self._drain_at = 0.0  # monotonic; 0.0 until the worker is told to stop
        self._deserted = 0

    @property
    def draining(self) -> bool:
        """Whether the worker has been told to stop: asked at each use, since the sweep is up to a second late."""
        if not self._drain_at and self._is_stopping is not None and self._is_stopping():
            self._drain_at = time.monotonic() + self._drain_seconds
        return bool(self._drain_at)

    @property
    def keeps_worker(self) -> bool:
        """Whether answers still run and have their time: that of the drain, and a moment in which all are told."""
        return bool(self._running) and self.draining and time.monotonic() < self._drain_at + LAST_SECONDS

    def __len__(self) -> int:
        return len(self._running)

    def admit(self, answer: Running, is_counted: bool = False) -> None:
        """Gives the answer its slot. Raises Draining, Overloaded or TooManyStreams at once.

        Where it `is_counted` somebody else holds it to the limits of streams: the log, which knows other workers'.
        """
        if self.draining:
            raise Draining(retry_after=RETRY_AFTER)
        with self._lock:
            if len(self._running) >= self.most:
                raise Overloaded(retry_after=RETRY_AFTER)
            if not is_counted and answer.asks:
                self._check(answer, 1)
            if answer.user is not None:
                self._users[answer.user] += 1
            self._running.add(answer)

    def recount(self, answer: Running) -> None:
        """Raises TooManyStreams where the answer, which has its slot, is one too many here."""
        with self._lock:
            self._check(answer, 0)

    def _check(self, answer: Running, more: int) -> None:
        of_user = self._users[answer.user] + more if answer.user is not None else 0
        in_all = sum(each.asks for each in tuple(self._running)) + more if self._most_in_all else 0
        if 0 < self._most_of_user < of_user or in_all > self._most_in_all:
            raise TooManyStreams(retry_after=RETRY_AFTER)

    def leave(self, answer: Running) -> None:
        """Frees the slot. Idempotent."""
        with self._lock:
            if answer not in self._running:
                return
            self._running.discard(answer)
            if answer.user is not None:
                self._users[answer.user] -= 1
                if not self._users[answer.user]:
                    del self._users[answer.user]

    def desert(self) -> None:
        """The caller of an answer left, and it went on."""
        with self._lock:
            self._deserted += 1

    def take_deserted(self) -> int:
        """How many did so since this was last asked."""
        with self._lock:
            count, self._deserted = self._deserted, 0
        return count

    def attend(self, caller: Caller) -> Callable[[], object]:
        """A whole body is about to be written, whose answer is over: until the returned is called, the sweep looks
        whether its caller reads. Such a body holds no slot.
        """
        self._whole[caller] = time.monotonic()
        return lambda: self._whole.pop(caller, None)

    def follow(self, is_stopping: Callable[[], bool], drain_seconds: float) -> None:
        """From when `is_stopping()` is true no answer is begun; those that still run after `drain_seconds` end."""
        self._is_stopping = is_stopping
        self._drain_seconds = drain_seconds

    def sweep(self) -> None:
        """Once a second. Never waits, and raises nothing: it runs in the event loop."""
        self._tidy()
        now = time.monotonic()
        over = self.draining and now >= self._drain_at
        for answer in list(self._running):
            writing = now - answer.writing_since if answer.writing_since else 0.0
            answer.tick(now)
            if writing > self._write_timeout:
                answer.caller_stalled()
            if now - answer.started > self._longest:
                answer.cancellation.cancel(Interrupted())
                answer.release()
            if over:
                answer.cancellation.cancel(Draining())
                if writing > STUCK_SECONDS:
                    answer.caller.hang_up()

        for caller, since in list(self._whole.items()):
            if now - since > (STUCK_SECONDS if over else self._write_timeout):
                caller.hang_up()

    def close(self) -> None:
        self.hangups.close()
