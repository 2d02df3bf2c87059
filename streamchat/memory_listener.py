"""What is written into a memory log, told to one process's listener. Never waits while the store's lock is held."""

from __future__ import annotations

import threading
from collections.abc import Callable

from .store import Batch


class MemoryListener:
    """`Listener` that is told of every batch when it is written."""

    def __init__(
        self,
        changed: threading.Condition,
        owner: str,
        stopped: Callable[[str], set[str]],
        listeners: set[MemoryListener],
    ) -> None:
        self._changed = changed
        self._owner = owner
        self._stopped = stopped
        self._listeners = listeners
        self._wanted: set[str] = set()
        self._told: set[str] = set()
        self._batches: list[Batch] = []
        self._closed = False

    def add(self, id: str) -> None:
        with self._changed:
            self._wanted.add(id)

    def drop(self, id: str) -> None:
        with self._changed:
            self._wanted.discard(id)

    def tell(self, batch: Batch) -> None:
        """Called with the lock held."""
        if batch.id in self._wanted:
            self._batches.append(batch)

    def wait(self, seconds: float) -> tuple[list[Batch], list[str]]:
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._batches or self._stopped(self._owner) - self._told, seconds
            )
            batches, self._batches = self._batches, []
            stopped = self._stopped(self._owner)
            new, self._told = stopped - self._told, stopped
            return batches, sorted(new)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._listeners.discard(self)
            self._changed.notify_all()
