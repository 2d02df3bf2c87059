"""The letters of a SQLite log, which come in by the transactions that end their answers: `Outbox` in SQL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from .attempts import Next
from .letters import OFF, Letter, State
from .sqlite_file import bound, unbound
from .sqlite_leases import Leases
from .sqlite_schema import Connection
from .sqlite_taking import Taker

COLUMNS = ("id", "answer", "queue", "target", "body", "created_at", "state", "attempts", "due", "told")
IS_OFF = "EXISTS (SELECT 1 FROM targets_off WHERE target = :target)"
PUT = f"""
    INSERT OR IGNORE INTO letters ({", ".join(COLUMNS)}) VALUES (:id, :answer, :queue, :target, :body, :created_at,
    iif({IS_OFF}, 'dead', :state), :attempts, :due, iif({IS_OFF}, :off, :told))"""
DUE = """
    SELECT nr FROM letters WHERE state = 'waiting' AND queue = ? AND due <= ?
    AND holder NOT IN (SELECT value FROM json_each(?)) ORDER BY due, nr LIMIT ?"""
TAKEN = f"""
    UPDATE letters SET holder = ? WHERE nr IN (SELECT value FROM json_each(?))
    RETURNING due, nr, {", ".join(COLUMNS)}"""
TOLD = f"SELECT {', '.join(COLUMNS)} FROM letters"
SETTLED = "UPDATE letters SET holder = '', state = ?, attempts = attempts + 1, due = ?, told = ? WHERE nr = ?"
REPLAYED = "UPDATE letters SET holder = '', state = 'waiting', attempts = 0, due = ?, told = '' WHERE id = ?"
# What was delivered; a replayed one waits again.
FORGOTTEN = "DELETE FROM letters WHERE nr IN (SELECT value FROM json_each(?)) AND state = 'delivered'"


class SqliteOutbox:
    """`taker` holds the store's files and leases."""

    def __init__(self, taker: Taker) -> None:
        self._taker = taker
        self._reader = taker.reader
        self._writer = taker.writer

    def take(self, owner: str, queue: str, now: float, most: int) -> list[Letter]:
        return self._taker.take(owner, partial(_find_due, queue=queue, now=now, most=most), _hold)

    def settle(self, owner: str, id: str, next: Next, told: str) -> None:
        self._writer.run(lambda connection: _settle(connection, owner, id, next, told))

    def find(self, id: str) -> Letter | None:
        row = self._reader.run(lambda connection: connection.execute(f"{TOLD} WHERE id = ?", (bound(id),)).fetchone())
        return None if row is None else _letter(row)

    def letters(self, state: State | None, most: int) -> list[Letter]:
        which = "" if state is None else "WHERE state = :state"
        asked = f"{TOLD} {which} ORDER BY created_at DESC, nr DESC LIMIT :most"
        given = {"state": state, "most": most}
        rows = self._reader.run(lambda connection: connection.execute(asked, given).fetchall())
        return [_letter(row) for row in rows]

    def replay(self, id: str, now: float) -> bool:
        return self._writer.run(lambda connection: _replay(connection, id, now))


def put(connection: Connection, letter: Letter) -> None:
    """By the end of its answer. What goes to a target that is switched off is born dead."""
    values = (bound(value) if isinstance(value, str) else value for value in _values(letter))
    connection.execute(PUT, dict(zip(COLUMNS, values, strict=True)) | {"off": OFF})


def counts(connection: Connection) -> dict[str, int]:
    """How many letters are waiting, and how many dead."""
    asked = "SELECT (SELECT count(*) FROM letters WHERE state = 'waiting'), count(*) FROM letters WHERE state = 'dead'"
    ((waiting, dead),) = connection.execute(asked)
    return {"waiting": waiting, "dead": dead}


def delivered(connection: Connection, before: float) -> list[tuple[int, int]]:
    """Letters that are to go, with their sizes."""
    asked = "SELECT nr, octet_length(body) FROM letters WHERE state = 'delivered' AND created_at < ?"
    return connection.execute(asked, (before,)).fetchall()


def forget_letters(connection: Connection, nrs: Sequence[int]) -> None:
    connection.execute(FORGOTTEN, (json.dumps(nrs),))


def _find_due(connection: Connection, leases: Leases, queue: str, now: float, most: int) -> list[int]:
    given = (bound(queue), now, json.dumps(leases.living(connection)), most)
    return [nr for (nr,) in connection.execute(DUE, given)]


def _hold(connection: Connection, owner: str, nrs: Sequence[int]) -> list[Letter]:
    rows = connection.execute(TAKEN, (owner, json.dumps(nrs))).fetchall()
    return [_letter(row) for _, _, *row in sorted(rows, key=lambda row: row[:2])]


def _settle(connection: Connection, owner: str, id: str, next: Next, told: str) -> None:
    asked = "SELECT nr, target, state FROM letters WHERE id = ? AND holder = ?"
    row = connection.execute(asked, (bound(id), owner)).fetchone()
    if row is None:
        return
    nr, target, state = row
    # One whose target was switched off meanwhile stays dead, unless it was delivered.
    if state == "waiting" or next.state == "delivered":
        connection.execute(SETTLED, (next.state, next.due or 0.0, bound(told), nr))
    else:
        connection.execute("UPDATE letters SET holder = '' WHERE nr = ?", (nr,))
    if next.switch_off:
        _switch_off(connection, target)


def _switch_off(connection: Connection, target: str | bytes) -> None:
    connection.execute("INSERT OR IGNORE INTO targets_off (target) VALUES (?)", (target,))
    dead = "UPDATE letters SET state = 'dead', due = 0.0, told = ? WHERE target = ? AND state = 'waiting'"
    connection.execute(dead, (OFF, target))


def _replay(connection: Connection, id: str, now: float) -> bool:
    on = "DELETE FROM targets_off WHERE target = (SELECT target FROM letters WHERE id = ?)"
    connection.execute(on, (bound(id),))
    connection.execute(REPLAYED, (now, bound(id)))
    return connection.changes() == 1


def _values(letter: Letter) -> list[Any]:
    return [getattr(letter, name) for name in COLUMNS]


def _letter(row: Sequence[Any]) -> Letter:
    """The body is bytes, whatever they are."""
    return Letter(
        **{name: value if name == "body" else unbound(value) for name, value in zip(COLUMNS, row, strict=True)}
    )
