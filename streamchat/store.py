"""The response log as a store keeps it: what is kept of an answer, and what every store promises. Does no I/O.

A store is called from many greenlets or threads at once. A call waits, but never the event loop with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from .events import ChoiceEnd, Event, Failure, Finish, Reasoning, Refusal, Start, Text, ToolCall, Usage
from .ledger import Record
from .letters import Letter, Outbox

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled", "incomplete"]
LIVE: tuple[Status, ...] = ("queued", "in_progress")
MOST_CLAIMS = 5  # of one answer: what ends its process each time before it is asked for, would end the next, too
NEVER = float("inf")

KINDS: dict[str, type[Event]] = {
    kind.type: kind for kind in (Start, Text, Reasoning, Refusal, ToolCall, ChoiceEnd, Finish, Failure)
}
_dumps = json.JSONEncoder(ensure_ascii=True, separators=(",", ":")).encode  # lone surrogates pass as escapes
_quoted = json.encoder.encode_basestring_ascii


def pack(events: Sequence[Event]) -> bytes:
    """Events as one JSON array of arrays: the type, then the fields in their order."""
    return joined([packed(events)])


def packed(events: Sequence[Event]) -> str:
    """A part of what `joined` makes one of: ASCII."""
    parts = [
        # Nearly every event is a piece of the first choice's text: a third of the time of writing went into `_dumps`.
        f'["text",{_quoted(event.text)}]'
        if type(event) is Text and not event.choice and event.logprobs is None
        else PACKERS.get(type(event), _other)(event)
        for event in events
    ]
    return ",".join(parts)


def joined(parts: Sequence[str]) -> bytes:
    return f"[{','.join(parts)}]".encode("ascii")


def _other(event: Any) -> str:
    return _dumps([event.type, *_values(event)])


def _start(event: Any) -> str:
    return f'["start",{_quoted(event.id)},{_quoted(event.model)},{event.created_at:d}]'


def _finish(event: Any) -> str:
    usage = event.usage
    counted = f"{usage.input_tokens:d},{usage.output_tokens:d},{str(usage.estimated).lower()}" if usage else ""
    return f'["finish",{_quoted(event.finish_reason)},{f"[{counted}]" if usage else "null"}]'


# Each answer has these two, and `_dumps` makes an encoder each time.
PACKERS: dict[type[Event], Callable[[Any], str]] = {Start: _start, Finish: _finish}


def _values(event: Event) -> list[Any]:
    values = [getattr(event, name) for name in event.__slots__]
    return values[:-2] if values[-2:] == [0, None] else values  # the first choice, without logprobs: nearly every piece


def unpack(payload: bytes) -> list[Event]:
    """The events of `pack`. Raises ValueError for what is no whole one: nothing half-written is read as complete."""
    try:
        return [_event(*item) for item in json.loads(payload)]
    except (KeyError, TypeError) as error:
        raise ValueError("not events of ours") from error


def _event(kind: str, *values: Any) -> Event:
    if kind == Finish.type:
        reason, counted = values
        return Finish(reason, Usage(*counted) if counted else None)
    event = KINDS[kind](*values)
    if not isinstance(getattr(event, "choice", 0), int):
        raise TypeError
    return event


@dataclass(frozen=True, slots=True)
class Batch:
    """Events of one answer that follow each other: `first` is the seq of the first, `count` how many there are."""

    id: str
    first: int
    count: int
    payload: bytes

    @property
    def last(self) -> int:
        return self.first + self.count - 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What admission holds a user and the whole service to; 0 is no limit. Only answers of live owners count, and
    those that wait in a queue.

    Without a user only `streams` holds. A budget's day is that of the entry's `created_at` and the records' `started`.
    """

    streams_per_user: int = 0
    streams: int = 0
    tokens_per_day: int = 0  # of a user, from midnight UTC; reserved at admission, settled at the end


@dataclass(frozen=True, slots=True)
class Entry:
    """An answer that asks to be admitted. `key` and `fingerprint` are of its Idempotency-Key and body.

    One with the status `queued` waits in `queue` until a process claims it; until then nobody owns it. `request` says
    what is to be asked then, `target` where a webhook tells its end.
    """

    id: str
    owner: str
    user: str | None
    model: str
    created_at: float  # Unix time
    chat: str | None = None
    key: str | None = None
    fingerprint: str | None = None
    reserve: int = 0  # tokens
    status: Status = "in_progress"
    queue: str = ""
    request: str = ""
    target: str = ""


@dataclass(frozen=True, slots=True)
class Ending:
    """The final state of an answer, written in one transaction with its last events, its record and its letter."""

    id: str
    status: Status
    record: Record
    finish_reason: str | None = None
    usage: Usage | None = None
    error: str | None = None  # the code
    letter: Letter | None = None
    retracted: bool = False  # nothing was asked: the answer is forgotten, without a record; slot and key are free


@dataclass(frozen=True, slots=True)
class Kept:
    """What the store knows of an answer beside its events. `next` is the seq after the last one that is kept."""

    id: str
    user: str | None
    chat: str | None
    model: str
    created_at: float
    status: Status
    owner: str
    next: int
    finish_reason: str | None = None
    usage: Usage | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Spent:
    """One line of the ledger's sum over a user, a model or a day (YYYY-MM-DD, UTC)."""

    name: str
    answers: int
    completed: int
    input_tokens: int
    output_tokens: int
    estimated: int  # answers whose tokens were estimated


class Listener(Protocol):
    """What other processes write, for one process. Used by one greenlet or thread; `add` and `drop` by any."""

    def add(self, id: str) -> None:
        """From when it returns, every batch of the answer that is written comes out of `wait`."""

    def drop(self, id: str) -> None: ...

    def wait(self, seconds: float) -> tuple[list[Batch], list[str]]:
        """New batches in the order of their writing, and the ids of own answers that somebody cancelled.

        Returns early when there are any, after `seconds` with nothing. Raises StoreDown; may be called again then,
        and what was written meanwhile may be missing: readers see the gap in seq and read it again.
        """

    def close(self) -> None: ...


class Store(Protocol):
    """The contract. Every method raises StoreDown within 2 s where the store does not answer.

    An `owner` is the lease of one process, taken by `take_lease`. It counts as dead `lease` seconds after its last
    renewal by the store's own clock (SQLite: CLOCK_MONOTONIC and the boot id; Redis: TIME), and never lives again.
    """

    @property
    def outbox(self) -> Outbox: ...

    def take_lease(self) -> str:
        """A new owner: random, alive from now on."""

    def renew(self, owner: str) -> None:
        """Raises LeaseLost where the owner is dead. Works while a full store refuses to write."""

    def give_up(self, owner: str) -> None:
        """The process ends in order: its owner is dead at once. Idempotent."""

    def admit(self, entry: Entry, limits: Limits) -> str:
        """One transaction: idempotency, slot, budget, row, key. The id of the answer that is to be told.

        It is another one than entry.id where the same user gave the same key and fingerprint within 24 h. Raises
        IdempotencyMismatch for the same key with another fingerprint, TooManyStreams, BudgetExhausted, LeaseLost.
        Entries without a user share one scope of keys. A key outlives an answer that was pruned.
        """

    def claim(self, owner: str, queue: str, most: int, before: float = NEVER, id: str | None = None) -> list[Entry]:
        """Takes the oldest answers that wait in a queue and were admitted before a Unix time; or only that one.

        They are as they were admitted, with the new owner, still queued. Raises LeaseLost.
        """

    def begin(self, owner: str, id: str) -> bool:
        """Says that a claimed answer is asked for from now on: nobody else will. False where it has ended meanwhile.

        Raises LeaseLost.
        """

    def write(self, owner: str, batches: Sequence[Batch], endings: Sequence[Ending]) -> None:
        """One transaction. Raises LeaseLost and writes nothing where the owner is dead.

        Writing the same again changes nothing: a caller that does not know whether it was done may repeat it, also
        joined with what follows. What belongs to an answer that has ended, or that another owner has, is left out
        silently. A batch that leaves a gap is kept, and read as a gap.
        """

    def find(self, id: str) -> Kept | None: ...

    def latest(self, user: str, chat: str) -> str | None:
        """The id of the user's newest answer in a chat; the chat's id is the client's."""

    def read(self, id: str, after: int) -> list[Batch]:
        """All batches that hold events with a seq above `after`, in order. One question to the store."""

    def listen(self, owner: str) -> Listener: ...

    def cancel(self, id: str) -> Record | None:
        """Tells the owner of a live answer; its listener hears of it within 1 s. Nothing for others. Idempotent.

        One that is queued ends at once, claimed or not: with the event `cancelled`, its letter, and the record that is
        returned.
        """

    def attend(self, ids: Collection[str]) -> None:
        """Says that somebody reads these answers now."""

    def unattended(self, id: str) -> float:
        """Seconds since the last `attend` of the answer; infinity where there was none."""

    def reap(self) -> list[str]:
        """Ends what belongs to dead owners, each once. The ids.

        One that is still queued waits in its queue again, unless it was claimed MOST_CLAIMS times. Each other gets an
        `error` event `interrupted` under its next seq, status failed, a ledger record of outcome `interrupted` and its
        letter, and gives back slot and reserve. No model is asked.

        Listeners hear of the event as of any other.
        """

    def usage(self, since: float, by: Literal["user", "model", "day"]) -> list[Spent]:
        """The ledger's sums since a Unix time, ordered by name. An answer without a user is under ""."""

    def prune(self, retention: float, bytes_per_user: int, bytes_in_all: int) -> int:
        """Forgets ended answers older than `retention` seconds, and the oldest ended ones above a cap (0: none).

        Live answers, the ledger, and letters that were not delivered stay. How many answers went.
        """

    def gauges(self) -> Mapping[str, int]:
        """For tests and metrics: `live` answers, `queued` ones among them, `reserved` tokens, `owners` that live,
        `answers` and `bytes` kept, letters that are `waiting`, and `dead` ones.
        """

    def close(self) -> None: ...
