"""What every store promises of queued answers and of letters: tests beside `StoreContract`, with its fixtures.

`expire` makes every lease taken so far run out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from streamchat.attempts import Next
from streamchat.envelopes import enclose, letter_id
from streamchat.errors import BudgetExhausted, LeaseLost, TooManyStreams
from streamchat.events import Failure, Finish, Start, Text, Usage
from streamchat.letters import OFF, Letter
from streamchat.store import MOST_CLAIMS, Ending, Entry, Limits, Store

from .store_contract import NONE, NOW, batch, ending, entry, heard, record, texts, together

HOOK = "https://shop.example/hook"
OTHER_HOOK = "https://other.example/hook"
LATER = NOW + 10_000
REQUEST = '{"messages":[{"role":"user","content":"\\ud83d\\ude00 hi"}]}'


def queued(owner: str, **values: Any) -> Entry:
    return entry(owner, **({"status": "queued", "queue": "jobs", "request": REQUEST, "target": HOOK} | values))


def ended(answer: Entry, **values: Any) -> Ending:
    """With its letter."""
    return enclose(ending(answer, **values), Finish("stop", Usage(7, 3)), answer.queue, answer.target)


def posted(store: Store, owner: str, **values: Any) -> Letter:
    """The letter of an answer that was queued, claimed, begun and ended."""
    answer = queued(owner, **values)
    store.admit(answer, NONE)
    [claimed] = store.claim(owner, answer.queue, 1, id=answer.id)
    assert store.begin(owner, claimed.id)
    store.write(owner, [], [ended(claimed)])
    letter = store.outbox.find(letter_id(answer.id))
    assert letter is not None
    return letter


def again(seconds: float) -> Next:
    return Next("waiting", due=LATER + seconds)


class QueueContract:
    # the queue

    def test_a_queued_answer_belongs_to_nobody(self, store: Store, another: Store, owner: str) -> None:
        answer = queued(owner, user="ann", chat="c1")
        assert store.admit(answer, NONE) == answer.id
        found = another.find(answer.id)
        assert found is not None
        assert (found.status, found.owner, found.next, found.user) == ("queued", "", 0, "ann")

    def test_a_claimed_answer_is_as_it_was_admitted(self, store: Store, another: Store, owner: str) -> None:
        answer = queued(owner, user="ann", chat="c1", key="k", fingerprint="f", reserve=70)
        store.admit(answer, NONE)
        worker = another.take_lease()
        [claimed] = another.claim(worker, "jobs", 10)
        told = replace(claimed, created_at=answer.created_at, key="k", fingerprint="f", owner=owner)
        assert told == answer
        assert claimed.owner == worker
        assert claimed.created_at == pytest.approx(answer.created_at, abs=0.001)
        found = store.find(answer.id)
        assert found is not None
        assert (found.status, found.owner) == ("queued", worker)

    def test_a_queue_outlives_whoever_admitted_to_it(
        self, store: Store, another: Store, owner: str, expire: Callable[[], None]
    ) -> None:
        answer = queued(owner)
        store.admit(answer, NONE)
        expire()
        assert another.reap() == []
        assert [each.id for each in another.claim(another.take_lease(), "jobs", 1)] == [answer.id]

    def test_the_oldest_are_claimed_first_and_each_once(self, store: Store, another: Store, owner: str) -> None:
        answers = [queued(owner) for _ in range(5)]
        for answer in reversed(answers):
            store.admit(answer, NONE)
        first = store.claim(owner, "jobs", 2)
        rest = another.claim(owner, "jobs", 10)
        assert [each.id for each in first + rest] == [answer.id for answer in answers]
        assert store.claim(owner, "jobs", 10) == []

    def test_only_the_named_queue_is_claimed(self, store: Store, owner: str) -> None:
        answers = [queued(owner, queue=queue) for queue in ("jobs", "other jobs", "jobs2")]
        for answer in answers:
            store.admit(answer, NONE)
        assert [each.id for each in store.claim(owner, "other jobs", 10)] == [answers[1].id]

    def test_one_that_streams_is_never_claimed(self, store: Store, owner: str) -> None:
        answer = entry(owner)
        store.admit(answer, NONE)
        assert store.claim(owner, "", 10) == []
        assert store.claim(owner, "", 10, id=answer.id) == []

    def test_one_is_claimed_by_its_id_wherever_it_stands(self, store: Store, owner: str) -> None:
        answers = [queued(owner) for _ in range(3)]
        for answer in answers:
            store.admit(answer, NONE)
        assert [each.id for each in store.claim(owner, "jobs", 1, id=answers[2].id)] == [answers[2].id]
        assert store.claim(owner, "jobs", 1, id=answers[2].id) == []
        assert store.claim(owner, "jobs", 1, id="resp_unknown") == []
        assert [each.id for each in store.claim(owner, "jobs", 10)] == [answers[0].id, answers[1].id]

    def test_younger_ones_can_be_left_to_others(self, store: Store, owner: str) -> None:
        old, young = queued(owner), queued(owner)
        store.admit(young, NONE)
        store.admit(old, NONE)
        between = (old.created_at + young.created_at) / 2
        assert [each.id for each in store.claim(owner, "jobs", 10, before=between)] == [old.id]
        assert store.claim(owner, "jobs", 10, before=between) == []

    def test_a_hundred_claims_at_once_give_each_answer_once(self, store: Store, another: Store, owner: str) -> None:
        answers = [queued(owner) for _ in range(30)]
        for answer in answers:
            store.admit(answer, NONE)
        handles = [(store, another)[place % 2] for place in range(40)]
        got = together([partial(each.claim, owner, "jobs", 1) for each in handles])
        assert sorted(each.id for claimed in got for each in claimed) == [answer.id for answer in answers]

    def test_an_owner_that_is_dead_claims_nothing(self, store: Store, owner: str, expire: Callable[[], None]) -> None:
        store.admit(queued(owner), NONE)
        expire()
        with pytest.raises(LeaseLost):
            store.claim(owner, "jobs", 1)
        assert store.gauges()["queued"] == 1

    def test_a_begun_answer_is_in_progress_and_is_written_as_others(
        self, store: Store, another: Store, owner: str
    ) -> None:
        answer = queued(owner)
        store.admit(answer, NONE)
        worker = another.take_lease()
        another.claim(worker, "jobs", 1)
        assert another.begin(worker, answer.id)
        assert not another.begin(worker, answer.id)
        found = store.find(answer.id)
        assert found is not None
        assert (found.status, found.owner) == ("in_progress", worker)
        another.write(worker, [batch(answer.id, 0, Start(answer.id, "m", 1), Text("a"))], [ended(answer)])
        found = store.find(answer.id)
        assert found is not None
        assert (found.status, found.next) == ("completed", 2)

    def test_who_did_not_claim_an_answer_does_not_begin_it(
        self, store: Store, owner: str, expire: Callable[[], None]
    ) -> None:
        answer = queued(owner)
        store.admit(answer, NONE)
        assert not store.begin(owner, answer.id)
        assert not store.begin(owner, "resp_unknown")
        expire()
        with pytest.raises(LeaseLost):
            store.begin(owner, answer.id)

    def test_what_is_claimed_and_not_begun_waits_again_when_its_owner_dies(
        self, store: Store, another: Store, owner: str, expire: Callable[[], None]
    ) -> None:
        answer = queued(owner, user="ann", reserve=70)
        store.admit(answer, NONE)
        store.claim(owner, "jobs", 1)
        expire()
        assert another.reap() == []
        assert another.gauges()["queued"] == 1
        worker = another.take_lease()
        [claimed] = another.claim(worker, "jobs", 1)
        assert (claimed.id, claimed.request, claimed.reserve) == (answer.id, REQUEST, 70)
        assert another.begin(worker, answer.id)

    def test_what_is_begun_is_never_begun_again(
        self, store: Store, another: Store, owner: str, expire: Callable[[], None]
    ) -> None:
        answer = queued(owner)
        store.admit(answer, NONE)
        store.claim(owner, "jobs", 1)
        store.begin(owner, answer.id)
        expire()
        assert another.reap() == [answer.id]
        worker = another.take_lease()
        assert another.claim(worker, "jobs", 10) == []
        assert another.claim(worker, "jobs", 10, id=answer.id) == []
        found = another.find(answer.id)
        assert found is not None
        assert (found.status, found.error) == ("failed", "interrupted")

    def test_what_ends_every_process_that_claims_it_is_given_up(self, store: Store, another: Store, owner: str) -> None:
        answer = queued(owner)
        store.admit(answer, NONE)
        for _ in range(MOST_CLAIMS):
            assert another.reap() == []
            worker = store.take_lease()
            assert len(store.claim(worker, "jobs", 1)) == 1
            store.give_up(worker)
        assert another.reap() == [answer.id]
        found = another.find(answer.id)
        assert found is not None
        assert (found.status, found.error) == ("failed", "interrupted")

    @pytest.mark.parametrize(
        "limits",
        [Limits(streams=1), Limits(streams_per_user=1), Limits(tokens_per_day=100)],
        ids=["all", "user", "day"],
    )
    def test_what_a_dead_worker_had_claimed_holds_its_place_until_it_waits_again_and_then(
        self, store: Store, another: Store, owner: str, limits: Limits
    ) -> None:
        worker = another.take_lease()
        store.admit(queued(owner, user="ann", reserve=80), NONE)
        assert another.claim(worker, "jobs", 1)
        another.give_up(worker)
        for _ in range(2):
            gauges = store.gauges()
            assert (gauges["live"], gauges["queued"], gauges["reserved"]) == (1, 1, 80)
            with pytest.raises((TooManyStreams, BudgetExhausted)):
                store.admit(entry(owner, user="ann", reserve=80), limits)
            store.reap()
        assert store.admit(entry(owner, user="bob", reserve=80), Limits(2, 2, 100))

    @pytest.mark.parametrize("claimed", [False, True])
    def test_a_queued_answer_that_is_cancelled_ends_at_once(
        self, store: Store, another: Store, owner: str, claimed: bool
    ) -> None:
        answer = queued(owner, user="ann", reserve=70)
        store.admit(answer, NONE)
        listener = store.listen(owner)
        listener.add(answer.id)
        if claimed:
            store.claim(owner, "jobs", 1)
        record = another.cancel(answer.id)
        assert record is not None and (record.id, record.outcome) == (answer.id, "cancelled")
        assert another.cancel(answer.id) is None
        found = store.find(answer.id)
        assert found is not None
        assert (found.status, found.error, found.next) == ("cancelled", "cancelled", 1)
        batches, _ = heard(listener, lambda batches, _: bool(batches))
        assert [(each.id, each.first, each.count) for each in batches] == [(answer.id, 0, 1)]
        listener.close()
        assert not store.begin(owner, answer.id)
        assert store.claim(owner, "jobs", 10) == []
        gauges = store.gauges()
        assert (gauges["live"], gauges["reserved"], gauges["queued"], gauges["waiting"]) == (0, 0, 0, 1)
        [spent] = store.usage(0, "user")
        assert (spent.name, spent.answers, spent.completed, spent.output_tokens) == ("ann", 1, 0, 0)

    def test_a_queued_answer_holds_its_slot_and_its_tokens(self, store: Store, another: Store, owner: str) -> None:
        store.admit(queued(owner, user="ann", reserve=70), NONE)
        with pytest.raises(TooManyStreams):
            store.admit(entry(owner, user="ann"), Limits(streams_per_user=1))
        with pytest.raises(TooManyStreams):
            another.admit(entry(owner), Limits(streams=1))
        gauges = store.gauges()
        assert (gauges["live"], gauges["queued"], gauges["reserved"]) == (1, 1, 70)

    def test_a_key_finds_the_queued_answer(self, store: Store, owner: str) -> None:
        first = queued(owner, user="ann", key="k", fingerprint="f")
        store.admit(first, NONE)
        assert store.admit(queued(owner, user="ann", key="k", fingerprint="f"), NONE) == first.id
        assert store.gauges()["queued"] == 1

    # letters

    def test_the_end_of_an_answer_brings_its_letter(self, store: Store, another: Store, owner: str) -> None:
        letter = posted(store, owner, target=HOOK)
        assert another.outbox.find(letter.id) == letter
        assert (letter.queue, letter.target, letter.state) == ("jobs", HOOK, "waiting")
        assert (letter.attempts, letter.told) == (0, "")
        assert b'"type":"response.completed"' in letter.body
        assert store.gauges()["waiting"] == 1

    def test_an_answer_without_a_target_brings_no_letter(self, store: Store, owner: str) -> None:
        answer = queued(owner, target="")
        store.admit(answer, NONE)
        store.claim(owner, "jobs", 1)
        store.begin(owner, answer.id)
        store.write(owner, [], [ended(replace(answer, target=""))])
        assert store.outbox.letters(None, 10) == []

    def test_an_end_that_is_written_twice_brings_one_letter(self, store: Store, owner: str) -> None:
        answer = queued(owner)
        store.admit(answer, NONE)
        store.claim(owner, "jobs", 1)
        store.begin(owner, answer.id)
        for _ in range(2):
            store.write(owner, [texts(answer.id, 0, 1)], [ended(answer)])
        assert len(store.outbox.letters(None, 10)) == 1

    def test_an_end_that_is_not_taken_brings_no_letter(self, store: Store, another: Store, owner: str) -> None:
        answer = queued(owner)
        store.admit(answer, NONE)
        store.claim(owner, "jobs", 1)
        store.begin(owner, answer.id)
        another.write(another.take_lease(), [], [ended(answer)])
        assert store.outbox.letters(None, 10) == []

    def test_a_producer_that_died_leaves_a_letter(
        self, store: Store, another: Store, owner: str, expire: Callable[[], None]
    ) -> None:
        answer = queued(owner)
        store.admit(answer, NONE)
        store.claim(owner, "jobs", 1)
        store.begin(owner, answer.id)
        store.write(owner, [texts(answer.id, 0, 3)], [])
        expire()
        assert another.reap() == [answer.id]
        [letter] = another.outbox.letters("waiting", 10)
        assert (letter.id, letter.answer, letter.target) == (letter_id(answer.id), answer.id, HOOK)
        assert b'"type":"response.failed"' in letter.body
        assert b'"code":"interrupted"' in letter.body

    def test_a_letter_is_taken_when_it_is_due_and_by_one_only(self, store: Store, another: Store, owner: str) -> None:
        letter = posted(store, owner)
        assert store.outbox.take(owner, "jobs", letter.due - 1, 10) == []
        assert store.outbox.take(owner, "other", LATER, 10) == []
        assert store.outbox.take(owner, "jobs", LATER, 10) == [letter]
        assert store.outbox.take(owner, "jobs", LATER, 10) == []
        assert another.outbox.take(another.take_lease(), "jobs", LATER, 10) == []

    def test_the_first_due_are_taken_first(self, store: Store, owner: str) -> None:
        letters = [posted(store, owner) for _ in range(4)]
        taken = store.outbox.take(owner, "jobs", LATER, 3)
        assert [each.id for each in taken] == [each.id for each in letters[:3]]
        assert [each.id for each in store.outbox.take(owner, "jobs", LATER, 3)] == [letters[3].id]

    def test_a_letter_that_its_holder_left_behind_is_taken_by_the_next(
        self, store: Store, another: Store, owner: str, expire: Callable[[], None]
    ) -> None:
        letter = posted(store, owner)
        store.outbox.take(owner, "jobs", LATER, 1)
        expire()
        with pytest.raises(LeaseLost):
            store.outbox.take(owner, "jobs", LATER, 1)
        another.reap()
        heir = another.take_lease()
        assert another.outbox.take(heir, "jobs", LATER, 1) == [letter]
        store.outbox.settle(owner, letter.id, Next("dead"), "late")
        found = another.outbox.find(letter.id)
        assert found is not None
        assert found.state == "waiting"
        another.outbox.settle(heir, letter.id, Next("delivered"), "204")
        found = another.outbox.find(letter.id)
        assert found is not None
        assert (found.state, found.told) == ("delivered", "204")

    def test_a_failed_attempt_is_counted_and_made_again_at_its_time(
        self, store: Store, another: Store, owner: str
    ) -> None:
        letter = posted(store, owner)
        store.outbox.take(owner, "jobs", LATER, 1)
        store.outbox.settle(owner, letter.id, again(5), "503")
        found = another.outbox.find(letter.id)
        assert found == replace(letter, attempts=1, due=LATER + 5, told="503")
        assert store.outbox.take(owner, "jobs", LATER + 4, 1) == []
        assert another.outbox.take(owner, "jobs", LATER + 5, 1) == [found]

    @pytest.mark.parametrize("state", ["delivered", "dead"])
    def test_a_letter_that_is_done_is_taken_no_more(self, store: Store, owner: str, state: Any) -> None:
        letter = posted(store, owner)
        store.outbox.take(owner, "jobs", LATER, 1)
        store.outbox.settle(owner, letter.id, Next(state), "204")
        found = store.outbox.find(letter.id)
        assert found is not None
        assert (found.state, found.attempts, found.body) == (state, 1, letter.body)
        assert store.outbox.take(owner, "jobs", LATER * 2, 10) == []
        gauges = store.gauges()
        assert (gauges["waiting"], gauges["dead"]) == (0, int(state == "dead"))

    def test_a_target_that_is_switched_off_gets_nothing_more(self, store: Store, another: Store, owner: str) -> None:
        gone, waiting, other = (posted(store, owner, target=hook) for hook in (HOOK, HOOK, OTHER_HOOK))
        store.outbox.take(owner, "jobs", LATER, 1)
        store.outbox.settle(owner, gone.id, Next("dead", switch_off=True), "410")
        later = posted(another, owner, target=HOOK)
        told = {each.id: (each.state, each.told, each.attempts) for each in another.outbox.letters(None, 10)}
        assert told == {
            gone.id: ("dead", "410", 1),
            waiting.id: ("dead", OFF, 0),
            later.id: ("dead", OFF, 0),
            other.id: ("waiting", "", 0),
        }
        assert another.outbox.take(owner, "jobs", LATER, 10) == [other]

    def test_a_letter_on_its_way_to_a_target_that_is_switched_off_stays_dead(self, store: Store, owner: str) -> None:
        first, second, third = (posted(store, owner) for _ in range(3))
        store.outbox.take(owner, "jobs", LATER, 3)
        store.outbox.settle(owner, first.id, Next("dead", switch_off=True), "410")
        store.outbox.settle(owner, second.id, again(5), "503")
        store.outbox.settle(owner, third.id, Next("delivered"), "204")
        found = {each.id: each.state for each in store.outbox.letters(None, 10)}
        assert found == {first.id: "dead", second.id: "dead", third.id: "delivered"}
        assert store.outbox.take(owner, "jobs", LATER * 2, 10) == []

    @pytest.mark.parametrize("state", ["delivered", "dead", "waiting"])
    def test_a_replayed_letter_is_new_and_has_the_same_bytes(
        self, store: Store, another: Store, owner: str, state: Any
    ) -> None:
        letter = posted(store, owner)
        store.outbox.take(owner, "jobs", LATER, 1)
        store.outbox.settle(owner, letter.id, Next(state, due=LATER + 9, switch_off=state == "dead"), "410")
        assert another.outbox.replay(letter.id, LATER + 1)
        assert store.outbox.take(owner, "jobs", LATER + 1, 10) == [replace(letter, due=LATER + 1)]
        later = posted(store, owner)
        assert later.state == "waiting"

    def test_a_letter_that_is_unknown_is_not_replayed(self, store: Store, owner: str) -> None:
        assert not store.outbox.replay("msg_unknown", LATER)
        assert store.outbox.find("msg_unknown") is None
        store.outbox.settle(owner, "msg_unknown", Next("dead"), "404")

    def test_letters_are_told_newest_first_and_by_state(self, store: Store, another: Store, owner: str) -> None:
        letters = [posted(store, owner) for _ in range(4)]
        store.outbox.take(owner, "jobs", LATER, 1)
        store.outbox.settle(owner, letters[0].id, Next("dead"), "500")
        ids = [each.id for each in letters]
        assert [each.id for each in another.outbox.letters(None, 10)] == ids[::-1]
        assert [each.id for each in another.outbox.letters(None, 2)] == ids[:1:-1]
        assert [each.id for each in another.outbox.letters("waiting", 10)] == ids[:0:-1]
        assert [each.id for each in another.outbox.letters("dead", 10)] == ids[:1]

    def test_pruning_forgets_delivered_letters_and_keeps_all_others(self, store: Store, owner: str) -> None:
        day = 86_400
        done, dead, waiting = (posted(store, owner, created_at=NOW - 3 * day + place) for place in range(3))
        young = posted(store, owner)
        store.outbox.take(owner, "jobs", LATER, 10)
        for letter, state in ((done, "delivered"), (young, "delivered"), (dead, "dead")):
            store.outbox.settle(owner, letter.id, Next(state), "")  # type: ignore[arg-type]
        store.outbox.settle(owner, waiting.id, again(5), "503")
        store.prune(2 * day, 0, 0)
        assert {each.id for each in store.outbox.letters(None, 10)} == {young.id, dead.id, waiting.id}

    def test_a_letter_carries_any_text_unharmed(self, store: Store, another: Store, owner: str) -> None:
        answer = queued(owner)
        store.admit(answer, NONE)
        store.claim(owner, "jobs", 1)
        store.begin(owner, answer.id)
        event = Failure("upstream_error", "\ud83d \0 é 😀", True)
        failed = Ending(answer.id, "failed", record(answer), error="upstream_error")
        whole = enclose(failed, event, "jobs", HOOK, "\udc00 text")
        store.write(owner, [], [whole])
        assert whole.letter is not None
        found = another.outbox.find(whole.letter.id)
        assert found is not None
        assert found.body == whole.letter.body
