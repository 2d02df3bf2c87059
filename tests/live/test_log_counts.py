"""Counts that hold over two servers at once: one upstream call for an Idempotency-Key, never one answer too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier

import pytest

from tests.fake_upstream import Gate
from tests.live.pair import STORES, Pair, ask, pair_over, text_of, words
from tests.live.servers import wait_for

pytestmark = pytest.mark.live

DUPLICATES = 200
RACERS = 50
MOST = 3


@pytest.fixture(scope="module", params=STORES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("counts")
    with pair_over(request.param, folder, users=True, max_streams_per_user=str(MOST)) as servers:
        yield servers


@pytest.mark.parametrize("when", ["running", "ended"])
def test_two_hundred_duplicates_on_two_servers_are_one_answer(pair: Pair, when: str) -> None:
    gate, together = Gate(), Barrier(DUPLICATES)
    message = pair.model.say(f"duplicates {when}", words(0, 5), gate, words(5, 9))
    if when == "ended":
        gate.open()
        with ask(pair.first, message, "ann", Idempotency_Key=when) as caller:
            caller.rest()

    def ask_once(number: int) -> tuple[int, str, str, bool]:
        together.wait(30)
        server = (pair.first, pair.second)[number % 2]
        with ask(server, message, "ann", Idempotency_Key=when) as caller:
            if when == "running" and caller.headers.get("Idempotency-Replayed") is None:
                caller.until(5)
                gate.open()
                return caller.status, caller.id, "".join(words(0, 5)) + text_of(caller.rest()), False
            return caller.status, caller.id, text_of(caller.rest()), "Idempotency-Replayed" in caller.headers

    with ThreadPoolExecutor(DUPLICATES) as pool:
        found = list(pool.map(ask_once, range(DUPLICATES)))
    assert Counter(status for status, *_ in found) == {200: DUPLICATES}
    assert {text for _, _, text, _ in found} == {"".join(words(0, 9))}
    assert len({id for _, id, _, _ in found}) == 1
    assert sum(not replayed for *_, replayed in found) == (1 if when == "running" else 0)
    assert len(pair.model.asked(message)) == 1


def test_the_same_key_with_another_body_is_refused_by_the_other_server(pair: Pair) -> None:
    messages = [pair.model.say(f"body {number}", words(0, 2)) for number in range(2)]
    with ask(pair.first, messages[0], "ann", Idempotency_Key="mismatch") as caller:
        caller.rest()
    with ask(pair.second, messages[1], "ann", Idempotency_Key="mismatch") as refused:
        assert (refused.status, refused.whole().document["code"]) == (422, "idempotency_mismatch")
    with ask(pair.second, messages[1], "bob", Idempotency_Key="mismatch") as caller:
        assert caller.rest()[-1]["type"] == "finish"
    assert [len(pair.model.asked(message)) for message in messages] == [1, 1]


def are_over(racing: Sequence[Future[int]]) -> int:
    return sum(each.done() for each in racing)


def test_fifty_parallel_requests_on_two_servers_begin_as_many_answers_as_are_allowed(pair: Pair) -> None:
    for number in range(4):
        gate, together = Gate(), Barrier(RACERS)
        message = pair.model.say(f"race {number}", words(0, 2), gate, words(2, 3))

        def race(number: int, message: str = message, together: Barrier = together) -> int:
            together.wait(30)
            with ask((pair.first, pair.second)[number % 2], message, "ann") as caller:
                if caller.status == 200:
                    assert caller.rest()[-1]["type"] == "finish"  # not before the gate is opened
                return caller.status

        with ThreadPoolExecutor(RACERS) as pool:
            racing = [pool.submit(race, number) for number in range(RACERS)]
            wait_for(lambda racing=racing: are_over(racing) == RACERS - MOST, 20, "the refusals")  # type: ignore[misc]
            assert pair.live() == MOST
            gate.open()
        assert Counter(each.result() for each in racing) == {200: MOST, 429: RACERS - MOST}
        assert len(pair.model.asked(message)) == MOST
        pair.wait_for_none()
