"""The response log in one Redis, for several machines: the contract of store.py by the scripts of redis_scripts.py.

A single Redis, or a primary that something fails over; not a Cluster. Channels are the server's, not the database's:
two shops on one Redis need two prefixes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import secrets
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Literal

from . import redis_scripts as lua
from .bookkeeping import Unfinished, interrupted, unseen
from .errors import (
    BudgetExhausted,
    IdempotencyMismatch,
    LeaseLost,
    SettingsError,
    StoreDown,
    StreamChatError,
    TooManyStreams,
)
from .events import Usage
from .redis_listener import RedisListener
from .store import Batch, Ending, Entry, Kept, Limits, Spent

AT_ONCE = 500  # ids or records in one command: Redis serves nobody else meanwhile
REFUSALS: dict[bytes, type[StreamChatError]] = {
    b"lost": LeaseLost,
    b"mismatch": IdempotencyMismatch,
    b"streams": TooManyStreams,
    b"budget": BudgetExhausted,
}
ROW = ("user", "chat", "model", "created", "status", "owner", "next", "told")


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
        self._doubtful: dict[str, dict[str, str]] = {}  # by owner: id and attempt of admissions without an answer

    def _run(self, script: lua.Script, *values: Any) -> Any:
        return self._link.script(script, self._prefix, *values)

    def _key(self, kind: str, name: str = "") -> bytes:
        return self._prefix + f"{kind}{name}".encode("utf-8", "surrogatepass")

    def take_lease(self) -> str:
        owner = secrets.token_hex(16)
        self._run(lua.TAKE_LEASE, owner, self._lease)
        return owner

    def renew(self, owner: str) -> None:
        doubtful = dict(self._doubtful.get(owner, {}))
        alive = self._run(lua.RENEW, owner, self._lease, *itertools.chain(*doubtful.items()))
        for id, attempt in doubtful.items():
            if self._doubtful[owner].get(id) == attempt:
                del self._doubtful[owner][id]
        if not alive:
            self._doubtful.pop(owner, None)
            raise LeaseLost

    def give_up(self, owner: str) -> None:
        self._link.call("DEL", self._key("owner:", owner))

    def admit(self, entry: Entry, limits: Limits) -> str:
        """Where its outcome stays unknown the next `renew` takes it back: it would hold a slot that nobody uses."""
        attempt = f"{secrets.token_hex(4)}-{next(self._attempts)}"
        user = _hash(entry.user) if entry.user is not None else ""
        try:
            word, *told = self._run(
                lua.ADMIT,
                entry.owner,
                entry.id,
                user,
                _hash(entry.user, entry.key) if entry.key is not None else "",
                entry.fingerprint or "",
                _hash(entry.user, entry.chat) if entry.user is not None and entry.chat is not None else "",
                entry.reserve,
                attempt,
                limits.streams_per_user,
                limits.streams,
                limits.tokens_per_day,
                _day(entry.created_at),
                repr(entry.created_at),
                *_fields(entry),
            )
        except self._outcome_unknown:
            self._doubtful.setdefault(entry.owner, {})[entry.id] = attempt
            raise
        if word in REFUSALS:
            raise REFUSALS[word]
        id: str = told[0].decode()
        return id

    def write(self, owner: str, batches: Sequence[Batch], endings: Sequence[Ending]) -> None:
        endings_told = [value for ending in endings for value in (ending.id, ending.status, *_settled(ending))]
        while overlaps := self._write(owner, batches, endings_told):
            batches = _without(batches, overlaps)

    def _write(self, owner: str, batches: Sequence[Batch], endings: Sequence[Any]) -> list[int]:
        pieces = [value for each in batches for value in (each.id, each.last, each.count, each.payload)]
        overlaps: list[int] | Literal[0] = self._run(lua.WRITE, owner, self._keep, len(batches), *pieces, *endings)
        if overlaps == 0:
            raise LeaseLost
        return overlaps

    def find(self, id: str) -> Kept | None:
        values = self._link.call("HMGET", self._key("answer:", id), *ROW)
        return _kept(id, dict(zip(ROW, values, strict=True))) if values[ROW.index("owner")] is not None else None

    def latest(self, user: str, chat: str) -> str | None:
        id = self._link.call("GET", self._key("chat:", _hash(user, chat)))
        return None if id is None else id.decode()

    def read(self, id: str, after: int) -> list[Batch]:
        return list(_batches(id, self._run(lua.READ, id, max(0, after + 1))))

    def listen(self, owner: str) -> RedisListener:
        return RedisListener(self._link, self._prefix, owner)

    def cancel(self, id: str) -> None:
        self._run(lua.CANCEL, id)

    def attend(self, ids: Collection[str]) -> None:
        if ids:
            self._run(lua.ATTEND, *ids)

    def unattended(self, id: str) -> float:
        micros = self._run(lua.UNATTENDED, id)
        return math.inf if micros is None else micros / 1e6

    def reap(self) -> list[str]:
        return [id for id in map(bytes.decode, self._run(lua.DEAD)) if self._bury(id)]

    def _bury(self, id: str) -> bool:
        kept = self.find(id)
        size = self._link.call("HGET", self._key("answer:", id), "bytes")
        if kept is None or size is None:
            return False
        now = time.time()
        last, ending = interrupted(Unfinished(id, kept.user, kept.model, kept.created_at, kept.next, int(size)), now)
        return bool(self._run(lua.BURY, id, kept.owner, kept.next, last.payload, *_settled(ending), self._keep))

    def usage(self, since: float, by: Literal["user", "model", "day"]) -> list[Spent]:
        sums: dict[str, Counter[str]] = {}
        for record in self._ledger(since):
            name = _day(record["started"]) if by == "day" else record[by] or ""
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
            if day < _day(since):
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
        return sum(self._run(lua.FORGET, *part) for part in _parts(going))

    def _above(self, ids: list[bytes], of_user: int, in_all: int) -> list[bytes]:
        """The ended answers without which the caps hold, the oldest first."""
        values = [value for part in _parts(ids) for value in self._link.call("HMGET", self._key("sizes"), *part)]
        sizes = {id: _size(value) for id, value in zip(ids, values, strict=True)}
        users = {user for _, user in sizes.values()} - {b""}
        going: list[bytes] = []
        for user in users if of_user else ():
            going += _oldest({id: size for id, (size, by) in sizes.items() if by == user}, of_user)
        gone = set(going)
        return going + _oldest({id: size for id, (size, _) in sizes.items() if id not in gone}, in_all)

    def gauges(self) -> Mapping[str, int]:
        return dict(zip(("live", "reserved", "owners", "answers", "bytes"), self._run(lua.GAUGES), strict=True))

    def close(self) -> None:
        self._link.close()


def _hash(*names: str | None) -> str:
    """Strangers' text as a name that is short, and has no separators of ours in it."""
    return hashlib.sha256(json.dumps(names).encode("ascii")).hexdigest()[:32]


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def _fields(entry: Entry) -> list[str]:
    row = {
        "user": entry.user,
        "chat": entry.chat,
        "model": entry.model,
        "status": entry.status,
    }
    return [text for name, value in row.items() if value is not None for text in (name, value)]


def _settled(ending: Ending) -> tuple[str, str, int, str]:
    """What the row is told, the day that the tokens belong to, how many, the record."""
    usage, record = ending.usage, ending.record
    counted = [usage.input_tokens, usage.output_tokens, usage.estimated] if usage else None
    told = json.dumps([ending.finish_reason, counted, ending.error])
    return told, _day(record.started), record.input_tokens + record.output_tokens, json.dumps(asdict(record))


def _kept(id: str, row: dict[str, bytes | None]) -> Kept:
    text = {name: None if value is None else value.decode("utf-8", "surrogatepass") for name, value in row.items()}
    reason, counted, error = json.loads(text["told"]) if text["told"] else (None, None, None)
    return Kept(
        id=id,
        user=text["user"],
        chat=text["chat"],
        model=text["model"] or "",
        created_at=float(text["created"] or 0),
        status=text["status"],  # type: ignore[arg-type]  # written from a Status
        owner=text["owner"] or "",
        next=int(text["next"] or 0),
        finish_reason=reason,
        usage=Usage(*counted) if counted else None,
        error=error,
    )


def _without(batches: Sequence[Batch], overlaps: Sequence[int]) -> list[Batch]:
    """The batches less the events that are kept: places in them, each with the seq that is to come next."""
    known = dict(zip(overlaps[::2], overlaps[1::2], strict=True))
    cut = (unseen(batch, known.get(place, 0)) for place, batch in enumerate(batches))
    return [batch for batch in cut if batch is not None]


def _batches(id: str, told: bytes) -> Iterator[Batch]:
    line, _, payloads = told.partition(b"\n")
    numbers, at = map(int, line.split()), 0
    for last, count, size in zip(numbers, numbers, numbers, strict=True):
        yield Batch(id, last - count + 1, count, payloads[at : at + size])
        at += size


def _size(value: bytes | None) -> tuple[int, bytes]:
    size, _, user = (value or b"0 ").partition(b" ")
    return int(size), user


def _oldest(sizes: dict[bytes, int], cap: int) -> list[bytes]:
    """The first ones, until the rest is within the cap. 0 is none."""
    total, found = sum(sizes.values()), []
    for id, size in sizes.items():
        if not cap or total <= cap:
            break
        found.append(id)
        total -= size
    return found


def _parts(ids: list[bytes]) -> Iterator[list[bytes]]:
    return (ids[start : start + AT_ONCE] for start in range(0, len(ids), AT_ONCE))
