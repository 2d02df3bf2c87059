"""The response log in one Redis, for several machines: the contract of store.py by scripts in Lua.

A single Redis, or a primary that something fails over; not a Cluster. Channels are the server's, not the database's:
two shops on one Redis need two prefixes.
"""

from __future__ import annotations

import itertools
import json
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from . import redis_queue_scripts as queue_lua
from . import redis_scripts as lua
from .bookkeeping import Unfinished, chars_of, interrupted, withdrawn
from .errors import (
    BudgetExhausted,
    IdempotencyMismatch,
    LeaseLost,
    SettingsError,
    StoreDown,
    StreamChatError,
    TooManyStreams,
)
from .ledger import Record
from .redis_doubts import NAMED_FOR, Doubts
from .redis_listener import RedisListener
from .redis_lua import Script
from .redis_outbox import RedisOutbox
from .redis_rows import (
    AT_ONCE,
    ROW,
    UNFINISHED,
    batches_of,
    claimed_of,
    day_of,
    fields_of,
    kept_of,
    name_of,
    oldest,
    parts_of,
    settled,
    size_of,
    unfinished_of,
    without,
)
from .store import MOST_CLAIMS, NEVER, Batch, Ending, Entry, Kept, Limits, Spent

REFUSALS: dict[bytes, type[StreamChatError]] = {
    b"lost": LeaseLost,
    b"mismatch": IdempotencyMismatch,
    b"streams": TooManyStreams,
    b"budget": BudgetExhausted,
}
GAUGES = ("live", "queued", "reserved", "owners", "answers", "bytes", "waiting", "dead")


class RedisStore:
    """One for each process. With `keep` seconds an ended answer goes by itself, also where nobody prunes."""

    def __init__(self, url: str, lease: float, *, prefix: str = "streamchat:", keep: float = 0.0) -> None:
        try:
            from .redis_link import Link, OutcomeUnknown
        except ModuleNotFoundError as missing:
            if missing.name != "redis":
                raise
            raise SettingsError(
                "STREAMCHAT_STORE_URL names a Redis, and the package redis is not installed: "
                'run pip install "flask-streamchat[redis]".'
            ) from None
        self._link = Link(url)
        self._outcome_unknown: type[StoreDown] = OutcomeUnknown
        self._prefix = prefix.encode()
        self._lease = max(1, round(lease * 1000))
        self._keep = round(keep * 1000)
        self._attempts = itertools.count()
        self._claims = Doubts(OutcomeUnknown)
        self.outbox = RedisOutbox(self._link, self._prefix, self._keep, Doubts(OutcomeUnknown))
        # By owner. Ids and attempts of admissions to a queue that had no reply; ids that were retracted, and when.
        self._doubtful: dict[str, dict[str, str]] = {}
        self._retracted: dict[str, dict[str, float]] = {}

    def _run(self, script: Script, *values: Any) -> Any:
        return self._link.script(script, self._prefix, *values)

    def _key(self, kind: str, name: str = "") -> bytes:
        return self._prefix + f"{kind}{name}".encode("utf-8", "surrogatepass")

    def take_lease(self) -> str:
        owner = secrets.token_hex(16)
        self._run(lua.TAKE_LEASE, owner, self._lease)
        return owner

    def renew(self, owner: str) -> None:
        """Takes back what was admitted although nobody knows. A Redis that hung may do that late: see NAMED_FOR."""
        doubtful, retracted = dict(self._doubtful.get(owner, {})), dict(self._retracted.get(owner, {}))
        named = itertools.chain(doubtful.items(), ((id, "") for id in retracted))
        alive = self._run(lua.RENEW, owner, self._lease, *itertools.chain(*named))
        for id, attempt in doubtful.items():
            if self._doubtful[owner].get(id) == attempt:
                del self._doubtful[owner][id]
        for id, at in retracted.items():
            if at < time.monotonic() - NAMED_FOR:
                self._retracted[owner].pop(id, None)
        if not alive:
            self._doubtful.pop(owner, None)
            self._retracted.pop(owner, None)
            raise LeaseLost

    def give_up(self, owner: str) -> None:
        self._link.call("DEL", self._key("owner:", owner))

    def admit(self, entry: Entry, limits: Limits) -> str:
        """To a queue: whose outcome stays unknown, the next `renew` takes back. Others are retracted, or go on."""
        attempt = f"{secrets.token_hex(4)}-{next(self._attempts)}"
        user = name_of(entry.user) if entry.user is not None else ""
        try:
            word, *told = self._run(
                lua.ADMIT,
                entry.owner,
                entry.id,
                user,
                name_of(entry.user, entry.key) if entry.key is not None else "",
                entry.fingerprint or "",
                name_of(entry.user, entry.chat) if entry.user is not None and entry.chat is not None else "",
                entry.reserve,
                attempt,
                limits.streams_per_user,
                limits.streams,
                limits.tokens_per_day,
                day_of(entry.created_at),
                repr(entry.created_at),
                name_of(entry.queue) if entry.status == "queued" else "",
                *fields_of(entry),
            )
        except self._outcome_unknown:
            if entry.status == "queued":
                self._doubtful.setdefault(entry.owner, {})[entry.id] = attempt
            raise
        if word in REFUSALS:
            raise REFUSALS[word]
        id: str = told[0].decode()
        return id

    def claim(self, owner: str, queue: str, most: int, before: float = NEVER, id: str | None = None) -> list[Entry]:
        asked = (owner, name_of(queue), max(0, most), repr(before), id or "")
        with self._claims.attempt(owner) as (attempt, lost):
            rows = self._run(queue_lua.CLAIM, *asked, attempt, *lost)
        if rows == 0:
            raise LeaseLost
        return [claimed_of(owner, row) for row in rows]

    def begin(self, owner: str, id: str) -> bool:
        begun = self._run(queue_lua.BEGIN, owner, id)
        if begun < 0:
            raise LeaseLost
        return bool(begun)

    def write(self, owner: str, batches: Sequence[Batch], endings: Sequence[Ending]) -> None:
        gone = {ending.id: time.monotonic() for ending in endings if ending.retracted}
        if gone:
            self._retracted.setdefault(owner, {}).update(gone)
        endings_told = [value for ending in endings for value in settled(ending)]
        while overlaps := self._write(owner, batches, endings_told):
            batches = without(batches, overlaps)

    def _write(self, owner: str, batches: Sequence[Batch], endings: Sequence[Any]) -> list[int]:
        pieces = [value for each in batches for value in (each.id, each.last, each.count, each.payload)]
        overlaps: list[int] | Literal[0] = self._run(lua.WRITE, owner, self._keep, len(batches), *pieces, *endings)
        if overlaps == 0:
            raise LeaseLost
        return overlaps

    def find(self, id: str) -> Kept | None:
        values = self._link.call("HMGET", self._key("answer:", id), *ROW)
        return kept_of(id, dict(zip(ROW, values, strict=True))) if values[ROW.index("owner")] is not None else None

    def latest(self, user: str, chat: str) -> str | None:
        id = self._link.call("GET", self._key("chat:", name_of(user, chat)))
        return None if id is None else id.decode()

    def read(self, id: str, after: int) -> list[Batch]:
        return list(batches_of(id, self._run(lua.READ, id, max(0, after + 1))))

    def listen(self, owner: str) -> RedisListener:
        return RedisListener(self._link, self._prefix, owner)

    def cancel(self, id: str) -> Record | None:
        while self._run(queue_lua.CANCEL, id):
            if record := self._end(id, withdrawn):
                return record
        return None  # or it was begun meanwhile

    def attend(self, ids: Collection[str]) -> None:
        if ids:
            self._run(lua.ATTEND, *ids)

    def unattended(self, id: str) -> float:
        micros = self._run(lua.UNATTENDED, id)
        return math.inf if micros is None else micros / 1e6

    def reap(self) -> list[str]:
        return [id for id in map(bytes.decode, self._run(queue_lua.DEAD, MOST_CLAIMS)) if self._end(id, interrupted)]

    def _end(self, id: str, how: Callable[[Unfinished, float], tuple[Batch, Ending]]) -> Record | None:
        """Its record; None where it ended meanwhile, or another one has it."""
        owner, answer = unfinished_of(id, self._link.call("HMGET", self._key("answer:", id), *UNFINISHED))
        if answer.events:
            answer = replace(answer, chars=chars_of(batch.payload for batch in self.read(id, -1)))
        last, ending = how(answer, time.time())
        ended = self._run(queue_lua.END, self._keep, owner, answer.events, last.payload, *settled(ending))
        return ending.record if ended else None

    def usage(self, since: float, by: Literal["user", "model", "day"]) -> list[Spent]:
        sums: dict[str, Counter[str]] = {}
        for record in self._ledger(since):
            name = day_of(record["started"]) if by == "day" else record[by] or ""
            sums.setdefault(name, Counter()).update(
                answers=1,
                completed=int(record["outcome"] == "completed"),
                input_tokens=record["input_tokens"],
                output_tokens=record["output_tokens"],
                estimated=int(record["estimated"]),
            )
        return [Spent(name=name, **dict(sums[name])) for name in sorted(sums)]

    def _ledger(self, since: float) -> Iterator[dict[str, Any]]:
        for day in sorted(map(bytes.decode, self._link.call("SMEMBERS", self._key("days")))):
            if day < day_of(since):
                continue
            start = b"-"
            while entries := self._link.call("XRANGE", self._key("ledger:", day), start, "+", "COUNT", AT_ONCE):
                records = (json.loads(fields[1]) for _, fields in entries)
                yield from (record for record in records if record["started"] >= since)
                start = b"(" + entries[-1][0]

    def prune(self, retention: float, bytes_per_user: int, bytes_in_all: int) -> int:
        capped = bytes_per_user > 0 or bytes_in_all > 0
        old, ids = self._run(lua.ENDED, retention, int(capped))
        going = ids[:old] + (self._above(ids[old:], bytes_per_user, bytes_in_all) if capped else [])
        self.outbox.forget(retention)
        return sum(self._run(lua.FORGET, *part) for part in parts_of(going))

    def _above(self, ids: list[bytes], of_user: int, in_all: int) -> list[bytes]:
        """The ended answers without which the caps hold, the oldest first."""
        values = [value for part in parts_of(ids) for value in self._link.call("HMGET", self._key("sizes"), *part)]
        sizes = {id: size_of(value) for id, value in zip(ids, values, strict=True)}
        users = {user for _, user in sizes.values()} - {b""}
        going: list[bytes] = []
        for user in users if of_user else ():
            going += oldest({id: size for id, (size, by) in sizes.items() if by == user}, of_user)
        gone = set(going)
        return going + oldest({id: size for id, (size, _) in sizes.items() if id not in gone}, in_all)

    def gauges(self) -> Mapping[str, int]:
        return dict(zip(GAUGES, self._run(lua.GAUGES), strict=True))

    def close(self) -> None:
        self._link.close()
