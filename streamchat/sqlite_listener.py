"""What other processes write into a SQLite log, for one process: one poller asks for all its readers. Never writes."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from .sqlite_file import File
from .sqlite_schema import Connection
from .store import Batch

# Seconds; what a reader of another process's answer waits at most, beside the writer's own delay: the shorter step
# while something comes, the longer one once nothing came for a second.
POLL, POLL_SOON = 0.05, 0.02
BUSY = 1.0
IDLE = 0.25  # where nobody reads here: only own answers that were cancelled are looked for
BATCHES_A_POLL = 5000  # some megabytes: after an outage the rest comes with the next poll
# The plus: SQLite goes through what is new. By the index of answers it would walk, with each question, through all that
# each wanted answer has so far.
NEW = f"""
    SELECT nr, answer, first, count, payload FROM pieces WHERE nr > ? AND nr <= ?
    AND +answer IN (SELECT value FROM json_each(?)) ORDER BY nr LIMIT {BATCHES_A_POLL}"""
STOPPED = "SELECT id FROM answers WHERE owner = ? AND cancelled = 1 AND ended_at IS NULL"


@dataclass(frozen=True, slots=True)
class _Seen:
    """What was told: pieces up to a number, own answers that were cancelled."""

    newest: int
    stopped: frozenset[str] = frozenset()
    version: tuple[int, int] | None = None  # of the data, as the file's connection told it; None where there is more


class SqliteListener:
    """`Listener` by asking every 20 to 50 ms whether anything was committed, and only then what.

    Numbers of pieces grow with the commits, so what is new stands above the last one seen.
    """

    def __init__(self, file: File, owner: str) -> None:
        self._file = file
        self._owner = owner
        self._wanted: dict[str, int | None] = {}  # ids and their numbers, None until the answer is found
        self._due = self._heard = 0.0  # monotonic
        self._seen = _Seen(file.run(_newest))

    def add(self, id: str) -> None:
        self._wanted.setdefault(id, None)

    def drop(self, id: str) -> None:
        self._wanted.pop(id, None)

    def wait(self, seconds: float) -> tuple[list[Batch], list[str]]:
        until = time.monotonic() + seconds
        while True:
            begin = self._rest(until)
            self._due = begin + self._pace(begin)
            batches, seen = self._file.run(self._poll)
            stopped = sorted(seen.stopped - self._seen.stopped)
            self._seen = seen
            if batches:
                self._heard = begin
            if batches or stopped or time.monotonic() >= until:
                return batches, stopped

    def _pace(self, now: float) -> float:
        if not self._wanted:
            return IDLE
        return POLL_SOON if now - self._heard < BUSY else POLL

    def _rest(self, until: float) -> float:
        """Until the next poll is due, which is at once where somebody begins to read; the time after that."""
        is_idle = not self._wanted
        while (now := time.monotonic()) < min(self._due, until) and not (is_idle and self._wanted):
            time.sleep(min(POLL, min(self._due, until) - now))
        return now

    def close(self) -> None:
        """The connection is the store's."""

    def _poll(self, connection: Connection) -> tuple[list[Batch], _Seen]:
        """In one transaction, so that an answer and its pieces are of the same moment.

        The file may undo it and do it again: what it found counts as seen once `wait` has it.
        """
        version = (self._file.opened, connection.execute("PRAGMA data_version").get)
        if version == self._seen.version:
            return [], self._seen
        stopped = frozenset(id for (id,) in connection.execute(STOPPED, (self._owner,)))
        batches, newest, is_all = self._batches(connection)
        return batches, _Seen(newest, stopped, version if is_all else None)

    def _batches(self, connection: Connection) -> tuple[list[Batch], int, bool]:
        """What is new, up to which piece, and whether that is all."""
        seen, newest = self._seen.newest, _newest(connection)
        ids = self._numbers(connection) if newest > seen else {}
        rows = connection.execute(NEW, (seen, newest, json.dumps(list(ids)))).fetchall() if ids else []
        is_all = len(rows) < BATCHES_A_POLL
        batches = [Batch(ids[answer], first, count, payload) for _, answer, first, count, payload in rows]
        return batches, newest if is_all else rows[-1][0], is_all

    def _numbers(self, connection: Connection) -> dict[int, str]:
        wanted = self._wanted.copy()  # others add and drop meanwhile
        unknown = [id for id, nr in wanted.items() if nr is None]
        if unknown:
            asked = "SELECT a.id, a.nr FROM json_each(?) wanted CROSS JOIN answers a ON a.id = wanted.value"
            found = dict(connection.execute(asked, (json.dumps(unknown),)).fetchall())
            wanted |= found
            for id in found.keys() & self._wanted.keys():
                self._wanted[id] = found[id]
        return {nr: id for id, nr in wanted.items() if nr is not None}


def _newest(connection: Connection) -> int:
    newest: int | None = connection.execute("SELECT max(nr) FROM pieces").get
    return newest or 0
