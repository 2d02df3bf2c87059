"""Waiting in threads, each in poll(); one more thread attends to the callers' sockets. Knows no gevent."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from queue import Empty, SimpleQueue
from typing import Any

from .waits import NEVER, Bell, Lane, T, Waiter


class _PollWaiter:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def readable(self, until: float) -> bool:
        return self._wait(select.POLLIN, until)

    def writable(self, until: float) -> bool:
        return self._wait(select.POLLOUT, until)

    def _wait(self, events: int, until: float) -> bool:
        poll = select.poll()
        poll.register(self._fd, events)
        timeout = None if until == NEVER else max(0.0, until - time.monotonic()) * 1000
        return bool(poll.poll(timeout))

    def close(self) -> None:
        """Nothing is kept open."""


class _LockedLane:
    """Threads may wait: the caller's own runs the task."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def run(self, task: Callable[[], T]) -> T:
        with self._lock:
            return task()

    def close(self) -> None:
        """There is no thread."""


class _QueueBell:
    """The collector, or a signal, may ring in the middle of a ring or a wait of the same thread. An Event would wait
    for itself then, and a Condition over a reentrant lock lose the ring; SimpleQueue is made for it.
    """

    def __init__(self) -> None:
        self._rings: SimpleQueue[None] = SimpleQueue()

    def ring(self) -> None:
        if self._rings.empty():  # one is as good as many
            self._rings.put(None)

    def wait(self, until: float) -> bool:
        try:
            self._rings.get(timeout=None if until == NEVER else max(0.0, until - time.monotonic()))
        except Empty:
            return False
        for _ in range(self._rings.qsize()):  # two may have rung at once
            self._rings.get_nowait()
        return True


class ThreadLoop:
    """Threads, each waiting in poll(); one more thread attends to the callers' sockets."""

    killed: tuple[type[BaseException], ...] = ()

    def waiter(self, fd: int) -> Waiter:
        return _PollWaiter(fd)

    def spawn(self, task: Callable[[], None]) -> None:
        threading.Thread(target=task, daemon=True, name="streamchat").start()

    def attend(self, fd: int, ready: Callable[[], None], tick: Callable[[], None]) -> Callable[[], None]:
        wake, woken = os.pipe()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        poll.register(wake, select.POLLIN)

        def attendant() -> None:
            due = time.monotonic() + 1
            while wake not in (found := dict(poll.poll(max(0.0, due - time.monotonic()) * 1000))):
                if fd in found:
                    ready()
                if time.monotonic() >= due:
                    due += 1
                    tick()

        thread = threading.Thread(target=attendant, daemon=True, name="streamchat-attendant")
        thread.start()

        def stop() -> None:
            os.write(woken, b"x")
            thread.join()
            os.close(wake)
            os.close(woken)

        return stop

    def pause(self, until: float) -> None:
        time.sleep(max(0.0, until - time.monotonic()))

    def is_readable(self, fd: int) -> bool:
        return _PollWaiter(fd).readable(0)

    def epoll(self) -> Any:
        return select.epoll() if hasattr(select, "epoll") else None

    def lane(self) -> Lane:
        return _LockedLane()

    def lock(self) -> AbstractContextManager[object]:
        return threading.RLock()

    def bell(self) -> Bell:
        return _QueueBell()
