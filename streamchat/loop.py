"""How this worker waits: on gevent's loop, or in threads. The only file that knows gevent, and only if it is in use.

A wait ends at its time without disturbing what it waits for; no wait under gevent makes a timer of its own.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

TICK = 0.1  # seconds; how late a wait under gevent may end: far below every time limit that is set in seconds
NEVER = float("inf")


class Waiter(Protocol):
    """Waits for one descriptor. It must be closed before the descriptor is."""

    def readable(self, until: float) -> bool:
        """True as soon as there is something to read (or the end); False at the monotonic time `until`."""

    def writable(self, until: float) -> bool: ...

    def close(self) -> None: ...


class Loop(Protocol):
    """What gevent and threads do in different ways."""

    killed: tuple[type[BaseException], ...]

    def waiter(self, fd: int) -> Waiter: ...

    def spawn(self, task: Callable[[], None]) -> None:
        """Runs `task` beside the caller's greenlet or thread."""

    def attend(self, fd: int, ready: Callable[[], None], tick: Callable[[], None]) -> Callable[[], None]:
        """Calls `ready` when fd is readable and `tick` once a second, until what it returns is called.

        Neither may wait.
        """

    def is_readable(self, fd: int) -> bool:
        """Asks once, without waiting."""

    def epoll(self) -> Any:
        """A new select.epoll, or None where the system has none."""


def choose_loop() -> Loop:
    """gevent's loop where the socket module is patched, threads elsewhere."""
    if "gevent" in sys.modules:
        from gevent import monkey

        if monkey.is_module_patched("socket"):
            return GeventLoop()
    return ThreadLoop()


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

    def is_readable(self, fd: int) -> bool:
        return _PollWaiter(fd).readable(0)

    def epoll(self) -> Any:
        return select.epoll() if hasattr(select, "epoll") else None


class GeventLoop:
    """gevent's hub. One ticker looks after the time limits of all waits."""

    def __init__(self) -> None:
        import gevent
        from gevent import monkey

        self._hub = gevent.get_hub()
        self._gevent = gevent
        # gevent takes select.epoll away and makes select.poll its own: both are asked here without waiting.
        self._poll, self._epoll = monkey.get_original("select", ["poll", "epoll"])
        self.killed: tuple[type[BaseException], ...] = (gevent.GreenletExit,)
        self._waits: dict[_GeventWaiter, float] = {}
        self._ticker: Any = self._hub.loop.timer(TICK, TICK, ref=False)
        self._ticking = False

    def waiter(self, fd: int) -> Waiter:
        return _GeventWaiter(self, fd)

    def spawn(self, task: Callable[[], None]) -> None:
        self._gevent.spawn(task)

    def attend(self, fd: int, ready: Callable[[], None], tick: Callable[[], None]) -> Callable[[], None]:
        watcher, timer = self._hub.loop.io(fd, 1, ref=False), self._hub.loop.timer(1, 1, ref=False)
        watcher.start(ready)
        timer.start(tick)

        def stop() -> None:  # holds both: a watcher that nobody holds is collected
            for each in (watcher, timer):
                each.stop()
                each.close()

        return stop

    def is_readable(self, fd: int) -> bool:
        return self.is_ready(fd, 1)

    def epoll(self) -> Any:
        return self._epoll()

    def is_ready(self, fd: int, events: int) -> bool:
        poll = self._poll()
        poll.register(fd, select.POLLIN if events == 1 else select.POLLOUT)
        return bool(poll.poll(0))

    def switch_out(self, waiter: _GeventWaiter, until: float) -> bool:
        """Leaves to the hub until the waiter's watcher or the ticker comes back."""
        if not self._ticking:
            self._ticking = True
            self._ticker.start(self._tick)
        self._waits[waiter] = until
        try:
            return bool(self._hub.switch())
        finally:
            del self._waits[waiter]

    def _tick(self) -> None:
        if not self._waits:
            self._ticking = False
            self._ticker.stop()
            return
        now = time.monotonic()
        for waiter in [waiter for waiter, until in self._waits.items() if until <= now]:
            if self._waits.get(waiter, NEVER) <= now:  # one that woke meanwhile may wait for something else
                waiter.end()


class _GeventWaiter:
    def __init__(self, loop: GeventLoop, fd: int) -> None:
        self._loop = loop
        self._fd = fd
        self._watchers: dict[int, Any] = {}
        self._greenlet: Any = None

    def readable(self, until: float) -> bool:
        return self._wait(1, until)

    def writable(self, until: float) -> bool:
        return self._wait(2, until)

    def _wait(self, events: int, until: float) -> bool:
        if until <= time.monotonic():
            return self._loop.is_ready(self._fd, events)
        watcher = self._watchers.get(events)
        if watcher is None:
            watcher = self._watchers[events] = self._loop._hub.loop.io(self._fd, events)
        self._greenlet = self._loop._gevent.getcurrent()
        watcher.start(self._greenlet.switch, True)
        try:
            return self._loop.switch_out(self, until)
        finally:
            watcher.stop()

    def end(self) -> None:
        self._greenlet.switch(False)

    def close(self) -> None:
        for watcher in self._watchers.values():
            watcher.stop()
            watcher.close()
        self._watchers.clear()
