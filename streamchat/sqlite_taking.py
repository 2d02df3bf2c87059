"""What waits in a SQLite log, for one owner each: answers in a queue, letters that are due."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from .sqlite_file import File
from .sqlite_leases import Leases
from .sqlite_schema import Connection

T = TypeVar("T")

Find = Callable[[Connection, Leases], list[int]]


@dataclass(frozen=True, slots=True)
class Taker:
    """Asks by reading first: where nothing waits, nobody waits for the lock. Each thread has its own leases."""

    reader: File
    seen_leases: Leases
    writer: File
    leases: Leases

    def take(self, owner: str, find: Find, mark: Callable[[Connection, str, list[int]], list[T]]) -> list[T]:
        """What `mark` makes of the numbers that `find` gave, in one transaction. Raises LeaseLost."""
        if not self.reader.run(lambda connection: _found(connection, self.seen_leases, owner, find)):
            return []
        return self.writer.run(lambda connection: mark(connection, owner, _found(connection, self.leases, owner, find)))


def _found(connection: Connection, leases: Leases, owner: str, find: Find) -> list[int]:
    leases.check(connection, owner)
    return find(connection, leases)
