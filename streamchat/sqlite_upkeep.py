"""What is done with a SQLite log beside the answers themselves: orphans, pruning, sums. Runs in others' transactions.

Pruning goes in steps that are small enough for writers to wait through.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

from .sqlite_endings import UNFINISHED, Orphan, orphan
from .sqlite_file import unbound
from .sqlite_leases import Leases
from .sqlite_outbox import counts
from .sqlite_schema import Connection
from .store import Spent

ORPHANS_A_STEP = 200  # each is four writes at most
ANSWERS_A_STEP = 500
BYTES_A_STEP = 4 * 2**20
KEYS_A_STEP = 5000
PAGES_A_STEP = 500
SPARE_PAGES = 1024  # free pages that stay for what is written next: 4 MiB
GROUPS = {
    "user": "ifnull(user, '')",
    "model": "model",
    "day": "strftime('%Y-%m-%d', CAST(started AS INTEGER), 'unixepoch')",
}
# What nobody owns waits in a queue, and may be much: the index is entered behind it.
OF_DEAD = f"""
    SELECT nr FROM answers INDEXED BY live WHERE ended_at IS NULL AND owner > ''
    AND owner NOT IN (SELECT value FROM json_each(?)) LIMIT {ORPHANS_A_STEP}"""
AGED = "SELECT nr, bytes FROM answers WHERE ended_at < ? ORDER BY nr"
# The oldest ended ones of each group, as long as what stands before them is above the cap.
ABOVE_CAP = """
    WITH sums AS (SELECT {group} AS name, sum(bytes) AS total FROM answers WHERE ended_at IS NOT NULL
        GROUP BY 1 HAVING total > :cap AND name IS NOT NULL),
    aged AS (SELECT nr, bytes, total + bytes - sum(bytes) OVER (PARTITION BY name ORDER BY ended_at, nr) AS before
        FROM sums JOIN answers ON {group} = name WHERE ended_at IS NOT NULL)
    SELECT nr, bytes FROM aged WHERE before > :cap ORDER BY nr"""

Found = list[tuple[int, int]]
Question = Callable[[Connection], Found]


def has_orphans(connection: Connection, leases: Leases) -> bool:
    living = json.dumps(leases.living(connection))
    return connection.execute(OF_DEAD, (living,)).get is not None


def find_orphans(connection: Connection, leases: Leases) -> list[Orphan]:
    """Some of them. Owners that are dead are closed first: they cannot come back. Those that left more keep their row,
    for all who count to see that they did.
    """
    owners, dead = leases.census(connection)
    leases.bury(connection, dead)
    found = connection.execute(f"{UNFINISHED} WHERE nr IN ({OF_DEAD}) ORDER BY nr", (json.dumps(owners),)).fetchall()
    if len(found) < ORPHANS_A_STEP:
        leases.forget(connection, dead)
    return [orphan(connection, row) for row in found]


def sums(connection: Connection, since: float, by: Literal["user", "model", "day"]) -> list[Spent]:
    found = connection.execute(
        f"""SELECT {GROUPS[by]} AS name, count(*), sum(outcome = 'completed'), sum(input_tokens), sum(output_tokens),
        sum(estimated) FROM ledger WHERE started >= ? GROUP BY name ORDER BY name""",
        (since,),
    )
    return [Spent(unbound(name), *counts) for name, *counts in found]


def figures(connection: Connection, leases: Leases) -> Mapping[str, int]:
    living = leases.living(connection)
    ((live, queued, reserved, answers, size),) = connection.execute(
        """SELECT count(*) FILTER (WHERE lives), count(*) FILTER (WHERE status = 'queued'),
            ifnull(sum(reserve) FILTER (WHERE lives), 0), count(*), ifnull(sum(size), 0) FROM (
            SELECT reserve, status,
            ended_at IS NULL AND (owner IN (SELECT value FROM json_each(?)) OR status = 'queued') AS lives,
            iif(ended_at IS NULL, (SELECT sum(octet_length(payload)) FROM pieces WHERE answer = answers.nr), bytes)
            AS size
            FROM answers)""",
        (counted(living),),
    )
    told = {"live": live, "queued": queued, "reserved": reserved, "owners": len(living)}
    return told | {"answers": answers, "bytes": size} | counts(connection)


def counted(living: Sequence[str]) -> str:
    """Whose answers count for limits, as JSON: an answer that waits in a queue has no owner, and counts."""
    return json.dumps(["", *living])


def questions(ended_before: float, bytes_per_user: int, bytes_in_all: int) -> Iterator[Question]:
    """Each finds answers that are to go, with their sizes; it is asked when those of the one before are gone."""
    yield lambda connection: connection.execute(AGED, (ended_before,)).fetchall()
    for cap, group in ((bytes_per_user, "user"), (bytes_in_all, "1")):
        if cap:
            yield partial(_above, cap=cap, group=group)


def _above(connection: Connection, cap: int, group: str) -> Found:
    return connection.execute(ABOVE_CAP.format(group=group), {"cap": cap}).fetchall()


def steps(found: Found) -> Iterator[list[int]]:
    """Answers that one transaction forgets."""
    step: list[int] = []
    size = 0
    for nr, more in found:
        if step and (len(step) == ANSWERS_A_STEP or size + more > BYTES_A_STEP):
            yield step
            step, size = [], 0
        step.append(nr)
        size += more
    if step:
        yield step


def forget(connection: Connection, nrs: Sequence[int]) -> int:
    """How many went. Another process may have forgotten some."""
    given = (json.dumps(nrs),)
    for table in ("pieces", "readers"):
        connection.execute(f"DELETE FROM {table} WHERE answer IN (SELECT value FROM json_each(?))", given)
    connection.execute("DELETE FROM answers WHERE nr IN (SELECT value FROM json_each(?))", given)
    return connection.changes()


def forget_keys(connection: Connection, before: float) -> bool:
    """Whether there may be more. A key stays its 24 h, whatever becomes of its answer."""
    connection.execute(
        """DELETE FROM keys WHERE (scope, key) IN
        (SELECT scope, key FROM keys WHERE created_at < ? ORDER BY created_at LIMIT ?)""",
        (before, KEYS_A_STEP),
    )
    return connection.changes() == KEYS_A_STEP


def shrink(connection: Connection) -> bool:
    """Gives pages back to the disk that nothing will fill soon. Whether there are more."""
    free: int = connection.execute("PRAGMA freelist_count").get
    if free <= SPARE_PAGES:
        return False
    connection.execute(f"PRAGMA incremental_vacuum({PAGES_A_STEP})").fetchall()
    left: int = connection.execute("PRAGMA freelist_count").get
    return SPARE_PAGES < left < free
