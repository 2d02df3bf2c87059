"""Callers leave answers that go on: finished and read later, or ended when nobody has read on for the grace time.

Through gunicorn and nginx as shipped; a second server is where others read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.fake_upstream import Gate, Hang, Pause, Repeat, Step, done, finish, head, last_chunk, text
from tests.live.pair import Pair, ask, cancel, look, pair_over, resume, seconds_since, seqs, text_of, words
from tests.live.servers import Server, nginx, wait_for

pytestmark = pytest.mark.live

GRACE = 1.2  # seconds in which a caller may come back
SWEEP = 1.0  # it is looked once a second
MARGIN = 1.0
DRAIN = 8  # seconds that a stopping server has; answers are ended after two of them


@dataclass
class Chain:
    pair: Pair
    nginx: Server


@contextmanager
def chain(kind: str, folder: Path, on_disconnect: str) -> Iterator[Chain]:
    with ExitStack() as stack:
        settings = {"on_disconnect": on_disconnect, "status_hold": "0.2", "grace": str(DRAIN)}
        pair = stack.enter_context(pair_over(kind, folder, **settings))  # type: ignore[arg-type]
        yield Chain(pair, stack.enter_context(nginx(pair.first, folder)))


@pytest.fixture(scope="module")
def finishing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    with chain("sqlite", tmp_path_factory.mktemp("finish"), "finish") as made:
        yield made


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    with chain("redis", tmp_path_factory.mktemp("grace"), str(GRACE)) as made:
        yield made


def outcome(server: Server, id: str) -> str:
    wait_for(lambda: any(record["id"] == id for record in server.records()), what="the record")
    (record,) = [record for record in server.records() if record["id"] == id]
    return record["outcome"]


# --- finish -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [0, 5], ids=["before the first piece", "in the middle"])
def test_an_answer_whose_caller_left_is_finished_and_read_later(finishing: Chain, read: int) -> None:
    pair, gate = finishing.pair, Gate()
    message = pair.model.say(f"left after {read}", words(0, read), gate, words(read, 9))
    with ask(finishing.nginx, message) as caller:
        assert caller.headers["X-Stream-Resumable"] == "?1"
        caller.until(read)
    (asked,) = pair.model.asked(message)
    with resume(pair.second, caller.id, read) as reader:
        gate.open()
        rest = reader.rest()
    assert text_of(rest) == "".join(words(read, 9))
    asked.wait_finished()
    told = look(finishing.nginx, caller.id)
    assert (told["status"], told["text"]) == ("completed", "".join(words(0, 9)))
    with resume(finishing.nginx, caller.id) as reader:
        assert seqs(reader.rest()) == list(range(11))
    assert outcome(pair.first, caller.id) == "completed"
    assert len(pair.model.asked(message)) == 1


def test_an_answer_that_nobody_reads_is_stopped_by_its_user_from_the_other_server(finishing: Chain) -> None:
    finishing.pair.model.scripts["stopped"] = [head(), text("Hel"), Hang()]
    with ask(finishing.nginx, "stopped") as caller:
        caller.until(1)
    (asked,) = finishing.pair.model.asked("stopped")
    with pytest.raises(AssertionError, match="has not left"):
        asked.wait_left(0.5)
    began = time.monotonic()
    assert cancel(finishing.pair.second, caller.id)["status"] == "cancelled"
    assert asked.wait_left(1) - began < 1
    assert outcome(finishing.pair.first, caller.id) == "cancelled"


# --- a grace time -----------------------------------------------------------------------------------------


def test_an_answer_that_nobody_reads_on_ends_with_the_grace_time(waiting: Chain) -> None:
    waiting.pair.model.scripts["alone"] = [head(), text("Hel"), Hang()]
    with ask(waiting.nginx, "alone") as caller:
        caller.until(1)
    left = time.monotonic()
    (asked,) = waiting.pair.model.asked("alone")
    waited = asked.wait_left(GRACE + SWEEP + MARGIN) - left
    assert GRACE - 0.1 <= waited <= GRACE + SWEEP + MARGIN, waited
    # The call to the model is closed first; the end is in the log a moment later.
    wait_for(lambda: look(waiting.pair.second, caller.id)["status"] != "in_progress", MARGIN, "the answer's end")
    told = look(waiting.pair.second, caller.id)
    assert (told["status"], told["error"]["code"], told["text"]) == ("cancelled", "cancelled", "Hel")
    assert outcome(waiting.pair.first, caller.id) == "caller_left"


def test_a_caller_who_comes_back_in_time_finds_the_answer_running_until_he_leaves_too(waiting: Chain) -> None:
    """Behind nginx, where it is made, and on the other server: both at once, as most of it is waiting."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(partial(come_back, waiting), ("behind nginx", "on the other server")))


def come_back(waiting: Chain, place: str) -> None:
    pair, gate = waiting.pair, Gate()
    message = f"back {place}"
    pair.model.scripts[message] = [head(), text("Hel"), gate, text("lo"), Hang()]
    with ask(waiting.nginx, message) as caller:
        caller.until(1)
    (asked,) = pair.model.asked(message)
    time.sleep(GRACE / 2)
    with resume(waiting.nginx if place == "behind nginx" else pair.second, caller.id, 0) as reader:
        assert [event["text"] for event in reader.until(1)] == ["Hel"]
        with pytest.raises(AssertionError, match="has not left"):
            asked.wait_left(GRACE + SWEEP + MARGIN)
        gate.open()
        assert [event["text"] for event in reader.until(2)] == ["lo"]
    left = time.monotonic()
    waited = asked.wait_left(GRACE + 2 * SWEEP + MARGIN) - left
    assert waited >= GRACE - SWEEP, waited
    assert len(pair.model.asked(message)) == 1


# --- a server that stops ----------------------------------------------------------------------------------


def test_a_server_that_stops_waits_for_answers_without_a_caller(tmp_path: Path) -> None:
    """Those that end in its time are finished, the others end as `draining`; its lease ends with it."""
    with chain("redis", tmp_path, "finish") as made:
        pair, left, gate = made.pair, Gate(), Gate()
        # What is written to the caller who left takes the connection with it: from then on nobody but the log reads.
        noticed: list[Step] = [left, Repeat([Pause(0.02), text("word ")], 20)]
        pair.model.scripts["finished"] = [
            head(),
            text("Hel"),
            *noticed,
            gate,
            text("lo"),
            finish(),
            done(),
            last_chunk(),
        ]
        pair.model.scripts["unfinished"] = [head(), text("Hel"), *noticed, Hang()]
        ids = []
        for message in ("finished", "unfinished"):
            with ask(made.nginx, message) as caller:
                caller.until(1)
                ids.append(caller.id)
        left.open()
        gate.wait_reached()
        pair.first.terminate()
        began = time.monotonic()
        time.sleep(1.5)  # the worker has seen it by then, and has no connection any more
        gate.open()
        with resume(pair.second, ids[0]) as reader:
            assert reader.rest()[-1]["type"] == "finish"
        wait_for(lambda: look(pair.second, ids[1])["status"] != "in_progress", DRAIN, "the other's end")
        told = look(pair.second, ids[1])
        assert (told["status"], told["error"]["code"]) == ("failed", "draining")
        assert pair.first.process.wait(DRAIN) == 0
        assert seconds_since(began) < DRAIN
        assert look(pair.second, ids[0])["text"] == "Hel" + "word " * 20 + "lo"
        assert pair.store.gauges()["owners"] == 1  # the second server's
        assert [record["outcome"] for record in pair.first.records()] == ["completed", "draining"]
        assert pair.live() == 0
