"""The process that makes an answer is killed: readers elsewhere hear of it, the books are closed, nobody asks again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.fake_upstream import Hang, head, text
from tests.live.pair import LEASE, STORES, Pair, ask, look, pair_over, resume, seconds_since, seqs, words
from tests.live.servers import wait_for

pytestmark = pytest.mark.live

# The lease of the dead ends first, then another process looks (three times in a lease), then readers are told.
MARGIN = LEASE


@pytest.fixture(scope="module", params=STORES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("killed")
    with pair_over(request.param, folder, users=True, max_streams_per_user="1") as servers:
        yield servers


def kill_worker(pair: Pair) -> None:
    """The first server's; the master makes another one."""
    (worker,) = pair.first.workers()
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: pair.first.workers() not in ([], [worker]), what="another worker")


def begin(pair: Pair, message: str) -> None:
    pair.model.scripts[message] = [head(), *map(text, words(0, 5)), Hang()]


def test_readers_elsewhere_get_interrupted_within_the_lease_and_all_is_settled(pair: Pair) -> None:
    begin(pair, "killed")
    spent_before = sum(each.answers for each in pair.store.usage(0, "user"))
    with ask(pair.first, "killed", "ann") as caller, resume(pair.second, caller.id, user="ann") as reader:
        assert seqs(caller.until(5)) == seqs(reader.until(5))
        with ask(pair.second, "killed", "ann") as refused:
            assert (refused.status, refused.whole().document["code"]) == (429, "too_many_streams")
        began = time.monotonic()
        kill_worker(pair)
        (end,) = reader.rest()
        took = seconds_since(began)
        assert caller.rest() == []  # its own caller sees a cut, and no end
    assert (end["type"], end["code"], end["seq"], end["retryable"]) == ("error", "interrupted", 6, True)
    assert took <= LEASE + MARGIN, took

    told = look(pair.second, caller.id, "ann")
    assert (told["status"], told["error"]["code"], told["text"]) == ("failed", "interrupted", "".join(words(0, 5)))
    assert pair.live() == 0
    (spent,) = [each for each in pair.store.usage(0, "user") if each.name == "ann"]
    assert (spent.answers - spent_before, spent.completed) == (1, 0)
    assert spent.output_tokens > 0
    assert len(pair.model.asked("killed")) == 1


def test_the_slot_of_a_killed_answer_is_free_within_the_lease(pair: Pair) -> None:
    begin(pair, "slot")
    pair.model.say("after the kill", words(0, 2))
    with ask(pair.first, "slot", "bob") as caller:
        caller.until(5)
        began = time.monotonic()
        kill_worker(pair)

        def is_admitted() -> bool:
            with ask(pair.second, "after the kill", "bob") as asked:
                return asked.status == 200 and asked.rest()[-1]["type"] == "finish"

        wait_for(is_admitted, LEASE + MARGIN, "a free slot")
        assert seconds_since(began) <= LEASE + MARGIN
    assert len(pair.model.asked("slot")) == 1


def test_who_comes_later_reads_what_there_was_and_that_it_was_interrupted(pair: Pair) -> None:
    begin(pair, "later")
    with ask(pair.first, "later", "ann") as caller:
        caller.until(5)
        wait_for(lambda: look(pair.second, caller.id, "ann")["text"] == "".join(words(0, 5)), 1, "the log")
        kill_worker(pair)
        wait_for(lambda: look(pair.first, caller.id, "ann")["status"] == "failed", LEASE + MARGIN, "the end")
    for server in (pair.first, pair.second):
        with resume(server, caller.id, 2, "ann") as reader:
            told = reader.rest()
        assert seqs(told) == [3, 4, 5, 6]
        assert told[-1]["code"] == "interrupted"


def test_a_process_that_stood_still_longer_than_its_lease_writes_no_more_to_the_log(pair: Pair) -> None:
    """Others have ended its answer: what it says when it goes on does not change what they told."""
    pair.model.scripts["frozen"] = [head(), *map(text, words(0, 5)), Hang()]
    (worker,) = pair.first.workers()
    with ask(pair.first, "frozen", "bob") as caller, resume(pair.second, caller.id, user="bob") as reader:
        reader.until(5)
        os.kill(worker, signal.SIGSTOP)
        try:
            (end,) = reader.rest()
        finally:
            os.kill(worker, signal.SIGCONT)
        told = look(pair.second, caller.id, "bob")
    assert (end["code"], told["status"]) == ("interrupted", "failed")
    wait_for(lambda: any(record["id"] == caller.id for record in pair.first.records()), what="the record")
    assert look(pair.second, caller.id, "bob") == told
    assert len(pair.model.asked("frozen")) == 1
