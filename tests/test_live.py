"""The answers of one worker: how many there may be, who is cut off by the sweep, and how they end with the worker."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from streamchat.cancellation import Cancellation
from streamchat.errors import CallerStalled, Draining, Interrupted, Overloaded
from streamchat.extension import follow_worker
from streamchat.hangup import Caller
from streamchat.live import LEASE_SPARE, RETRY_AFTER, Live
from streamchat.loop import choose_loop
from tests.fake_upstream import FakeUpstream, Gate, Hang, Repeat, Rst, done, error, finish, head, last_chunk, text
from tests.shop import (
    FORMATS,
    NDJSON,
    SSE,
    STREAMS,
    TEXT,
    Shop,
    call,
    open_shop,
    post_bytes,
    read_all,
    read_until,
    serve,
)


@pytest.fixture
def upstream(http: str, upstream: FakeUpstream) -> FakeUpstream:
    return upstream


@pytest.fixture
def live() -> Iterator[Live]:
    made = Live(choose_loop(), most=2, write_timeout=30, total_timeout=60, tidy=lambda: None)
    yield made
    made.close()


class Line(Caller):
    """A caller whose connection can be seen to end."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = False

    def hang_up(self) -> None:
        self.ended = True


class Running:
    """What the sweep needs of an answer."""

    asks = True

    def __init__(self, live: Live, *, age: float = 0, writing: float = 0, user: str | None = None) -> None:
        self.user = user
        self.ticks = 0
        self.cancellation = Cancellation()
        self.line = Line()
        self.caller: Caller = self.line
        self.started = time.monotonic() - age
        self.writing_since = time.monotonic() - writing if writing else 0.0
        self._live = live
        live.admit(self)

    def caller_stalled(self) -> None:
        self.cancellation.cancel(CallerStalled())
        self.caller.hang_up()

    def tick(self, now: float) -> None:
        self.ticks += 1

    def release(self) -> None:
        self._live.leave(self)

    @property
    def fate(self) -> tuple[type | None, bool]:
        error = self.cancellation.error
        return (type(error) if error else None), self.line.ended


UNTOUCHED = (None, False)


def test_a_full_worker_takes_no_more(live: Live) -> None:
    first, _ = Running(live), Running(live)
    with pytest.raises(Overloaded) as caught:
        Running(live)
    assert caught.value.retry_after == RETRY_AFTER
    first.release()
    first.release()
    assert len(live) == 1
    Running(live)


def test_threads_that_come_at_once_do_not_pass_the_limit(live: Live) -> None:
    live.most = 20
    barrier = threading.Barrier(40)
    refused: list[Overloaded] = []

    def enter() -> None:
        barrier.wait()
        try:
            Running(live)
        except Overloaded as full:
            refused.append(full)

    threads = [threading.Thread(target=enter) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(live), len(refused)) == (20, 20)


def test_the_sweep_leaves_alone_who_is_well(live: Live) -> None:
    quiet, writing = Running(live, age=50), Running(live, writing=29)
    live.sweep()
    assert (quiet.fate, writing.fate) == (UNTOUCHED, UNTOUCHED)


def test_the_sweep_cuts_off_who_does_not_read(live: Live) -> None:
    stuck = Running(live, writing=31)
    live.sweep()
    assert stuck.fate == (CallerStalled, True)


def test_the_sweep_takes_the_slot_of_an_answer_that_nothing_ended(live: Live) -> None:
    old = Running(live, age=60 + 30 + LEASE_SPARE + 1)
    live.sweep()
    assert old.fate == (Interrupted, False)
    assert len(live) == 0


def test_a_stopping_worker_takes_no_more_and_ends_the_rest_after_a_time(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping: list[bool] = []
    live.follow(lambda: bool(stopping), 10)
    quiet, stuck = Running(live), Running(live, writing=2)
    live.sweep()
    assert not live.draining
    stopping.append(True)
    live.sweep()
    assert (quiet.fate, stuck.fate) == (UNTOUCHED, UNTOUCHED)
    with pytest.raises(Draining):
        Running(live)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 10.5)
    live.sweep()
    assert (quiet.fate, stuck.fate) == ((Draining, False), (Draining, True))


# --- with callers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("accept", FORMATS)
def test_a_full_worker_is_a_503_at_once(accept: str, upstream: FakeUpstream) -> None:
    upstream.script = [head(), text("one"), Hang()]
    with open_shop(max_streams=1) as shop, serve(shop.app) as port:
        with call(port, post_bytes()) as sock:
            read_until(sock, b"one")
            began = time.monotonic()
            response = shop.ask(accept=accept)
            assert time.monotonic() - began < 0.5
        assert response.status_code == 503
        assert response.headers["Retry-After"] == str(RETRY_AFTER)
        document = json.loads(response.data)
        assert (document["code"], document["request_id"]) == ("overloaded", response.headers["X-Response-Id"])
        record = shop.the_record()  # none for the one that was not admitted
        assert (record.outcome, len(upstream.requests)) == ("caller_left", 1)


def test_every_ending_gives_the_slot_back(upstream: FakeUpstream) -> None:
    upstream.scripts.extend([error(500), [head(), text("a"), Rst()], [Rst()], [head(), last_chunk()]])
    with open_shop(max_streams=1) as shop:
        for accept in (SSE, NDJSON, SSE, NDJSON, TEXT, SSE):
            assert shop.ask(accept=accept).status_code != 503
        assert shop.ask("").status_code == 400
        assert len(shop.wait_records(6)) == 6
        shop.expect_nothing_held()


class Worker:
    """What gunicorn's worker tells; a worker that stops is no longer alive."""

    def __init__(self, shop: Shop, drain_seconds: float, most: int = 100) -> None:
        self.alive = True
        follow_worker(shop.app, lambda: not self.alive, most, drain_seconds)

    def stop(self, shop: Shop) -> None:
        self.alive = False
        for mount in shop.mounts:
            mount.process.live.sweep()  # sees the stop
            mount.process.live.sweep()  # and what is due then


def test_a_draining_worker_is_a_503(upstream: FakeUpstream) -> None:
    with open_shop() as shop:
        worker = Worker(shop, 60)
        assert shop.ask().status_code == 200
        worker.stop(shop)
        for accept in FORMATS:
            response = shop.ask(accept=accept)
            assert (response.status_code, json.loads(response.data)["code"]) == (503, "draining")
            assert response.headers["Retry-After"] == str(RETRY_AFTER)
        health = shop.app.test_client().get("/api/healthz")
        assert (health.status_code, health.json) == (503, {"status": "draining"})
        assert len(upstream.requests) == len(shop.records) == 1


def test_an_answer_that_ends_in_time_is_not_touched_by_the_drain(upstream: FakeUpstream) -> None:
    gate = Gate()
    upstream.script = [head(), text("one"), gate, text("two"), finish(), done(), last_chunk()]
    with open_shop() as shop, serve(shop.app) as port:
        worker = Worker(shop, 60)
        with call(port, post_bytes(accept=SSE)) as sock:
            read_until(sock, b"one")
            worker.stop(shop)
            gate.open()
            assert b'"finish"' in read_all(sock)
        assert shop.the_record().outcome == "completed"


@pytest.mark.parametrize("accept", STREAMS)
def test_an_answer_that_does_not_end_in_time_gets_the_error(accept: str, upstream: FakeUpstream) -> None:
    upstream.script = [head(), text("one"), Hang()]
    with open_shop() as shop, serve(shop.app) as port:
        worker = Worker(shop, 0)
        with call(port, post_bytes(accept=accept)) as sock:
            read_until(sock, b"one")
            worker.stop(shop)
            rest = read_all(sock)
        if accept == TEXT:
            assert rest == b"" or b"0\r\n\r\n" not in rest
        else:
            assert b'"draining"' in rest and rest.endswith(b"0\r\n\r\n")
        assert shop.the_record().outcome == "draining"
        upstream.requests[0].wait_left()


def test_a_worker_lowers_the_cap_and_never_raises_it(upstream: FakeUpstream) -> None:
    with open_shop(max_streams=5) as shop:
        Worker(shop, 1, most=9)
        assert shop.mounts[0].process.live.most == 5
        Worker(shop, 1, most=3)
        assert shop.mounts[0].process.live.most == 3


@pytest.mark.parametrize("accept", STREAMS)
def test_a_caller_that_reads_nothing_is_cut_off(accept: str, upstream: FakeUpstream) -> None:
    piece: Any = text("x" * 50_000)
    upstream.script = [head(), Repeat(piece, 1000), finish(), done(), last_chunk()]
    with open_shop(write_timeout=1, coalesce_ms=0) as shop, serve(shop.app) as port:
        with call(port, post_bytes(accept=accept)):
            began = time.monotonic()
            (record,) = shop.wait_records(timeout=10)
            assert 0.9 < time.monotonic() - began < 1 + 2.5
        assert record.outcome == "caller_stalled"
        upstream.requests[0].wait_left()
        shop.expect_nothing_held()


def test_a_cap_that_is_full_leaves_the_events_of_others_alone(upstream: FakeUpstream) -> None:
    gate = Gate()
    upstream.script = [head(), text("one"), gate, finish(), done(), last_chunk()]
    with open_shop(max_streams=1) as shop, serve(shop.app) as port:
        with call(port, post_bytes(accept=NDJSON)) as sock:
            body = read_until(sock, b"one")
            for _ in range(5):
                assert shop.ask().status_code == 503
            gate.open()
            body += read_all(sock)
        assert [body.count(b'"seq":%d' % seq) for seq in range(4)] == [1, 1, 1, 0]
        shop.the_record()


def test_the_streams_of_all_are_counted_while_the_collector_ends_some() -> None:
    live = Live(choose_loop(), 100, 30, 60, lambda: None, most_in_all=50)
    dropped: list[Running] = []

    class Collecting(Running):
        @property
        def asks(self) -> bool:  # type: ignore[override]
            """Looked at in the middle of the count."""
            while dropped:
                live.leave(dropped.pop())
            return True

    kept: list[Running] = [Collecting(live)]
    streams = [Running(live) for _ in range(5)]
    dropped += streams
    kept.append(Running(live))
    assert (len(live), dropped) == (len(kept), [])
    live.close()
