"""Answers that wait in a queue of a SQLite log, until one process claims and begins them. Runs in others' transactions.

`waiting`, the index, holds none but these: its conditions are repeated word by word.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .sqlite_file import bound, unbound
from .sqlite_leases import Leases
from .sqlite_schema import Connection
from .store import MOST_CLAIMS, Entry

FOUND = "SELECT nr FROM answers WHERE status = 'queued' AND owner = '' AND queue = ?"
BY_AGE = f"{FOUND} AND created_at < ? ORDER BY created_at, nr LIMIT ?"
BY_ID = f"{FOUND} AND id = ? LIMIT ?"
COLUMNS = (
    "created_at",
    "nr",
    "id",
    "owner",
    "user",
    "model",
    "chat",
    "reserve",
    "status",
    "queue",
    "request",
    "target",
)
CLAIMED = f"""
    UPDATE answers SET owner = ?, claims = claims + 1 WHERE nr IN (SELECT value FROM json_each(?))
    RETURNING {", ".join(COLUMNS)}"""
BEGUN = "UPDATE answers SET status = 'in_progress' WHERE id = ? AND owner = ? AND status = 'queued'"
FREED_OF = """
    UPDATE answers SET owner = '' WHERE owner = ? AND ended_at IS NULL AND status = 'queued' AND claims < ?"""
FREED = "UPDATE answers SET owner = '' WHERE nr IN (SELECT value FROM json_each(?))"


def find_waiting(
    connection: Connection, leases: Leases, queue: str, most: int, before: float, id: str | None
) -> list[int]:
    """The numbers of what `claim` may take, the oldest first."""
    asked, which = (BY_AGE, before) if id is None else (BY_ID, bound(id))
    return [nr for (nr,) in connection.execute(asked, (bound(queue), which, most))]


def claim(connection: Connection, owner: str, nrs: Sequence[int]) -> list[Entry]:
    rows = connection.execute(CLAIMED, (owner, json.dumps(nrs))).fetchall()
    return [_entry(*(unbound(value) for value in row)) for row in sorted(rows, key=lambda row: row[:2])]


def _entry(created_at: float, _nr: int, *values: Any) -> Entry:
    return Entry(created_at=created_at, **dict(zip(COLUMNS[2:], values, strict=True)))


def begin(connection: Connection, owner: str, id: str) -> bool:
    connection.execute(BEGUN, (bound(id), owner))
    return connection.changes() == 1


def requeue_of(connection: Connection, owner: str) -> None:
    """What the owner had claimed, did not begin, and may be claimed again."""
    connection.execute(FREED_OF, (owner, MOST_CLAIMS))


def requeue(connection: Connection, nrs: Sequence[int]) -> None:
    """What was claimed and not begun waits again."""
    connection.execute(FREED, (json.dumps(nrs),))
