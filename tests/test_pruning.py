"""The log has old answers forgotten in passing: now and then, beside its beats, whatever the store says."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from streamchat import pruning
from streamchat.cancellation import Cancellation
from streamchat.errors import StoreDown
from streamchat.log import Log
from streamchat.loop import ThreadLoop
from streamchat.memory_store import MemoryStore
from streamchat.settings import Settings
from streamchat.store import Entry, Limits
from streamchat.stores import prune
from tests.shop import wait_until
from tests.store_contract import ending, entry, texts

LEASE = 0.3


class Counting(MemoryStore):
    """Knows how often its lease was renewed."""

    def __init__(self) -> None:
        super().__init__(60.0)
        self.beats = 0

    def renew(self, owner: str) -> None:
        self.beats += 1
        super().renew(owner)


class Pruned:
    """What the log calls. Waits or raises as it is told."""

    def __init__(self) -> None:
        self.times = 0
        self.go_on = threading.Event()
        self.go_on.set()
        self.error: Exception | None = None

    def __call__(self) -> None:
        self.times += 1
        assert self.go_on.wait(10)
        if self.error is not None:
            raise self.error


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "AFTER", 0.05)


@pytest.fixture
def store() -> Counting:
    return Counting()


@pytest.fixture
def pruned() -> Iterator[Pruned]:
    pruned = Pruned()
    yield pruned
    pruned.go_on.set()


def begun(store: MemoryStore, pruned: Pruned) -> Log:
    """A log that has had its first answer: it works from then on."""
    log = Log(store, ThreadLoop(), LEASE, pruned)
    log.admit(Entry("resp_1", "", None, "m", 0.0), Limits(), Cancellation(), needed=True)
    return log


def beats(store: Counting, more: int) -> None:
    wanted = store.beats + more
    wait_until(lambda: store.beats >= wanted, "the log does not beat")


def test_it_comes_soon_after_the_first_answer_and_not_with_every_beat(store: Counting, pruned: Pruned) -> None:
    with closing(begun(store, pruned)):
        wait_until(lambda: pruned.times, "nothing was pruned")
        beats(store, 3)
        assert pruned.times == 1


def test_it_comes_again_in_its_time(store: Counting, pruned: Pruned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "EVERY", 0.01)
    with closing(begun(store, pruned)):
        wait_until(lambda: pruned.times >= 3, "nothing was pruned again")


def test_a_log_that_closes_does_not_wait_for_the_next_one(
    store: Counting, pruned: Pruned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "AFTER", 60.0)
    log = begun(store, pruned)
    began = time.monotonic()
    log.close()
    assert time.monotonic() - began < 1
    assert pruned.times == 0


def test_a_long_one_holds_up_no_beat_and_no_second_begins_beside_it(
    store: Counting, pruned: Pruned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "EVERY", 0.0)
    pruned.go_on.clear()
    with closing(begun(store, pruned)):
        wait_until(lambda: pruned.times, "nothing was pruned")
        beats(store, 4)
        assert pruned.times == 1
        pruned.go_on.set()
        wait_until(lambda: pruned.times >= 2, "nothing was pruned again")


@pytest.mark.parametrize(("error", "lines"), [(StoreDown(), []), (RuntimeError("a bug"), ["the response log failed"])])
def test_what_it_raises_harms_nobody(
    error: Exception,
    lines: list[str],
    store: Counting,
    pruned: Pruned,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "streamchat")
    monkeypatch.setattr(pruning, "EVERY", 0.05)
    pruned.error = error
    with closing(begun(store, pruned)):
        wait_until(lambda: pruned.times >= 2, "one that failed was the last")
        beats(store, 1)
    assert sorted({record.getMessage() for record in caplog.records}) == lines


EACH = len(texts("resp_0", 0, 1).payload)


@pytest.mark.parametrize(
    ("settings", "gone"),
    [({}, 0), ({"retention": -1.0}, 3), ({"kept_bytes": EACH}, 2), ({"kept_bytes_per_user": 2 * EACH}, 1)],
)
def test_the_settings_say_what_goes(settings: dict[str, float], gone: int) -> None:
    store = MemoryStore(60.0)
    owner = store.take_lease()
    for nr in range(3):
        admitted = entry(owner, id=f"resp_{nr}", user="ann")
        store.admit(admitted, Limits())
        store.write(owner, [texts(admitted.id, 0, 1)], [ending(admitted)])
    assert store.gauges()["bytes"] == 3 * EACH
    assert prune(store, Settings(public=True, **settings)) == gone  # type: ignore[arg-type]
