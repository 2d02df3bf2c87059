"""The store in a SQLite file keeps the contract."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import pytest

from streamchat import sqlite_listener
from streamchat.errors import LeaseLost, StoreDown, TooManyStreams
from streamchat.loop import ThreadLoop
from streamchat.sqlite_listener import SqliteListener
from streamchat.sqlite_schema import Connection
from streamchat.sqlite_store import SqliteStore
from streamchat.sqlite_upkeep import ORPHANS_A_STEP
from streamchat.store import Entry, Limits

from .asking import Background, wait_until
from .queue_contract import QueueContract
from .store_contract import HEARD_WITHIN, LEASE, NONE, Clock, ClockContract, StoreContract, entry, heard, texts


def with_news(store: SqliteStore, owner: str) -> tuple[Entry, SqliteListener]:
    """An answer with pieces that was cancelled, and a listener that is still to hear of both."""
    answer = entry(owner)
    store.admit(answer, NONE)
    listener = store.listen(owner)
    listener.add(answer.id)
    store.write(owner, [texts(answer.id, 0, 2)], [])
    store.cancel(answer.id)
    return answer, listener


class TestSqliteStore(QueueContract, ClockContract, StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path, clock: Clock) -> Iterator[SqliteStore]:
        store = SqliteStore(str(tmp_path / "log.db"), LEASE, ThreadLoop().lane, clock)
        yield store
        store.close()

    @pytest.fixture
    def another(self, tmp_path: Path, clock: Clock) -> Iterator[SqliteStore]:
        store = SqliteStore(str(tmp_path / "log.db"), LEASE, ThreadLoop().lane, clock)
        yield store
        store.close()

    def test_a_poll_that_fails_half_way_loses_no_cancel_and_no_news(
        self, store: SqliteStore, owner: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answer, listener = with_news(store, owner)

        def fail(_: Connection) -> int:
            monkeypatch.undo()
            raise OSError

        monkeypatch.setattr(sqlite_listener, "_newest", fail)  # asked once it is known what was cancelled
        with pytest.raises(StoreDown):
            listener.wait(0.0)
        assert heard(listener, lambda *found: all(found)) == ([texts(answer.id, 0, 2)], [answer.id])

    def test_a_poll_that_is_done_again_because_of_another_task_loses_no_cancel_and_no_news(
        self, store: SqliteStore, owner: str
    ) -> None:
        answer, listener = with_news(store, owner)
        held, go_on = Event(), Event()

        def hold(_: Connection) -> None:
            held.set()
            assert go_on.wait(HEARD_WITHIN)

        def fail(_: Connection) -> None:
            raise OSError

        tasks = [Background(lambda: store._reader.run(hold))]
        assert held.wait(HEARD_WITHIN)
        for task in (lambda: listener.wait(0.5), lambda: store._reader.run(fail)):
            tasks.append(Background(task))
            wait_until(lambda: len(store._reader._waiting) == len(tasks) - 1)
        go_on.set()
        for each in tasks:
            each.join()
        assert isinstance(tasks[2].error, StoreDown)
        assert tasks[1].result == ([texts(answer.id, 0, 2)], [answer.id])


def test_a_file_by_another_name_is_the_same_log(tmp_path: Path) -> None:
    """What a process makes is not taken for a dead one's."""
    (tmp_path / "data").mkdir()
    (tmp_path / "link.db").symlink_to(tmp_path / "data" / "log.db")
    names = (tmp_path / "data" / "log.db", tmp_path / "link.db", tmp_path / "data" / ".." / "link.db")
    stores = [SqliteStore(str(name), LEASE, ThreadLoop().lane) for name in names]
    for store in stores:
        store.admit(entry(store.take_lease()), NONE)
    assert [store.reap() for store in stores] == [[], [], []]
    assert stores[0].gauges()["owners"] == 3
    for store in stores:
        store.close()
    assert {path.name for path in tmp_path.rglob("*-leases")} == {"log.db-leases"}


class StoppingClock(Clock):
    """Whoever looks at it next is stopped there, while others do something."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile: list[Callable[[], object]] = []

    def __call__(self) -> float:
        now = super().__call__()
        if self.meanwhile:
            self.meanwhile.pop()()
        return now


@pytest.mark.parametrize("limits", [Limits(streams_per_user=1), Limits(streams=1), Limits(tokens_per_day=100)])
def test_a_lease_that_an_admission_counted_as_dead_does_not_live_again(tmp_path: Path, limits: Limits) -> None:
    clock = StoppingClock()
    slow, quick = (SqliteStore(str(tmp_path / "log.db"), LEASE, ThreadLoop().lane, clock) for _ in range(2))
    stopped = slow.take_lease()
    orphan = entry(stopped, user="ann", reserve=70)
    slow.admit(orphan, limits)
    clock.now += LEASE * 0.9
    owner = quick.take_lease()

    def take_its_place() -> None:
        clock.now += LEASE * 0.2
        quick.admit(entry(owner, user="ann", reserve=70), limits)

    clock.meanwhile.append(take_its_place)
    slow.renew(stopped)  # it saw that it lived, and was stopped until it did not
    gauges = quick.gauges()
    assert (gauges["live"], gauges["reserved"], gauges["owners"]) == (1, 70, 1)
    with pytest.raises(LeaseLost):
        slow.renew(stopped)
    with pytest.raises(LeaseLost):
        slow.write(stopped, [texts(orphan.id, 0, 1)], [])
    assert quick.reap() == []
    ended = quick.find(orphan.id)
    assert ended is not None and ended.status == "failed"
    slow.close()
    quick.close()


def test_the_rest_of_what_the_dead_left_holds_its_place_between_the_steps_of_a_reap(tmp_path: Path) -> None:
    clock = Clock()
    store, another = (SqliteStore(str(tmp_path / "log.db"), LEASE, ThreadLoop().lane, clock) for _ in range(2))
    dead = store.take_lease()
    many = ORPHANS_A_STEP + 5
    for _ in range(many):
        store.admit(entry(dead, status="queued", queue="jobs", user="ann"), NONE)
    assert len(store.claim(dead, "jobs", many)) == many
    clock.now += 2 * LEASE
    mine = another.take_lease()
    another._writer.run(another._reap)  # its process is killed then
    with pytest.raises(TooManyStreams):
        another.admit(entry(mine, user="ann"), Limits(streams_per_user=many - 1))
    assert another.gauges()["owners"] == 1
    store.close()
    another.close()
