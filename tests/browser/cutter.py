"""A hop between a browser and a server whose connections a test cuts, as a lost network does it."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from types import TracebackType
from typing import Self

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST
CUT, STOP = b"c", b"s"


class Cutter:
    """Listens on a port of its own. One thread carries all bytes, and it alone opens and closes connections."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.accepted = 0
        self._others: dict[socket.socket, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._orders, self._order = socket.socketpair()
        self._was_cut = threading.Event()
        self._thread = threading.Thread(target=self._carry, name="cutter")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Resets every connection that there is; when it returns, they are gone."""
        self._was_cut.clear()
        self._order.send(CUT)
        assert self._was_cut.wait(5), "nothing was cut"

    def _carry(self) -> None:
        while True:
            ready = [key.fileobj for key, _ in self._selector.select()]
            for side in ready:
                assert isinstance(side, socket.socket)
                if side is self._orders:
                    order = side.recv(1)
                    self._reset_all()
                    if order == STOP:
                        return
                elif side is self._listener:
                    self._accept()
                elif side in self._others:
                    self._pass_on(side, self._others[side])

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        far = socket.create_connection(("127.0.0.1", self._target))
        self.accepted += 1
        for side, other in ((near, far), (far, near)):
            self._others[side] = other
            self._selector.register(side, selectors.EVENT_READ)

    def _pass_on(self, side: socket.socket, other: socket.socket) -> None:
        try:
            data = side.recv(65536)
            other.sendall(data)
        except OSError:
            data = b""
        if not data:
            self._close(side)
            self._close(other)

    def _close(self, side: socket.socket) -> None:
        self._selector.unregister(side)
        del self._others[side]
        side.close()

    def _reset_all(self) -> None:
        for side in list(self._others):
            side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self._close(side)
        self._was_cut.set()

    def __enter__(self) -> Self:
        for each in (self._listener, self._orders):
            self._selector.register(each, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._order.send(STOP)
        self._thread.join(5)
        for each in (self._selector, self._listener, self._orders, self._order):
            each.close()
