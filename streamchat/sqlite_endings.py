"""How an answer ends in a SQLite log: state, record and letter at once. Runs in others' transactions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .bookkeeping import Unfinished, chars_of, withdrawn
from .ledger import FIELDS, Record
from .sqlite_file import bound, unbound
from .sqlite_outbox import put
from .sqlite_schema import Connection
from .store import MOST_CLAIMS, Batch, Ending

PIECE = "INSERT INTO pieces (answer, first, count, payload) VALUES (?, ?, ?, ?)"
ENDED = """
    UPDATE answers SET status = ?, ended_at = ?, finish_reason = ?, input_tokens = ?, output_tokens = ?, estimated = ?,
    error = ?, bytes = (SELECT ifnull(sum(octet_length(payload)), 0) FROM pieces WHERE answer = answers.nr),
    request = '' WHERE nr = ?"""
RECORD = f"INSERT OR IGNORE INTO ledger (nr, {', '.join(FIELDS)}) VALUES (?, {', '.join('?' * len(FIELDS))})"
# A scope is a user, or 0: no text equals it.
KEY_OF = "DELETE FROM keys WHERE scope = (SELECT ifnull(user, 0) FROM answers WHERE nr = ?) AND id = ?"
STOPPED = "UPDATE answers SET cancelled = 1 WHERE id = ? AND ended_at IS NULL AND status <> 'queued' AND cancelled = 0"
UNFINISHED = """
    SELECT nr, status, claims, id, user, model, created_at,
    (SELECT ifnull(max(first + count), 0) FROM pieces WHERE answer = a.nr), queue, target FROM answers a"""


@dataclass(frozen=True, slots=True)
class Orphan:
    """A live answer that nobody makes. `may_wait` says that it was not begun, and may be claimed again."""

    nr: int
    may_wait: bool
    answer: Unfinished


def orphan(connection: Connection, row: Sequence[Any]) -> Orphan:
    """A row of UNFINISHED."""
    nr, status, claims, id, user, model, created_at, events, queue, target = (unbound(value) for value in row)
    kept = connection.execute("SELECT payload FROM pieces WHERE answer = ?", (nr,)) if events else ()
    chars = chars_of(payload for (payload,) in kept)
    answer = Unfinished(id, user, model, created_at, events, chars, queue, target)
    return Orphan(nr, status == "queued" and claims < MOST_CLAIMS, answer)


def end(connection: Connection, nr: int, ending: Ending, now: float) -> None:
    if ending.retracted:
        connection.execute(KEY_OF, (nr, ending.id))
        connection.execute("DELETE FROM answers WHERE nr = ?", (nr,))
        return
    usage = ending.usage
    counted = (usage.input_tokens, usage.output_tokens, usage.estimated) if usage else (None, None, None)
    connection.execute(ENDED, (ending.status, now, bound(ending.finish_reason), *counted, bound(ending.error), nr))
    told = (getattr(ending.record, name) for name in FIELDS)
    connection.execute(RECORD, (nr, *(bound(value) if isinstance(value, str) else value for value in told)))
    if ending.letter is not None:
        put(connection, ending.letter)


def finish(connection: Connection, nr: int, last: tuple[Batch, Ending], now: float) -> None:
    """Ends what nobody makes."""
    piece, ending = last
    connection.execute(PIECE, (nr, piece.first, piece.count, piece.payload))
    end(connection, nr, ending, now)


def cancel(connection: Connection, id: str) -> Record | None:
    """Tells the owner; what is queued, claimed or not, ends here, with the record that is returned."""
    connection.execute(STOPPED, (bound(id),))
    if connection.changes():
        return None
    row = connection.execute(f"{UNFINISHED} WHERE id = ? AND status = 'queued'", (bound(id),)).fetchone()
    if row is None:
        return None
    found, now = orphan(connection, row), time.time()
    last = withdrawn(found.answer, now)
    finish(connection, found.nr, last, now)
    return last[1].record
