"""Waiting on gevent's hub: one ticker looks after the time limits of all waits, a faster one after all pauses.

The only file that imports gevent, and it is imported only where gevent is in use.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import gevent
from gevent import monkey

from .waits import NEVER, Bell, Lane, T, Waiter

STEP = 0.005  # seconds; how late a pause may end: small beside the 40 ms in which pieces are joined
TICK = 0.1  # seconds; how late a wait may end: far below every time limit that is set in seconds


def is_patched() -> bool:
    return bool(monkey.is_module_patched("socket"))


# A socket that blocks the whole worker, and the TLS whose calls fail with a TypeError.
REPLACED = {"socket": "socket", "ssl": "SSLContext"}


def holders_of_originals(modules: Mapping[str, object]) -> list[str]:
    """Top packages with a module that has the original of what gevent replaced: it was imported too early."""
    originals = [monkey.get_original(module, name) for module, name in REPLACED.items()]
    holders = {
        name.partition(".")[0]
        for name, module in modules.items()
        for held in list(getattr(module, "__dict__", {}).values())
        if any(held is original for original in originals)
    }
    return sorted(holders - sys.stdlib_module_names - {"gevent", "_socket", "__main__"})


class GeventLoop:
    """The hub of this thread."""

    def __init__(self) -> None:
        self._hub = gevent.get_hub()
        self._lock = monkey.get_original("_thread", "RLock")
        # gevent takes select.epoll away and makes select.poll its own: both are asked here without waiting.
        self._poll, self._epoll = monkey.get_original("select", ["poll", "epoll"])
        self.killed: tuple[type[BaseException], ...] = (gevent.GreenletExit,)
        self._limits = _Ticker(self._hub.loop, TICK)
        self._pauses = _Ticker(self._hub.loop, STEP)

    def waiter(self, fd: int) -> Waiter:
        return _GeventWaiter(self, fd)

    def spawn(self, task: Callable[[], None]) -> None:
        gevent.spawn(task)

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
        return _NativeLane(self._hub)

    def lock(self) -> AbstractContextManager[object]:
        """gevent's own let greenlets wait, which here none does, and take four times as long."""
        return cast("AbstractContextManager[object]", self._lock())

    def bell(self) -> Bell:
        return _HubBell(self, self._hub)

    def is_ready(self, fd: int, events: int) -> bool:
        poll = self._poll()
        poll.register(fd, select.POLLIN if events == 1 else select.POLLOUT)
        return bool(poll.poll(0))

    def switch_out(self, until: float, is_short: bool = False) -> bool:
        """Leaves to the hub until somebody switches back, or the limit's ticker does, with False.

        A wait that is short beside that ticker's step has the faster one.
        """
        ticker = self._pauses if is_short else self._limits
        return ticker.switch_out(self._hub, gevent.getcurrent(), until)

    def pause(self, until: float) -> None:
        self._pauses.switch_out(self._hub, gevent.getcurrent(), until)


class _Job:
    """One call of a lane: who waits for it, and what became of it."""

    __slots__ = ("error", "greenlet", "result", "task")

    def __init__(self, task: Callable[[], Any], greenlet: Any) -> None:
        self.task = task
        self.greenlet = greenlet  # None where it left meanwhile
        self.result: Any = None
        self.error: BaseException | None = None


class _NativeLane:
    """A thread and a watcher for all calls: gevent's own pool makes a watcher and takes a semaphore and a condition for
    each, which was more than half of what a small transaction took. The hub's pool also resolves names.
    """

    def __init__(self, hub: Any) -> None:
        self._hub = hub
        self._todo = monkey.get_original("queue", "SimpleQueue")()
        self._asked: list[_Job] = []
        self._done: deque[_Job] = deque()
        self._pending = 0
        self._news = hub.loop.async_()
        self._closed = False
        monkey.get_original("_thread", "start_new_thread")(self._work, ())

    def run(self, task: Callable[[], T]) -> T:
        job = _Job(task, gevent.getcurrent())
        if not self._pending:  # started only then: a watcher that is started keeps its loop open
            self._news.start(self._wake)
        self._pending += 1
        self._asked.append(job)
        if len(self._asked) == 1:  # whoever runs before the loop waits again comes along: one hand-over for all
            self._hub.loop.run_callback(self._hand_over)
        try:
            self._hub.switch()
        finally:
            job.greenlet = None
        if job.error is not None:
            raise job.error
        return cast(T, job.result)

    def _hand_over(self) -> None:
        asked, self._asked = self._asked, []
        self._todo.put(asked)

    def _work(self) -> None:
        """In the native thread, which touches nothing of the loop but `send`."""
        _yield_to_others()
        while asked := self._todo.get():
            for job in asked:
                try:
                    job.result = job.task()
                except BaseException as error:
                    job.error = error
            self._done.extend(asked)
            del job, asked
            self._news.send()

    def _wake(self) -> None:
        for _ in range(len(self._done)):
            job = self._done.popleft()
            self._pending -= 1
            if not self._pending:
                self._news.stop()
                self._close_news()
            if job.greenlet is not None:
                job.greenlet.switch()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._asked:
                self._hand_over()
            self._todo.put([])
            self._close_news()

    def _close_news(self) -> None:
        if self._closed and not self._pending:  # a task whose caller was killed still tells its end
            self._news.close()


def _yield_to_others() -> None:
    """This thread, once it is woken, waits for the core until the loop leaves it (sched(7), SCHED_BATCH).

    It was woken while the loop held the interpreter's lock, took the core, and waited for the lock: two switches for
    nothing, each time. A hand-over took 17 us of CPU, and takes 10.
    """
    if hasattr(os, "SCHED_BATCH"):  # Linux
        with contextlib.suppress(OSError):  # where a sandbox forbids it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class _HubBell:
    def __init__(self, loop: GeventLoop, hub: Any) -> None:
        self._loop = loop
        self._hub = hub
        self._waiting: Any = None
        self._rung = False

    def ring(self) -> None:
        if not self._rung and self._waiting is not None:
            self._hub.loop.run_callback(self._wake)
        self._rung = True

    def _wake(self) -> None:
        if self._waiting is not None:  # it may have left at its time
            self._waiting.switch(True)

    def wait(self, until: float) -> bool:
        while not self._rung and until > time.monotonic():
            self._waiting = gevent.getcurrent()
            try:
                self._loop.switch_out(until, is_short=until - time.monotonic() < TICK)
            finally:
                self._waiting = None
        rung, self._rung = self._rung, False
        return rung


class _Ticker:
    """One timer for all greenlets that wait for a time: it runs while there are any."""

    def __init__(self, loop: Any, step: float) -> None:
        self._due: dict[Any, float] = {}
        # It counts as open: gevent ends a loop in which nothing is, and whoever waits for a time is not stuck.
        self._timer = loop.timer(step, step)
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
        watcher.start(gevent.getcurrent().switch, True)
        try:
            return self._loop.switch_out(until)
        finally:
            watcher.stop()

    def close(self) -> None:
        for watcher in self._watchers.values():
            watcher.stop()
            watcher.close()
        self._watchers.clear()
