"""One connection to the log's file, in a native thread of its own: transactions, retries, and what becomes of errors.

Whatever goes wrong with the file is StoreDown for the caller, and the next call tries anew.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from .errors import StoreDown
from .ledger import logger
from .loop import Lane
from .sqlite_schema import Connection, apsw, open_file

T = TypeVar("T")

BUSY_WAIT = 0.1  # seconds a native thread waits for another process's lock: others want the thread, too
PAUSE = 0.02  # seconds between attempts, in the caller's own greenlet or thread
PATIENCE = 1.7  # seconds of attempts; with the last one's wait they stay below the 2 s that a store may take


class _Trouble(Exception):
    """Crosses from the native thread to the caller, who may log."""

    def __init__(self, name: str, *, again: bool) -> None:
        self.name = name
        self.again = again


class File:
    """Opens at the first use, after a fork. `is_reader` says that nothing is written through it."""

    def __init__(self, path: str, lane: Callable[[], Lane], *, is_reader: bool) -> None:
        self._path = path
        self._begin = "BEGIN" if is_reader else "BEGIN IMMEDIATE"
        self._is_reader = is_reader
        self._make_lane = lane
        self._lane: Lane | None = None
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._trouble: str | None = None
        self.opened = 0  # times

    def run(self, task: Callable[[Connection], T], patience: float = PATIENCE) -> T:
        """What the task returns, done as one transaction. No `patience` is one attempt. Raises StoreDown."""
        until = time.monotonic() + patience if patience else None
        while True:
            found = self._thread().run(lambda: self._caught(task, until))
            if not isinstance(found, Exception):
                self._tell(None)
                return found
            if not isinstance(found, _Trouble):
                raise found
            if not found.again or until is None or time.monotonic() + PAUSE > until:
                self._tell(found.name)
                raise StoreDown()
            time.sleep(PAUSE)

    def close(self) -> None:
        """Idempotent. A later use opens it again."""
        with self._lock:
            lane, self._lane = self._lane, None
        if lane is not None:
            lane.run(self._drop)
            lane.close()

    def _thread(self) -> Lane:
        with self._lock:
            if self._lane is None:
                self._lane = self._make_lane()
            return self._lane

    def _caught(self, task: Callable[[Connection], T], until: float | None) -> T | Exception:
        """What a native thread of gevent raises is written to stderr first, with a traceback: 40 ms and no news."""
        try:
            return self._attempt(task, until)
        except Exception as error:
            return error

    def _attempt(self, task: Callable[[Connection], T], until: float | None) -> T:
        """In the native thread. Many may have waited for it: who comes too late gives up at once."""
        if until is not None and until < time.monotonic():
            raise _Trouble("Busy", again=False)
        try:
            if self._connection is None:
                self._connection = self._open()
            self._connection.set_busy_timeout(int(BUSY_WAIT * 1000))
            return self._transact(self._connection, task)
        except (apsw.BusyError, apsw.LockedError, apsw.ProtocolError) as error:
            raise _Trouble(_name(error), again=True) from None
        except apsw.FullError as error:
            raise _Trouble(_name(error), again=False) from None
        except (apsw.Error, OSError, MemoryError) as error:
            self._drop()
            raise _Trouble(_name(error), again=False) from None

    def _transact(self, connection: Connection, task: Callable[[Connection], T]) -> T:
        connection.execute(self._begin)
        try:
            result = task(connection)
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        return result

    def _open(self) -> Connection:
        connection = open_file(self._path)
        self.opened += 1
        if self._is_reader:
            connection.execute("PRAGMA query_only = ON")
        return connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(apsw.Error):  # what is broken may not close; it goes with its last reference
                connection.close(True)

    def _tell(self, trouble: str | None) -> None:
        """One line a change, and no values: an error's text may hold them."""
        if trouble == self._trouble:
            return
        self._trouble = trouble
        if trouble:
            logger.warning("the response log does not answer: %s", trouble)
        else:
            logger.warning("the response log answers again")


def _name(error: BaseException) -> str:
    return type(error).__name__.removesuffix("Error")


def bound(text: str | None) -> str | bytes | None:
    """Text as SQLite takes it: what is no UTF-8 becomes bytes, which equal no text."""
    if text is None or text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")
    return text


def unbound(value: Any) -> Any:
    """The text that `bound` was given."""
    return value.decode("utf-8", "surrogatepass") if isinstance(value, bytes) else value
