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
from typing import Any, Protocol, TypeVar

STEP = 0.005  # seconds; how late a pause may end: small beside the 40 ms in which pieces are joined
TICK = 0.1  # seconds; how late a wait under gevent may end: far below every time limit that is set in seconds
NEVER = float("inf")

T = TypeVar("T")


class Waiter(Protocol):
    """Waits for one descriptor. It must be closed before the descriptor is."""

    def readable(self, until: float) -> bool:
        """True as soon as there is something to read (or the end); False at the monotonic time `until`."""

    def writable(self, until: float) -> bool: ...

    def close(self) -> None: ...


class Lane(Protocol):
    """One native thread of its own, for calls that would stop the event loop: they run in it one after the other."""

    def run(self, task: Callable[[], T]) -> T:
        """What the task returns or raises. Others run while the caller waits."""

    def close(self) -> None:
        """Ends the thread. Idempotent; no call may be running."""


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

    def pause(self, until: float) -> None:
        """Waits for the monotonic time `until`, whatever happens meanwhile."""

    def is_readable(self, fd: int) -> bool:
        """Asks once, without waiting."""

    def epoll(self) -> Any:
        """A new select.epoll, or None where the system has none."""

    def lane(self) -> Lane: ...


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


class _LockedLane:
    """Threads may wait: the caller's own runs the task."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def run(self, task: Callable[[], T]) -> T:
        with self._lock:
            return task()

    def close(self) -> None:
        """There is no thread."""


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


class GeventLoop:
    """gevent's hub. One ticker looks after the time limits of all waits, a faster one after all pauses."""

    def __init__(self) -> None:
        import gevent
        from gevent import monkey

        self._hub = gevent.get_hub()
        self._gevent = gevent
        # gevent takes select.epoll away and makes select.poll its own: both are asked here without waiting.
        self._poll, self._epoll = monkey.get_original("select", ["poll", "epoll"])
        self.killed: tuple[type[BaseException], ...] = (gevent.GreenletExit,)
        self._limits = _Ticker(self._hub.loop, TICK)
        self._pauses = _Ticker(self._hub.loop, STEP)

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

    def lane(self) -> Lane:
        return _NativeLane()

    def is_ready(self, fd: int, events: int) -> bool:
        poll = self._poll()
        poll.register(fd, select.POLLIN if events == 1 else select.POLLOUT)
        return bool(poll.poll(0))

    def switch_out(self, until: float) -> bool:
        """Leaves to the hub until somebody switches back, or the limit's ticker does, with False."""
        return self._limits.switch_out(self._hub, self._gevent.getcurrent(), until)

    def pause(self, until: float) -> None:
        self._pauses.switch_out(self._hub, self._gevent.getcurrent(), until)


class _NativeLane:
    """A pool of one beside the hub's own, whose threads also resolve names."""

    def __init__(self) -> None:
        from gevent.threadpool import ThreadPool

        self._pool = ThreadPool(1)

    def run(self, task: Callable[[], T]) -> T:
        result: T = self._pool.apply(task)
        return result

    def close(self) -> None:
        self._pool.kill()


class _Ticker:
    """One timer for all greenlets that wait for a time: it runs while there are any."""

    def __init__(self, loop: Any, step: float) -> None:
        self._due: dict[Any, float] = {}
        self._timer = loop.timer(step, step, ref=False)
        self._running = False

    def switch_out(self, hub: Any, greenlet: Any, until: float) -> bool:
        if not self._running:
            self._running = True
            self._timer.start(self._tick)
        self._due[greenlet] = until
        try:
            return bool(hub.switch())
        finally:
            del self._due[greenlet]

    def _tick(self) -> None:
        if not self._due:
            self._running = False
            self._timer.stop()
            return
        now = time.monotonic()
        for greenlet in [greenlet for greenlet, until in self._due.items() if until <= now]:
            if self._due.get(greenlet, NEVER) <= now:  # one that woke meanwhile may wait for something else
                greenlet.switch(False)


class _GeventWaiter:
    def __init__(self, loop: GeventLoop, fd: int) -> None:
        self._loop = loop
        self._fd = fd
        self._watchers: dict[int, Any] = {}

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
        watcher.start(self._loop._gevent.getcurrent().switch, True)
        try:
            return self._loop.switch_out(until)
        finally:
            watcher.stop()

    def close(self) -> None:
        for watcher in self._watchers.values():
            watcher.stop()
            watcher.close()
        self._watchers.clear()
