"""What the SQLite log asks of its file: which indexes its questions enter, and how many statements a stream costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from streamchat.attempts import Next
from streamchat.envelopes import letter_id
from streamchat.loop import ThreadLoop
from streamchat.sqlite_file import File
from streamchat.sqlite_listener import NEW
from streamchat.sqlite_store import SqliteStore
from streamchat.store import Limits

from .queue_contract import LATER, ended, posted, queued
from .store_contract import LEASE, NONE, ending, entry, texts

LARGE = ("answers", "letters", "pieces", "ledger", "keys", "a")  # tables that grow with the log; `a` is answers
WALKED = {"SCAN letters USING INDEX letter_ages"}  # the newest, as many as were asked for
ALL_LIMITS = Limits(streams_per_user=9, streams=9, tokens_per_day=10**6)

Statement = tuple[str, Any]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(str(tmp_path / "log.db"), LEASE, ThreadLoop().lane)
    yield store
    store.close()


@pytest.fixture
def said(store: SqliteStore) -> Iterator[list[Statement]]:
    """All that was executed, with its values."""
    statements: list[Statement] = []

    def note(_cursor: Any, statement: str, values: Any) -> bool:
        statements.append((statement, values))
        return True

    def watch(file: File, tracer: Callable[[Any, str, Any], bool] | None) -> None:
        file.run(lambda connection: setattr(connection, "exec_trace", tracer))

    for file in (store._writer, store._reader):
        watch(file, note)
    statements.clear()
    yield statements
    for file in (store._writer, store._reader):
        watch(file, None)


def plan(store: SqliteStore, statement: Statement) -> list[str]:
    asked, values = statement
    rows = store._reader.run(lambda connection: connection.execute(f"EXPLAIN QUERY PLAN {asked}", values).fetchall())
    return [str(row[3]) for row in rows]


def scans(steps: list[str]) -> list[str]:
    """A table from its first row to its last, or one of its indexes; and what is sorted for want of an index."""
    large = tuple(f"SCAN {table}" for table in LARGE)
    return [step for step in steps if (step.startswith(large) and step not in WALKED) or "TEMP B-TREE" in step]


def asked(said: list[Statement]) -> list[Statement]:
    return [each for each in said if each[0].split()[0] in ("SELECT", "UPDATE", "INSERT", "DELETE", "WITH")]


def live_one(store: SqliteStore, owner: str) -> str:
    """The id of an answer that was claimed and begun."""
    answer = queued(owner)
    store.admit(answer, NONE)
    store.claim(owner, "jobs", 1, id=answer.id)
    store.begin(owner, answer.id)
    return answer.id


def reap(store: SqliteStore, owner: str) -> None:
    live_one(store, owner)
    store.admit(queued(owner), NONE)
    store.claim(owner, "jobs", 1)
    store.give_up(owner)
    assert len(store.reap()) == 1
    assert len(store.claim(store.take_lease(), "jobs", 9)) == 1


def claim(store: SqliteStore, owner: str) -> None:
    answers = [queued(owner) for _ in range(2)]
    for answer in answers:
        store.admit(answer, ALL_LIMITS)
    assert len(store.claim(owner, "jobs", 1)) == len(store.claim(owner, "jobs", 1, id=answers[1].id)) == 1
    assert store.begin(owner, answers[0].id)
    store.write(owner, [texts(answers[0].id, 0, 1)], [ended(answers[0])])


def cancel(store: SqliteStore, owner: str) -> None:
    answer = queued(owner)
    store.admit(answer, NONE)
    store.cancel(answer.id)
    store.cancel(live_one(store, owner))


def deliver(store: SqliteStore, owner: str) -> None:
    letters = [posted(store, owner) for _ in range(3)]
    assert len(store.outbox.take(owner, "jobs", LATER, 2)) == 2
    store.outbox.settle(owner, letters[0].id, Next("waiting", due=LATER), "503")
    store.outbox.settle(owner, letters[1].id, Next("dead", switch_off=True), "410")
    assert store.outbox.replay(letters[1].id, LATER)
    assert store.outbox.find(letter_id(letters[0].answer)) is not None
    assert len(store.outbox.letters(None, 9)) == 3
    assert len(store.outbox.letters("dead", 9)) == 2


def stream(store: SqliteStore, owner: str) -> None:
    answer = entry(owner, user="ann", chat="c", key="k", fingerprint="f")
    store.admit(answer, Limits(streams_per_user=9, tokens_per_day=10**6))
    store.write(owner, [texts(answer.id, 0, 3)], [ending(answer)])
    store.find(answer.id)
    store.read(answer.id, -1)


def follow(store: SqliteStore, owner: str) -> None:
    answer = entry(owner)
    store.admit(answer, NONE)
    listener = store.listen(store.take_lease())
    listener.add(answer.id)
    store.write(owner, [texts(answer.id, 0, 3)], [])
    assert [batch.count for batch in listener.wait(2)[0]] == [3]


@pytest.mark.parametrize("task", [claim, cancel, reap, deliver, stream, follow])
def test_no_question_reads_a_large_table_from_end_to_end(
    store: SqliteStore, said: list[Statement], task: Callable[[SqliteStore, str], None]
) -> None:
    task(store, store.take_lease())
    plans = {statement[0]: plan(store, statement) for statement in asked(said)}
    assert len(plans) > 5
    assert {statement: scans(steps) for statement, steps in plans.items() if scans(steps)} == {}


def test_a_stream_costs_as_many_statements_as_it_needs(store: SqliteStore, said: list[Statement]) -> None:
    """What a queue and letters bring must not cost a stream anything: two of each are its transaction's."""
    owner = store.take_lease()
    answer = entry(owner, user="ann", key="k", fingerprint="f")
    tasks: list[Callable[[], Any]] = [
        lambda: store.admit(answer, ALL_LIMITS),
        lambda: store.write(owner, [texts(answer.id, 0, 3)], []),
        lambda: store.write(owner, [], [ending(answer)]),
    ]
    costs = []
    for task in tasks:
        said.clear()
        task()
        costs.append(len(said))
    assert costs == [10, 4, 5]


def test_an_empty_queue_and_an_empty_outbox_are_asked_without_the_lock(
    store: SqliteStore, said: list[Statement]
) -> None:
    owner = store.take_lease()
    said.clear()
    assert store.claim(owner, "jobs", 9) == []
    assert store.outbox.take(owner, "jobs", LATER, 9) == []
    assert "BEGIN" in {statement for statement, _ in said}
    assert "BEGIN IMMEDIATE" not in {statement for statement, _ in said}


def test_what_is_new_is_found_by_its_number_however_long_the_answers_are(
    store: SqliteStore, said: list[Statement]
) -> None:
    follow(store, store.take_lease())
    (steps,) = [plan(store, statement) for statement in asked(said) if statement[0] == NEW]
    assert steps[0].startswith("SEARCH pieces USING INTEGER PRIMARY KEY")
