"""The caller's socket: has the caller left, is it reading, and how to break an answer off so that the caller sees it.

Nothing is read from the socket: a stray CRLF or a pipelined request stays where it is and hides nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from typing import Any

from .cancellation import shut_down
from .loop import Loop

SEND_BUFFER = 32768  # bytes; Linux grows it to megabytes else, and a caller that stopped reading is seen late
SOCKETS = ("gunicorn.socket", "gunicorn.sock", "werkzeug.socket")
ALONE = ("HTTP/1.0", "HTTP/1.1")  # an answer at a time on a connection
CLEAN_CLOSE = struct.pack("ii", 0, 0)
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, zero seconds: close sends RST


class Caller:
    """The other end of one answer, where the server shows its socket; else everything here does nothing."""

    def __init__(self, sock: Any = None, *, http10: bool = False, returns: bool = False) -> None:
        self._socket = sock
        self._http10 = http10
        self._returns = returns
        with contextlib.suppress(OSError):
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    @classmethod
    def from_environ(cls, environ: Mapping[str, Any]) -> Caller:
        """Looks where gunicorn's workers and Werkzeug's server put the socket."""
        protocol = environ.get("SERVER_PROTOCOL")
        sock = next((environ[name] for name in SOCKETS if environ.get(name) is not None), None)
        return cls(sock, http10=protocol == "HTTP/1.0", returns=protocol in ALONE)

    def fileno(self) -> int:
        """-1 where there is none to watch."""
        return -1 if self._socket is None else int(self._socket.fileno())

    def hang_up(self) -> None:
        """Ends the connection under whoever is writing to it, by a reset once the server closes it.

        What the caller did not read is freed at once, and no HTTP/1.0 answer, which ends at the close, looks whole.
        """
        self._reset_on_close()
        self._shut_down()

    def break_off(self) -> None:
        """Makes the end of the answer look broken to the caller.

        The socket is shut down and the end is normal, so that the server's final chunk finds nowhere to go. An
        exception would be reported as a bug by what watches a WSGI application (Sentry, tracers), once for each caller
        that leaves, and Werkzeug's debugger makes a clean end of it.
        An HTTP/1.0 answer ends at the close, which would look clean: that socket is reset.
        Where no socket is shown, or other answers share it, it leaves by ConnectionResetError, which gunicorn logs at
        DEBUG: any other exception has a traceback there.
        """
        if self._http10:
            self._reset()
        if self._returns and self._socket is not None:
            self._shut_down()
            return
        raise ConnectionResetError(errno.ECONNRESET, "the answer was broken off")

    def guard(self) -> None:
        """From here to `settle` an HTTP/1.0 answer ends by a reset, even if its process is killed: see `break_off`."""
        if self._http10:
            self._reset_on_close()

    def settle(self) -> None:
        """The answer has said how it ended: the close may be clean."""
        if self._http10:
            self._linger(CLEAN_CLOSE)

    def _reset(self) -> None:
        """Resets now, by closing: some servers send FIN before they close. Only while nobody writes.

        The server's descriptor becomes another's duplicate, so that the server has something left to close.
        """
        self._reset_on_close()
        with contextlib.suppress(OSError), socket.socket() as other:
            if (fd := self.fileno()) >= 0:
                os.dup2(other.fileno(), fd, inheritable=False)

    def _shut_down(self) -> None:
        if (fd := self.fileno()) >= 0:
            shut_down(fd)

    def _reset_on_close(self) -> None:
        self._linger(RESET_ON_CLOSE)

    def _linger(self, how: bytes) -> None:
        with contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, how)


class Hangups:
    """Watches the callers of one worker by one epoll: EPOLLRDHUP says FIN and half-close, errors come unasked.

    The data that may stand before the end is not looked at, so it cannot hide the end or keep the loop busy.
    """

    def __init__(self, loop: Loop, tick: Callable[[], None]) -> None:
        self._epoll = loop.epoll()
        self._watched: dict[int, Callable[[], None]] = {}
        self._lock = threading.Lock()  # an event of a descriptor must not reach the next owner of its number
        self._stop = loop.attend(self._epoll.fileno(), self._ready, tick) if self._epoll else _nothing

    def watch(self, fd: int, left: Callable[[], None]) -> None:
        """Calls `left` once if the caller on fd leaves. It may not wait."""
        if fd < 0 or self._epoll is None:
            return
        with self._lock:
            self._epoll.register(fd, select.EPOLLRDHUP)
            self._watched[fd] = left

    def unwatch(self, fd: int) -> None:
        """To be called before the descriptor is closed. Idempotent."""
        with self._lock:
            self._forget(fd)

    def _forget(self, fd: int) -> Callable[[], None] | None:
        left = self._watched.pop(fd, None)
        if left is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)
        return left

    def _ready(self) -> None:
        with self._lock:
            for fd, _ in () if self._epoll.closed else self._epoll.poll(0):
                left = self._forget(fd)
                if left is not None:
                    left()

    def close(self) -> None:
        self._stop()
        with self._lock:
            if self._epoll is not None:
                self._epoll.close()


def _nothing() -> None:
    """What is stopped where nothing was started."""
