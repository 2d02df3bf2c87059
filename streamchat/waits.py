"""What is waited for, and how: the words that gevent's loop and threads have in common. Does nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

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


class Bell(Protocol):
    """Wakes one greenlet or thread, rung by any other of this loop. A ring that nobody waits for is kept."""

    def ring(self) -> None:
        """Never waits."""

    def wait(self, until: float) -> bool:
        """True when it was rung since the last wait; False at the monotonic time `until`."""


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

    def lock(self) -> AbstractContextManager[object]:
        """A reentrant lock for what threads share; nothing waits while it is held."""

    def bell(self) -> Bell: ...
