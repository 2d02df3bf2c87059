"""The letters of a Redis store: the contract of letters.py by the scripts of redis_outbox_scripts.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import redis_outbox_scripts as lua
from .attempts import Next
from .errors import LeaseLost
from .letters import OFF, Letter, State
from .redis_doubts import Doubts
from .redis_lua import Script
from .redis_rows import AT_ONCE, letter_of, name_of

if TYPE_CHECKING:
    from .redis_link import Link

STATES: tuple[State, ...] = ("waiting", "delivered", "dead")


class RedisOutbox:
    """With `keep` milliseconds a delivered letter goes by itself when it is so old."""

    def __init__(self, link: Link, prefix: bytes, keep: int, doubts: Doubts) -> None:
        self._link = link
        self._prefix = prefix
        self._keep = keep
        self._doubts = doubts

    def _run(self, script: Script, *values: Any) -> Any:
        return self._link.script(script, self._prefix, *values)

    def take(self, owner: str, queue: str, now: float, most: int) -> list[Letter]:
        with self._doubts.attempt(owner) as (attempt, lost):
            rows = self._run(lua.TAKE, owner, name_of(queue), repr(now), max(0, most), attempt, *lost)
        if rows == 0:
            raise LeaseLost
        return [letter_of(*row) for row in rows]

    def settle(self, owner: str, id: str, next: Next, told: str) -> None:
        off = OFF if next.switch_off else ""
        self._run(lua.SETTLE, owner, id, next.state, repr(next.due or 0.0), told, off, self._keep)

    def find(self, id: str) -> Letter | None:
        key = self._prefix + b"letter:" + id.encode("utf-8", "surrogatepass")
        row = self._link.call("HMGET", key, *lua.FIELDS)
        return None if row[0] is None else letter_of(id.encode("utf-8", "surrogatepass"), *row)

    def letters(self, state: State | None, most: int) -> list[Letter]:
        return [letter_of(*row) for row in self._run(lua.LIST, most, *([state] if state else STATES))]

    def replay(self, id: str, now: float) -> bool:
        return bool(self._run(lua.REPLAY, id, repr(now)))

    def forget(self, retention: float) -> None:
        """What was delivered and is older than so many seconds."""
        while self._run(lua.FORGET, retention, AT_ONCE) == AT_ONCE:
            pass
