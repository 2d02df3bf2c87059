"""What readers of running answers hear, and who listens for them while they come and go."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from streamchat.cancellation import Cancellation
from streamchat.errors import StoreDown
from streamchat.events import Text
from streamchat.loop import choose_loop
from streamchat.sheet import Sheet
from streamchat.store import Batch, Limits
from streamchat.tail import Tails
from tests.keeping import FaultyStore
from tests.shop import wait_until
from tests.store_contract import batch, entry, texts


class Line:
    """Tails of one process, and an answer that another makes."""

    def __init__(self) -> None:
        self.faulty = FaultyStore()
        self.store = self.faulty.memory
        self.cancelled: list[str] = []
        self.tails = Tails(self.faulty.store, choose_loop(), self.cancelled.append)
        self.owner = self.store.take_lease()
        self.answer = entry(self.owner)
        self.store.admit(self.answer, Limits())
        self.tails.begin(self.store.take_lease())

    def write(self, *batches: Batch) -> None:
        self.store.write(self.owner, batches, [])


@pytest.fixture
def line() -> Iterator[Line]:
    made = Line()
    yield made
    made.faulty.rise()
    made.tails.close(2)
    assert made.tails._silent.is_set()
    assert made.store._listeners == set()


def heard(line: Line, tail: object, count: int) -> list[int]:
    news = tail.news  # type: ignore[attr-defined]
    wait_until(lambda: len(news) >= count, "nothing is heard")
    return [seq for seq, _ in news]


def test_each_reader_hears_all_that_is_written_from_when_it_came(line: Line) -> None:
    first = line.tails.of_store(line.answer.id)
    line.write(texts(line.answer.id, 0, 2))
    assert heard(line, first, 2) == [0, 1]
    second = line.tails.of_store(line.answer.id)
    line.write(texts(line.answer.id, 2, 3))
    assert heard(line, first, 5) == [0, 1, 2, 3, 4]
    assert heard(line, second, 3) == [2, 3, 4]
    first.close()
    line.write(texts(line.answer.id, 5, 1))
    assert heard(line, second, 4) == [2, 3, 4, 5]
    second.close()
    assert line.tails.ids == set()


def test_a_new_lease_listens_for_the_same_readers_and_for_its_own_cancels(line: Line) -> None:
    tail = line.tails.of_store(line.answer.id)
    owner = line.store.take_lease()
    own = entry(owner)
    line.store.admit(own, Limits())
    line.tails.begin(owner)
    line.write(texts(line.answer.id, 0, 1))
    line.store.cancel(own.id)
    assert heard(line, tail, 1) == [0]
    wait_until(lambda: line.cancelled == [own.id], "the cancel is not heard")
    assert len(line.store._listeners) == 1
    tail.close()


def test_a_lease_whose_listener_fails_leaves_the_old_one(line: Line) -> None:
    tail = line.tails.of_store(line.answer.id)
    line.faulty.fall("listen")
    with pytest.raises(StoreDown):
        line.tails.begin(line.store.take_lease())
    line.write(texts(line.answer.id, 0, 1))
    assert heard(line, tail, 1) == [0]
    tail.close()


def test_a_listener_that_fails_is_listened_to_again(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    (listener,) = line.store._listeners
    wait, faults = listener.wait, iter([StoreDown(), ValueError()])

    def faulty(seconds: float) -> tuple[list[Batch], list[str]]:
        for fault in faults:
            raise fault
        return wait(seconds)

    tail = line.tails.of_store(line.answer.id)
    with caplog.at_level(logging.CRITICAL, "streamchat"):
        listener.wait = faulty  # type: ignore[method-assign]
        line.write(texts(line.answer.id, 0, 1))
        assert heard(line, tail, 1) == [0]
        wait_until(lambda: next(faults, None) is None, "nobody listens")
    tail.close()


def test_news_that_cannot_be_read_touch_nobody_else(line: Line) -> None:
    tail = line.tails.of_store(line.answer.id)
    line.write(Batch(line.answer.id, 0, 1, b"[[1"), batch(line.answer.id, 1, Text("b")))
    assert heard(line, tail, 1) == [1]
    tail.close()


def test_a_reader_that_the_store_refuses_is_not_held(line: Line) -> None:
    (listener,) = line.store._listeners

    def refuse(id: str) -> None:
        raise StoreDown

    listener.add = refuse  # type: ignore[method-assign]
    with pytest.raises(StoreDown):
        line.tails.of_store(line.answer.id)
    assert line.tails.ids == set()


def test_readers_that_come_and_go_at_once_all_hear(line: Line) -> None:
    deaf: list[object] = []
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            tail = line.tails.of_store(line.answer.id)
            if tail not in line.tails._following.get(line.answer.id, []):
                deaf.append(tail)
            tail.close()
            time.sleep(0)

    readers = [threading.Thread(target=come_and_go) for _ in range(4)]
    for reader in readers:
        reader.start()
    for first in range(0, 400, 2):
        line.write(texts(line.answer.id, first, 2))
        stop.wait(0.001)
    stop.set()
    for reader in readers:
        reader.join()
    assert deaf == []
    assert line.tails.ids == set()


def test_what_is_from_before_its_time_comes_in_slices_and_then_what_is_told(line: Line) -> None:
    sheet = Sheet(
        line.answer.id, line.owner, Cancellation(), lambda *_: None, line.faulty.store.unattended, choose_loop()
    )
    for number in range(0, 5000, 5):
        sheet.extend([Text(str(each)) for each in range(number, number + 5)])
        if number == 2500:
            sheet.take()
    tail = line.tails.of_sheet(sheet)
    sheet.extend([Text("5000")])
    slices = list[list[tuple[int, Text]]]()
    while tail.is_behind:
        slices.append(tail.take(0))  # type: ignore[arg-type]
    assert [each for told in slices for each in told] == [(number, Text(str(number))) for number in range(5000)]
    assert max(map(len, slices)) < 1000
    assert tail.take(0) == [(5000, Text("5000"))]
    assert tail.take(0) == []
    tail.close()
    assert sheet.readers == []


def test_who_comes_while_the_collector_drops_the_last_reader_hears_all(line: Line) -> None:
    first = line.tails.of_store(line.answer.id)

    class Collecting(dict[str, list[Any]]):
        def setdefault(self, id: str, default: Any = None) -> Any:
            found = super().setdefault(id, default)
            first.close()
            return found

    line.tails._following = Collecting(line.tails._following)
    second = line.tails.of_store(line.answer.id)
    line.write(texts(line.answer.id, 0, 2))
    assert heard(line, second, 2) == [0, 1]
    second.close()
    assert line.tails.ids == set()
