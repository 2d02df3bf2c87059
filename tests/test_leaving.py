"""What becomes of a kept answer whose caller leaves: cancelled, finished, or kept for somebody who reads on."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from streamchat.answer import Answer
from streamchat.extension import follow_worker
from tests.fake_upstream import (
    FakeUpstream,
    Gate,
    Hang,
    Repeat,
    Step,
    done,
    finish,
    head,
    last_chunk,
    text,
    usage_chunk,
)
from tests.keeping import FaultyStore, expect_settled, get, get_bytes, keeping_shop, post
from tests.shop import NDJSON, SSE, TEXT, WHOLE, Shop, call, post_bytes, read_until, serve, wait_until

ANN = "X-User: ann\r\n"


class Scene:
    """Two processes on one store; callers come to the first, `told` holds what its on_finish got."""

    def __init__(self, here: Shop, there: Shop, port: int, other: int, store: FaultyStore) -> None:
        self.here, self.there, self.port, self.other, self.store = here, there, port, other, store
        self.told: list[str] = []

    def leave(self, accept: str = NDJSON) -> str:
        """A caller that reads the beginning and leaves; the answer's id."""
        sock = call(self.port, post_bytes(accept=accept, extra=ANN))
        seen = read_until(sock, b"Hel")
        sock.close()
        line = next(line for line in seen.split(b"\r\n") if line.startswith(b"X-Response-Id"))
        return line.split()[1].decode()

    def read(self, id: str, port: int) -> socket.socket:
        return call(port, get_bytes(f"/responses/{id}/stream", NDJSON))

    def object(self, id: str) -> dict[str, Any]:
        told: dict[str, Any] = get(self.there, f"/responses/{id}").get_json()
        return told

    def end(self, outcome: str, status: str, id: str, text: str) -> None:
        """There is one record, one on_finish, one final state."""
        (record,) = self.here.wait_records(1, 10)
        assert record.outcome == outcome
        self.here.expect_nothing_held()
        expect_settled(self.store)
        told = self.object(id)
        assert (told["status"], told["text"]) == (status, text)
        assert self.told == [text]
        assert len(self.here.records) == 1
        log = self.here.mounts[0].process.log
        assert log is not None
        assert not log.running


@contextlib.contextmanager
def scene(monkeypatch: pytest.MonkeyPatch, on_disconnect: Any, **options: Any) -> Iterator[Scene]:
    store, told = FaultyStore(), list[str]()
    given = {"on_disconnect": on_disconnect, "on_finish": lambda _, text: told.append(text)} | options
    with contextlib.ExitStack() as stack:
        here, there = (stack.enter_context(keeping_shop(monkeypatch, store, **given)) for _ in range(2))
        port, other = (stack.enter_context(serve(shop.app)) for shop in (here, there))
        made = Scene(here, there, port, other, store)
        made.told = told
        yield made


def gated() -> tuple[Gate, list[Step]]:
    gate = Gate()
    return gate, [head(), text("Hel"), gate, text("lo"), finish(), usage_chunk(19, 10), done(), last_chunk()]


SILENT: list[Step] = [head(), text("Hel"), Hang()]
UNSPOKEN: list[Step] = [head(), Hang()]


def test_under_cancel_an_answer_ends_with_its_caller(upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream.script = SILENT
    with scene(monkeypatch, "cancel") as made:
        id = made.leave()
        made.end("caller_left", "cancelled", id, "Hel")
        upstream.requests[0].wait_left()
        assert made.object(id)["error"]["code"] == "cancelled"
        last = json.loads(get(made.there, f"/responses/{id}/stream", Accept=NDJSON).data.splitlines()[-1])
        assert (last["type"], last["code"]) == ("error", "cancelled")


@pytest.mark.parametrize("accept", [NDJSON, SSE, TEXT])
def test_under_finish_an_answer_is_finished(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch, accept: str
) -> None:
    gate, upstream.script = gated()
    with scene(monkeypatch, "finish") as made:
        id = made.leave(accept)
        wait_until(lambda: made.here.mounts[0].process.live.hangups._watched == {}, "nobody noticed")
        assert len(made.here.mounts[0].process.live) == 1
        gate.open()
        made.end("completed", "completed", id, "Hello")


def test_readers_here_and_elsewhere_see_the_rest(upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, upstream.script = gated()
    with scene(monkeypatch, "finish") as made:
        id = made.leave()
        readers = [made.read(id, port) for port in (made.port, made.other)]
        for sock in readers:
            read_until(sock, b"Hel")
        gate.open()
        for sock in readers:
            assert b'"finish_reason":"stop"' in read_until(sock, b"0\r\n\r\n")
            sock.close()
        made.end("completed", "completed", id, "Hello")


def test_a_caller_that_stops_reading_does_not_stop_an_answer_that_shall_finish(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece = "x" * 10_000
    upstream.script = [head(), Repeat(text(piece), 1000), finish(), usage_chunk(19, 10), done(), last_chunk()]
    with scene(monkeypatch, "finish", write_timeout=1) as made:
        with call(made.port, post_bytes(accept=TEXT, extra=ANN)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            (record,) = made.here.wait_records(1, 20)
        assert record.outcome == "completed"
        made.here.expect_nothing_held()
        assert [len(text) for text in made.told] == [10_000_000]
    expect_settled(made.store)


@pytest.mark.parametrize("by", ["here", "there"])
def test_cancelling_wins_over_finish(upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    upstream.script = SILENT
    with scene(monkeypatch, "finish") as made:
        id = made.leave()
        post(getattr(made, by), f"/responses/{id}/cancel")
        made.end("cancelled", "cancelled", id, "Hel")
        upstream.requests[0].wait_left()


def test_the_end_of_a_worker_ends_those_that_outlived_their_callers(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.script = SILENT
    with scene(monkeypatch, "finish") as made:
        id = made.leave()
        follow_worker(made.here.app, lambda: True, 900, 0.1)
        made.end("draining", "failed", id, "Hel")
        assert made.object(id)["error"]["code"] == "draining"


def test_a_lost_lease_ends_an_answer_that_outlived_its_caller(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.script = SILENT
    with scene(monkeypatch, "finish", lease=0.6) as made:
        id = made.leave()
        wait_until(lambda: made.object(id)["text"] == "Hel", "it is not kept")
        made.store.lose_leases()
        made.end("interrupted", "failed", id, "Hel")
        upstream.script = [head(), text("new"), finish(), done(), last_chunk()]
        with call(made.port, post_bytes(accept=NDJSON, extra=ANN)) as sock:
            assert b'"finish"' in read_until(sock, b"0\r\n\r\n")
    expect_settled(made.store)


# --- a time to come back in


def test_nobody_comes_back_in_time(upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream.script = SILENT
    with scene(monkeypatch, 1.0) as made:
        begun = time.monotonic()
        id = made.leave()
        made.end("caller_left", "cancelled", id, "Hel")
        assert 0.9 < time.monotonic() - begun < 5
        upstream.requests[0].wait_left()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes say more often who is read there, and are believed for a shorter time."""
    monkeypatch.setattr("streamchat.lease.ATTEND", 0.2)
    monkeypatch.setattr("streamchat.sheet.REMOTE", 0.5)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("where", ["port", "other"])
def test_an_answer_that_is_read_on_goes_on(upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    gate, upstream.script = gated()
    with scene(monkeypatch, 0.5) as made:
        id = made.leave()
        with made.read(id, getattr(made, where)) as sock:
            read_until(sock, b"Hel")
            time.sleep(2.2)  # two sweeps: more than the time to come back in, and what another process may be late
            gate.open()
            assert b'"finish_reason":"stop"' in read_until(sock, b"0\r\n\r\n")
        made.end("completed", "completed", id, "Hello")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("where", ["port", "other"])
def test_an_answer_whose_last_reader_left_is_cancelled(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    upstream.script = SILENT
    with scene(monkeypatch, 0.5) as made:
        id = made.leave()
        with made.read(id, getattr(made, where)) as sock:
            read_until(sock, b"Hel")
        made.end("caller_left", "cancelled", id, "Hel")


# --- before the headers, which tell the answer's id


KEYED: dict[str, Any] = {"accept": NDJSON, "extra": f"{ANN}Idempotency-Key: k\r\n"}
CHAT: dict[str, Any] = {
    "body": b'{"id": "c1", "messages": [{"role": "user", "parts": [{"type": "text", "text": "hi"}]}]}',
    "accept": SSE,
    "extra": ANN,
    "url": "/api/chat",
}
READ_CHAT = get_bytes("/chat/c1/stream", SSE)


def slow_gated() -> tuple[Gate, list[Step]]:
    """An answer that waits before its first word."""
    gate = Gate()
    return gate, [head(), gate, text("Hello"), finish(), usage_chunk(19, 10), done(), last_chunk()]


def leave_unanswered(made: Scene, upstream: FakeUpstream, request: bytes) -> None:
    """A caller that leaves once the model has been asked: nothing has been sent to it."""
    with call(made.port, request):
        upstream.wait_for_requests(1)


def expect_alone(made: Scene) -> None:
    """The caller was seen to leave, and the answer goes on."""
    running = made.here.mounts[0].process.live._running

    def is_alone() -> bool:
        return any(isinstance(each, Answer) and each.absence.since for each in list(running))

    wait_until(is_alone, "nobody saw the caller leave")


def expect_stopped(made: Scene, upstream: FakeUpstream, text: str = "") -> None:
    upstream.requests[0].wait_left(2)
    (record,) = made.here.wait_records()
    made.end("caller_left", "cancelled", record.id, text)


@pytest.mark.parametrize(
    "asked", [{"accept": each, "extra": ANN} for each in (NDJSON, SSE, TEXT)] + [CHAT | {"extra": ""}]
)
def test_a_caller_that_left_without_an_id_is_not_waited_for(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    upstream.script = UNSPOKEN
    with scene(monkeypatch, 30.0, status_hold=30, public=not asked["extra"]) as made:
        leave_unanswered(made, upstream, post_bytes(**asked))
        expect_stopped(made, upstream)


def test_a_caller_of_a_whole_answer_has_its_id_only_with_the_end(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.script = SILENT
    with scene(monkeypatch, 30.0) as made:
        log = made.here.mounts[0].process.log
        assert log is not None
        with call(made.port, post_bytes(accept=WHOLE, extra=ANN)):
            wait_until(lambda: any(made.object(id)["text"] == "Hel" for id in list(log.running)), "it is not kept")
        expect_stopped(made, upstream, "Hel")


@pytest.mark.parametrize(("asked", "again"), [(KEYED, post_bytes(**KEYED)), (CHAT, READ_CHAT)], ids=["key", "chat"])
@pytest.mark.parametrize("where", ["port", "other"])
def test_a_caller_that_can_find_its_answer_without_an_id_finds_it_running(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], again: bytes, where: str
) -> None:
    gate, upstream.script = slow_gated()
    with scene(monkeypatch, 30.0) as made:
        leave_unanswered(made, upstream, post_bytes(**asked))
        expect_alone(made)
        with call(getattr(made, where), again) as sock:
            time.sleep(0.5)  # what is not waited for is stopped by then
            gate.open()
            assert b"Hello" in read_until(sock, b"0\r\n\r\n")
        (record,) = made.here.wait_records()
        made.end("completed", "completed", record.id, "Hello")
    assert len(upstream.requests) == 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("where", ["port", "other"])
def test_an_answer_that_others_read_by_an_id_of_the_shops_goes_on_without_its_caller(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    gate, upstream.script = slow_gated()
    with scene(monkeypatch, 30.0, status_hold=30, make_id=lambda: "resp_of_shop") as made:
        caller = call(made.port, post_bytes(accept=NDJSON, extra=ANN))
        upstream.wait_for_requests(1)
        with caller, made.read("resp_of_shop", getattr(made, where)) as reader:
            wait_until(lambda: reads_along(made, where), "nobody is seen to read")
            caller.close()
            expect_alone(made)
            time.sleep(0.5)  # what is not waited for is stopped by then
            gate.open()
            assert b"Hello" in read_until(reader, b"0\r\n\r\n")
        made.end("completed", "completed", "resp_of_shop", "Hello")


def reads_along(made: Scene, where: str) -> bool:
    log = made.here.mounts[0].process.log
    assert log is not None
    here = any(sheet.readers for sheet in log.running.values())
    return here if where == "port" else made.store.memory.unattended("resp_of_shop") < 1


def test_under_finish_an_answer_needs_nobody_who_could_find_it(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, upstream.script = slow_gated()
    with scene(monkeypatch, "finish", status_hold=30) as made:
        leave_unanswered(made, upstream, post_bytes(accept=NDJSON, extra=ANN))
        expect_alone(made)
        gate.open()
        (record,) = made.here.wait_records()
        made.end("completed", "completed", record.id, "Hello")


def without_log(made: Scene, id: str) -> None:
    """The store takes nothing, and says nothing, until the answer is given up."""
    made.store.fall("write", "unattended")
    log = made.here.mounts[0].process.log
    assert log is not None
    wait_until(lambda: log.running[id].lost, "it is not given up")


def test_a_caller_who_leaves_what_nobody_can_read_on_ends_it_at_once(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamchat.sheet.OLDEST", 0.1)
    gate = Gate()
    upstream.script = [head(), text("Hel"), gate, text("lo"), Hang()]
    with scene(monkeypatch, 60) as made:
        with call(made.port, post_bytes(accept=NDJSON, extra=ANN)) as sock:
            read_until(sock, b"Hel")
            log = made.here.mounts[0].process.log
            assert log is not None
            (id,) = log.running
            wait_until(lambda: made.store.memory.read(id, -1), "it is not kept")
            made.store.fall("write")
            gate.open()
            read_until(sock, b'"lo"')
            without_log(made, id)
        (record,) = made.here.wait_records(1, 5)
        assert record.outcome == "caller_left"
        upstream.requests[0].wait_left()
        made.store.rise()


def test_an_answer_that_is_given_up_while_it_waits_for_its_caller_waits_no_longer_than_its_time(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamchat.sheet.OLDEST", 0.1)
    gate = Gate()
    upstream.script = [head(), text("Hel"), gate, text("lo"), Hang()]
    with scene(monkeypatch, 1.0) as made:
        id = made.leave()
        made.store.fall("write", "unattended")
        gate.open()
        without_log(made, id)
        (record,) = made.here.wait_records(1, 5)
        assert record.outcome == "caller_left"
        upstream.requests[0].wait_left()
        made.store.rise()


@pytest.mark.parametrize(("policy", "end"), [("cancel", '"code":"cancelled"'), ("finish", '"finish_reason":"stop"')])
def test_who_left_and_asks_again_under_the_same_key_gets_what_became_of_the_answer(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch, policy: str, end: str
) -> None:
    gate, upstream.script = gated()
    with scene(monkeypatch, policy) as made:
        request = post_bytes(accept=NDJSON, extra=f"{ANN}Idempotency-Key: k\r\n")
        with call(made.port, request) as sock:
            read_until(sock, b"Hel")
        if policy == "cancel":
            upstream.requests[0].wait_left()
        gate.open()
        made.here.wait_records(1, 10)
        expect_settled(made.store)
        with call(made.other, request) as sock:
            told = read_until(sock, b"0\r\n\r\n")
        assert b"Idempotency-Replayed: true" in told
        assert b'"text":"Hel"' in told and end.encode() in told
    assert len(upstream.requests) == 1
