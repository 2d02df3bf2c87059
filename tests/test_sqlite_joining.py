"""What waits for a SQLite file's thread becomes one transaction, in which nobody's fault is another's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from streamchat.errors import LeaseLost, StoreDown
from streamchat.loop import ThreadLoop
from streamchat.sqlite_file import File
from streamchat.sqlite_schema import Connection
from streamchat.sqlite_store import SqliteStore

from .asking import Background, wait_until
from .sqlite_lock import locked
from .store_contract import LEASE, NONE, ending, entry, texts, told

Do = Callable[[Connection], Any]


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    file = File(str(tmp_path / "log.db"), ThreadLoop().lane, is_reader=False)
    file.run(lambda connection: connection.execute("CREATE TABLE notes (text TEXT NOT NULL)").get)
    yield file
    file.close()


@contextmanager
def said(file: File) -> Iterator[list[str]]:
    statements: list[str] = []

    def note(_cursor: Any, statement: str, _values: Any) -> bool:
        statements.append(statement)
        return True

    file.run(lambda connection: setattr(connection, "exec_trace", note))
    yield statements
    file.run(lambda connection: setattr(connection, "exec_trace", None))


def at_once(file: File, *tasks: Do) -> list[Background]:
    """They all wait while another has the thread."""
    held, go_on = Event(), Event()

    def hold(_: Connection) -> None:
        held.set()
        assert go_on.wait(5)

    first = Background(lambda: file.run(hold))
    assert held.wait(5)
    calls = [Background(lambda task=task: file.run(task)) for task in tasks]  # type: ignore[misc]
    wait_until(lambda: len(file._waiting) == len(tasks))
    go_on.set()
    for call in (first, *calls):
        call.join()
    return calls


def write(text: str) -> Do:
    return lambda connection: connection.execute("INSERT INTO notes VALUES (?) RETURNING text", (text,)).get


def notes(file: File) -> set[str]:
    return {text for (text,) in file.run(lambda connection: connection.execute("SELECT text FROM notes").fetchall())}


def test_what_waits_is_done_in_one_transaction_and_each_gets_its_own(file: File) -> None:
    with said(file) as statements:
        calls = at_once(file, *(write(text) for text in "abc"))
        begun = statements.count("BEGIN IMMEDIATE")
    assert [call.result for call in calls] == ["a", "b", "c"]
    assert begun == 2  # who held the thread, and the three
    assert notes(file) == {"a", "b", "c"}


def test_one_that_is_refused_leaves_the_others_as_they_are(file: File) -> None:
    def refuse(_: Connection) -> None:
        raise LeaseLost

    with said(file) as statements:
        first, second, third = at_once(file, write("a"), refuse, write("c"))
        begun = statements.count("BEGIN IMMEDIATE")
    assert (first.result, third.result) == ("a", "c")
    assert isinstance(second.error, LeaseLost)
    assert begun == 2
    assert notes(file) == {"a", "c"}


@pytest.mark.parametrize(
    ("wrong", "kind"), [("INSERT INTO notes VALUES (NULL)", StoreDown), ("bug", ZeroDivisionError)], ids=["SQL", "bug"]
)
def test_one_that_fails_is_undone_and_the_others_are_done(file: File, wrong: str, kind: type[Exception]) -> None:
    def fail(connection: Connection) -> None:
        write("half")(connection)
        connection.execute(wrong) if wrong != "bug" else 1 / 0

    first, second, third = at_once(file, write("a"), fail, write("c"))
    assert (first.result, third.result) == ("a", "c")
    assert isinstance(second.error, kind)
    assert notes(file) == {"a", "c"}


def test_who_waits_for_a_lock_together_is_done_together_after_it(file: File, tmp_path: Path) -> None:
    with locked(str(tmp_path / "log.db")):
        calls = [Background(lambda text=text: file.run(write(text))) for text in "ab"]  # type: ignore[misc]
        wait_until(lambda: not file._waiting)
    for call in calls:
        call.join()
    assert [call.result for call in calls] == ["a", "b"]


def test_who_comes_apart_after_his_time_gives_up_unasked(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of many that are done apart may wait for a lock: together longer than a store may take."""
    now, tries = [0.0], [0]
    monkeypatch.setattr("streamchat.sqlite_file.time.monotonic", lambda: now[0])

    def fail(_: Connection) -> None:
        tries[0] += 1
        now[0] += 10.0 if tries[0] == 2 else 0.0
        raise ZeroDivisionError

    first, second = at_once(file, fail, write("late"))
    assert isinstance(first.error, ZeroDivisionError)
    assert isinstance(second.error, StoreDown)
    assert notes(file) == set()


def test_what_a_store_knew_before_a_transaction_was_undone_it_asks_again(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "log.db"), LEASE, ThreadLoop().lane)
    owner = store.take_lease()
    answer = entry(owner)
    store.admit(answer, NONE)

    def undone(connection: Connection) -> None:
        store._write(connection, owner, [texts(answer.id, 0, 3)], [])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store._writer.run(undone)
    store.write(owner, [texts(answer.id, 0, 3)], [])
    store.write(owner, [texts(answer.id, 0, 3), texts(answer.id, 3, 2)], [ending(answer)])
    assert [seq for seq, _ in told(store.read(answer.id, -1))] == [0, 1, 2, 3, 4]
    store.close()


def test_a_store_knows_nothing_of_answers_whose_lease_it_lost(tmp_path: Path) -> None:
    first, second = (SqliteStore(str(tmp_path / "log.db"), LEASE, ThreadLoop().lane) for _ in range(2))
    owner = first.take_lease()
    answer = entry(owner)
    first.admit(answer, NONE)
    first.write(owner, [texts(answer.id, 0, 3)], [])
    second.give_up(owner)
    assert second.reap() == [answer.id]
    with pytest.raises(LeaseLost):
        first.write(owner, [texts(answer.id, 3, 1)], [ending(answer)])
    assert first._running == {}
    found = first.find(answer.id)
    assert found is not None
    assert (found.status, found.next) == ("failed", 4)
    first.close()
    second.close()
