"""What every store promises, as one class of tests: a store's own test file subclasses it and gives the fixtures.

`store` and `another` are two handles on the same data, as two processes have them; `expire` makes every lease taken so
far run out, and may do so by waiting.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import pytest

from streamchat.bookkeeping import DAY, midnight
from streamchat.errors import BudgetExhausted, IdempotencyMismatch, LeaseLost, StreamChatError, TooManyStreams
from streamchat.events import Event, Failure, Finish, Start, Text, ToolCall, Usage
from streamchat.ledger import Record
from streamchat.store import Batch, Ending, Entry, Limits, Listener, Status, Store, pack, unpack

NONE = Limits()
EMPTY = dict.fromkeys(("live", "queued", "reserved", "owners", "answers", "bytes", "waiting", "dead"), 0)
NOW = time.time()
LEASE = 15.0  # of stores that are handed a clock
HEARD_WITHIN = 5.0  # far above the second within which a store tells; a noisy machine is no bug
_numbers = count()


def entry(owner: str, **values: Any) -> Entry:
    """An answer that nobody else has. Later ones are younger."""
    number = next(_numbers)
    given = {"id": f"resp_{number:032x}", "user": None, "model": "m", "created_at": NOW + number / 1000}
    return Entry(owner=owner, **(given | values))


def batch(id: str, first: int, *events: Event) -> Batch:
    return Batch(id, first, len(events), pack(events))


def texts(id: str, first: int, many: int) -> Batch:
    return batch(id, first, *(Text(f"{seq} ") for seq in range(first, first + many)))


def record(admitted: Entry, **values: Any) -> Record:
    given: dict[str, Any] = {
        "first_piece": 0.25,
        "duration": 1.5,
        "outcome": "completed",
        "finish_reason": "stop",
        "pieces": 2,
        "input_tokens": 7,
        "output_tokens": 3,
        "estimated": False,
        "attempts": 1,
        "upstream_status": 200,
        "upstream_request_id": "req_1",
        "upstream_code": None,
    }
    own = {"id": admitted.id, "user": admitted.user, "model": admitted.model, "started": admitted.created_at}
    return Record(**(own | given | values))


def ending(admitted: Entry, status: Status = "completed", **values: Any) -> Ending:
    told = record(admitted, **values)
    return Ending(admitted.id, status, told, told.finish_reason, Usage(told.input_tokens, told.output_tokens))


def told(batches: Sequence[Batch]) -> list[tuple[int, Event]]:
    """The events with their seqs."""
    return [(each.first + place, event) for each in batches for place, event in enumerate(unpack(each.payload))]


def heard(listener: Listener, enough: Callable[[list[Batch], list[str]], bool]) -> tuple[list[Batch], list[str]]:
    """What a listener hears until it is enough."""
    batches: list[Batch] = []
    stopped: list[str] = []
    deadline = time.monotonic() + HEARD_WITHIN
    while not enough(batches, stopped):
        assert time.monotonic() < deadline, (batches, stopped)
        more, others = listener.wait(0.5)
        batches += more
        stopped += others
    return batches, stopped


def together(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """What each returned or raised, begun at the same moment."""
    gate = threading.Barrier(len(tasks))

    def run(task: Callable[[], Any]) -> Any:
        gate.wait()
        try:
            return task()
        except StreamChatError as error:
            return error

    with ThreadPoolExecutor(len(tasks)) as pool:
        return list(pool.map(run, tasks))


def admitted_together(handles: Sequence[Store], entries: Sequence[Entry], limits: Limits) -> list[Any]:
    return together([partial(each.admit, entry, limits) for each, entry in zip(handles, entries, strict=True)])


class StoreContract:
    @pytest.fixture
    def store(self) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def another(self) -> Any:
        """A second handle, as another process has it."""
        raise NotImplementedError

    @pytest.fixture
    def expire(self) -> Any:
        raise NotImplementedError

    @pytest.fixture
    def owner(self, store: Store) -> str:
        return store.take_lease()

    # leases

    def test_an_owner_lives_from_when_it_took_its_lease(self, store: Store, another: Store) -> None:
        first, second = store.take_lease(), another.take_lease()
        store.renew(first)
        another.renew(second)
        assert first != second
        assert store.gauges()["owners"] == another.gauges()["owners"] == 2

    def test_an_owner_that_did_not_renew_is_dead_for_ever(
        self, store: Store, owner: str, expire: Callable[[], None]
    ) -> None:
        expire()
        for _ in range(2):
            with pytest.raises(LeaseLost):
                store.renew(owner)
        with pytest.raises(LeaseLost):
            store.admit(entry(owner), NONE)
        assert store.gauges()["owners"] == 0

    def test_an_owner_that_gave_up_is_dead_at_once(self, store: Store, another: Store, owner: str) -> None:
        answer = entry(owner)
        store.admit(answer, NONE)
        store.give_up(owner)
        store.give_up(owner)
        with pytest.raises(LeaseLost):
            store.renew(owner)
        assert another.reap() == [answer.id]

    def test_an_owner_that_never_was_is_dead(self, store: Store) -> None:
        store.give_up("nobody")
        with pytest.raises(LeaseLost):
            store.renew("nobody")
        with pytest.raises(LeaseLost):
            store.write("nobody", [], [])

    # admission

    def test_an_admitted_answer_is_found_from_everywhere(self, store: Store, another: Store, owner: str) -> None:
        answer = entry(owner, user="ann", chat="c1")
        assert store.admit(answer, NONE) == answer.id
        found = another.find(answer.id)
        assert found is not None
        assert (found.id, found.user, found.chat, found.model) == (answer.id, "ann", "c1", "m")
        assert (found.status, found.owner, found.next) == ("in_progress", owner, 0)
        assert found.created_at == pytest.approx(answer.created_at, abs=0.001)
        assert (found.finish_reason, found.usage, found.error) == (None, None, None)

    def test_an_answer_that_was_not_admitted_is_not_found(self, store: Store, owner: str) -> None:
        assert store.find("resp_unknown") is None
        assert store.find("\ud800 \0 é") is None
        assert store.read("resp_unknown", -1) == []
        assert store.latest("ann", "c1") is None

    def test_the_same_key_and_body_give_the_answer_that_is_there(
        self, store: Store, another: Store, owner: str
    ) -> None:
        first = entry(owner, user="ann", key="k", fingerprint="f")
        assert store.admit(first, NONE) == first.id
        assert another.admit(entry(owner, user="ann", key="k", fingerprint="f"), NONE) == first.id
        store.write(owner, [], [ending(first)])
        later = entry(owner, user="ann", key="k", fingerprint="f", created_at=first.created_at + DAY - 60)
        assert another.admit(later, NONE) == first.id
        assert store.gauges()["answers"] == 1

    def test_a_known_key_is_told_also_where_no_slot_is_free(self, store: Store, owner: str) -> None:
        first = entry(owner, user="ann", key="k", fingerprint="f")
        store.admit(first, NONE)
        again = entry(owner, user="ann", key="k", fingerprint="f", reserve=10)
        assert store.admit(again, Limits(1, 1, 1)) == first.id

    def test_the_same_key_with_another_body_is_refused(self, store: Store, owner: str) -> None:
        store.admit(entry(owner, user="ann", key="k", fingerprint="f"), NONE)
        with pytest.raises(IdempotencyMismatch):
            store.admit(entry(owner, user="ann", key="k", fingerprint="g"), NONE)
        assert store.gauges()["answers"] == 1

    def test_a_key_is_its_users_own(self, store: Store, owner: str) -> None:
        users = ["ann", "bob", None, "", "0", "None"]
        answers = [entry(owner, user=user, key="k", fingerprint="f") for user in users]
        assert [store.admit(answer, NONE) for answer in answers] == [answer.id for answer in answers]

    def test_callers_without_a_user_share_one_scope_of_keys(self, store: Store, owner: str) -> None:
        first = entry(owner, key="k", fingerprint="f")
        store.admit(first, NONE)
        assert store.admit(entry(owner, key="k", fingerprint="f"), NONE) == first.id

    def test_an_admission_that_is_refused_keeps_neither_answer_nor_key(self, store: Store, owner: str) -> None:
        store.admit(entry(owner, user="ann"), NONE)
        refused = entry(owner, user="ann", key="k", fingerprint="f")
        with pytest.raises(TooManyStreams):
            store.admit(refused, Limits(streams_per_user=1))
        assert store.find(refused.id) is None
        other = entry(owner, user="ann", key="k", fingerprint="g")
        assert store.admit(other, NONE) == other.id

    def test_two_hundred_admissions_with_one_key_at_once_are_one_answer(
        self, store: Store, another: Store, owner: str
    ) -> None:
        asked = [entry(owner, user="ann", key="k", fingerprint="f") for _ in range(200)]
        handles = [(store, another)[place % 2] for place in range(len(asked))]
        ids = admitted_together(handles, asked, NONE)
        assert len(set(ids)) == 1
        assert ids[0] in {each.id for each in asked}
        assert store.gauges()["answers"] == 1

    # limits

    def test_a_user_holds_as_many_streams_as_allowed(self, store: Store, owner: str) -> None:
        limits = Limits(streams_per_user=2)
        first = entry(owner, user="ann")
        for answer in (first, entry(owner, user="ann"), entry(owner, user="bob")):
            store.admit(answer, limits)
        with pytest.raises(TooManyStreams):
            store.admit(entry(owner, user="ann"), limits)
        store.write(owner, [], [ending(first)])
        store.admit(entry(owner, user="ann"), limits)

    def test_the_service_holds_as_many_streams_as_allowed(self, store: Store, another: Store, owner: str) -> None:
        limits = Limits(streams=2)
        store.admit(entry(owner, user="ann"), limits)
        another.admit(entry(owner), limits)
        with pytest.raises(TooManyStreams):
            store.admit(entry(owner, user="bob"), limits)

    def test_without_a_user_no_limit_of_users_holds(self, store: Store, owner: str) -> None:
        for _ in range(3):
            store.admit(entry(owner, reserve=100), Limits(streams_per_user=1, tokens_per_day=10))
        assert store.gauges()["live"] == 3

    def test_a_race_of_admissions_never_admits_one_too_many(self, store: Store, another: Store, owner: str) -> None:
        asked = [entry(owner, user="ann", reserve=10) for _ in range(40)]
        handles = [(store, another)[place % 2] for place in range(len(asked))]
        limits = Limits(streams_per_user=7, streams=9, tokens_per_day=1000)
        got = admitted_together(handles, asked, limits)
        assert sum(isinstance(each, str) for each in got) == 7
        assert {type(each) for each in got} == {str, TooManyStreams}
        assert store.gauges()["live"] == 7

    def test_a_race_for_tokens_never_spends_one_too_many(self, store: Store, another: Store, owner: str) -> None:
        asked = [entry(owner, user="ann", reserve=30) for _ in range(20)]
        handles = [(store, another)[place % 2] for place in range(len(asked))]
        limits = Limits(tokens_per_day=100)
        got = admitted_together(handles, asked, limits)
        assert sum(isinstance(each, str) for each in got) == 3
        assert {type(each) for each in got} == {str, BudgetExhausted}
        assert store.gauges()["reserved"] == 90

    def test_the_answers_of_a_dead_owner_hold_neither_slot_nor_reserve(
        self, store: Store, owner: str, expire: Callable[[], None]
    ) -> None:
        store.admit(entry(owner, user="ann", reserve=50), NONE)
        expire()
        gauges = store.gauges()
        assert (gauges["live"], gauges["reserved"], gauges["owners"]) == (0, 0, 0)
        alive = store.take_lease()
        store.admit(entry(alive, user="ann", reserve=50), Limits(1, 1, 50))

    def test_tokens_are_reserved_at_admission_and_settled_at_the_end(self, store: Store, owner: str) -> None:
        limits = Limits(tokens_per_day=100)
        first = entry(owner, user="ann", reserve=80)
        store.admit(first, limits)
        with pytest.raises(BudgetExhausted):
            store.admit(entry(owner, user="ann", reserve=30), limits)
        store.admit(entry(owner, user="bob", reserve=30), limits)
        store.write(owner, [], [ending(first, input_tokens=40, output_tokens=10)])
        assert store.gauges()["reserved"] == 30
        store.admit(entry(owner, user="ann", reserve=50), limits)
        with pytest.raises(BudgetExhausted):
            store.admit(entry(owner, user="ann", reserve=0), limits)

    def test_a_budget_begins_anew_at_midnight(self, store: Store, owner: str) -> None:
        limits = Limits(tokens_per_day=100)
        today = midnight(NOW)
        late = entry(owner, user="ann", reserve=100, created_at=today - 1)
        store.admit(late, limits)
        store.write(owner, [], [ending(late, input_tokens=90, output_tokens=10)])
        with pytest.raises(BudgetExhausted):
            store.admit(entry(owner, user="ann", reserve=1, created_at=today - 0.5), limits)
        store.admit(entry(owner, user="ann", reserve=100, created_at=today + 0.5), limits)

    # writing and reading

    def test_what_is_written_is_read_from_everywhere_in_order(self, store: Store, another: Store, owner: str) -> None:
        answer = entry(owner)
        store.admit(answer, NONE)
        opening = batch(answer.id, 0, Start(answer.id, "m", 1), Text("a"), Text("b"))
        store.write(owner, [opening], [])
        store.write(owner, [texts(answer.id, 3, 2), texts(answer.id, 5, 1)], [])
        events = told(another.read(answer.id, -1))
        assert [seq for seq, _ in events] == list(range(6))
        assert events[0] == (0, Start(answer.id, "m", 1))
        assert events[5] == (5, Text("5 "))
        found = another.find(answer.id)
        assert found is not None
        assert found.next == 6

    @pytest.mark.parametrize(("after", "firsts"), [(-1, [0, 4, 8]), (0, [0, 4, 8]), (3, [4, 8]), (8, [8]), (9, [])])
    def test_reading_after_a_seq_gives_the_batches_that_hold_more(
        self, store: Store, owner: str, after: int, firsts: list[int]
    ) -> None:
        answer = entry(owner)
        store.admit(answer, NONE)
        store.write(owner, [texts(answer.id, 0, 4), texts(answer.id, 4, 4), texts(answer.id, 8, 2)], [])
        assert [each.first for each in store.read(answer.id, after)] == firsts

    def test_many_answers_are_written_at_once_and_kept_apart(self, store: Store, owner: str) -> None:
        answers = [entry(owner) for _ in range(60)]
        for answer in answers:
            store.admit(answer, NONE)
        for first in (0, 3):
            store.write(owner, [texts(answer.id, first, 3) for answer in answers], [])
        for answer in answers:
            assert [seq for seq, _ in told(store.read(answer.id, -1))] == list(range(6))

    def test_writing_the_same_again_changes_nothing(self, store: Store, another: Store, owner: str) -> None:
        answer = entry(owner, user="ann")
        store.admit(answer, NONE)
        batches, endings = [texts(answer.id, 0, 3), batch(answer.id, 3, Finish("stop", Usage(7, 3)))], [ending(answer)]
        store.write(owner, batches[:1], [])
        for handle in (store, another):
            handle.write(owner, batches, endings)
            handle.write(owner, batches, endings)
        assert store.read(answer.id, -1) == batches
        assert [each.answers for each in store.usage(0, "user")] == [1]

    def test_a_repeated_write_may_join_old_events_with_new_ones(self, store: Store, owner: str) -> None:
        answer = entry(owner)
        store.admit(answer, NONE)
        store.write(owner, [texts(answer.id, 0, 3)], [])
        store.write(owner, [texts(answer.id, 0, 5)], [])
        store.write(owner, [texts(answer.id, 2, 2), texts(answer.id, 4, 3), texts(answer.id, 3, 5)], [])
        assert told(store.read(answer.id, -1)) == [(seq, Text(f"{seq} ")) for seq in range(8)]

    def test_a_gap_that_was_written_is_read_as_a_gap(self, store: Store, owner: str) -> None:
        answer = entry(owner)
        store.admit(answer, NONE)
        store.write(owner, [texts(answer.id, 0, 2)], [])
        store.write(owner, [texts(answer.id, 5, 1)], [])
        assert [seq for seq, _ in told(store.read(answer.id, -1))] == [0, 1, 5]

    def test_any_text_comes_back_as_it_was(self, store: Store, owner: str) -> None:
        answer = entry(owner)
        store.admit(answer, NONE)
        odd: list[Event] = [Text("\0 \ud83d"), Text("\ude00 é\n\u2028"), Text(""), Failure("gap", "\x7f", True)]
        store.write(owner, [batch(answer.id, 0, *odd)], [])
        assert [event for _, event in told(store.read(answer.id, -1))] == odd

    def test_the_end_is_one_with_the_last_events_and_the_record(self, store: Store, another: Store, owner: str) -> None:
        answer = entry(owner, user="ann", reserve=50)
        store.admit(answer, NONE)
        finish = Finish("stop", Usage(7, 3))
        store.write(owner, [texts(answer.id, 0, 2), batch(answer.id, 2, finish)], [ending(answer)])
        found = another.find(answer.id)
        assert found is not None
        assert (found.status, found.finish_reason, found.usage, found.next) == ("completed", "stop", Usage(7, 3), 3)
        assert told(another.read(answer.id, 1)) == [(2, finish)]
        gauges = another.gauges()
        assert (gauges["live"], gauges["reserved"], gauges["answers"]) == (0, 0, 1)
        (spent,) = another.usage(0, "user")
        assert (spent.name, spent.answers, spent.completed, spent.input_tokens, spent.output_tokens) == (
            "ann",
            1,
            1,
            7,
            3,
        )

    def test_an_end_without_usage_keeps_its_code(self, store: Store, owner: str) -> None:
        answer = entry(owner)
        store.admit(answer, NONE)
        failed = record(answer, outcome="upstream_stalled", finish_reason=None, first_piece=None, estimated=True)
        store.write(owner, [], [Ending(answer.id, "failed", failed, error="upstream_stalled")])
        found = store.find(answer.id)
        assert found is not None
        assert (found.status, found.error, found.usage, found.finish_reason) == (
            "failed",
            "upstream_stalled",
            None,
            None,
        )
        (spent,) = store.usage(0, "user")
        assert (spent.completed, spent.estimated) == (0, 1)

    def test_an_ended_answer_takes_nothing_more(self, store: Store, owner: str) -> None:
        answer = entry(owner)
        store.admit(answer, NONE)
        store.write(owner, [texts(answer.id, 0, 2)], [ending(answer)])
        store.write(owner, [texts(answer.id, 2, 2)], [ending(answer, "failed", outcome="gap", input_tokens=900)])
        found = store.find(answer.id)
        assert found is not None
        assert (found.status, found.next) == ("completed", 2)
        assert store.usage(0, "user")[0].input_tokens == 7

    def test_an_owner_writes_to_its_own_answers_only(self, store: Store, another: Store, owner: str) -> None:
        other = another.take_lease()
        mine, theirs = entry(owner), entry(other)
        store.admit(mine, NONE)
        another.admit(theirs, NONE)
        both = [texts(mine.id, 0, 1), texts(theirs.id, 0, 1), texts("resp_unknown", 0, 1)]
        store.write(owner, both, [ending(theirs), ending(mine)])
        assert another.read(theirs.id, -1) == []
        found = [store.find(each.id) for each in (mine, theirs)]
        assert [each and each.status for each in found] == ["completed", "in_progress"]
        assert store.find("resp_unknown") is None

    def test_a_dead_owner_may_neither_append_nor_finish(
        self, store: Store, owner: str, expire: Callable[[], None]
    ) -> None:
        answer = entry(owner)
        store.admit(answer, NONE)
        store.write(owner, [texts(answer.id, 0, 1)], [])
        expire()
        with pytest.raises(LeaseLost):
            store.write(owner, [texts(answer.id, 1, 1)], [])
        with pytest.raises(LeaseLost):
            store.write(owner, [], [ending(answer)])
        found = store.find(answer.id)
        assert found is not None
        assert (found.status, found.next) == ("in_progress", 1)
        assert store.usage(0, "user") == []

    def test_the_newest_answer_of_a_chat_is_its_users_own(self, store: Store, another: Store, owner: str) -> None:
        for user, chat in (("ann", "c1"), ("ann", "c2"), ("bob", "c1"), (None, "c1"), ("ann", "\ud800")):
            store.admit(entry(owner, user=user, chat=chat), NONE)
        newest = entry(owner, user="ann", chat="c1")
        store.admit(newest, NONE)
        assert another.latest("ann", "c1") == newest.id
        assert another.latest("bob", "c2") is None
        assert another.latest("", "c1") is None
        odd = another.latest("ann", "\ud800")
        found = another.find(odd or "")
        assert found is not None
        assert found.chat == "\ud800"
        assert another.latest("ann", "\\ud800") is None

    # listening

    def test_a_listener_hears_every_batch_from_when_it_was_added(
        self, store: Store, another: Store, owner: str
    ) -> None:
        heard_of, not_heard_of = entry(owner), entry(owner)
        store.admit(heard_of, NONE)
        store.admit(not_heard_of, NONE)
        listener = another.listen(another.take_lease())
        store.write(owner, [texts(heard_of.id, 0, 2)], [])
        listener.add(heard_of.id)
        written = [texts(heard_of.id, first, 3) for first in (2, 5, 8)]
        for each in written:
            store.write(owner, [each, texts(not_heard_of.id, each.first, 3)], [])
        batches, _ = heard(listener, lambda found, _: bool(found) and found[-1].last == 10)
        listener.close()
        assert {each.id for each in batches} == {heard_of.id}
        assert [each for each in batches if each.first >= 2] == written

    def test_a_listener_misses_nothing_between_adding_and_reading(
        self, store: Store, another: Store, owner: str
    ) -> None:
        answer = entry(owner)
        store.admit(answer, NONE)
        many = 60
        listener = another.listen(another.take_lease())

        def write() -> None:
            for seq in range(many):
                store.write(owner, [texts(answer.id, seq, 1)], [])

        def follow() -> list[int]:
            while not another.read(answer.id, -1):
                time.sleep(0.001)  # joins in the middle
            listener.add(answer.id)
            seqs = {seq for seq, _ in told(another.read(answer.id, -1))}
            deadline = time.monotonic() + HEARD_WITHIN
            while len(seqs) < many and time.monotonic() < deadline:
                seqs |= {seq for seq, _ in told(listener.wait(0.5)[0])}
            return sorted(seqs)

        _, seqs = together([write, follow])
        listener.close()
        assert seqs == list(range(many))

    def test_a_dropped_answer_is_not_heard(self, store: Store, another: Store, owner: str) -> None:
        dropped, kept = entry(owner), entry(owner)
        store.admit(dropped, NONE)
        store.admit(kept, NONE)
        listener = another.listen(another.take_lease())
        listener.add(dropped.id)
        listener.add(kept.id)
        listener.drop(dropped.id)
        listener.drop("resp_unknown")
        store.write(owner, [texts(dropped.id, 0, 1)], [])
        store.write(owner, [texts(kept.id, 0, 1)], [])
        batches, _ = heard(listener, lambda found, _: bool(found))
        listener.close()
        assert [each.id for each in batches] == [kept.id]

    def test_an_answer_may_be_listened_to_before_it_is_admitted(self, store: Store, another: Store, owner: str) -> None:
        answer = entry(owner)
        listener = another.listen(another.take_lease())
        listener.add(answer.id)
        store.admit(answer, NONE)
        store.write(owner, [texts(answer.id, 0, 1)], [])
        batches, _ = heard(listener, lambda found, _: bool(found))
        listener.close()
        assert batches == [texts(answer.id, 0, 1)]

    def test_a_listener_that_hears_nothing_returns_in_time(self, store: Store, owner: str) -> None:
        listener = store.listen(owner)
        began = time.monotonic()
        assert listener.wait(0.1) == ([], [])
        took = time.monotonic() - began
        listener.close()
        assert 0.09 <= took < 2.0

    def test_a_cancel_reaches_the_owner_alone_and_once(self, store: Store, another: Store, owner: str) -> None:
        other = another.take_lease()
        answer = entry(owner)
        store.admit(answer, NONE)
        mine, theirs = store.listen(owner), another.listen(other)
        assert another.cancel(answer.id) is None
        assert another.cancel(answer.id) is None
        _, stopped = heard(mine, lambda _, found: bool(found))
        assert stopped == [answer.id]
        store.write(owner, [texts(answer.id, 0, 1)], [])
        assert mine.wait(0.12) == ([], [])
        assert theirs.wait(0.12) == ([], [])
        mine.close()
        theirs.close()

    def test_a_cancel_that_came_before_the_listener_is_heard(self, store: Store, another: Store, owner: str) -> None:
        answer = entry(owner)
        store.admit(answer, NONE)
        another.cancel(answer.id)
        listener = store.listen(owner)
        _, stopped = heard(listener, lambda _, found: bool(found))
        listener.close()
        assert stopped == [answer.id]

    def test_cancelling_what_has_ended_or_never_was_does_nothing(
        self, store: Store, another: Store, owner: str
    ) -> None:
        answer = entry(owner)
        store.admit(answer, NONE)
        store.write(owner, [], [ending(answer)])
        listener = store.listen(owner)
        another.cancel(answer.id)
        another.cancel("resp_unknown")
        assert listener.wait(0.12) == ([], [])
        listener.close()
        found = store.find(answer.id)
        assert found is not None
        assert found.status == "completed"

    # attention

    def test_it_is_known_how_long_nobody_attended(self, store: Store, another: Store, owner: str) -> None:
        attended, alone = entry(owner), entry(owner)
        store.admit(attended, NONE)
        store.admit(alone, NONE)
        another.attend([attended.id, "resp_unknown"])
        another.attend([])
        assert 0 <= store.unattended(attended.id) < 5
        assert store.unattended(alone.id) == store.unattended("resp_unknown") == float("inf")

    # the dead

    def test_what_belongs_to_the_dead_is_ended_once(
        self, store: Store, another: Store, owner: str, expire: Callable[[], None]
    ) -> None:
        answer, done, empty = entry(owner, user="ann", reserve=50), entry(owner, user="bob"), entry(owner, user="cid")
        for each in (answer, done, empty):
            store.admit(each, NONE)
        store.write(owner, [texts(answer.id, 0, 3)], [ending(done)])
        expire()
        alive = another.take_lease()
        running = entry(alive)
        another.admit(running, NONE)
        assert sorted(another.reap()) == sorted([answer.id, empty.id])
        assert store.reap() == []
        found = store.find(answer.id)
        assert found is not None
        assert (found.status, found.error, found.next) == ("failed", "interrupted", 4)
        seq, event = told(store.read(answer.id, -1))[-1]
        assert seq == 3
        assert isinstance(event, Failure)
        assert (event.code, event.retryable) == ("interrupted", True)
        assert [seq for seq, _ in told(store.read(empty.id, -1))] == [0]
        gauges = store.gauges()
        assert (gauges["live"], gauges["reserved"], gauges["owners"]) == (1, 0, 1)
        sums = {each.name: each for each in store.usage(0, "user")}
        assert (sums["ann"].answers, sums["ann"].completed, sums["ann"].estimated) == (1, 0, 1)
        assert (sums["bob"].answers, sums["bob"].completed, sums["cid"].answers) == (1, 1, 1)

    def test_an_answer_that_is_retracted_was_never_there(self, store: Store, another: Store, owner: str) -> None:
        """Its admission had no reply, and nothing was asked: whoever sends the same key asks."""
        kept = entry(owner, user="ann", key="k", fingerprint="f", chat="c")
        store.admit(kept, NONE)
        retracted = [
            entry(owner, user="ann", key="again", fingerprint="f", chat="c", reserve=70),
            entry(owner, key="again", fingerprint="f", reserve=70),
        ]
        for each in retracted:
            store.admit(each, NONE)
        gone = [replace(ending(each, "failed"), retracted=True) for each in retracted]
        store.write(owner, [texts(kept.id, 0, 1)], gone)
        store.write(owner, [], gone)  # once more: its reply did not come
        assert [store.find(each.id) for each in retracted] == [None, None]
        gauges = store.gauges()
        assert (gauges["live"], gauges["reserved"], gauges["answers"]) == (1, 0, 1)
        assert store.usage(0, "user") == []
        for each in retracted:
            new = entry(owner, user=each.user, key="again", fingerprint="other")
            assert another.admit(new, Limits(streams_per_user=2)) == new.id
        assert another.admit(entry(owner, user="ann", key="k", fingerprint="f"), NONE) == kept.id

    def test_the_dead_cost_what_was_kept_of_what_they_said(
        self, store: Store, another: Store, owner: str, expire: Callable[[], None]
    ) -> None:
        answer, silent = entry(owner, user="ann"), entry(owner, user="bob")
        for each in (answer, silent):
            store.admit(each, NONE)
        start = Start(answer.id, "m" * 100, 1790000000)
        said: list[Event] = [Text("Привет, "), Text("\n\n\n\n"), ToolCall(0, "call_1", "look", '{"at": "日本"}')]
        store.write(owner, [batch(answer.id, 0, start, *said[:1]), batch(answer.id, 2, *said[1:])], [])
        store.write(owner, [batch(silent.id, 0, start)], [])
        expire()
        another.take_lease()
        another.reap()
        sums = {each.name: each.output_tokens for each in store.usage(0, "user")}
        assert sums == {"ann": -(-(8 + 4 + 12) // 4), "bob": 0}

    def test_listeners_hear_of_the_dead(
        self, store: Store, another: Store, owner: str, expire: Callable[[], None]
    ) -> None:
        answer = entry(owner)
        store.admit(answer, NONE)
        expire()
        listener = store.listen(store.take_lease())
        listener.add(answer.id)
        another.reap()
        batches, _ = heard(listener, lambda found, _: bool(found))
        listener.close()
        assert [type(event) for _, event in told(batches)] == [Failure]

    def test_two_that_reap_at_once_end_each_answer_once(
        self, store: Store, another: Store, owner: str, expire: Callable[[], None]
    ) -> None:
        answers = [entry(owner, user="ann") for _ in range(30)]
        for answer in answers:
            store.admit(answer, NONE)
            store.write(owner, [texts(answer.id, 0, 2)], [])
        expire()
        reaped = together([store.reap, another.reap, store.reap, another.reap])
        assert sorted(id for ids in reaped for id in ids) == sorted(answer.id for answer in answers)
        for answer in answers:
            assert [seq for seq, _ in told(store.read(answer.id, -1))] == [0, 1, 2]
        assert [each.answers for each in store.usage(0, "user")] == [30]

    # sums

    def test_gauges_tell_what_is_held_and_kept(self, store: Store, another: Store, owner: str) -> None:
        done, running = self.ended(store, owner, "ann", 3), entry(owner, user="ann", reserve=40)
        store.admit(running, NONE)
        batches = [texts(running.id, 0, 2), texts(running.id, 2, 5)]
        store.write(owner, batches, [])
        size = sum(len(each.payload) for each in [*store.read(done.id, -1), *batches])
        assert another.gauges() == EMPTY | {"live": 1, "reserved": 40, "owners": 1, "answers": 2, "bytes": size}

    def test_the_ledger_is_summed_by_user_model_and_day(self, store: Store, another: Store, owner: str) -> None:
        today = midnight(NOW)
        asked = [
            ("bob", "m1", today - 10, 1),
            ("ann", "m2", today + 10, 10),
            ("ann", "m1", today + 20, 100),
            (None, "m2", today + 30, 1000),
            ("", "m2", today + 30, 10000),
        ]
        for user, model, at, tokens in asked:
            answer = entry(owner, user=user, model=model, created_at=at)
            store.admit(answer, NONE)
            store.write(owner, [], [ending(answer, input_tokens=tokens, output_tokens=2, estimated=user == "bob")])
        by_user = [(each.name, each.answers, each.input_tokens, each.estimated) for each in another.usage(0, "user")]
        assert by_user == [("", 2, 11000, 0), ("ann", 2, 110, 0), ("bob", 1, 1, 1)]
        by_model = [(each.name, each.input_tokens, each.output_tokens) for each in another.usage(0, "model")]
        assert by_model == [("m1", 101, 4), ("m2", 11010, 6)]
        days = [time.strftime("%Y-%m-%d", time.gmtime(at)) for at in (today - 10, today)]
        assert [(each.name, each.answers) for each in another.usage(0, "day")] == [(days[0], 1), (days[1], 4)]
        assert [each.name for each in another.usage(today, "model")] == ["m1", "m2"]
        assert [each.name for each in another.usage(today, "user")] == ["", "ann"]
        assert another.usage(NOW + 10 * DAY, "user") == []

    # forgetting

    def ended(self, store: Store, owner: str, user: str | None, many: int) -> Entry:
        answer = entry(owner, user=user)
        store.admit(answer, NONE)
        store.write(owner, [texts(answer.id, 0, many)], [ending(answer)])
        return answer

    def test_what_ended_long_ago_is_forgotten_and_the_ledger_stays(
        self, store: Store, another: Store, owner: str
    ) -> None:
        old, running = self.ended(store, owner, "ann", 3), entry(owner, user="ann")
        store.admit(running, NONE)
        store.write(owner, [texts(running.id, 0, 3)], [])
        assert another.prune(3600, 0, 0) == 0
        deadline = time.monotonic() + HEARD_WITHIN
        while not (gone := another.prune(0.01, 0, 0)):
            assert time.monotonic() < deadline
        assert gone == 1
        assert (store.find(old.id), store.read(old.id, -1)) == (None, [])
        assert len(told(store.read(running.id, -1))) == 3
        assert [each.answers for each in store.usage(0, "user")] == [1]
        assert store.gauges()["answers"] == 1
        store.write(owner, [texts(running.id, 3, 1)], [ending(running)])
        found = store.find(running.id)
        assert found is not None
        assert found.next == 4

    def test_the_oldest_ended_answers_go_where_a_user_has_too_much(self, store: Store, owner: str) -> None:
        answers = [self.ended(store, owner, "ann", 20) for _ in range(4)]
        others = [self.ended(store, owner, user, 20) for user in ("bob", None)]
        each = store.gauges()["bytes"] // 6
        assert each > 200
        assert store.prune(3600, int(each * 2.5), 0) == 2
        assert [store.find(answer.id) is not None for answer in answers + others] == [False] * 2 + [True] * 4

    def test_the_oldest_ended_answers_go_where_all_have_too_much(self, store: Store, owner: str) -> None:
        answers = [self.ended(store, owner, user, 20) for user in ("ann", "bob", None, "ann")]
        each = store.gauges()["bytes"] // 4
        running = entry(owner)
        store.admit(running, NONE)
        assert store.prune(3600, 0, int(each * 2.5)) == 2
        assert [store.find(answer.id) is not None for answer in [*answers, running]] == [False] * 2 + [True] * 3
        assert store.prune(3600, 0, int(each * 2.5)) == 0

    def test_a_listener_goes_on_after_everything_was_forgotten(self, store: Store, another: Store, owner: str) -> None:
        listener = another.listen(another.take_lease())
        old = self.ended(store, owner, "ann", 5)
        more = entry(owner, user="ann")
        store.admit(more, NONE)
        listener.add(more.id)
        store.write(owner, [texts(more.id, 0, 1), texts(more.id, 1, 1)], [ending(more)])
        heard(listener, lambda found, _: bool(found) and found[-1].last == 1)
        listener.add(old.id)
        assert store.prune(3600, 1, 0) == 2
        new = entry(owner)
        store.admit(new, NONE)
        listener.add(new.id)
        store.write(owner, [texts(new.id, 0, 1)], [])
        batches, _ = heard(listener, lambda found, _: any(each.id == new.id for each in found))
        listener.close()
        assert [each for each in batches if each.id == new.id] == [texts(new.id, 0, 1)]

    def test_a_store_that_is_empty_has_nothing_to_count(self, store: Store) -> None:
        assert store.gauges() == EMPTY
        assert store.reap() == []
        assert store.prune(0, 1, 1) == 0
        assert store.usage(0, "day") == []

    def test_an_answer_admitted_again_by_one_who_does_not_know_is_the_same(self, store: Store, owner: str) -> None:
        answer = entry(owner)
        assert store.admit(answer, NONE) == store.admit(replace(answer), NONE) == answer.id
        assert store.gauges()["answers"] == 1


class Clock:
    """A monotonic clock that a test moves on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class ClockContract:
    """For stores that are handed a clock, and go by the entries' own times of the day."""

    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    @pytest.fixture
    def expire(self, clock: Clock) -> Callable[[], None]:
        def expire() -> None:
            clock.now += LEASE

        return expire

    def test_a_renewed_lease_lasts_from_its_renewal(self, store: Store, another: Store, clock: Clock) -> None:
        owner = store.take_lease()
        for _ in range(5):
            clock.now += LEASE * 0.9
            store.renew(owner)
        assert another.gauges()["owners"] == 1
        clock.now += LEASE
        assert another.gauges()["owners"] == 0

    def test_attention_ages(self, store: Store, another: Store, clock: Clock) -> None:
        answer = entry(store.take_lease())
        store.admit(answer, NONE)
        another.attend([answer.id])
        clock.now += 7.0
        assert store.unattended(answer.id) == 7.0
        another.attend([answer.id])
        assert store.unattended(answer.id) == 0.0

    def test_a_key_is_forgotten_after_a_day(self, store: Store) -> None:
        owner = store.take_lease()
        first = entry(owner, user="ann", key="k", fingerprint="f")
        store.admit(first, NONE)
        next_day = entry(owner, user="ann", key="k", fingerprint="g", created_at=first.created_at + DAY + 1)
        assert store.admit(next_day, NONE) == next_day.id
        later = entry(owner, user="ann", key="k", fingerprint="g", created_at=first.created_at + 2 * DAY)
        assert store.admit(later, NONE) == next_day.id

    def test_pruning_takes_the_keys_of_days_gone_by(self, store: Store) -> None:
        owner = store.take_lease()
        old = entry(owner, key="old", fingerprint="f", created_at=NOW - DAY - 10)
        new = entry(owner, key="new", fingerprint="f", created_at=NOW)
        for each in (old, new):
            store.admit(each, NONE)
        store.prune(3600, 0, 0)
        again = entry(owner, key="old", fingerprint="f", created_at=NOW - DAY - 5)
        assert store.admit(again, NONE) == again.id
        assert store.admit(entry(owner, key="new", fingerprint="f", created_at=NOW), NONE) == new.id
