"""The response log of one process: events gather in memory and are written behind the stream's back, never in its way.

One writer hands groups to the store. What the store does not take in time is given up: that answer cannot be resumed.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from .bookkeeping import Unfinished, interrupted
from .cancellation import Cancellation
from .errors import Cancelled, LeaseLost, StoreDown, StreamChatError
from .lease import Lease
from .ledger import Record
from .loop import Loop
from .pruning import Pruning
from .sheet import Sheet
from .store import LIVE, Entry, Kept, Limits, Store
from .tail import Tail, Tails

logger = logging.getLogger("streamchat")
Admitted = tuple[str, Sheet | None]

GATHER = 0.075  # seconds: with the time of a write, below the 100 ms that the log may be behind the caller
AGAIN = 0.1  # seconds until the store is asked again after it failed
MOST_OF_ALL = 64 << 20  # bytes that wait in this process
MOST_OF_GROUP = 1 << 20  # bytes of one transaction: over a slow line to Redis, too, they are sent in its time for that
MOST_ABANDONED = 1000  # answers that a silent store may have, and is to forget
CLOSE_WITHIN = 2.5  # seconds: more than the 2 in which a store answers


class Log:
    """One for each mounted blueprint and process. Its greenlets or threads begin with its first answer."""

    def __init__(self, store: Store, loop: Loop, lease: float, prune: Callable[[], object] = lambda: None) -> None:
        self.store = store
        self.waiting_bytes = 0
        self.running: dict[str, Sheet] = {}
        self.tails = Tails(store, loop, self._cancelled)
        self._loop = loop
        self.lease = Lease(store, loop, lease, self.tails, self._begin, self._lost)
        self._dirty: dict[Sheet, None] = {}
        self._news, self._hurry = loop.bell(), loop.bell()
        self._pruning = Pruning(loop, prune)
        self._counting = loop.lock()  # reentrant: the collector may end an answer while it is held
        self._tasks: list[threading.Event] = []  # set when they have ended
        self._closed = False

    @property
    def down(self) -> bool:
        """Whether the store did not answer the last time."""
        return self.lease.down

    def adopt(self, entry: Entry, cancellation: Cancellation) -> Sheet:
        """The sheet of an answer that this process claimed."""
        sheet = self._sheet(entry, cancellation)
        sheet.alone = True
        if self.lease.owner != sheet.owner:
            self._end_with_lease(sheet)
        return sheet

    def admit(self, entry: Entry, limits: Limits, cancellation: Cancellation, needed: bool) -> Admitted:
        """The answer's sheet; or the id of the one that the same Idempotency-Key got before.

        Raises TooManyStreams, BudgetExhausted, IdempotencyMismatch; StoreDown where the admission is needed.
        """
        try:
            return self._admitted(entry, limits, cancellation, needed)
        except LeaseLost:
            return self._admitted(entry, limits, cancellation, needed)

    def _admitted(self, entry: Entry, limits: Limits, cancellation: Cancellation, needed: bool) -> Admitted:
        owner = self.lease.held()
        asked = entry if entry.owner == owner else replace(entry, owner=owner)
        sheet = self._sheet(asked, cancellation)  # now: once the store knows the answer, somebody may cancel it
        sheet.admitted = False
        try:
            id = self.store.admit(asked, limits)
        except StoreDown:
            self.lease.fell()
            if needed:
                self._abandon(sheet, asked)
                raise
            sheet.give_up()
            return asked.id, sheet
        except StreamChatError as error:
            self.running.pop(asked.id, None)
            if isinstance(error, LeaseLost):
                self.lease.lose(owner)
            raise
        except BaseException:  # a killed greenlet: the store does it all the same
            self._abandon(sheet, asked)
            raise
        if id != asked.id:
            self.running.pop(asked.id, None)
            return id, None
        sheet.admitted = True
        if self.lease.owner != owner:  # lost meanwhile
            self._end_with_lease(sheet)
        return id, sheet

    def _sheet(self, entry: Entry, cancellation: Cancellation) -> Sheet:
        sheet = Sheet(entry.id, entry.owner, cancellation, self._note, self.store.unattended, self._loop)
        sheet.user = entry.user
        self.running[entry.id] = sheet
        return sheet

    def _abandon(self, sheet: Sheet, asked: Entry) -> None:
        """The store may have the answer that it said nothing about: it is told to forget it, with its slot and key."""
        if len(self._dirty) < MOST_ABANDONED:
            _, ending = interrupted(Unfinished(asked.id, asked.user, asked.model, asked.created_at), time.time())
            sheet.retract(replace(ending, retracted=True))
        else:
            self.running.pop(sheet.id, None)

    def _begin(self) -> None:
        for task in (self._write_on, self.lease.keep, self._pruning.keep):
            self._start(task)

    def _start(self, task: Callable[[], None]) -> None:
        ended = threading.Event()
        self._tasks.append(ended)

        def run() -> None:
            try:
                task()
            finally:
                ended.set()

        self._loop.spawn(run)

    def _note(self, sheet: Sheet, size: int, urgent: bool) -> None:
        """Something of the sheet waits to be written, `size` bytes more than before."""
        self._count(size)
        if self.waiting_bytes > MOST_OF_ALL:
            self._give_up(sheet)
        if sheet not in self._dirty:
            self._dirty[sheet] = None
            self._news.ring()
        if urgent:
            self._hurry.ring()

    def _count(self, size: int) -> None:
        with self._counting:
            self.waiting_bytes += size

    def _give_up(self, sheet: Sheet) -> None:
        self._count(-sheet.give_up())

    def forget(self, sheet: Sheet) -> None:
        """Nothing more of it is written, and nobody stops it here."""
        self._give_up(sheet)
        self.running.pop(sheet.id, None)
        self._dirty.pop(sheet, None)

    def _write_on(self) -> None:
        while not self._closed:
            if self._dirty or self._news.wait(time.monotonic() + self.lease.beat):
                self._hurry.wait(time.monotonic() + GATHER)
                self._write_group()
        until = time.monotonic() + CLOSE_WITHIN  # what waits is written as long as the store takes it at once
        while self._write_group() and time.monotonic() < until:
            pass

    def _write_group(self) -> bool:
        """Whether the store took some of what waits."""
        owner = self.lease.owner  # None: it is just being lost, or taken
        if owner is None or not (sheets := self._group(owner)):
            return False
        try:
            self._write(owner, sheets)
            return True
        except StoreDown:
            self.lease.fell()
            self._expire()
            self._loop.pause(time.monotonic() + AGAIN)
        except LeaseLost:
            self.lease.lose(owner)
        except Exception:  # a bug: it may touch one answer, not all
            for sheet in sheets:
                self._write_alone(owner, sheet)
        return False

    def _write(self, owner: str, sheets: Sequence[Sheet]) -> None:
        batches = [sheet.batch for sheet in sheets]
        endings = [sheet.ending for sheet in sheets if sheet.ends_with_batch]
        self.store.write(owner, [each for each in batches if each], [each for each in endings if each])
        self.lease.down = False
        for sheet in sheets:
            self._written(sheet)

    def _write_alone(self, owner: str, sheet: Sheet) -> None:
        try:
            self._write(owner, [sheet])
        except (StoreDown, LeaseLost):
            return  # the next group meets it again
        except Exception:
            logger.exception("the response log cannot keep answer %s", sheet.id)
            self.forget(sheet)

    def _group(self, owner: str) -> list[Sheet]:
        sheets, size = list[Sheet](), 0
        for sheet in list(self._dirty):
            if sheet.owner != owner:
                self._end_with_lease(sheet)
                continue
            size += sheet.take()
            sheets.append(sheet)
            if size > MOST_OF_GROUP:
                break
        return sheets

    def _written(self, sheet: Sheet) -> None:
        self._dirty.pop(sheet, None)
        self._count(-sheet.confirm())
        if sheet.over:
            self.running.pop(sheet.id, None)
        elif sheet.waits:
            self._dirty[sheet] = None

    def _expire(self) -> None:
        now = time.monotonic()
        for sheet in list(self._dirty):
            if sheet.is_late(now):
                self._give_up(sheet)

    def _lost(self, owner: str) -> None:
        """Others have ended the answers of this lease: here they end too. Where it was lost because the store was away,
        nobody is to blame: they go on for their callers, if they have one, without the log.
        """
        for sheet in [sheet for sheet in list(self.running.values()) if sheet.owner == owner]:
            if self.down and not sheet.alone:
                self.forget(sheet)
            else:
                self._end_with_lease(sheet)

    def _end_with_lease(self, sheet: Sheet) -> None:
        self.forget(sheet)
        if sheet.admitted:
            sheet.cancellation.cancel(LeaseLost())

    def _cancelled(self, id: str) -> None:
        sheet = self.running.get(id)
        if sheet is not None:
            sheet.cancellation.cancel(Cancelled())

    def find(self, id: str) -> Kept | None:
        """Raises StoreDown."""
        kept = self.store.find(id)
        if kept is not None and kept.status in LIVE:
            self.wake()  # whoever makes it may be dead: this process looks, too
        return kept

    def cancel(self, id: str) -> Record | None:
        """Stops an answer, wherever it is made; the record of one that ends in its queue. Raises StoreDown."""
        if id not in self.running:
            return self.store.cancel(id)
        self._cancelled(id)
        return None

    def cancel_here(self, id: str, user: str | None) -> None:
        """Stops the user's answer if it is made here: that needs no store."""
        sheet = self.running.get(id)
        if sheet is not None and sheet.user == user:
            self._cancelled(id)

    def wake(self) -> None:
        """Takes the lease before the first answer: what a process that died left behind is ended from now on."""
        with contextlib.suppress(StoreDown):  # it is tried again
            self.lease.held()

    def follow(self, id: str) -> Tail:
        """From now on, all events of an answer; what is written already stands in the store. Raises StoreDown."""
        sheet = self.running.get(id)
        if sheet is not None:
            return self.tails.of_sheet(sheet)
        with contextlib.suppress(StoreDown):  # locked or full, it can be read; this is said again each second
            self.lease.held()
            self.store.attend({id})
        return self.tails.of_store(id)

    def close(self) -> None:
        """The process ends in order."""
        due = time.monotonic() + CLOSE_WITHIN
        self._closed = True
        self.lease.stop()
        self._pruning.stop()
        for bell in (self._news, self._hurry):
            bell.ring()
        for ended in self._tasks:
            ended.wait(max(0.0, due - time.monotonic()))
        self.tails.close(max(0.0, due - time.monotonic()))
        self.lease.give_up()
        self.store.close()
