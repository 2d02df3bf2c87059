"""Queued answers and letters in Redis: where it is full, hangs, forgets all, or is asked by many at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from streamchat.attempts import Next
from streamchat.envelopes import letter_id
from streamchat.errors import LeaseLost, StoreDown
from streamchat.ledger import Record
from streamchat.redis_doubts import NAMED_FOR, Doubts
from streamchat.redis_store import RedisStore
from streamchat.store import Entry, Kept, Limits

from .queue_contract import HOOK, LATER, again, ended, posted, queued
from .redis_server import RedisServer
from .store_contract import EMPTY, NONE, entry, heard

LEASE = 30.0
DONE_WITHIN = 5.0


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(kept: RedisServer) -> RedisServer:
    kept.client.flushall()
    return kept


@pytest.fixture
def store(server: RedisServer) -> Iterator[RedisStore]:
    store = RedisStore(server.url, LEASE)
    yield store
    store.close()


@pytest.fixture
def another(server: RedisServer) -> Iterator[RedisStore]:
    store = RedisStore(server.url, LEASE)
    yield store
    store.close()


@pytest.fixture
def owner(store: RedisStore) -> str:
    return store.take_lease()


@pytest.fixture
def full(server: RedisServer) -> Iterator[Callable[[], None]]:
    yield server.fill
    server.unfill()


@pytest.fixture
def hung(server: RedisServer) -> Iterator[Callable[[Callable[[], object]], None]]:
    """Asks a Redis that hangs, and has it go on: it does then what it was asked, and nobody hears of it."""

    def ask(call: Callable[[], object]) -> None:
        server.stop()
        try:
            with pytest.raises(StoreDown):
                call()
        finally:
            server.go_on()

    teach_scripts(server)
    yield ask
    server.go_on()


def teach_scripts(server: RedisServer) -> None:
    """Redis knows a script from its first use on."""
    store = RedisStore(server.url, LEASE, prefix="other:")
    owner = store.take_lease()
    store.admit(entry(owner), NONE)
    store.claim(owner, "", 1)
    store.outbox.take(owner, "", 0.0, 1)
    store.close()


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + DONE_WITHIN
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held


def found(store: RedisStore, answer: Entry) -> Kept:
    kept = store.find(answer.id)
    assert kept is not None
    return kept


def claimed(store: RedisStore, owner: str) -> Entry:
    answer = queued(owner, user="ann")
    store.admit(answer, NONE)
    [taken] = store.claim(owner, "jobs", 1, id=answer.id)
    return taken


def begun(store: RedisStore, owner: str) -> Entry:
    answer = claimed(store, owner)
    assert store.begin(owner, answer.id)
    return answer


# full


def test_a_full_redis_refuses_to_queue_to_claim_and_to_end_and_changes_nothing(
    store: RedisStore, owner: str, full: Callable[[], None]
) -> None:
    waiting, running = queued(owner, user="ann", reserve=7), begun(store, owner)
    store.admit(waiting, NONE)
    before = store.gauges()
    full()
    for call in (
        lambda: store.admit(queued(owner), Limits(9, 9, 900)),
        lambda: store.claim(owner, "jobs", 9),
        lambda: store.write(owner, [], [ended(running)]),
    ):
        with pytest.raises(StoreDown):
            call()
    assert store.gauges() == before
    assert (found(store, waiting).status, found(store, waiting).owner) == ("queued", "")
    assert store.outbox.letters(None, 9) == []


def test_what_a_full_redis_refused_can_be_repeated(store: RedisStore, server: RedisServer, owner: str) -> None:
    running, waiting = begun(store, owner), queued(owner)
    store.admit(waiting, NONE)
    server.fill()
    try:
        for call in (lambda: store.write(owner, [], [ended(running)]), lambda: store.claim(owner, "jobs", 9)):
            with pytest.raises(StoreDown):
                call()
    finally:
        server.unfill()
    store.write(owner, [], [ended(running)])
    assert [each.id for each in store.outbox.letters("waiting", 9)] == [letter_id(running.id)]
    assert [each.id for each in store.claim(owner, "jobs", 9)] == [waiting.id]


def test_a_full_redis_holds_up_nothing_that_is_on_its_way(
    store: RedisStore, another: RedisStore, owner: str, full: Callable[[], None]
) -> None:
    letters = [posted(store, owner) for _ in range(3)]
    assert store.outbox.take(owner, "jobs", LATER, 1) == letters[:1]
    mine, theirs, waiting = claimed(store, owner), claimed(another, another.take_lease()), queued(owner)
    store.admit(waiting, NONE)
    full()
    store.renew(owner)
    assert store.begin(owner, mine.id)
    another.give_up(theirs.owner)
    assert store.reap() == []
    store.cancel(waiting.id)
    store.outbox.settle(owner, letters[0].id, again(5), "503")
    taken = {each.id for each in store.outbox.take(owner, "jobs", LATER, 9)}
    assert taken == {letters[1].id, letters[2].id, letter_id(waiting.id)}
    store.outbox.settle(owner, letters[1].id, Next("delivered"), "204")
    store.outbox.settle(owner, letters[2].id, Next("dead", switch_off=True), "410")
    assert store.outbox.replay(letters[2].id, LATER)
    assert [found(store, each).status for each in (mine, theirs, waiting)] == ["in_progress", "queued", "cancelled"]
    assert found(store, theirs).owner == ""
    told = {each.id: each.state for each in store.outbox.letters(None, 9)}
    states = dict(zip([each.id for each in letters], ("dead", "delivered", "waiting"), strict=True))
    assert told == states | {letter_id(waiting.id): "dead"}


# hung


def test_a_queued_admission_whose_outcome_was_never_known_is_taken_back(
    store: RedisStore, owner: str, hung: Callable[[Callable[[], object]], None]
) -> None:
    answer = queued(owner, user="ann", chat="c", reserve=7, key="k", fingerprint="f")
    hung(lambda: store.admit(answer, NONE))
    assert eventually(lambda: store.gauges()["queued"] == 1)  # Redis did it, and nobody knows
    store.renew(owner)
    assert store.gauges() == EMPTY | {"owners": 1}
    assert store.latest("ann", "c") is None
    assert store.claim(owner, "jobs", 9) == []
    again = queued(owner, user="ann", key="k", fingerprint="f")
    assert store.admit(again, Limits(1, 1, 10)) == again.id


def test_a_queued_admission_of_an_owner_that_is_dead_is_taken_back_too(
    store: RedisStore, owner: str, hung: Callable[[Callable[[], object]], None]
) -> None:
    hung(lambda: store.admit(queued(owner), NONE))
    assert eventually(lambda: store.gauges()["queued"] == 1)
    store.give_up(owner)
    with pytest.raises(LeaseLost):
        store.renew(owner)
    assert store.gauges() == EMPTY


@pytest.mark.parametrize("begins", [False, True])
def test_a_queued_admission_that_somebody_claimed_meanwhile_is_not_taken_back(
    store: RedisStore, owner: str, hung: Callable[[Callable[[], object]], None], begins: bool
) -> None:
    answer = queued(owner)
    hung(lambda: store.admit(answer, NONE))
    assert eventually(lambda: store.gauges()["queued"] == 1)
    assert [each.id for each in store.claim(owner, "jobs", 9)] == [answer.id]
    assert not begins or store.begin(owner, answer.id)
    store.renew(owner)
    assert found(store, answer).status == ("in_progress" if begins else "queued")
    assert store.gauges()["live"] == 1


def test_a_claim_that_nobody_heard_of_is_made_again(
    store: RedisStore, owner: str, hung: Callable[[Callable[[], object]], None]
) -> None:
    mine, answer = claimed(store, owner), queued(owner, user="ann", reserve=7)
    store.admit(answer, NONE)
    hung(lambda: store.claim(owner, "jobs", 9))
    assert eventually(lambda: found(store, answer).owner == owner)
    assert [(each.id, each.reserve) for each in store.claim(owner, "jobs", 9)] == [(answer.id, 7)]
    assert store.claim(owner, "jobs", 9) == []
    assert store.begin(owner, mine.id)


def test_letters_that_nobody_heard_of_are_taken_again(
    store: RedisStore, server: RedisServer, owner: str, hung: Callable[[Callable[[], object]], None]
) -> None:
    known, letter = posted(store, owner), posted(store, owner)
    assert store.outbox.take(owner, "jobs", LATER, 1) == [known]
    hung(lambda: store.outbox.take(owner, "jobs", LATER, 9))
    assert eventually(lambda: server.client.hlen(f"streamchat:held:{owner}") == 2)
    assert store.outbox.take(owner, "jobs", LATER, 9) == [letter]
    assert store.outbox.take(owner, "jobs", LATER, 9) == []


def test_an_attempt_in_doubt_is_named_until_its_time_is_over_and_once_after() -> None:
    now = 0.0
    doubts = Doubts(StoreDown, lambda: now)
    with pytest.raises(StoreDown), doubts.attempt("one") as (lost, _):
        raise StoreDown
    seen = []
    for now in (1.0, NAMED_FOR + 1, NAMED_FOR + 2):  # noqa: B007  # the clock's
        for of in ("one", "other"):
            with doubts.attempt(of) as (_, named):
                seen.append(named)
    assert seen == [[lost], [], [lost], [], [], []]


# many at once


def test_an_answer_is_claimed_once_or_stopped_never_both(store: RedisStore, another: RedisStore, owner: str) -> None:
    answers = [queued(owner) for _ in range(60)]
    for answer in answers:
        store.admit(answer, NONE)
    workers = [(each, each.take_lease()) for each in (store, another)]

    def work(number: int) -> list[str]:
        handle, worker = workers[number % 2]
        mine = [each.id for each in handle.claim(worker, "jobs", 2)]
        return [id for id in mine if handle.begin(worker, id)]

    with ThreadPoolExecutor(8) as pool:
        stopping = [pool.submit(another.cancel, answer.id) for answer in answers[::3]]
        working = [pool.submit(work, number) for number in range(40)]
        for each in stopping:
            each.result()
        begun = [id for each in working for id in each.result()]
    assert len(begun) == len(set(begun))
    told = {answer.id: found(store, answer).status for answer in answers}
    assert {id for id, status in told.items() if status == "in_progress"} == set(begun)
    assert {id for id, status in told.items() if status == "cancelled"} == told.keys() - set(begun)
    assert len(store.outbox.letters(None, 99)) == 60 - len(begun)
    assert store.gauges()["live"] == len(begun)


def test_what_is_begun_while_it_is_cancelled_is_told_to_its_owner(
    store: RedisStore, another: RedisStore, owner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = claimed(store, owner)
    listener = store.listen(owner)
    end = another._end

    def late(*asked: object) -> Record | None:
        assert store.begin(owner, answer.id)
        return end(*asked)  # type: ignore[arg-type]

    monkeypatch.setattr(another, "_end", late)
    another.cancel(answer.id)
    assert heard(listener, lambda _, stopped: bool(stopped))[1] == [answer.id]
    assert found(store, answer).status == "in_progress"
    listener.close()


def test_many_take_each_letter_once(store: RedisStore, another: RedisStore, owner: str) -> None:
    letters = {posted(store, owner).id for _ in range(30)}
    handles = [(each, each.take_lease()) for each in (store, another)]

    def take(number: int) -> list[str]:
        handle, worker = handles[number % 2]
        return [each.id for each in handle.outbox.take(worker, "jobs", LATER, 2)]

    with ThreadPoolExecutor(8) as pool:
        taken = [id for ids in pool.map(take, range(30)) for id in ids]
    assert sorted(taken) == sorted(letters)


# what is left behind


def test_letters_of_a_dead_owner_are_taken_although_nobody_reaps(
    store: RedisStore, another: RedisStore, owner: str
) -> None:
    letter = posted(store, owner)
    store.outbox.take(owner, "jobs", LATER, 1)
    store.give_up(owner)
    assert another.outbox.take(another.take_lease(), "jobs", LATER, 1) == [letter]


def test_a_letter_that_was_replayed_while_somebody_had_it_is_not_taken_twice(
    store: RedisStore, another: RedisStore, owner: str
) -> None:
    letter, heir = posted(store, owner), another.take_lease()
    store.outbox.take(owner, "jobs", LATER, 1)
    assert another.outbox.replay(letter.id, LATER)
    assert [each.id for each in another.outbox.take(heir, "jobs", LATER, 1)] == [letter.id]
    store.give_up(owner)
    assert another.outbox.take(heir, "jobs", LATER, 1) == []


def test_a_letter_to_a_target_that_is_off_stays_dead_when_its_holder_dies(
    store: RedisStore, another: RedisStore, owner: str
) -> None:
    first, _ = posted(store, owner), posted(store, owner)
    assert len(store.outbox.take(owner, "jobs", LATER, 2)) == 2
    store.outbox.settle(owner, first.id, Next("dead", switch_off=True), "410")
    store.give_up(owner)
    assert another.outbox.take(another.take_lease(), "jobs", LATER, 9) == []
    assert another.gauges()["dead"] == 2


def test_what_redis_forgot_is_nobodys_and_all_begins_anew(store: RedisStore, server: RedisServer, owner: str) -> None:
    letter, mine = posted(store, owner), claimed(store, owner)
    store.outbox.take(owner, "jobs", LATER, 1)
    server.client.flushall()
    for call in (
        lambda: store.claim(owner, "jobs", 9),
        lambda: store.begin(owner, mine.id),
        lambda: store.outbox.take(owner, "jobs", LATER, 9),
        lambda: store.renew(owner),
    ):
        with pytest.raises(LeaseLost):
            call()
    store.outbox.settle(owner, letter.id, again(5), "503")
    store.cancel(mine.id)
    assert store.reap() == []
    assert (store.outbox.find(letter.id), store.find(mine.id), store.gauges()) == (None, None, EMPTY)
    assert posted(store, store.take_lease()).state == "waiting"


def test_a_redis_that_was_killed_still_has_the_queue_and_the_letters(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        store = RedisStore(server.url, LEASE)
        owner = store.take_lease()
        letter, answer = posted(store, owner), queued(owner)
        store.admit(answer, NONE)
        server.kill()
        for call in (lambda: store.claim(owner, "jobs", 9), lambda: store.outbox.take(owner, "jobs", LATER, 9)):
            with pytest.raises(StoreDown):
                call()
        server.start()
        assert [each.id for each in store.claim(owner, "jobs", 9)] == [answer.id]
        assert store.outbox.take(owner, "jobs", LATER, 9) == [letter]
        store.close()


def test_a_delivered_letter_goes_by_itself_and_others_stay(server: RedisServer) -> None:
    store = RedisStore(server.url, LEASE, keep=0.5)
    owner = store.take_lease()
    done, dead, waiting = (posted(store, owner, created_at=time.time() - 1.5 + place / 100) for place in range(3))
    store.outbox.take(owner, "jobs", LATER, 9)
    store.outbox.settle(owner, done.id, Next("delivered"), "204")
    store.outbox.settle(owner, dead.id, Next("dead"), "500")
    assert server.client.pttl(f"streamchat:letter:{dead.id}") == -1
    assert eventually(lambda: store.outbox.find(done.id) is None)
    assert [each.id for each in store.outbox.letters(None, 9)] == [waiting.id, dead.id]
    assert not store.outbox.replay(done.id, LATER)
    server.client.zadd("streamchat:letters:delivered", {done.id: 1.0})  # as if it had been long ago
    store.outbox.settle(owner, waiting.id, Next("delivered"), "204")
    assert server.client.zrange("streamchat:letters:delivered", 0, -1) == [waiting.id]
    store.close()


def test_a_delivered_letter_that_is_replayed_does_not_go(server: RedisServer) -> None:
    store = RedisStore(server.url, LEASE, keep=86_400.0)
    owner = store.take_lease()
    letter = posted(store, owner)
    store.outbox.take(owner, "jobs", LATER, 9)
    store.outbox.settle(owner, letter.id, Next("delivered"), "204")
    assert server.client.pttl(f"streamchat:letter:{letter.id}") > 0
    assert store.outbox.replay(letter.id, LATER)
    assert server.client.pttl(f"streamchat:letter:{letter.id}") == -1
    store.close()


def test_nothing_is_left_of_what_was_done_and_pruned(server: RedisServer, store: RedisStore, owner: str) -> None:
    old = time.time() - 1000
    letter = posted(store, owner, user="ann", created_at=old)
    store.cancel(claimed(store, owner).id)
    store.outbox.take(owner, "jobs", LATER, 9)
    for each in store.outbox.letters(None, 9):
        store.outbox.settle(owner, each.id, Next("delivered"), "204")
    store.give_up(owner)
    store.reap()

    def left() -> set[str]:
        store.prune(0.0, 0, 0)
        return {str(key).split(":")[1] for key in server.client.keys("streamchat:*")}

    assert eventually(lambda: left() == {"ledger", "days", "spent", "bytes"}), left()
    assert store.outbox.find(letter.id) is None


def test_names_of_queues_and_targets_may_be_any_text(store: RedisStore, server: RedisServer, owner: str) -> None:
    queue, target = "\ud800:\r\n jobs", f"{HOOK}\0\udfff "
    answer = queued(owner, queue=queue, target=target, request="\ud83d \0")
    store.admit(answer, NONE)
    [taken] = store.claim(owner, queue, 1)
    assert (taken.queue, taken.target, taken.request) == (queue, target, "\ud83d \0")
    store.give_up(owner)
    assert store.reap() == []
    heir = store.take_lease()
    store.claim(heir, queue, 1)
    store.begin(heir, answer.id)
    store.write(heir, [], [ended(taken)])
    [letter] = store.outbox.take(heir, queue, LATER, 1)
    assert (letter.queue, letter.target) == (queue, target)
    assert {str(key).partition(":")[0] for key in server.client.keys("*")} == {"streamchat"}
