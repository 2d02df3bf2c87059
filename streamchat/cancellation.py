"""One flag with a reason, for one answer: set once, by whoever is first, from any greenlet or thread.

Setting it shuts the upstream's socket down, which wakes whoever waits for it, and runs the callbacks. It never waits.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable

from .errors import StreamChatError


class Cancellation:
    """`error` is None until somebody cancels; then it says why, for ever."""

    def __init__(self) -> None:
        self.error: StreamChatError | None = None
        self._fd: int | None = None
        self._owned = False
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []

    def cancel(self, error: StreamChatError) -> bool:
        """True for the first who cancels."""
        with self._lock:
            if self.error is not None:
                return False
            self.error = error
            if self._fd is not None:
                shut_down(self._fd)
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()
        return True

    def check(self) -> None:
        """Raises the reason, if there is one."""
        if self.error is not None:
            raise self.error

    def hold(self, fd: int) -> None:
        """Makes the upstream's descriptor known, before a byte is sent on it; shuts it down if that is too late."""
        self._hold(fd, owned=False)

    def _hold(self, fd: int, *, owned: bool) -> None:
        self.drop()
        with self._lock:
            self._fd, self._owned = fd, owned
            if self.error is not None:
                shut_down(fd)

    def hold_duplicate(self, fd: int) -> None:
        """The same for a descriptor that a library closes when it likes: a duplicate cannot become another's."""
        self._hold(os.dup(fd), owned=True)

    def end_connection(self) -> None:
        """Shuts the upstream's socket down without giving a reason: its owner has read all it wants."""
        with self._lock:
            if self._fd is not None:
                shut_down(self._fd)

    def drop(self) -> None:
        """Forgets the descriptor; to be called before it is closed or kept for the next answer."""
        with self._lock:
            duplicate = self._fd if self._owned else None
            self._fd, self._owned = None, False
        if duplicate is not None:
            open(duplicate, "rb", buffering=0).close()  # gevent's os.close may wait, also where nobody may

    def then(self, callback: Callable[[], None]) -> None:
        """Runs the callback on cancelling, at once if that has happened."""
        with self._lock:
            if self.error is None:
                self._callbacks.append(callback)
                return
        callback()

    def sleep(self, seconds: float) -> None:
        """Waits; raises the reason as soon as there is one."""
        woken = threading.Event()
        self.then(woken.set)
        woken.wait(seconds)
        self.check()


def shut_down(fd: int) -> None:
    """Ends the connection of a descriptor that somebody else owns and may be reading.

    By a second, plain socket object: gevent's SSLSocket.shutdown would drop the TLS layer under its reader.
    Not by a duplicate: where no descriptor is left, nothing could be ended any more.
    """
    with contextlib.suppress(OSError):
        view = socket.socket(fileno=fd)
        try:
            view.shutdown(socket.SHUT_RDWR)
        finally:
            view.detach()
