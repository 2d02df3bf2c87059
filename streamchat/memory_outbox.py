"""The letters of a memory store: `Outbox` in plain Python. Its store's lock is held by every method."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

from .attempts import Next
from .errors import LeaseLost
from .letters import OFF, Letter, State


class MemoryOutbox:
    """`living` tells whose leases have not ended."""

    def __init__(self, lock: threading.Condition, living: Callable[[], set[str]]) -> None:
        self._lock = lock
        self._living = living
        self._letters: dict[str, Letter] = {}  # in the order of their coming
        self._holders: dict[str, str] = {}  # by letter: who delivers it now
        self._off: set[str] = set()  # targets

    def put(self, letter: Letter | None) -> None:
        """By the end of an answer."""
        if letter is not None:
            is_off = letter.target in self._off
            self._letters.setdefault(letter.id, replace(letter, state="dead", told=OFF) if is_off else letter)

    def take(self, owner: str, queue: str, now: float, most: int) -> list[Letter]:
        with self._lock:
            living = self._living()
            if owner not in living:
                raise LeaseLost()
            due = [
                letter
                for letter in self._letters.values()
                if letter.state == "waiting"
                and letter.queue == queue
                and letter.due <= now
                and self._holders.get(letter.id) not in living
            ]
            taken = sorted(due, key=lambda letter: letter.due)[:most]
            self._holders |= {letter.id: owner for letter in taken}
            return taken

    def settle(self, owner: str, id: str, next: Next, told: str) -> None:
        with self._lock:
            if self._holders.get(id) != owner:
                return
            del self._holders[id]
            letter = self._letters[id]
            # One whose target was switched off meanwhile stays dead, unless it was delivered.
            if letter.state == "waiting" or next.state == "delivered":
                self._letters[id] = self._after(letter, next, told)
            if next.switch_off:
                self._switch_off(letter.target)

    def _after(self, letter: Letter, next: Next, told: str) -> Letter:
        return replace(letter, state=next.state, attempts=letter.attempts + 1, due=next.due or 0.0, told=told)

    def _switch_off(self, target: str) -> None:
        self._off.add(target)
        for letter in list(self._letters.values()):
            if letter.target == target and letter.state == "waiting":
                self._letters[letter.id] = replace(letter, state="dead", due=0.0, told=OFF)

    def find(self, id: str) -> Letter | None:
        with self._lock:
            return self._letters.get(id)

    def letters(self, state: State | None, most: int) -> list[Letter]:
        with self._lock:
            found = [each for each in self._letters.values() if state in (None, each.state)]
            return sorted(found, key=lambda each: each.created_at, reverse=True)[:most]

    def replay(self, id: str, now: float) -> bool:
        with self._lock:
            letter = self._letters.get(id)
            if letter is None:
                return False
            self._off.discard(letter.target)
            self._holders.pop(id, None)
            self._letters[id] = replace(letter, state="waiting", attempts=0, due=now, told="")
            return True

    def forget(self, before: float) -> None:
        """What was delivered and is older."""
        for letter in list(self._letters.values()):
            if letter.state == "delivered" and letter.created_at < before:
                del self._letters[letter.id]

    def count(self, state: State) -> int:
        return sum(letter.state == state for letter in self._letters.values())
