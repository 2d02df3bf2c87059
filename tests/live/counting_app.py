"""wsgi.py's app, in a worker that counts what a piece costs: system calls, greenlets, threads, timers. GET /counts."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import gevent
import gevent.socket
import greenlet

from wsgi import app

counts: Counter[str] = Counter()


def counted(owner: Any, name: str, as_name: str) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        counts[as_name] += 1
        return original(*arguments, **named)

    setattr(owner, name, call)


class CountingLoop:
    """The hub's loop; a timer that is made is counted."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def timer(self, *arguments: Any, **named: Any) -> Any:
        counts["timers"] += 1
        return self._loop.timer(*arguments, **named)


seen: WeakSet[greenlet.greenlet] = WeakSet()


def count_greenlet(event: str, switch: tuple[greenlet.greenlet, greenlet.greenlet]) -> None:
    """Greenlets cannot be counted where they start; each is counted when it runs for the first time."""
    if switch[1] not in seen:
        seen.add(switch[1])
        counts["greenlets"] += 1


counted(gevent.socket.socket, "recv", "recv")
counted(gevent.socket.socket, "send", "send")
counted(threading.Thread, "start", "threads")
greenlet.settrace(count_greenlet)
hub = gevent.get_hub()
hub.loop = CountingLoop(hub.loop)


@app.get("/counts")
def show_counts() -> dict[str, int]:
    return dict(counts)
