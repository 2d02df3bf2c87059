"""The response log in a SQLite file: one machine, several workers. Calls become transactions; SQL is spoken here.

Writing and reading have a connection and a native thread each, so that a locked file stops no reader.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Literal

from .bookkeeping import DAY, interrupted, is_over, midnight, needs_count, unseen
from .errors import BudgetExhausted, IdempotencyMismatch, LeaseLost, TooManyStreams
from .events import Usage
from .ledger import Record
from .loop import Lane
from .sqlite_endings import PIECE, cancel, end, finish
from .sqlite_file import File, bound, unbound
from .sqlite_leases import Leases
from .sqlite_listener import SqliteListener
from .sqlite_outbox import SqliteOutbox, delivered, forget_letters
from .sqlite_queue import begin, claim, find_waiting, requeue, requeue_of
from .sqlite_schema import Connection, check_library
from .sqlite_taking import Taker
from .sqlite_upkeep import (
    counted,
    figures,
    find_orphans,
    forget,
    forget_keys,
    has_orphans,
    questions,
    shrink,
    steps,
    sums,
)
from .store import NEVER, Batch, Ending, Entry, Kept, Limits, Spent

NEXT = "ifnull((SELECT first + count FROM pieces WHERE answer = a.nr ORDER BY first DESC LIMIT 1), 0)"
ADMITTED = """
    INSERT INTO answers (id, user, chat, model, created_at, owner, status, reserve, queue, request, target)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING"""
RUNNING = f"""
    SELECT a.id, a.status, a.nr, {NEXT} FROM json_each(?) wanted CROSS JOIN answers a ON a.id = wanted.value
    WHERE a.owner = ? AND a.ended_at IS NULL"""
KEPT = ("id", "user", "chat", "model", "created_at", "status", "owner", "finish_reason", "error", "next")
FOUND = f"""
    SELECT {", ".join(KEPT[:-1])}, {NEXT}, input_tokens, output_tokens, estimated FROM answers a WHERE id = ?"""
READ = """
    SELECT first, count, payload FROM pieces WHERE answer = (SELECT nr FROM answers WHERE id = ?)
    AND first + count - 1 > ? ORDER BY first"""
LIVE_OF_LIVING = "FROM answers WHERE ended_at IS NULL AND owner IN (SELECT value FROM json_each(?))"


class SqliteStore:
    """`Store` in a file. `lane` makes native threads; `lease` is in seconds of `clock`.

    Raises SettingsError where apsw is missing or its SQLite too old. A file that is not ours is down.
    """

    def __init__(
        self, path: str, lease: float, lane: Callable[[], Lane], clock: Callable[[], float] = time.monotonic
    ) -> None:
        check_library()
        self._running: dict[tuple[str, str], tuple[int, int]] = {}  # by owner and id: number, next seq; see `_write`
        self._writer = File(path, lane, is_reader=False, undone=self._running.clear)
        self._reader = File(path, lane, is_reader=True)
        self._leases = Leases(path, lease, clock)
        self._seen_leases = Leases(path, lease, clock)  # the reading thread's own
        self._clock = clock
        self._taker = Taker(self._reader, self._seen_leases, self._writer, self._leases)
        self.outbox = SqliteOutbox(self._taker)

    def take_lease(self) -> str:
        return self._writer.run(self._leases.take)

    def renew(self, owner: str) -> None:
        self._reader.run(lambda connection: self._seen_leases.renew(connection, owner))

    def give_up(self, owner: str) -> None:
        self._writer.run(lambda connection: self._give_up(connection, owner))

    def admit(self, entry: Entry, limits: Limits) -> str:
        return self._writer.run(lambda connection: self._admit(connection, entry, limits))

    def claim(self, owner: str, queue: str, most: int, before: float = NEVER, id: str | None = None) -> list[Entry]:
        waiting = partial(find_waiting, queue=queue, most=most, before=before, id=id)
        return self._taker.take(owner, waiting, claim)

    def begin(self, owner: str, id: str) -> bool:
        return self._writer.run(lambda connection: self._begin(connection, owner, id))

    def write(self, owner: str, batches: Sequence[Batch], endings: Sequence[Ending]) -> None:
        self._writer.run(lambda connection: self._write(connection, owner, batches, endings), patience=0)

    def find(self, id: str) -> Kept | None:
        row = self._reader.run(lambda connection: connection.execute(FOUND, (bound(id),)).fetchone())
        if row is None:
            return None
        *told, counted, written, estimated = (unbound(value) for value in row)
        usage = None if counted is None else Usage(counted, written, bool(estimated))
        return Kept(**dict(zip(KEPT, told, strict=True)), usage=usage)

    def latest(self, user: str, chat: str) -> str | None:
        asked = "SELECT id FROM answers WHERE user = ? AND chat = ? ORDER BY nr DESC LIMIT 1"
        found: str | None = self._reader.run(
            lambda connection: connection.execute(asked, (bound(user), bound(chat))).get
        )
        return found

    def read(self, id: str, after: int) -> list[Batch]:
        rows = self._reader.run(lambda connection: connection.execute(READ, (bound(id), after)).fetchall())
        return [Batch(id, *row) for row in rows]

    def listen(self, owner: str) -> SqliteListener:
        return SqliteListener(self._reader, owner)

    def cancel(self, id: str) -> Record | None:
        return self._writer.run(lambda connection: cancel(connection, id))

    def attend(self, ids: Collection[str]) -> None:
        told = """
            INSERT OR REPLACE INTO readers (answer, at) SELECT a.nr, ? FROM json_each(?) wanted
            CROSS JOIN answers a ON a.id = wanted.value"""
        given = (self._clock(), json.dumps(list(ids)))
        self._writer.run(lambda connection: connection.execute(told, given).get)

    def unattended(self, id: str) -> float:
        asked = "SELECT at FROM readers WHERE answer = (SELECT nr FROM answers WHERE id = ?)"
        at: float | None = self._reader.run(lambda connection: connection.execute(asked, (bound(id),)).get)
        now = self._clock()
        return float("inf") if at is None or at > now else now - at  # a time to come is of another boot

    def reap(self) -> list[str]:
        ended: list[str] = []
        # Asked by reading first: where nobody died, nobody waits for the lock.
        while self._reader.run(lambda connection: has_orphans(connection, self._seen_leases)):
            ended += self._writer.run(self._reap)
        return ended

    def usage(self, since: float, by: Literal["user", "model", "day"]) -> list[Spent]:
        return self._reader.run(lambda connection: sums(connection, since, by))

    def prune(self, retention: float, bytes_per_user: int, bytes_in_all: int) -> int:
        now = time.time()
        gone = 0
        for question in questions(now - retention, bytes_per_user, bytes_in_all):
            for nrs in steps(self._reader.run(question)):
                gone += self._writer.run(partial(forget, nrs=nrs))
        for nrs in steps(self._reader.run(lambda connection: delivered(connection, now - retention))):
            self._writer.run(partial(forget_letters, nrs=nrs))
        while self._writer.run(lambda connection: forget_keys(connection, now - DAY)):
            pass
        while self._writer.run(shrink):
            pass
        return gone

    def gauges(self) -> Mapping[str, int]:
        return self._reader.run(lambda connection: figures(connection, self._seen_leases))

    def close(self) -> None:
        """A later use opens all again."""
        self._writer.close()
        self._reader.close()
        self._leases.close()
        self._seen_leases.close()

    def _admit(self, connection: Connection, entry: Entry, limits: Limits) -> str:
        self._leases.check(connection, entry.owner)
        scope = (0 if entry.user is None else bound(entry.user), bound(entry.key))  # no text equals 0
        if entry.key is not None:
            asked = "SELECT id, fingerprint FROM keys WHERE scope = ? AND key = ? AND created_at > ?"
            known = connection.execute(asked, (*scope, entry.created_at - DAY)).fetchone()
            if known is not None:
                if unbound(known[1]) != entry.fingerprint:
                    raise IdempotencyMismatch()
                return str(known[0])
        self._check_limits(connection, entry, limits)
        told = (bound(entry.user), bound(entry.chat), bound(entry.model), entry.created_at)
        owner = "" if entry.status == "queued" else entry.owner
        later = (bound(entry.queue), bound(entry.request), bound(entry.target))
        connection.execute(ADMITTED, (entry.id, *told, owner, entry.status, entry.reserve, *later))
        if owner and connection.changes():
            self._running[owner, entry.id] = connection.last_insert_rowid(), 0
        if entry.key is not None:
            kept = "INSERT OR REPLACE INTO keys (scope, key, fingerprint, id, created_at) VALUES (?, ?, ?, ?, ?)"
            connection.execute(kept, (*scope, bound(entry.fingerprint), entry.id, entry.created_at))
        return entry.id

    def _give_up(self, connection: Connection, owner: str) -> None:
        """What it had claimed waits again at once: without its row, nobody who counts would see that it may."""
        requeue_of(connection, owner)
        self._leases.forget(connection, [owner])

    def _begin(self, connection: Connection, owner: str, id: str) -> bool:
        self._leases.check(connection, owner)
        return begin(connection, owner, id)

    def _check_limits(self, connection: Connection, entry: Entry, limits: Limits) -> None:
        of_user, of_all, of_day = needs_count(limits, entry.user)
        if not (of_user or of_all or of_day):
            return
        owners, dead = self._leases.census(connection)
        if dead:
            self._settle(connection, dead)
        living, user = counted(owners), bound(entry.user)
        if of_all and connection.execute(f"SELECT count(*) {LIVE_OF_LIVING}", (living,)).get >= limits.streams:
            raise TooManyStreams()
        if of_user or of_day:
            asked = f"SELECT count(*), ifnull(sum(reserve), 0) {LIVE_OF_LIVING} AND user = ?"
            ((running, reserved),) = connection.execute(asked, (living, user))
            if of_user and running >= limits.streams_per_user:
                raise TooManyStreams()
            spent = self._spent(connection, user, midnight(entry.created_at)) if of_day else 0
            if is_over(limits.tokens_per_day, spent + reserved, entry.reserve):
                raise BudgetExhausted()

    def _spent(self, connection: Connection, user: str | bytes | None, since: float) -> int:
        asked = "SELECT ifnull(sum(input_tokens + output_tokens), 0) FROM ledger WHERE user = ? AND started >= ?"
        spent: int = connection.execute(asked, (user, since)).get
        return spent

    def _write(self, connection: Connection, owner: str, batches: Sequence[Batch], endings: Sequence[Ending]) -> None:
        """What it knows of a begun answer is true as long as its owner lives: nobody else writes to it, or ends it."""
        try:
            self._leases.check(connection, owner)
        except LeaseLost:
            self._running.clear()
            raise
        ids = {batch.id for batch in batches} | {ending.id for ending in endings}
        running = self._found_running(connection, owner, ids)
        rows = []
        for batch in batches:
            nr, seq = running.get(batch.id, (0, 0))
            new = unseen(batch, seq) if nr else None
            if new is not None:
                rows.append((nr, new.first, new.count, new.payload))
                running[batch.id] = nr, new.last + 1
                if (owner, batch.id) in self._running:
                    self._running[owner, batch.id] = running[batch.id]
        connection.executemany(PIECE, rows)
        now = time.time()
        for ending in endings:
            nr, _ = running.pop(ending.id, (0, 0))
            self._running.pop((owner, ending.id), None)
            if nr:
                end(connection, nr, ending, now)

    def _found_running(self, connection: Connection, owner: str, ids: Collection[str]) -> dict[str, tuple[int, int]]:
        """Number and next seq of each that is live and this owner's."""
        running = {id: known for id in ids if (known := self._running.get((owner, id))) is not None}
        if len(running) < len(ids):
            asked = json.dumps([id for id in ids if id not in running])
            for id, status, nr, seq in connection.execute(RUNNING, (asked, owner)):
                running[id] = nr, seq
                if status == "in_progress":  # one that is claimed, and not begun, may be cancelled by anybody
                    self._running[owner, id] = nr, seq
        return running

    def _settle(self, connection: Connection, dead: Sequence[str]) -> None:
        """Who is counted as dead stays so, and what was claimed and not begun waits again, before others are counted.

        It holds whether who asked is then refused or not.
        """
        self._leases.bury(connection, dead)
        while has_orphans(connection, self._leases):
            self._reap(connection)
        self._leases.forget(connection, dead)

    def _reap(self, connection: Connection) -> list[str]:
        orphans = find_orphans(connection, self._leases)
        requeue(connection, [orphan.nr for orphan in orphans if orphan.may_wait])
        lost = [orphan for orphan in orphans if not orphan.may_wait]
        now = time.time()
        for orphan in lost:
            finish(connection, orphan.nr, interrupted(orphan.answer, now), now)
        return [orphan.answer.id for orphan in lost]
