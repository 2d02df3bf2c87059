"""One reader of one answer: each event once and in order, from any event on; what is missing is an error."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamchat import replay as module
from streamchat.encoders import ENCODERS
from streamchat.errors import Gap, Interrupted, InvalidRequest, StoreDown, StreamChatError
from streamchat.events import Event, Failure, Finish, Start, Text
from streamchat.hangup import Caller
from streamchat.live import Live
from streamchat.log import Log
from streamchat.loop import choose_loop
from streamchat.order import detail_of
from streamchat.replay import SLICE, Replay
from streamchat.settings import Settings
from streamchat.store import Batch, Limits, pack
from tests.keeping import FaultyStore
from tests.shop import NDJSON, TEXT, events_of
from tests.store_contract import batch, ending, entry
from tests.test_log import FINISH, Made


class Reading:
    """A process that reads, and a producer that a test writes for."""

    def __init__(self, **options: Any) -> None:
        self.faulty = FaultyStore()
        self.store = self.faulty.memory
        self.log = Log(self.faulty.store, choose_loop(), 15)
        self.live = Live(choose_loop(), 100, 30, 60, lambda: None)
        self.settings = Settings(public=True, **({"heartbeat": 60.0, "status_hold": 60.0} | options))
        self.owner = self.store.take_lease()

    def answer(self) -> str:
        self.entry = entry(self.owner)
        self.store.admit(self.entry, Limits())
        return self.entry.id

    def write(self, first: int, *events: Event) -> None:
        """As a producer elsewhere does; with the final state where the last event ends."""
        ends = [ending(self.entry)] if isinstance(events[-1], Finish) else []
        self.store.write(self.owner, [batch(self.entry.id, first, *events)], ends)

    def replay(self, id: str, after: int = -1, accept: str = NDJSON, log: Log | None = None) -> Replay:
        kept = self.store.find(id)
        assert kept is not None
        made = Replay(kept, after, log or self.log, ENCODERS[accept](), Caller(), self.live, self.settings, detail_of)
        made.begin()
        return made

    def close(self) -> None:
        self.faulty.rise()
        assert len(self.live) == 0
        assert self.log.tails.ids == set()
        self.log.close()
        self.live.close()


@pytest.fixture
def reading() -> Iterator[Reading]:
    made = Reading()
    yield made
    made.close()


def told(replay: Replay) -> list[tuple[int, str]]:
    """Seq, or -1, and text, code or type of each event."""
    events = events_of(NDJSON, b"".join(replay.stream()))
    return [(event.get("seq", -1), event.get("text", event.get("code", event["type"]))) for event in events]


A, B, C, D = (Text(each) for each in "abcd")
WARNED = (-1, "not_resumable")


def test_events_that_are_missing_are_read_again(reading: Reading) -> None:
    id = reading.answer()
    reading.write(0, A)
    replay = reading.replay(id)
    stream = replay.stream()
    assert b"".join(next(stream) for _ in range(2)).count(b'"a"') == 1
    (listener,) = reading.store._listeners
    listener.drop(id)
    reading.write(1, B)
    listener.add(id)
    reading.write(2, C)
    reading.write(3, FINISH)
    rest = events_of(NDJSON, b"".join(stream))
    assert [event["seq"] for event in rest] == [1, 2, 3]


def test_a_gap_between_two_pieces_of_news_is_read_again_too(reading: Reading) -> None:
    id = reading.answer()
    replay = reading.replay(id)
    (listener,) = reading.store._listeners
    assert replay._tail is not None
    reading.write(0, A, B)
    reading.write(2, C, FINISH)
    listener.drop(id)
    replay._tail.news.clear()
    replay._tail.news.extend([(0, A), (2, C), (3, FINISH)])
    reading.faulty.before["read"] = lambda: reading.faulty.before.pop("read")
    history = replay._log.store.read
    calls: list[int] = []

    def empty_first(id: str, after: int) -> list[Batch]:
        calls.append(after)
        return [] if len(calls) == 1 else history(id, after)

    reading.faulty.read = empty_first  # type: ignore[attr-defined]
    assert told(replay) == [(0, "a"), (1, "b"), (2, "c"), (3, "finish")]
    assert calls == [-1, 0]


def test_who_has_the_end_before_the_log_has_it_is_told_that_it_is_over(reading: Reading) -> None:
    """The store was slow at the end: the caller was told it after a warning, and came back at once."""
    id = reading.answer()
    reading.write(0, A, B)
    replay = reading.replay(id, after=2)
    reading.write(2, FINISH)
    assert told(replay) == []
    assert told(reading.replay(id, after=1)) == [(2, "finish")]


def test_so_is_a_reader_to_whom_nobody_told_the_end(reading: Reading, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamchat.replay.LOOK", 0.1)
    id = reading.answer()
    reading.write(0, A, B)
    replay = reading.replay(id, after=2)
    (listener,) = reading.store._listeners
    listener.drop(id)
    reading.write(2, FINISH)
    assert told(replay) == []


def test_who_says_to_have_more_of_a_running_answer_than_there_will_be_is_told_so(reading: Reading) -> None:
    id = reading.answer()
    reading.write(0, A, B)
    whole, stream = reading.replay(id, after=3, accept=TEXT), reading.replay(id, after=3)
    reading.write(2, FINISH)
    with pytest.raises(InvalidRequest, match='"after" and Last-Event-ID must be at most 2,'):
        next(whole.stream())
    with pytest.raises(ConnectionResetError):  # the status is told already: a reader who comes back gets a 400
        b"".join(stream.stream())


@pytest.mark.parametrize("accept", [TEXT, NDJSON])
def test_who_is_told_of_an_answer_that_is_retracted_may_ask_again(reading: Reading, accept: str) -> None:
    """The same key found it between its admission, whose reply never came, and that."""
    id = reading.answer()
    replay = reading.replay(id, accept=accept)
    reading.store.write(reading.owner, [], [replace(ending(reading.entry), retracted=True)])
    with pytest.raises(StoreDown):
        next(replay.stream())


def test_what_is_missing_for_good_is_a_gap(reading: Reading) -> None:
    id = reading.answer()
    reading.write(0, A)
    replay = reading.replay(id)
    reading.write(2, C, FINISH)
    assert told(replay) == [(0, "a"), (0, "gap")]
    assert told(reading.replay(id)) == [(0, "a"), (0, "gap")]


def test_a_kept_end_that_is_missing_is_a_gap(reading: Reading) -> None:
    id = reading.answer()
    reading.write(0, A)
    reading.store.write(reading.owner, [], [ending(reading.entry)])
    assert told(reading.replay(id)) == [(0, "a"), (0, "gap")]


def test_what_is_half_written_is_a_gap(reading: Reading) -> None:
    id = reading.answer()
    reading.store.write(reading.owner, [Batch(id, 0, 2, pack([A, B])[:-3])], [])
    with pytest.raises(Gap):
        told(reading.replay(id))


def test_a_failure_is_told_wherever_it_stands(reading: Reading) -> None:
    id = reading.answer()
    reading.write(0, A, B)
    replay = reading.replay(id, after=5)
    reading.write(2, Failure("interrupted", "w", True))
    assert told(replay) == [(2, "interrupted")]


def test_a_failure_behind_what_a_reader_missed_is_told_after_that(reading: Reading) -> None:
    id = reading.answer()
    reading.write(0, A)
    replay = reading.replay(id)
    stream = replay.stream()
    next(stream), next(stream)
    (listener,) = reading.store._listeners
    listener.drop(id)
    reading.write(1, B, C)
    listener.add(id)
    reading.write(3, Failure("interrupted", "w", True))
    assert [event["seq"] for event in events_of(NDJSON, b"".join(stream))] == [1, 2, 3]


def test_a_reader_of_another_process_survives_a_store_that_is_silent(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamchat.replay.LOOK", 0.05)
    id = reading.answer()
    reading.write(0, A)
    replay = reading.replay(id)
    stream = replay.stream()
    seen = next(stream) + next(stream)
    reading.faulty.fall("find")
    timer = threading.Timer(0.3, lambda: reading.write(1, FINISH))
    timer.start()
    seen += b"".join(stream)
    timer.join()
    assert [event["seq"] for event in events_of(NDJSON, seen)] == [0, 1]
    assert reading.faulty.calls.count("find") > 1


def test_heartbeats_do_not_keep_a_reader_from_seeing_that_the_answer_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("streamchat.replay.LOOK", 0.2)
    reading = Reading(heartbeat=0.05, status_hold=0.05)
    id = reading.answer()
    replay = reading.replay(id)
    (listener,) = reading.store._listeners
    listener.drop(id)
    reading.write(0, A, FINISH)
    reading.faulty.read = lambda id, after: []  # type: ignore[attr-defined]
    stream = replay.stream()
    seen = next(stream) + next(stream)
    assert b"heartbeat" in seen
    del reading.faulty.read
    assert [event["seq"] for event in events_of(NDJSON, seen + b"".join(stream))] == [0, 1]
    reading.close()


def test_a_reader_that_comes_while_the_store_is_silent_is_refused_and_holds_nothing(reading: Reading) -> None:
    id = reading.answer()
    reading.log.find(id)
    reading.faulty.fall("attend")  # a store that only refuses to write is read
    replay = reading.replay(id)
    reading.faulty.fall("read")
    with pytest.raises(StoreDown):
        next(replay.stream())


def test_text_of_a_failure_raises_what_it_was(reading: Reading) -> None:
    id = reading.answer()
    reading.write(0, Start(id, "m", 1), Failure("upstream_error", "words", True))
    with pytest.raises(StreamChatError) as caught:
        next(reading.replay(id, accept=TEXT).stream())
    assert (caught.value.status, caught.value.code, caught.value.detail, caught.value.retryable) == (
        502,
        "upstream_error",
        "words",
        True,
    )


def test_text_that_was_begun_breaks_off(reading: Reading) -> None:
    id = reading.answer()
    reading.write(0, A, Failure("upstream_error", "words", True))
    stream = reading.replay(id, accept=TEXT).stream()
    assert next(stream) + next(stream) == b"a"
    with pytest.raises(ConnectionResetError):
        next(stream)


def test_a_long_answer_is_told_in_slices_by_one_question(reading: Reading) -> None:
    id = reading.answer()
    for first in range(0, 10_000, 100):
        reading.write(first, *(Text("x" * 20) for _ in range(100)))
    reading.write(10_000, FINISH)
    replay = reading.replay(id)
    pieces = list(replay.stream())
    assert sum(piece.count(b"\n") for piece in pieces) == 10_001
    assert max(map(len, pieces)) <= SLICE
    assert len(pieces) < 160
    assert reading.faulty.calls.count("read") == 1


@pytest.mark.parametrize("size", [SLICE - 60, SLICE, 300_000])
def test_a_long_event_is_told_in_slices_too(reading: Reading, size: int) -> None:
    id = reading.answer()
    reading.write(0, A, Text("x" * size), B)
    reading.write(3, FINISH)
    pieces = list(reading.replay(id).stream())
    assert max(map(len, pieces)) <= SLICE
    assert [event.get("text") for event in events_of(NDJSON, b"".join(pieces))] == ["a", "x" * size, "b", None]


@pytest.mark.parametrize("accept", [TEXT, NDJSON])
def test_a_long_answer_of_small_pieces_leaves_others_their_turn(reading: Reading, accept: str) -> None:
    """They fill few slices: under gevent one long stretch of work would hold up every other answer of the worker."""
    id = reading.answer()
    for first in range(0, 10_000, 5):
        reading.write(first, *[A] * 5)
    reading.write(10_000, FINISH)
    turns, is_told = 0, threading.Event()

    def take_turns() -> None:
        nonlocal turns
        while not is_told.wait(0.0005):
            turns += 1

    other = threading.Thread(target=take_turns)
    replay = reading.replay(id, accept=accept)
    other.start()
    assert len(b"".join(replay.stream())) >= 10_000
    seen = turns
    is_told.set()
    other.join()
    assert seen >= 10


def test_a_reader_that_is_closed_ends_and_holds_nothing(reading: Reading) -> None:
    id = reading.answer()
    reading.write(0, A)
    replay = reading.replay(id)
    stream = replay.stream()
    next(stream), next(stream)
    closer = threading.Timer(0.05, replay.close)
    closer.start()
    with pytest.raises(ConnectionResetError):  # a cut: whoever wants the rest asks again
        b"".join(stream)
    replay.close()
    closer.join()
    assert isinstance(replay.cancellation.error, Interrupted)


def test_a_write_that_hangs_is_seen_by_the_sweep(reading: Reading) -> None:
    id = reading.answer()
    reading.write(0, A)
    replay = reading.replay(id)
    stream = replay.stream()
    next(stream)
    next(stream)
    assert time.monotonic() - replay.writing_since < 5
    reading.write(1, FINISH)
    next(stream)
    assert replay.writing_since > 0
    assert list(stream) == []
    assert replay.writing_since == 0


pieces = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(pieces, st.lists(st.integers(0, 4), max_size=6), st.booleans(), st.data())
def test_a_reader_that_is_cut_again_and_again_assembles_the_same_text(
    said: Sequence[str], cuts: Sequence[int], elsewhere: bool, data: st.DataObject
) -> None:
    reading = Reading()
    producer = Log(reading.faulty.store, choose_loop(), 15)
    try:
        made = Made(producer)
        assert made.sheet is not None
        pauses = iter(data.draw(st.lists(st.sampled_from([0, 0, 0.002, 0.06]), min_size=len(said), max_size=len(said))))

        def produce() -> None:
            for piece in said:
                time.sleep(next(pauses))
                made.say(Text(piece))
            made.end()

        thread = threading.Thread(target=produce)
        thread.start()
        read: list[dict[str, Any]] = []
        for cut in [*cuts, 10_000]:
            if read and read[-1]["type"] == "finish":
                break
            stream = reading.replay(made.id, len(read) - 1, log=reading.log if elsewhere else producer).stream()
            body = b""
            for piece in stream:
                body += piece
                if body.count(b"\n") >= max(cut, 1):
                    break
            stream.close()  # type: ignore[attr-defined]
            read += events_of(NDJSON, body)[: cut or 10_000]
        thread.join()
        assert [event["seq"] for event in read] == list(range(len(said) + 1))
        assert "".join(event.get("text", "") for event in read) == "".join(said)
    finally:
        producer.close()
        reading.close()


def test_an_answer_given_up_is_a_gap_for_who_comes_later_and_none_for_who_was_there(reading: Reading) -> None:
    made = Made(reading.log)
    made.say(A)
    replay = reading.replay(made.id)
    reading.faulty.fall("write")
    made.say(B)
    assert made.sheet is not None
    made.sheet.give_up()
    made.say(C)
    late = reading.replay(made.id)
    made.say(D)
    reading.faulty.rise()
    made.end()
    assert told(replay) == [(0, "a"), (1, "b"), (2, "c"), (3, "d"), WARNED, (4, "finish")]
    assert told(late)[-1][1] == "gap" if late.kept.next else True
    late.close()


def test_who_comes_during_a_fault_of_the_store_leaves_others_their_turn_and_misses_nothing(
    reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(reading.log)
    reading.faulty.fall("write")
    made.say(*[A] * 10_000)
    replay = reading.replay(made.id)
    stands, give_way = list[int](), module.give_way

    def go_on() -> None:
        """Others have their turn: the answer goes on, and ends."""
        stands.append(replay._next)
        give_way()
        if len(stands) < 10:
            made.say(B)
        elif len(stands) == 10:
            reading.faulty.rise()
            made.end()

    monkeypatch.setattr(module, "give_way", go_on)
    said = [(seq, "a") for seq in range(10_000)] + [(seq, "b") for seq in range(10_000, 10_009)]
    assert told(replay) == [*said, (10_009, "finish")]
    assert stands[-1] > 9000
    assert max(after - before for before, after in pairwise([0, *stands, 10_010])) < 1000


def test_who_reads_here_is_warned_of_a_finish_that_the_log_does_not_have(reading: Reading) -> None:
    """As the caller is: for all others it still is in progress."""
    made = Made(reading.log)
    made.say(A)
    replay = reading.replay(made.id)
    reading.faulty.fall("write")
    assert not made.end(0.05)
    late = reading.replay(made.id)
    for each in (replay, late):
        assert told(each) == [(0, "a"), WARNED, (1, "finish")]
    found = reading.store.find(made.id)
    assert found is not None and found.status == "in_progress"


def test_of_one_that_it_has_nobody_is_warned(reading: Reading) -> None:
    made = Made(reading.log)
    replay = reading.replay(made.id)
    made.say(A)
    assert made.end()
    assert told(replay) == [(0, "a"), (1, "finish")]


def test_a_failure_which_waits_for_no_log_is_told_without_a_warning(reading: Reading) -> None:
    made = Made(reading.log)
    replay = reading.replay(made.id)
    made.say(A)
    assert made.sheet is not None
    made.sheet.end(Failure("interrupted", "w", True), ending(made.entry, "failed"), 0)
    assert told(replay) == [(0, "a"), (1, "interrupted")]
