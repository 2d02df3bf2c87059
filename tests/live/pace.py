"""Whether a live stream keeps its pace: pieces that carry the moment they were made, and how late each one came."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.fake_upstream import Step, stamped
from tests.live.pair import Reading, ask
from tests.live.servers import Server

COALESCED = 0.04  # seconds in which pieces are joined, as shipped
LATE = 0.1  # seconds beyond that; a store that is waited for makes a piece two seconds late
PAUSE = 0.02  # seconds between pieces


def paced(seconds: float) -> Step:
    return stamped(round(seconds / PAUSE), PAUSE)


class Hiccups:
    """The longest time that this machine let a sleeping thread wait beyond its sleep: no server can do better."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._over = threading.Event()

    def watch(self) -> None:
        before = time.monotonic()
        while not self._over.wait(PAUSE / 2):
            now = time.monotonic()
            self.longest = max(self.longest, now - before - PAUSE / 2)
            before = now

    def stop(self) -> None:
        self._over.set()


@contextmanager
def hiccups() -> Iterator[Hiccups]:
    found = Hiccups()
    thread = threading.Thread(target=found.watch)
    thread.start()
    try:
        yield found
    finally:
        found.stop()
        thread.join()


class Listening:
    """One caller in a thread of its own. `began` is set with the first piece."""

    def __init__(self, server: Server, message: str) -> None:
        self.began = threading.Event()
        self.events: list[dict[str, Any]] = []
        self.latest = 0.0  # how late the latest piece was
        self.headers: dict[str, str] = {}
        self.id = ""
        self.waited = 0.0  # for the headers
        self._server, self._message = server, message
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        asked = time.monotonic()
        with ask(self._server, self._message) as reading:
            self.waited = time.monotonic() - asked
            self.id, self.headers = reading.id, reading.headers
            self._read(reading)
        self.began.set()

    def _read(self, reading: Reading) -> None:
        while event := reading.next():
            if event["type"] == "text":
                self.latest = max(self.latest, time.monotonic() - float(event["text"]))
                self.began.set()
            self.events.append(event)

    def join(self, seconds: float = 30) -> list[dict[str, Any]]:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"{self._message} has not ended after {seconds} s"
        return self.events

    @property
    def warnings(self) -> list[str]:
        return [event["code"] for event in self.events if event["type"] == "warning"]
