"""Letters that are due become webhooks; what came of them stands in the outbox."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from streamchat.attempts import Reply
from streamchat.envelopes import enclose
from streamchat.events import Finish, Usage
from streamchat.letters import Letter
from streamchat.log import Log
from streamchat.loop import choose_loop
from streamchat.sender import AT_ONCE, Sender
from streamchat.settings import Settings
from streamchat.webhooks import WrongSignature, new_secret, verify

from .keeping import Block, FaultyStore
from .queue_contract import HOOK, LATER, queued
from .shop import wait_until
from .store_contract import NONE, ending

SECRETS = [new_secret(), new_secret()]


class FakeCourier:
    """Answers with the next of its replies, the last again and again."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies) or [Reply(204)]
        self.posts: list[tuple[str, dict[str, str], bytes]] = []
        self.before: Block | None = None

    def post(self, url: str, headers: dict[str, str], body: bytes) -> Reply:
        self.posts.append((url, headers, body))
        if self.before is not None:
            self.before()
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


class Clock:
    def __init__(self) -> None:
        self.now = LATER

    def __call__(self) -> float:
        return self.now


class Office:
    """A log, its letters and a sender."""

    def __init__(self, store: FaultyStore, courier: FakeCourier, **settings: Any) -> None:
        self.clock = Clock()
        self.store = store
        self.log = Log(store.store, choose_loop(), 15)
        given = Settings(webhook_secrets=tuple(SECRETS), **settings)
        self.sender = Sender(self.log, choose_loop(), given, "jobs", courier, self.clock)  # type: ignore[arg-type]

    def letter(self, **values: Any) -> Letter:
        owner = self.log.lease.held()
        asked = queued(owner, **values)
        memory = self.store.memory
        memory.admit(asked, NONE)
        memory.claim(owner, asked.queue, 1, id=asked.id)
        memory.begin(owner, asked.id)
        ended = enclose(ending(asked), Finish("stop", Usage(7, 3)), asked.queue, asked.target)
        memory.write(owner, [], [ended])
        assert ended.letter is not None
        return ended.letter

    def send(self) -> None:
        self.sender.send_due()
        wait_until(lambda: not self.sender.sending, "a letter is on its way")

    def found(self, letter: Letter) -> Letter:
        found = self.store.memory.outbox.find(letter.id)
        assert found is not None
        return found


@pytest.fixture
def courier() -> FakeCourier:
    return FakeCourier()


@pytest.fixture
def office(courier: FakeCourier) -> Iterator[Office]:
    made = Office(FaultyStore(), courier)
    yield made
    made.log.close()


def test_a_letter_is_posted_with_its_bytes_and_a_signature_of_each_secret(office: Office, courier: FakeCourier) -> None:
    letter = office.letter()
    office.send()
    [(url, headers, body)] = courier.posts
    assert (url, body, headers["webhook-id"]) == (HOOK, letter.body, letter.id)
    for secret in SECRETS:
        assert verify(body, headers, secret, now=LATER) == json.loads(letter.body)
    with pytest.raises(WrongSignature):
        verify(body, headers, new_secret(), now=LATER)
    found = office.found(letter)
    assert (found.state, found.attempts, found.told) == ("delivered", 1, "204")


def test_a_failed_attempt_is_made_again_with_the_same_bytes_and_a_new_time(
    office: Office, courier: FakeCourier
) -> None:
    courier.replies = [Reply(500), Reply(fault="timeout"), Reply(204)]
    letter = office.letter()
    told = []
    for _ in range(3):
        office.send()
        found = office.found(letter)
        told.append((found.state, found.attempts, found.told))
        office.clock.now = found.due
    assert told == [("waiting", 1, "500"), ("waiting", 2, "timeout"), ("delivered", 3, "204")]
    assert len({body for _, _, body in courier.posts}) == 1
    assert len({headers["webhook-id"] for _, headers, _ in courier.posts}) == 1
    assert len({headers["webhook-timestamp"] for _, headers, _ in courier.posts}) == 3


def test_before_its_time_nothing_is_posted(office: Office, courier: FakeCourier) -> None:
    letter = office.letter()
    office.clock.now = letter.due - 1
    office.send()
    assert courier.posts == []


def test_ten_failures_make_a_dead_letter_after_three_days(office: Office, courier: FakeCourier) -> None:
    courier.replies = [Reply(500)]
    letter = office.letter()
    first = office.clock.now
    while office.found(letter).state == "waiting":
        office.clock.now = max(office.clock.now, office.found(letter).due)
        office.send()
    assert (office.found(letter).state, len(courier.posts)) == ("dead", 10)
    assert 75 * 3600 <= office.clock.now - first <= 75.6 * 3600 * 1.2


def test_a_target_that_is_gone_gets_nothing_more(office: Office, courier: FakeCourier) -> None:
    courier.replies = [Reply(410)]
    letters = [office.letter()]
    office.send()
    letters.append(office.letter())
    office.send()
    assert [office.found(letter).state for letter in letters] == ["dead", "dead"]
    assert len(courier.posts) == 1


def test_what_the_store_did_not_hear_is_told_again(office: Office, courier: FakeCourier) -> None:
    letter = office.letter()
    faults = [1, 1]

    def twice_down() -> None:
        if faults:
            faults.pop()
            from .keeping import down

            down()

    office.store.before["settle"] = twice_down
    office.send()
    assert office.found(letter).state == "delivered"
    assert len(courier.posts) == 1


def test_a_letter_whose_lease_was_lost_is_left_to_others(office: Office, courier: FakeCourier) -> None:
    letter = office.letter()
    block = courier.before = Block()
    office.sender.send_due()
    assert block.reached.wait(5)
    office.store.lose_leases()
    office.store.fall("settle")
    office.store.memory.reap()
    office.log.lease.lose(office.log.lease.owner or "")
    block.open()
    wait_until(lambda: not office.sender.sending, "a letter is on its way")
    assert office.found(letter).state == "waiting"
    heir = office.store.memory.take_lease()
    assert [each.id for each in office.store.memory.outbox.take(heir, "jobs", LATER, 9)] == [letter.id]


def test_no_more_are_on_their_way_than_allowed(office: Office, courier: FakeCourier) -> None:
    block = courier.before = Block()
    for _ in range(AT_ONCE + 5):
        office.letter()
    office.sender.send_due()
    office.sender.send_due()
    wait_until(lambda: len(courier.posts) == AT_ONCE, "not all are begun")
    assert len(office.sender.sending) == AT_ONCE
    block.open()
    wait_until(lambda: not office.sender.sending, "a letter is on its way")
    office.send()
    assert len(courier.posts) == AT_ONCE + 5


def test_what_waits_for_a_place_is_sent_as_soon_as_there_is_one(office: Office, courier: FakeCourier) -> None:
    given = Settings(webhook_secrets=tuple(SECRETS))
    room = choose_loop().bell()
    sender = Sender(office.log, choose_loop(), given, "jobs", courier, office.clock, room.ring)  # type: ignore[arg-type]
    letters = [office.letter() for _ in range(2 * AT_ONCE + 1)]
    sender.send_due()
    while room.wait(time.monotonic() + 0.5):  # as a worker does, but without its beat
        sender.send_due()
    assert len(courier.posts) == len(letters)
    assert {office.found(letter).state for letter in letters} == {"delivered"}


def test_letters_of_other_blueprints_are_left_alone(office: Office, courier: FakeCourier) -> None:
    office.letter(queue="second")
    office.send()
    assert courier.posts == []


def test_without_a_secret_nothing_is_sent(courier: FakeCourier) -> None:
    office = Office(FaultyStore(), courier)
    try:
        letter = office.letter()
        Sender(office.log, choose_loop(), Settings(), "jobs", courier).send_due()  # type: ignore[arg-type]
        assert (courier.posts, office.found(letter).state) == ([], "waiting")
    finally:
        office.log.close()
