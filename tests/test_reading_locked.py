"""A kept answer is read while its file cannot be written: reading needs no lock and no room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from streamchat.errors import StoreDown
from streamchat.log import Log
from streamchat.loop import ThreadLoop
from streamchat.sqlite_store import SqliteStore
from tests.sqlite_lock import locked
from tests.store_contract import NONE, entry, texts


@contextmanager
def two(path: Path) -> Iterator[tuple[SqliteStore, Log]]:
    """A producer's store, and the log of a process that only reads."""
    loop = ThreadLoop()
    with closing(SqliteStore(str(path), 15.0, loop.lane)) as store:
        log = Log(SqliteStore(str(path), 15.0, loop.lane), loop, 15.0)
        with closing(log):
            yield store, log


def test_a_reader_elsewhere_may_come_while_another_process_holds_the_lock(tmp_path: Path) -> None:
    with two(tmp_path / "log.db") as (store, log):
        owner = store.take_lease()
        answer = entry(owner)
        store.admit(answer, NONE)
        store.write(owner, [texts(answer.id, 0, 3)], [])
        log.wake()
        with locked(str(tmp_path / "log.db")):
            assert log.find(answer.id) is not None
            tail = log.follow(answer.id)
            assert len(log.store.read(answer.id, -1)) == 1
        tail.close()


def test_a_process_without_a_lease_tells_the_object_of_a_running_answer_while_the_file_is_locked(
    tmp_path: Path,
) -> None:
    with two(tmp_path / "log.db") as (store, log):
        owner = store.take_lease()
        answer = entry(owner)
        store.admit(answer, NONE)
        with locked(str(tmp_path / "log.db")):
            try:
                assert log.find(answer.id) is not None
            except StoreDown:
                pytest.fail("who only asks what became of an answer is refused, since the process may not write")
