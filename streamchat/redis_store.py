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
from .errors import (
    BudgetExhausted,
    IdempotencyMismatch,
    LeaseLost,
    SettingsError,
    StoreDown,
    StreamChatError,
    TooManyStreams,
)
from .events import Failure, Usage
from .ledger import Record
from .redis_listener import RedisListener
from .store import Batch, Ending, Entry, Kept, Limits, Spent, pack

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
            from .redis_link import Link
        except ModuleNotFoundError as missing:
            if missing.name != "redis":
                raise
            raise SettingsError(
                "STREAMCHAT_STORE_URL names a Redis, and the package redis is not installed: "
                'run pip install "flask-streamchat[redis]".'
            ) from None
        self._link = Link(url)
        self._prefix = prefix.encode()
        self._lease = max(1, round(lease * 1000))
        self._keep = round(keep * 1000)
        self._attempts = itertools.count()
        self._doubtful: dict[str, dict[str, str]] = {}  # by owner: id and attempt of admissions without an answer

    def _run(self, script: lua.Script, *values: Any) -> Any:
        return self._link.script(script, self._prefix, *values)

    def _key(self, kind: str, name: str = "") -> bytes:
        return self._prefix + f"{kind}{name}".encode()

    def take_lease(self) -> str:
        owner = secrets.token_hex(16)
        self._run(lua.TAKE_LEASE, owner, self._lease)
        return owner

    def renew(self, owner: str) -> None:
        doubtful = dict(self._doubtful.get(owner, {}))
        alive = self._run(lua.RENEW, owner, self._lease, *itertools.chain(*doubtful.items()))
        for id in doubtful:
            self._doubtful[owner].pop(id, None)
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
                *_fields(entry),
            )
        except StoreDown:
            self._doubtful.setdefault(entry.owner, {})[entry.id] = attempt
            raise
        if word in REFUSALS:
            raise REFUSALS[word]
        id: str = told[0].decode()
        return id

    def write(self, owner: str, batches: Sequence[Batch], endings: Sequence[Ending]) -> None:
        values: list[Any] = [owner, self._keep, len(batches)]
        for batch in batches:
            values += batch.id, batch.last, batch.count, batch.payload
        for ending in endings:
            values += ending.id, ending.status, *_settled(ending)
        if not self._run(lua.WRITE, *values):
            raise LeaseLost

    def find(self, id: str) -> Kept | None:
        values = self._link.call("HMGET", self._key("answer:", id), *ROW)
        return _kept(id, dict(zip(ROW, values, strict=True))) if values[ROW.index("owner")] is not None else None

    def latest(self, user: str, chat: str) -> str | None:
        id = self._link.call("GET", self._key("chat:", _hash(user, chat)))
        return None if id is None else id.decode()

    def read(self, id: str, after: int) -> list[Batch]:
        flat = self._run(lua.READ, id, max(0, after + 1))
        return [_batch(id, flat[at], flat[at + 1]) for at in range(0, len(flat), 2)]

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
        if kept is None:
            return False
        ending = Ending(id, "failed", _interrupted(kept), error="interrupted")
        payload = pack([Failure("interrupted", "The answer was interrupted.", True)])
        return bool(self._run(lua.BURY, id, kept.owner, kept.next, payload, *_settled(ending), self._keep))

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
        going = ids[:old]
        if capped:
            going += self._above(ids, old, bytes_per_user or math.inf, bytes_in_all or math.inf)
        return sum(self._run(lua.FORGET, *part) for part in _parts(going))

    def _above(self, ids: list[bytes], old: int, most_of_user: float, most: float) -> list[bytes]:
        """The oldest ended answers without which the caps hold."""
        sizes = [_size(value) for part in _parts(ids) for value in self._link.call("HMGET", self._key("sizes"), *part)]
        kept = sizes[old:]
        in_all, of_user, going = 0, Counter[bytes](), []
        for size, user in kept:
            in_all += size
            of_user[user] += size
        for id, (size, user) in zip(ids[old:], kept, strict=True):
            if in_all > most or (user and of_user[user] > most_of_user):
                going.append(id)
                in_all -= size
                of_user[user] -= size
        return going

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
        "created": repr(entry.created_at),
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


def _interrupted(kept: Kept) -> Record:
    """What it cost died with its producer."""
    return Record(
        id=kept.id,
        user=kept.user,
        model=kept.model,
        started=kept.created_at,
        first_piece=None,
        duration=max(0.0, time.time() - kept.created_at),
        outcome="interrupted",
        finish_reason=None,
        pieces=kept.next,
        input_tokens=0,
        output_tokens=0,
        estimated=True,
        attempts=1,
        upstream_status=None,
        upstream_request_id=None,
        upstream_code=None,
    )


def _batch(id: str, entry: bytes, payload: bytes) -> Batch:
    last, count = map(int, entry.split(b"-"))
    return Batch(id, last - count + 1, count, payload)


def _size(value: bytes | None) -> tuple[int, bytes]:
    size, _, user = (value or b"0 ").partition(b" ")
    return int(size), user


def _parts(ids: list[bytes]) -> Iterator[list[bytes]]:
    return (ids[start : start + AT_ONCE] for start in range(0, len(ids), AT_ONCE))
