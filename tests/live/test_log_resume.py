"""An answer that one server makes is read, resumed and stopped on another one: over Redis, and over one SQLite file."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import pytest

from tests.fake_upstream import Gate, Hang, Step, answer, head, text
from tests.live.pair import (
    STORES,
    Pair,
    ask,
    cancel,
    look,
    pair_over,
    resume,
    seconds_since,
    seqs,
    text_of,
    words,
)
from tests.live.readers import JSON, NDJSON, SSE, TEXT
from tests.live.servers import wait_for

pytestmark = pytest.mark.live


@pytest.fixture(scope="module", params=STORES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pair_over(request.param, tmp_path_factory.mktemp("log"), status_hold="0.3") as servers:
        yield servers


@pytest.mark.parametrize("after", [-1, 0, 3, 5])
def test_an_answer_is_resumed_on_the_other_server_after_any_event_once_each_and_in_order(
    pair: Pair, after: int
) -> None:
    gate = Gate()
    message = pair.model.say(f"resume after {after}", words(0, 5), gate, words(5, 40))
    with ask(pair.first, message) as caller:
        begun = caller.until(5)
        with resume(pair.second, caller.id, after) as reader:
            assert reader.headers["Content-Type"] == f"{SSE}; charset=utf-8"  # before there is anything new
            read = reader.until(5) if after < 5 else []
            gate.open()
            read += reader.rest()
            told = begun + caller.rest()
    assert seqs(told) == list(range(42))
    assert read == told[after + 1 :]
    assert (read[-1]["type"], text_of(told)) == ("finish", "".join(words(0, 40)))
    assert reader.id == caller.id
    assert len(pair.model.asked(message)) == 1


def test_a_reader_may_come_before_the_log_has_the_first_piece(pair: Pair) -> None:
    gate = Gate()
    message = pair.model.say("early reader", words(0, 1), gate, words(1, 3))
    with ask(pair.first, message) as caller, resume(pair.second, caller.id) as reader:
        gate.open()
        assert reader.rest() == caller.rest()


def test_the_other_server_tells_what_there_is_of_a_running_answer_and_what_became_of_it(pair: Pair) -> None:
    gate = Gate()
    message = pair.model.say("look", words(0, 5), gate, words(5, 7))
    with ask(pair.first, message) as caller:
        caller.until(5)
        wait_for(lambda: look(pair.second, caller.id)["text"] == "".join(words(0, 5)), 1, "the running text")
        running = look(pair.second, caller.id)
        gate.open()
        finished = caller.rest()[-1]
    ended = look(pair.second, caller.id)  # at once: who has read finish reads `completed`
    assert (running["status"], running["finish_reason"], running["usage"]) == ("in_progress", None, None)
    assert (ended["status"], ended["text"], ended["error"]) == ("completed", "".join(words(0, 7)), None)
    assert ended["usage"] == finished["usage"]
    assert look(pair.first, caller.id) == ended


@pytest.mark.parametrize("accept", [SSE, NDJSON, TEXT, JSON])
def test_an_ended_answer_is_told_again_by_the_other_server_in_every_format(pair: Pair, accept: str) -> None:
    message = pair.model.say(f"ended {accept}", words(0, 7))
    with ask(pair.first, message) as caller:
        events = caller.rest()
    with resume(pair.second, caller.id, accept=accept) as reader:
        seen = reader.whole()
    assert (seen.status, seen.kind, seen.whole) == (200, accept, True)
    if accept in (SSE, NDJSON):
        assert seen.events == events
    else:
        told = seen.body.decode() if accept == TEXT else seen.document["text"]
        assert told == "".join(words(0, 7))


def test_after_the_last_event_of_an_ended_answer_there_is_nothing(pair: Pair) -> None:
    with ask(pair.first, pair.model.say("nothing more", words(0, 2))) as caller:
        last = caller.rest()[-1]["seq"]
    with resume(pair.second, caller.id, last) as reader:
        assert (reader.status, reader.whole().body) == (204, b"")


@pytest.mark.parametrize("silent", [False, True], ids=["between pieces", "before the first"])
def test_an_answer_is_stopped_from_the_other_server_within_a_second(pair: Pair, silent: bool) -> None:
    steps: list[Step] = [head(), *([] if silent else [text("Hel")]), Hang()]
    message = f"stop {silent}"
    pair.model.scripts[message] = steps
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, pair.first, message)  # a silent one has its headers after the status hold
        pair.model.fake.wait_for(lambda: bool(pair.model.asked(message)))
        request = pair.model.asked(message)[0]
        caller = asking.result()
    with caller:
        began = time.monotonic()
        stopped = cancel(pair.second, caller.id)
        took = seconds_since(began)
        left = request.wait_left(1) - began
        last = caller.rest()[-1]
    assert (stopped["status"], stopped["error"]["code"]) == ("cancelled", "cancelled")
    assert (last["type"], last["code"]) == ("error", "cancelled")
    assert left < 1.0 and took < 1.2, (left, took)
    assert cancel(pair.second, caller.id) == stopped == look(pair.first, caller.id)
    wait_for(lambda: any(record["id"] == caller.id for record in pair.first.records()), what="the record")
    (record,) = [record for record in pair.first.records() if record["id"] == caller.id]
    assert record["outcome"] == "cancelled"


def test_readers_who_are_cut_anywhere_and_come_back_on_any_server_assemble_the_same_text(pair: Pair) -> None:
    pieces = words(0, 150)
    pair.model.scripts["cuts"] = answer(pieces, pause=0.01)

    def assemble(id: str, seed: int) -> tuple[list[int], str]:
        """One reader: leaves after some events, or in the middle of them, and asks for those after the last one."""
        draw, read, told = random.Random(seed), -1, ""
        places: list[int] = []
        while True:
            with resume(draw.choice((pair.first, pair.second)), id, read) as reader:
                for _ in range(draw.randint(0, 60)):
                    event = reader.next()
                    if event is None:
                        break
                    places.append(event["seq"])
                    read, told = event["seq"], told + text_of([event])
                    if event["type"] == "finish":
                        return places, told

    with ask(pair.first, "cuts") as caller, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(partial(assemble, caller.id), range(16)))
        places = seqs(caller.rest())
    assert [told == "".join(pieces) for _, told in found] == [True] * 16
    assert all(seen == places for seen, _ in found)
    assert len(pair.model.asked("cuts")) == 1


def test_a_hundred_running_answers_are_read_on_the_other_server_each_whole_and_by_its_own_reader(pair: Pair) -> None:
    first, second = gates = Gate(), Gate()
    places = range(0, 3000, 30)  # no other answer has the same pieces

    def say(place: int) -> str:
        parts = [words(place + step, place + step + 10) for step in (0, 10, 20)]
        return pair.model.say(f"crowd {place}", parts[0], first, parts[1], second, parts[2])

    with ExitStack() as stack:
        callers = [stack.enter_context(ask(pair.first, say(place))) for place in places]
        readers = [stack.enter_context(resume(pair.second, caller.id)) for caller in callers]
        told = [reader.until(10) for reader in readers]
        for seq, gate in zip((20, 31), gates, strict=True):
            gate.open()
            told = [before + reader.until(seq) for before, reader in zip(told, readers, strict=True)]
        assert [reader.rest() for reader in readers] == [[]] * 100
    assert [seqs(events) for events in told] == [list(range(32))] * 100
    assert [text_of(events) for events in told] == ["".join(words(place, place + 30)) for place in places]


def test_two_workers_of_one_server_share_a_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pair_over("sqlite", tmp_path_factory.mktemp("workers"), "-w", "2") as pair:

        def have_both_made_some() -> bool:
            """After eight more answers, each with three readers: who is given which is the kernel's choice."""
            share_answers(pair)
            makers = set(re.findall(r"\[(\d+)\] INFO streamchat: answer {", pair.first.log))
            return makers == {str(pid) for pid in pair.first.workers()}

        wait_for(have_both_made_some, 20, "an answer of each worker")


def share_answers(pair: Pair) -> None:
    gate, told = Gate(), len(pair.first.records())
    messages = [pair.model.say(f"shared {number}", words(0, 3), gate, words(3, 6)) for number in range(8)]
    callers = [ask(pair.first, message) for message in messages]
    readers = [resume(pair.first, caller.id) for caller in callers for _ in range(3)]
    gate.open()
    assert [seqs(each.rest()) for each in callers + readers] == [list(range(8))] * 32
    for each in callers + readers:
        each.close()
    wait_for(lambda: len(pair.first.records()) == told + 8, what="the records")
