"""The response log in the memory of one process: gone with it.

For tests and `memory://`; the contract in plain Python.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Literal

from .bookkeeping import DAY, interrupted, is_over, midnight, needs_count, unseen, withdrawn
from .errors import BudgetExhausted, IdempotencyMismatch, LeaseLost, TooManyStreams
from .ledger import Record
from .memory_answers import MemoryAnswer, kept_of, unfinished
from .memory_listener import MemoryListener
from .memory_outbox import MemoryOutbox
from .store import MOST_CLAIMS, NEVER, Batch, Ending, Entry, Kept, Limits, Spent


class MemoryStore:
    """`Store` without a disk: nothing is ever down. One lock; nothing waits while it is held."""

    def __init__(self, lease: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease = lease
        self._clock = clock
        self._changed = threading.Condition()
        self._owners: dict[str, float] = {}  # when their leases end
        self._answers: dict[str, MemoryAnswer] = {}  # in the order of their admission
        self._keys: dict[tuple[str | None, str], Entry] = {}
        self._ledger: dict[str, Record] = {}
        self._listeners: set[MemoryListener] = set()
        self.outbox = MemoryOutbox(self._changed, self._living)

    def take_lease(self) -> str:
        owner = f"owner_{secrets.token_hex(8)}"
        with self._changed:
            self._owners[owner] = self._clock() + self._lease
        return owner

    def renew(self, owner: str) -> None:
        with self._changed:
            self._check(owner)
            self._owners[owner] = self._clock() + self._lease

    def give_up(self, owner: str) -> None:
        with self._changed:
            self._owners.pop(owner, None)

    def admit(self, entry: Entry, limits: Limits) -> str:
        with self._changed:
            self._check(entry.owner)
            if entry.key is not None:
                known = self._keys.get((entry.user, entry.key))
                if known is not None and known.created_at > entry.created_at - DAY:
                    if known.fingerprint != entry.fingerprint:
                        raise IdempotencyMismatch()
                    return known.id
            self._check_limits(entry, limits)
            owner = "" if entry.status == "queued" else entry.owner
            self._answers.setdefault(entry.id, MemoryAnswer(entry, entry.status, owner=owner))
            if entry.key is not None:
                self._keys[entry.user, entry.key] = entry
            return entry.id

    def claim(self, owner: str, queue: str, most: int, before: float = NEVER, id: str | None = None) -> list[Entry]:
        with self._changed:
            self._check(owner)
            waiting = [
                answer
                for answer in self._answers.values()
                if answer.status == "queued"
                and not answer.owner
                and answer.entry.queue == queue
                and (answer.entry.created_at < before if id is None else answer.entry.id == id)
            ]
            taken = sorted(waiting, key=lambda answer: answer.entry.created_at)[:most]
            for answer in taken:
                answer.owner, answer.claims = owner, answer.claims + 1
            return [replace(answer.entry, owner=owner) for answer in taken]

    def begin(self, owner: str, id: str) -> bool:
        with self._changed:
            self._check(owner)
            answer = self._answers.get(id)
            if answer is None or answer.owner != owner or answer.status != "queued":
                return False
            answer.status = "in_progress"
            return True

    def write(self, owner: str, batches: Sequence[Batch], endings: Sequence[Ending]) -> None:
        with self._changed:
            self._check(owner)
            for batch in batches:
                answer = self._answers.get(batch.id)
                if answer is not None and answer.is_live and answer.owner == owner:
                    self._append(answer, batch)
            for ending in endings:
                answer = self._answers.get(ending.id)
                if answer is not None and answer.is_live and answer.owner == owner:
                    self._end(answer, ending)

    def find(self, id: str) -> Kept | None:
        with self._changed:
            answer = self._answers.get(id)
            return None if answer is None else kept_of(answer)

    def latest(self, user: str, chat: str) -> str | None:
        with self._changed:
            entries = [answer.entry for answer in self._answers.values()]
        found = [entry.id for entry in entries if (entry.user, entry.chat) == (user, chat)]
        return found[-1] if found else None

    def read(self, id: str, after: int) -> list[Batch]:
        with self._changed:
            answer = self._answers.get(id)
            return [batch for batch in answer.batches if batch.last > after] if answer else []

    def listen(self, owner: str) -> MemoryListener:
        listener = MemoryListener(self._changed, owner, self._stopped, self._listeners)
        with self._changed:
            self._listeners.add(listener)
        return listener

    def cancel(self, id: str) -> Record | None:
        with self._changed:
            answer = self._answers.get(id)
            if answer is not None and answer.status == "queued":
                last, ending = withdrawn(unfinished(answer), time.time())
                self._finish(answer, last, ending)
                return ending.record
            if answer is not None and answer.is_live:
                answer.is_cancelled = True
                self._changed.notify_all()
        return None

    def attend(self, ids: Collection[str]) -> None:
        with self._changed:
            for id in ids & self._answers.keys():
                self._answers[id].attended_at = self._clock()

    def unattended(self, id: str) -> float:
        with self._changed:
            answer = self._answers.get(id)
            at = answer.attended_at if answer else None
            return float("inf") if at is None else self._clock() - at

    def reap(self) -> list[str]:
        with self._changed:
            for owner in self._owners.keys() - self._living():
                del self._owners[owner]
            lost = [each for each in self._answers.values() if each.is_live and each.owner not in self._owners]
            lost = [each for each in lost if each.owner]
            again = [each for each in lost if each.status == "queued" and each.claims < MOST_CLAIMS]
            for answer in again:
                answer.owner = ""
            orphans = [answer for answer in lost if answer.owner]
            for answer in orphans:
                self._finish(answer, *interrupted(unfinished(answer), time.time()))
            return [answer.entry.id for answer in orphans]

    def usage(self, since: float, by: Literal["user", "model", "day"]) -> list[Spent]:
        groups = defaultdict(list)
        with self._changed:
            for record in self._ledger.values():
                if record.started >= since:
                    groups[GROUPS[by](record)].append(record)
        return [_spent(name, groups[name]) for name in sorted(groups)]

    def prune(self, retention: float, bytes_per_user: int, bytes_in_all: int) -> int:
        with self._changed:
            before, now = len(self._answers), time.time()
            self._forget(each for each in self._ended() if each.ended_at < now - retention)
            for user in {each.entry.user for each in self._answers.values()} - {None}:
                self._forget(_above([each for each in self._ended() if each.entry.user == user], bytes_per_user))
            self._forget(_above(self._ended(), bytes_in_all))
            self.outbox.forget(now - retention)
            self._keys = {key: entry for key, entry in self._keys.items() if entry.created_at > now - DAY}
            return before - len(self._answers)

    def gauges(self) -> Mapping[str, int]:
        with self._changed:
            entries = [answer.entry for answer in self._running()]
            return {
                "live": len(entries),
                "queued": sum(answer.status == "queued" for answer in self._answers.values()),
                "reserved": sum(entry.reserve for entry in entries),
                "owners": len(self._living()),
                "answers": len(self._answers),
                "bytes": sum(answer.size for answer in self._answers.values()),
                "waiting": self.outbox.count("waiting"),
                "dead": self.outbox.count("dead"),
            }

    def close(self) -> None:
        """What is kept stays for others who hold this store."""

    def _living(self) -> set[str]:
        now = self._clock()
        return {owner for owner, end in self._owners.items() if end > now}

    def _check(self, owner: str) -> None:
        if owner not in self._living():
            raise LeaseLost()

    def _running(self) -> list[MemoryAnswer]:
        """What counts for limits: an answer whose owner is dead holds no slot, one that waits in a queue does, or will
        again.
        """
        living, live = self._living(), [answer for answer in self._answers.values() if answer.is_live]
        return [answer for answer in live if answer.owner in living or answer.status == "queued"]

    def _check_limits(self, entry: Entry, limits: Limits) -> None:
        of_user, of_all, of_day = needs_count(limits, entry.user)
        running = self._running() if of_user or of_all or of_day else []
        own = [answer.entry.reserve for answer in running if answer.entry.user == entry.user]
        if (of_all and len(running) >= limits.streams) or (of_user and len(own) >= limits.streams_per_user):
            raise TooManyStreams()
        if of_day and is_over(limits.tokens_per_day, self._spent(entry) + sum(own), entry.reserve):
            raise BudgetExhausted()

    def _spent(self, entry: Entry) -> int:
        since = midnight(entry.created_at)
        records = [each for each in self._ledger.values() if each.user == entry.user and each.started >= since]
        return sum(record.input_tokens + record.output_tokens for record in records)

    def _append(self, answer: MemoryAnswer, batch: Batch) -> None:
        new = unseen(batch, answer.next)
        if new is None:
            return
        answer.batches.append(new)
        for listener in self._listeners:
            listener.tell(new)
        self._changed.notify_all()

    def _finish(self, answer: MemoryAnswer, last: Batch, ending: Ending) -> None:
        self._append(answer, last)
        self._end(answer, ending)

    def _end(self, answer: MemoryAnswer, ending: Ending) -> None:
        if ending.retracted:
            self._answers.pop(ending.id)
            self._keys = {key: entry for key, entry in self._keys.items() if entry.id != ending.id}
            return
        answer.status, answer.ending, answer.ended_at = ending.status, ending, time.time()
        self._ledger.setdefault(ending.record.id, ending.record)
        self.outbox.put(ending.letter)

    def _stopped(self, owner: str) -> set[str]:
        return {id for id, each in self._answers.items() if each.is_cancelled and each.is_live and each.owner == owner}

    def _ended(self) -> list[MemoryAnswer]:
        return sorted((each for each in self._answers.values() if not each.is_live), key=lambda each: each.ended_at)

    def _forget(self, answers: Iterable[MemoryAnswer]) -> None:
        for answer in answers:
            del self._answers[answer.entry.id]


GROUPS: dict[str, Callable[[Record], str]] = {
    "user": lambda record: record.user or "",
    "model": lambda record: record.model,
    "day": lambda record: datetime.fromtimestamp(record.started, UTC).strftime("%Y-%m-%d"),
}


def _spent(name: str, records: Sequence[Record]) -> Spent:
    return Spent(
        name,
        answers=len(records),
        completed=sum(record.outcome == "completed" for record in records),
        input_tokens=sum(record.input_tokens for record in records),
        output_tokens=sum(record.output_tokens for record in records),
        estimated=sum(record.estimated for record in records),
    )


def _above(answers: Sequence[MemoryAnswer], cap: int) -> list[MemoryAnswer]:
    """The first ones, until the rest is within the cap."""
    total, found = sum(answer.size for answer in answers), []
    for answer in answers:
        if not cap or total <= cap:
            break
        found.append(answer)
        total -= answer.size
    return found
