"""The response log of one process: events gather in memory and are written behind the stream's back, never in its way.

One writer hands groups to the store. What the store does not take in time is given up: that answer cannot be resumed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from .cancellation import Cancellation
from .errors import Cancelled, LeaseLost, StoreDown
from .loop import NEVER, Loop
from .sheet import Sheet
from .store import Entry, Limits, Store
from .tail import Tail, Tails

logger = logging.getLogger("streamchat")

GATHER = 0.05  # seconds: half of what the log may be behind the caller
AGAIN = 0.1  # seconds until the store is asked again after it failed
OLDEST = 5.0  # seconds that an event may wait for the store
MOST_OF_ALL = 64 << 20  # bytes that wait in this process
MOST_OF_GROUP = 4 << 20  # bytes of one transaction
BEATS = 3  # renewals in the time of a lease
PRUNE_EVERY = 60.0  # seconds


class Log:
    """One for each mounted blueprint and process. Its greenlets or threads begin with its first answer."""

    def __init__(self, store: Store, loop: Loop, lease: float, prune: Callable[[], object] = lambda: None) -> None:
        self.store = store
        self._prune = prune
        self._prune_at = 0.0  # monotonic
        self.down = False  # the store did not answer the last time
        self.waiting_bytes = 0
        self.running: dict[str, Sheet] = {}
        self.tails = Tails(store, loop, self._cancelled)
        self._loop = loop
        self._beat = lease / BEATS
        self._owner: str | None = None
        self._dirty: dict[Sheet, None] = {}
        self._news, self._hurry, self._stop = loop.bell(), loop.bell(), loop.bell()
        self._lock = threading.Lock()  # of the first answer
        self._works = False
        self._closed = False

    def admit(
        self, entry: Callable[[str], Entry], limits: Limits, cancellation: Cancellation
    ) -> tuple[str, Sheet | None]:
        """The answer's sheet; or the id of the one that the same Idempotency-Key got before.

        Raises StoreDown, TooManyStreams, BudgetExhausted, IdempotencyMismatch.
        """
        try:
            owner, asked, id = self._admitted(entry, limits)
        except StoreDown:
            self._fell()
            raise
        if id != asked:
            return id, None
        sheet = Sheet(id, owner, cancellation, self._note, self.store.unattended)
        self.running[id] = sheet
        return id, sheet

    def _admitted(self, entry: Callable[[str], Entry], limits: Limits) -> tuple[str, str, str]:
        owner = self._begun()
        try:
            asked = entry(owner)
            return owner, asked.id, self.store.admit(asked, limits)
        except LeaseLost:
            self._lose(owner)
            owner = self._begun()
            asked = entry(owner)
            return owner, asked.id, self.store.admit(asked, limits)

    def _begun(self) -> str:
        """The lease; the first call starts what works beside the answers."""
        with self._lock:
            if self._owner is None:
                self._owner = self.store.take_lease()
                self.down = False
                self.tails.begin(self._owner)
                for task in () if self._works else (self._write_on, self._keep):
                    self._loop.spawn(task)
                self._works = True
            return self._owner

    def _note(self, sheet: Sheet, size: int, urgent: bool) -> None:
        """Something of the sheet waits to be written, `size` bytes more than before."""
        self.waiting_bytes += size
        if self.waiting_bytes > MOST_OF_ALL:
            self._give_up(sheet)
        if sheet not in self._dirty:
            self._dirty[sheet] = None
            self._news.ring()
        if urgent:
            self._hurry.ring()

    def _give_up(self, sheet: Sheet) -> None:
        self.waiting_bytes -= sheet.give_up()

    def _write_on(self) -> None:
        while not self._closed:
            if self._dirty or self._news.wait(time.monotonic() + self._beat):
                self._hurry.wait(time.monotonic() + GATHER)
                if self._dirty and not self._closed:
                    self._write_group()

    def _write_group(self) -> None:
        sheets = self._group()
        batches = [sheet.batch for sheet in sheets if sheet.batch is not None]
        endings = [sheet.ending for sheet in sheets if sheet.ends_with_batch and sheet.ending is not None]
        owner = self._owner
        try:
            if owner is not None:
                self.store.write(owner, batches, endings)
        except StoreDown:
            self._fell()
            self._expire()
            self._loop.pause(time.monotonic() + AGAIN)
        except LeaseLost:
            self._lose(owner)
        else:
            self.down = False
            for sheet in sheets:
                self._written(sheet)

    def _group(self) -> list[Sheet]:
        sheets, size = [], 0
        for sheet in list(self._dirty):
            size += sheet.take()
            sheets.append(sheet)
            if size > MOST_OF_GROUP:
                break
        return sheets

    def _written(self, sheet: Sheet) -> None:
        self._dirty.pop(sheet, None)
        self.waiting_bytes -= sheet.confirm()
        if sheet.over:
            self.running.pop(sheet.id, None)
        elif sheet.waits:
            self._dirty[sheet] = None

    def _expire(self) -> None:
        before = time.monotonic() - OLDEST
        for sheet in list(self._dirty):
            if sheet.since and sheet.since < before:
                self._give_up(sheet)

    def _fell(self) -> None:
        if not self.down:
            self.down = True
            logger.warning("the response log does not answer: answers go on without it")

    def _keep(self) -> None:
        """Renews the lease, ends what dead processes left, and has old answers forgotten."""
        while not self._stop.wait(time.monotonic() + self._beat):
            owner = self._owner
            try:
                if owner is not None:
                    self.store.renew(owner)
                    self.down = False
                    self.store.reap()
                    self._begin_pruning()
            except StoreDown:
                self._fell()
            except LeaseLost:
                self._lose(owner)
            except Exception:  # a bug in a store: the lease must go on
                logger.exception("the response log failed")

    def _begin_pruning(self) -> None:
        """Beside the beats, which a large log must not hold up; one at a time, a minute after the one before."""
        if time.monotonic() >= self._prune_at:
            self._prune_at = NEVER
            self._loop.spawn(self._prune_once)

    def _prune_once(self) -> None:
        try:
            self._prune()
        except StoreDown:
            pass  # the next minute is early enough
        except Exception:
            logger.exception("the response log failed")
        finally:
            self._prune_at = time.monotonic() + PRUNE_EVERY

    def _lose(self, owner: str | None) -> None:
        """Others have ended the answers of this lease: here they end too."""
        with self._lock:
            if self._owner == owner:
                self._owner = None
        for sheet in [sheet for sheet in self.running.values() if sheet.owner == owner]:
            sheet.cancellation.cancel(LeaseLost())
            self._give_up(sheet)
            self.running.pop(sheet.id, None)
            self._dirty.pop(sheet, None)

    def _cancelled(self, id: str) -> None:
        sheet = self.running.get(id)
        if sheet is not None:
            sheet.cancellation.cancel(Cancelled())

    def cancel(self, id: str) -> None:
        """Stops an answer, here or wherever it is made. Raises StoreDown where it is not made here."""
        if id in self.running:
            self._cancelled(id)
        else:
            self.store.cancel(id)

    def follow(self, id: str) -> Tail:
        """From now on, all events of an answer; what is written already stands in the store. Raises StoreDown."""
        self._begun()
        sheet = self.running.get(id)
        return self.tails.of_sheet(sheet) if sheet is not None else self.tails.of_store(id)

    def close(self) -> None:
        """The process ends in order: what waits is written if the store takes it at once."""
        self._closed = True
        for bell in (self._news, self._hurry, self._stop):
            bell.ring()
        owner, self._owner = self._owner, None
        self.tails.close()
        if owner is not None:
            try:
                self._owner = owner
                if self._dirty:
                    self._write_group()
                self.store.give_up(owner)
            except (StoreDown, LeaseLost):
                logger.warning("the response log does not answer: its lease ends by itself")
        self.store.close()
