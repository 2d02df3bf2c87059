"""One connection to the log's file, in a native thread of its own: transactions, retries, and what becomes of errors.

Whatever goes wrong with the file is StoreDown for the caller, and the next call tries anew.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from .errors import SettingsError, StoreDown, StreamChatError
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


class _Task:
    """What one caller wants done, and what came of it."""

    __slots__ = ("do", "found", "until")

    def __init__(self, do: Callable[[Connection], Any], until: float | None) -> None:
        self.do = do
        self.until = until
        self.found: Any = None  # what is returned, or the exception that is raised


class File:
    """Opens at the first use, after a fork. `is_reader` says that nothing is written through it. `undone` is called in
    the native thread when a transaction was not committed, or nobody knows.

    What waits for the native thread is done in one transaction: its begin, its commit and the pages that tasks share
    cost once. Where a task raises StreamChatError, what it wrote before is right by itself; after anything else all are
    done apart.
    """

    def __init__(
        self, path: str, lane: Callable[[], Lane], *, is_reader: bool, undone: Callable[[], object] = lambda: None
    ) -> None:
        self._path = path
        self._begin = "BEGIN" if is_reader else "BEGIN IMMEDIATE"
        self._is_reader = is_reader
        self._make_lane = lane
        self._undone = undone
        self._lane: Lane | None = None
        self._lock = threading.Lock()
        self._waiting: deque[_Task] = deque()
        self._connection: Connection | None = None
        self._trouble: str | None = None
        self.opened = 0  # times

    def run(self, task: Callable[[Connection], T], patience: float = PATIENCE) -> T:
        """What the task returns, done in a transaction. No `patience` is one attempt. Raises StoreDown."""
        until = time.monotonic() + patience if patience else None
        while True:
            found = self._done(_Task(task, until))
            if not isinstance(found, Exception):
                self._tell(None)
                return cast(T, found)
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
        if self._lane is None:
            with self._lock:
                self._lane = self._lane or self._make_lane()
        return self._lane

    def _done(self, task: _Task) -> Any:
        self._waiting.append(task)
        self._thread().run(self._join)  # finds nothing where one that waited before it took this along
        return task.found

    def _join(self) -> None:
        """In the native thread. Many may have waited for it: who comes too late gives up at once."""
        waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
        due = [task for task in waiting if _is_due(task)]
        if due and not self._did(due) and len(due) > 1:
            for task in due:
                if _is_due(task):  # each may have waited for a lock
                    self._did([task])

    def _did(self, tasks: Sequence[_Task]) -> bool:
        """Whether it is known of each what came of it; not where one's fault may have been the others', too.

        Raises nothing: what a native thread raises is not the caller's to see.
        """
        try:
            self._attempt(tasks)
            return True
        except Exception as error:
            self._undone()
            for task in tasks:
                task.found = error
            return isinstance(error, _Trouble) and error.again

    def _attempt(self, tasks: Sequence[_Task]) -> None:
        try:
            if self._connection is None:
                self._connection = self._open()
                self._connection.set_busy_timeout(int(BUSY_WAIT * 1000))
            self._transact(self._connection, tasks)
        except (apsw.BusyError, apsw.LockedError, apsw.ProtocolError) as error:
            raise _Trouble(_name(error), again=True) from None
        except SettingsError as error:  # since the start somebody has put another file there
            raise _Trouble(error.detail, again=False) from None
        except apsw.FullError as error:
            raise _Trouble(_name(error), again=False) from None
        except (apsw.Error, OSError, MemoryError) as error:
            self._drop()
            raise _Trouble(_name(error), again=False) from None

    def _transact(self, connection: Connection, tasks: Sequence[_Task]) -> None:
        connection.execute(self._begin)
        try:
            for task in tasks:
                try:
                    task.found = task.do(connection)
                except StreamChatError as error:
                    task.found = error
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

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


def _is_due(task: _Task) -> bool:
    """A task whose time is over has given up, and says so."""
    if task.until is None or task.until >= time.monotonic():
        return True
    task.found = _Trouble("Busy", again=False)
    return False


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
