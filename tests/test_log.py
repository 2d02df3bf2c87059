"""What the log's writer promises while its store is healthy, slow, silent, broken, or takes this process for dead.

These tests, and those of sheets, tails and replays, run in threads, and once more under gevent in their own process.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streamchat import log as module
from streamchat import sheet as sheet_module
from streamchat.cancellation import Cancellation
from streamchat.errors import Cancelled, LeaseLost, StoreDown, TooManyStreams
from streamchat.events import Event, Finish, Start, Text
from streamchat.log import Log
from streamchat.loop import choose_loop
from streamchat.sheet import Sheet
from streamchat.store import Batch, Ending, Limits
from tests.keeping import Block, FaultyStore, expect_settled
from tests.queue_contract import queued
from tests.shop import wait_until
from tests.store_contract import ending, entry, told
from tests.test_loop import PATCHED, run

NONE = Limits()
FINISH = Finish("stop")


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore()


@pytest.fixture
def log(store: FaultyStore) -> Iterator[Log]:
    made = Log(store.store, choose_loop(), 15)
    yield made
    store.rise()
    made.close()


class Made:
    """An answer that a log keeps."""

    def __init__(self, log: Log, limits: Limits = NONE, needed: bool = True, **values: Any) -> None:
        self.log = log
        self.cancellation = Cancellation()
        self.entry = entry("", **values)
        self.id, self.sheet = log.admit(self.entry, limits, self.cancellation, needed)
        self.entry = replace(self.entry, owner=self.sheet.owner if self.sheet is not None else "")

    def say(self, *events: Event) -> None:
        assert self.sheet is not None
        for event in events:
            self.sheet.extend([event])

    def end(self, hold: float = 5) -> bool:
        """Whether the whole answer is written."""
        assert self.sheet is not None
        self.sheet.end(FINISH, ending(self.entry), hold)
        return not self.sheet.trouble()


def kept(store: FaultyStore, id: str) -> list[tuple[int, Event]]:
    return told(store.memory.read(id, -1))


def status(store: FaultyStore, id: str) -> str:
    found = store.memory.find(id)
    assert found is not None
    return found.status


def test_all_of_this_holds_under_gevent_that_is_not_in_this_process() -> None:
    here = Path(__file__).parent
    files = [str(here / f"test_{name}.py") for name in ("sheet", "log", "tail", "replay")]
    options = ["-q", "-k", "not in_this_process", "-W", "error", "-p", "no:cacheprovider"]
    told = run([sys.executable, "-c", PATCHED, *files, *options])
    assert " passed" in told and "failed" not in told and "skipped" not in told


# --- a healthy store


def test_the_log_is_a_tenth_of_a_second_behind_at_most(log: Log, store: FaultyStore) -> None:
    made = Made(log)
    delays = []
    for number in range(11):
        begun = time.monotonic()
        made.say(Text(str(number)))
        wait_until(lambda: len(kept(store, made.id)) == number + 1, "it is not written")  # noqa: B023
        delays.append(time.monotonic() - begun)
    assert sorted(delays)[5] < 0.1  # the median: a noisy machine is no bug
    made.end()


def test_thirty_two_kib_do_not_wait(log: Log, store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GATHER", 60)
    made = Made(log)
    made.say(Text("x" * 33_000))
    wait_until(lambda: len(kept(store, made.id)) == 1, "it is not written")
    made.end()


def test_finish_and_final_state_are_one_write(log: Log, store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GATHER", 60)
    seen: list[tuple[int, str]] = []
    store.after["write"] = lambda: seen.append((len(kept(store, made.id)), status(store, made.id)))
    made = Made(log)
    made.say(Start(made.id, "m", 1), Text("a"))
    assert made.end()
    assert seen == [(3, "completed")]
    assert (log.running, log.waiting_bytes) == ({}, 0)


def test_many_answers_share_a_write(log: Log, store: FaultyStore) -> None:
    answers = [Made(log) for _ in range(50)]
    block = Block()
    store.before["write"] = block
    answers[0].say(Text("a"))
    assert block.reached.wait(5)
    for made in answers[1:]:
        made.say(Text("a"))
    store.rise()
    block.open()
    wait_until(lambda: all(kept(store, made.id) for made in answers), "something is not written")
    assert store.calls.count("write") < 10
    assert all(made.end() for made in answers)


# --- a slow, silent or broken store


def test_nothing_waits_for_a_store_that_hangs_and_nothing_is_lost(log: Log, store: FaultyStore) -> None:
    made, block = Made(log), Block()
    store.before["write"] = block
    made.say(Text("0"))
    assert block.reached.wait(5)
    begun = time.monotonic()
    made.say(*(Text(str(number)) for number in range(1, 2000)))
    assert time.monotonic() - begun < 1
    store.rise()
    block.open()
    assert made.end()
    assert kept(store, made.id) == [*((number, Text(str(number))) for number in range(2000)), (2000, FINISH)]
    assert made.sheet is not None and not made.sheet.lost


def test_a_store_that_is_locked_for_two_seconds_loses_nothing(log: Log, store: FaultyStore) -> None:
    made = Made(log)
    store.fall()
    until = time.monotonic() + 2
    number = 0
    while time.monotonic() < until:
        made.say(Text(str(number)))
        number += 1
        time.sleep(0.02)
    assert log.down
    store.rise()
    assert made.end()
    assert kept(store, made.id) == [*((each, Text(str(each))) for each in range(number)), (number, FINISH)]
    assert not log.down


def test_a_write_that_was_done_though_the_store_fell_silent_is_not_doubled(log: Log, store: FaultyStore) -> None:
    made, failures = Made(log), iter(range(3))

    def fail() -> None:
        if next(failures, None) is not None:
            raise StoreDown

    store.after["write"] = fail
    made.say(Text("a"), Text("b"))
    assert made.end()
    assert kept(store, made.id) == [(0, Text("a")), (1, Text("b")), (2, FINISH)]


def test_what_waits_too_long_is_given_up_and_the_end_still_told(
    log: Log, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sheet_module, "OLDEST", 0.2)
    made = Made(log)
    store.fall("write")
    made.say(Text("a"))
    wait_until(lambda: made.sheet is not None and made.sheet.lost, "it is not given up")
    assert log.waiting_bytes == 0
    assert not made.end(0.05)
    store.rise()
    wait_until(lambda: status(store, made.id) == "completed", "the end is not told")
    assert kept(store, made.id) == []
    wait_until(lambda: not log.running, "the sheet is held")


def test_what_is_too_much_for_the_process_is_given_up(
    log: Log, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_OF_ALL", 100_000)
    answers = [Made(log) for _ in range(5)]
    store.fall("write")
    for made in answers:
        made.say(Text("x" * 30_000))
    assert [made.sheet.lost for made in answers if made.sheet] == [False, False, False, True, True]
    assert log.waiting_bytes < 100_000
    store.rise()
    assert [made.end() for made in answers] == [True, True, True, False, False]
    wait_until(lambda: not log.running, "an end is not written")
    assert log.waiting_bytes == 0


def test_a_bug_in_the_store_touches_the_one_answer_that_it_is_about(
    log: Log, store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Made(log), Made(log)
    write = store.memory.write

    def broken(owner: str, batches: Sequence[Batch], endings: Sequence[Ending]) -> None:
        if any(batch.id == bad.id for batch in batches):
            raise ValueError
        write(owner, batches, endings)

    store.memory.write = broken  # type: ignore[method-assign]
    with caplog.at_level(logging.CRITICAL, "streamchat"):
        bad.say(Text("a"))
        good.say(Text("a"))
        assert good.end()
        wait_until(lambda: bad.sheet is not None and bad.sheet.lost, "it is not given up")
    assert kept(store, good.id) == [(0, Text("a")), (1, FINISH)]


# --- admission


def test_a_store_that_is_back_is_used_again_without_anybody_who_insists(log: Log, store: FaultyStore) -> None:
    store.fall()
    with pytest.raises(StoreDown):
        Made(log, needed=False)
    assert log.down
    store.rise()
    wait_until(lambda: not log.down, "nobody asks the store")
    assert Made(log, needed=False).end()


def test_callers_of_a_store_that_hangs_wait_once_together(log: Log, store: FaultyStore) -> None:
    def hang() -> None:
        time.sleep(0.3)
        raise StoreDown

    store.before["take_lease"] = hang
    failed: list[float] = []

    def ask() -> None:
        begun = time.monotonic()
        with pytest.raises(StoreDown):
            Made(log)
        failed.append(time.monotonic() - begun)

    callers = [threading.Thread(target=ask) for _ in range(20)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(failed) == 20 and max(failed) < 1.5


def test_an_admission_that_was_done_though_the_store_fell_silent_is_retracted(log: Log, store: FaultyStore) -> None:
    def silent() -> None:
        raise StoreDown

    store.after["admit"] = silent
    with pytest.raises(StoreDown):
        Made(log, user="ann", key="k", fingerprint="f", reserve=100)
    store.rise()
    wait_until(lambda: not log.running, "a sheet is held")
    expect_settled(store)
    assert Made(log, user="ann", key="k", fingerprint="f").sheet is not None
    assert store.memory.usage(0, "user") == []


def test_so_is_one_whose_caller_was_killed_meanwhile(log: Log, store: FaultyStore) -> None:
    """A greenlet may be, while the store does what it was asked."""

    def kill() -> None:
        raise KeyboardInterrupt

    store.after["admit"] = kill
    with pytest.raises(KeyboardInterrupt):
        Made(log, user="ann", key="k", fingerprint="f", reserve=100, needed=False)
    store.rise()
    wait_until(lambda: not log.running, "a sheet is held")
    expect_settled(store)
    assert Made(log, user="ann", key="k", fingerprint="f").sheet is not None


def test_an_answer_that_needs_no_log_has_its_true_end_in_a_store_that_had_it(log: Log, store: FaultyStore) -> None:
    def silent() -> None:
        raise StoreDown

    store.after["admit"] = silent
    made = Made(log, needed=False)
    assert made.sheet is not None and made.sheet.lost
    store.rise()
    made.say(Text("a"))
    assert not made.end()
    assert (status(store, made.id), kept(store, made.id)) == ("completed", [])


def test_a_refused_admission_leaves_nothing(log: Log, store: FaultyStore) -> None:
    first = Made(log, Limits(1), user="ann")
    with pytest.raises(TooManyStreams):
        Made(log, Limits(1), user="ann")
    assert list(log.running) == [first.id]
    first.end()


# --- leases


def test_a_log_that_is_woken_ends_what_dead_processes_left(store: FaultyStore) -> None:
    dead = entry(store.memory.take_lease())
    store.memory.admit(dead, NONE)
    store.lose_leases()
    log = Log(store.store, choose_loop(), 0.6)
    try:
        store.fall("take_lease")
        log.wake()
        assert store.memory.gauges()["owners"] == 0
        store.rise()
        wait_until(lambda: status(store, dead.id) == "failed", "nobody ends it")
    finally:
        log.close()


def test_a_lost_lease_ends_the_answers_and_the_next_one_has_a_new_one(store: FaultyStore) -> None:
    log = Log(store.store, choose_loop(), 0.6)
    try:
        made = Made(log)
        made.say(Text("a"))
        store.lose_leases()
        wait_until(lambda: isinstance(made.cancellation.error, LeaseLost), "the answer goes on")
        made.end(0)
        after = Made(log)
        assert after.entry.owner != made.entry.owner
        assert after.end()
        wait_until(lambda: status(store, made.id) == "failed", "nobody ends it")
        wait_until(lambda: not log.running, "a sheet is held")
    finally:
        log.close()


def test_an_admission_under_a_lease_that_is_lost_takes_a_new_one(log: Log, store: FaultyStore) -> None:
    Made(log).end()
    store.lose_leases()
    made = Made(log)
    assert made.cancellation.error is None
    assert made.end()


def test_a_write_under_a_lost_lease_ends_the_answers(log: Log, store: FaultyStore) -> None:
    made = Made(log)
    store.lose_leases()
    made.say(Text("a"))
    wait_until(lambda: isinstance(made.cancellation.error, LeaseLost), "the answer goes on")
    assert log.waiting_bytes == 0


def adopted(log: Log, store: FaultyStore) -> tuple[Sheet, Cancellation]:
    """The sheet of an answer that came out of a queue."""
    asked = queued(log.lease.held())
    store.memory.admit(asked, NONE)
    (claimed,) = store.memory.claim(log.lease.held(), asked.queue, 1)
    store.memory.begin(claimed.owner, claimed.id)
    cancellation = Cancellation()
    return log.adopt(claimed, cancellation), cancellation


def test_a_lease_lost_while_the_store_was_away_ends_what_nobody_reads_and_nothing_else(store: FaultyStore) -> None:
    log = Log(store.store, choose_loop(), 0.6)
    try:
        made = Made(log)
        _, alone = adopted(log, store)
        store.fall()
        wait_until(lambda: log.down, "the store answers")
        store.lose_leases()
        store.rise()
        wait_until(lambda: isinstance(alone.error, LeaseLost), "it is made for nobody")
        assert made.cancellation.error is None
        wait_until(lambda: not log.running, "a sheet is held")
    finally:
        log.close()


def test_what_nobody_reads_waits_for_a_store_that_is_away_for_long(
    log: Log, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sheet_module, "OLDEST", 0.1)
    made = Made(log)
    sheet, _ = adopted(log, store)
    store.fall("write")
    sheet.extend([Text("a")])
    made.say(Text("a"))
    wait_until(lambda: made.sheet is not None and made.sheet.lost, "it is not given up")
    sheet.extend([Text("b")])
    assert not sheet.lost
    store.rise()
    wait_until(lambda: [event for _, event in kept(store, sheet.id)] == [Text("a"), Text("b")], "it is not kept")
    made.end()


def test_a_full_store_that_refuses_the_rest_still_renews(store: FaultyStore) -> None:
    log = Log(store.store, choose_loop(), 0.6)
    try:
        made = Made(log)
        store.fall("write", "attend", "reap")
        time.sleep(1.2)
        assert made.cancellation.error is None
        store.rise()
        assert made.end()
    finally:
        log.close()


def test_answers_of_the_dead_are_ended_by_those_who_only_read(store: FaultyStore) -> None:
    owner = store.memory.take_lease()
    dead = entry(owner)
    store.memory.admit(dead, NONE)
    log = Log(store.store, choose_loop(), 0.6)
    try:
        found = log.find(dead.id)
        assert found is not None and found.status == "in_progress"
        store.memory.give_up(owner)
        wait_until(lambda: status(store, dead.id) == "failed", "nobody ends it")
    finally:
        log.close()


# --- others


@pytest.fixture
def other(store: FaultyStore) -> Iterator[Log]:
    made = Log(store.store, choose_loop(), 15)
    yield made
    made.close()


def test_an_answer_is_cancelled_from_here_and_from_elsewhere(log: Log, other: Log) -> None:
    for by in (log, other):
        made = Made(log)
        by.cancel(made.id)
        by.cancel(made.id)
        wait_until(lambda: isinstance(made.cancellation.error, Cancelled), "it goes on", 2)  # noqa: B023
        made.end()
        by.cancel(made.id)
    log.cancel("resp_unknown")


def test_an_answer_that_is_cancelled_while_it_is_admitted_hears_of_it(log: Log, other: Log, store: FaultyStore) -> None:
    Made(log).end()
    asked = entry("", id="resp_early")
    heard = threading.Event()
    cancellation = Cancellation()
    cancellation.then(heard.set)

    def cancel() -> None:
        other.cancel(asked.id)
        assert heard.wait(2)

    store.after["admit"] = cancel
    log.admit(asked, NONE, cancellation, True)
    assert isinstance(cancellation.error, Cancelled)


def test_readers_elsewhere_are_made_known(log: Log, other: Log, store: FaultyStore) -> None:
    made = Made(log)
    assert made.sheet is not None
    assert made.sheet.idle() == float("inf")
    tail = other.follow(made.id)
    assert made.sheet.idle() == 0
    tail.close()
    assert other.tails.ids == set()
    made.end()


def read_to_end(take: Callable[[float], list[tuple[int, Event]]]) -> list[tuple[int, Event]]:
    read: list[tuple[int, Event]] = []
    until = time.monotonic() + 5
    while not read or not isinstance(read[-1][1], Finish):
        assert time.monotonic() < until, read
        read += take(until)
    return read


def test_tails_here_and_elsewhere_hear_what_comes(log: Log, other: Log, store: FaultyStore) -> None:
    made = Made(log)
    made.say(Text("0"))
    wait_until(lambda: kept(store, made.id), "it is not written")
    tails = [log.follow(made.id), other.follow(made.id), other.follow(made.id)]
    made.say(Text("1"), Text("2"))
    assert made.end()
    for tail in tails:
        assert read_to_end(tail.take) == [(1, Text("1")), (2, Text("2")), (3, FINISH)]
        tail.close()
    assert other.tails.ids == set()


def test_the_writer_that_comes_between_losing_a_lease_and_hearing_of_it_stops_nobody(
    log: Log, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With threads it may: Lease.lose forgets the owner before it tells the log whose answers those were."""
    made = Made(log)
    store.fall()
    made.say(Text("a"))
    lost = log.lease._lost

    def late(owner: str) -> None:
        log._write_group()
        lost(owner)

    monkeypatch.setattr(log.lease, "_lost", late)
    log.lease.down = True
    assert made.sheet is not None
    log.lease.lose(made.sheet.owner)
    assert made.cancellation.error is None
    assert made.sheet.lost


# --- the end of the process


def test_closing_writes_what_waits_and_gives_the_lease_back(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GATHER", 0.3)
    before = threading.active_count()
    log = Log(store.store, choose_loop(), 15)
    made = Made(log)
    made.say(Text("a"))
    log.close()
    assert kept(store, made.id) == [(0, Text("a"))]
    assert store.memory.gauges()["owners"] == 0
    assert store.calls[-1] == "close"
    assert threading.active_count() == before
    with pytest.raises(StoreDown):
        Made(log)


def test_closing_does_not_wait_for_ever_for_a_store_that_is_silent(
    store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLOSE_WITHIN", 0.3)
    log = Log(store.store, choose_loop(), 15)
    made, block = Made(log), Block()
    store.before["write"] = block
    made.say(Text("a"))
    assert block.reached.wait(5)
    begun = time.monotonic()
    log.close()
    assert time.monotonic() - begun < 2
    block.open()


def test_a_log_that_nobody_used_is_closed_at_once(store: FaultyStore) -> None:
    Log(store.store, choose_loop(), 15).close()
    assert store.calls == ["close"]


def test_closing_writes_more_than_one_group_holds(
    log: Log, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_OF_GROUP", 100)
    answers = [Made(log) for _ in range(5)]
    block = Block()
    store.before["write"] = block
    answers[0].say(Text("x" * 200))
    assert block.reached.wait(5)
    for made in answers:
        made.say(Text("y" * 200))
        made.end(0)
    store.rise()
    log._closed = True  # as close() does first
    block.open()
    log.close()
    assert [status(store, made.id) for made in answers] == ["completed"] * 5
    assert all(kept(store, made.id) for made in answers)


# --- renewing, and what is due beside it


@pytest.mark.parametrize("due", ["attend", "reap"])
def test_a_lease_is_renewed_while_the_store_lets_what_is_due_beside_it_wait(store: FaultyStore, due: str) -> None:
    """A locked file does, each time for nearly 2 s."""
    log, block = Log(store.store, choose_loop(), 0.3), Block()
    elsewhere = entry(store.memory.take_lease())
    store.memory.admit(elsewhere, NONE)
    try:
        made, tail = Made(log), log.follow(elsewhere.id)
        store.before[due] = block
        assert block.reached.wait(5)
        renewed = store.calls.count("renew")
        wait_until(lambda: store.calls.count("renew") >= renewed + 3, "nobody renews")
        store.rise()
        block.open()
        tail.close()
        assert made.end()
    finally:
        block.open()
        log.close()


def test_the_lease_is_given_back_after_all_that_was_due_is_done(store: FaultyStore) -> None:
    log, block = Log(store.store, choose_loop(), 0.3), Block()
    log.wake()
    store.before["reap"] = block
    store.after["reap"] = lambda: given_back.append("give_up" in store.calls)
    given_back: list[bool] = []
    assert block.reached.wait(5)
    closer = threading.Thread(target=log.close)
    closer.start()
    closer.join(0.2)
    assert closer.is_alive()
    block.open()
    closer.join()
    assert given_back == [False]
    assert store.calls[-2:] == ["give_up", "close"]
