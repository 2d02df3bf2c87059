"""Who lives: one process, one lease. Owners stand in the database, the ends of their leases in a small file beside it.

Renewing overwrites 16 bytes in place, so it works while the database is locked, and on a full disk.
"""

from __future__ import annotations

import json
import os
import secrets
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import LeaseLost
from .sqlite_schema import MODE, Connection

SUFFIX = "-leases"
LEASE = struct.Struct("=dd")  # the monotonic time of its end, and how long it was
ROUNDING = 0.001  # seconds
NO_BOOT = "none"  # of an owner that is dead
THESE = "WHERE owner IN (SELECT value FROM json_each(?))"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """Monotonic times of two boots do not compare. Where the system does not tell, `is_running` sees most of it."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


class Leases:
    """Every method with a connection runs in its transaction."""

    def __init__(self, path: str, seconds: float, clock: Callable[[], float]) -> None:
        self._path = path
        self._seconds = seconds
        self._clock = clock
        self._boot = boot_id()
        self._fd: int | None = None

    def take(self, connection: Connection) -> str:
        owner = f"owner_{secrets.token_hex(8)}"
        connection.execute("INSERT INTO owners (owner, boot) VALUES (?, ?)", (owner, self._boot))
        self._extend(connection.last_insert_rowid())
        return owner

    def renew(self, connection: Connection, owner: str) -> None:
        """Writes to the small file only. A process that others took for dead meanwhile has lost its row."""
        self._extend(self._living_slot(connection, owner))

    def check(self, connection: Connection, owner: str) -> None:
        """Raises LeaseLost."""
        self._living_slot(connection, owner)

    def living(self, connection: Connection) -> list[str]:
        return self.census(connection)[0]

    def census(self, connection: Connection) -> tuple[list[str], list[str]]:
        """Who lives; and who is dead, and still has a row."""
        living, dead = list[str](), list[str]()
        for slot, owner, boot in connection.execute("SELECT slot, owner, boot FROM owners").fetchall():
            (living if boot == self._boot and self._is_running(slot) else dead).append(owner)
        return living, dead

    def bury(self, connection: Connection, dead: Sequence[str]) -> None:
        """By whoever counts on their death, in one transaction: who is in the middle of `renew` would live again."""
        if dead:
            connection.execute(f"UPDATE owners SET boot = '{NO_BOOT}' {THESE}", (json.dumps(dead),))

    def forget(self, connection: Connection, dead: Sequence[str]) -> None:
        """Their rows, once nothing is left of them."""
        if dead:
            connection.execute(f"DELETE FROM owners {THESE}", (json.dumps(dead),))

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _living_slot(self, connection: Connection, owner: str) -> int:
        slot: int | None = connection.execute(
            "SELECT slot FROM owners WHERE owner = ? AND boot = ?", (owner, self._boot)
        ).get
        if slot is None or not self._is_running(slot):
            raise LeaseLost()
        return slot

    def _is_running(self, slot: int) -> bool:
        found = os.pread(self._file(), LEASE.size, slot * LEASE.size)
        if len(found) < LEASE.size:
            return False
        end, seconds = LEASE.unpack(found)
        # One that ends later than anybody could have written is of another boot.
        return bool(0 < end - self._clock() <= seconds + ROUNDING)

    def _extend(self, slot: int) -> None:
        os.pwrite(self._file(), LEASE.pack(self._clock() + self._seconds, self._seconds), slot * LEASE.size)

    def _file(self) -> int:
        if self._fd is None:
            # SQLite follows links, too: by whatever name a process opens the log, it looks for the same leases.
            self._fd = os.open(os.path.realpath(self._path) + SUFFIX, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, MODE)
        return self._fd
