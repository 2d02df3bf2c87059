"""The routes of kept answers: object, stream after an event, cancelling, chats; from this process and others."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest

from streamchat.replay import LOOK
from tests.fake_upstream import (
    FakeUpstream,
    Gate,
    Hang,
    Rst,
    Step,
    answer,
    done,
    error,
    finish,
    head,
    last_chunk,
    text,
    usage_chunk,
)
from tests.keeping import Block, FaultyStore, ask, expect_settled, get, get_bytes, keeping_shop, post
from tests.shop import (
    NDJSON,
    SSE,
    TEXT,
    WHOLE,
    Shop,
    call,
    events_of,
    ndjson_events,
    open_shop,
    post_bytes,
    read_all,
    read_until,
    serve,
    wait_until,
)

ANN = "X-User: ann\r\n"
GONE = "/responses/resp_00000000000000000000000000000000"


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore()


@pytest.fixture
def here(upstream: FakeUpstream, store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    with keeping_shop(monkeypatch, store, on_disconnect="finish") as shop:
        yield shop
    expect_settled(store)


@pytest.fixture
def there(upstream: FakeUpstream, store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    with keeping_shop(monkeypatch, store, on_disconnect="finish") as shop:
        yield shop


def gated() -> tuple[Gate, list[Step]]:
    gate = Gate()
    return gate, [head(), text("Hel"), gate, text("lo"), finish(), usage_chunk(19, 10), done(), last_chunk()]


class Started:
    """A caller on a socket that has read the beginning of an answer."""

    def __init__(self, port: int, accept: str = NDJSON, until: bytes = b"Hel", **options: Any) -> None:
        self.sock = call(port, post_bytes(accept=accept, extra=ANN, **options))
        self.seen = read_until(self.sock, until)
        line = next(line for line in self.seen.split(b"\r\n") if line.startswith(b"X-Response-Id"))
        self.id = line.split()[1].decode()

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


# --- the object


def test_the_object_of_an_answer_that_has_ended(here: Shop, there: Shop) -> None:
    response = ask(here, accept=NDJSON)
    for shop in (here, there):
        told = get(shop, f"/responses/{response.headers['X-Response-Id']}")
        assert told.headers["X-Response-Id"] == response.headers["X-Response-Id"]
        body = told.get_json()
        assert body.pop("created_at") == pytest.approx(time.time(), abs=60)
        assert body == {
            "id": response.headers["X-Response-Id"],
            "status": "completed",
            "model": "gpt-4.1-mini",
            "text": "Hello, world!",
            "finish_reason": "stop",
            "usage": {"input_tokens": 19, "output_tokens": 10, "total_tokens": 29, "estimated": False},
            "error": None,
        }


def test_who_has_read_finish_reads_completed(upstream: FakeUpstream, here: Shop, there: Shop) -> None:
    with serve(here.app) as port:
        for _ in range(10):
            with Started(port, until=b'"finish"') as caller:
                assert get(there, f"/responses/{caller.id}").json["status"] == "completed"  # type: ignore[index]


def test_the_object_of_a_long_answer_gives_others_their_turn(
    upstream: FakeUpstream, here: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[None] = []
    monkeypatch.setattr("streamchat.reading.give_way", lambda: turns.append(None))
    upstream.script = answer(["word " * 2000] * 30)
    id = ask(here, accept=NDJSON).headers["X-Response-Id"]
    assert get(here, f"/responses/{id}").json["text"] == "word " * 60_000  # type: ignore[index]
    assert len(turns) > 1


def test_the_object_of_an_answer_that_runs(upstream: FakeUpstream, here: Shop, there: Shop) -> None:
    gate, upstream.script = gated()
    with serve(here.app) as port, Started(port) as caller:
        path = f"/responses/{caller.id}"
        wait_until(lambda: get(there, path).json["text"] == "Hel", "the text is not kept")  # type: ignore[index]
        told = get(there, path).json
        assert told is not None
        assert (told["status"], told["finish_reason"], told["usage"], told["error"]) == (
            "in_progress",
            None,
            None,
            None,
        )
        gate.open()
        read_all_chunks(caller)


@pytest.mark.parametrize(
    ("script", "status", "code", "words", "retryable"),
    [
        ([head(), text("Hel"), Rst()], "failed", "upstream_incomplete", "Hel", True),
        (error(500), "failed", "upstream_error", "", True),
        (error(400), "failed", "upstream_rejected", "", False),
        (answer(["Hel"], finish_reason="length"), "incomplete", None, "Hel", None),
        (answer(["Hel"], finish_reason="content_filter"), "incomplete", None, "Hel", None),
    ],
)
def test_the_object_of_an_answer_that_is_not_whole(
    upstream: FakeUpstream, here: Shop, script: Any, status: str, code: str | None, words: str, retryable: bool | None
) -> None:
    upstream.script = script
    response = ask(here, accept=NDJSON)
    here.the_record()
    path = f"/responses/{response.headers['X-Response-Id']}"
    wait_until(lambda: get(here, path).json["status"] != "in_progress", "it has not ended")  # type: ignore[index]
    told = get(here, path).json
    assert told is not None
    assert (told["status"], told["text"]) == (status, words)
    assert (told["error"] or {}).get("code") == code
    assert (told["error"] or {}).get("retryable") == retryable


# --- whose it is


@pytest.mark.parametrize("user", ["bob", "None", "ANN"])
def test_somebody_elses_answer_is_not_there(here: Shop, user: str) -> None:
    id = ask(here).headers["X-Response-Id"]

    def told(response: Any) -> tuple[int, dict[str, Any]]:
        return response.status_code, {name: value for name, value in response.json.items() if name != "request_id"}

    for path in ("", "/stream", "/stream?after=2"):
        other = get(here, f"/responses/{id}{path}", user)
        assert told(other) == told(get(here, GONE + path, user))
        assert (other.status_code, other.json["code"]) == (404, "not_found")  # type: ignore[index]
        assert id not in str(other.headers)
    assert told(post(here, f"/responses/{id}/cancel", user)) == told(post(here, GONE + "/cancel", user))
    assert get(here, f"/responses/{id}").status_code == 200


@pytest.mark.parametrize("path", [GONE, GONE + "/stream", GONE + "/cancel"])
def test_without_a_store_the_routes_name_the_setting(upstream: FakeUpstream, path: str) -> None:
    with open_shop() as shop:
        response = post(shop, path) if path.endswith("cancel") else get(shop, path)
        assert response.status_code == 404
        assert b"STREAMCHAT_STORE_URL" in response.data
        assert get(shop, "/chat/c1/stream").status_code == 204


# --- reading after the end


def seqs(body: bytes, accept: str = NDJSON) -> list[int]:
    return [event["seq"] for event in events_of(accept, body)]


@pytest.mark.parametrize("accept", [SSE, NDJSON])
def test_the_stream_of_an_ended_answer_is_what_its_caller_got(here: Shop, there: Shop, accept: str) -> None:
    first = ask(here, accept=accept)
    id, last = first.headers["X-Response-Id"], seqs(first.data, accept)[-1]
    for shop in (here, there):
        again = get(shop, f"/responses/{id}/stream", Accept=accept)
        assert again.data == first.data
        assert (again.headers["X-Response-Id"], again.headers["X-Stream-Resumable"]) == (id, "?1")
        for after in range(last):
            rest = get(shop, f"/responses/{id}/stream?after={after}", Accept=accept)
            assert seqs(rest.data, accept) == list(range(after + 1, last + 1))
        done_with = get(shop, f"/responses/{id}/stream?after={last}", Accept=accept)
        assert (done_with.status_code, done_with.data) == (204, b"")


def test_the_header_of_an_event_source_is_newer_than_its_address(here: Shop) -> None:
    first = ask(here, accept=SSE)
    path = f"/responses/{first.headers['X-Response-Id']}/stream?after=0"
    rest = get(here, path, **{"Accept": SSE, "Last-Event-ID": "2"})
    assert seqs(rest.data, SSE)[0] == 3


@pytest.mark.parametrize("after", ["x", "-2", "1.5", "٣", "9" * 16, " 1"])
def test_an_after_that_is_no_seq_is_refused(here: Shop, after: str) -> None:
    id = ask(here).headers["X-Response-Id"]
    assert get(here, f"/responses/{id}/stream?after={after}").status_code == 400


@pytest.mark.parametrize("headers", [{}, {"Last-Event-ID": "%d"}])
@pytest.mark.parametrize("accept", [TEXT, SSE, NDJSON, WHOLE])
def test_an_after_beyond_the_end_of_a_whole_answer_is_refused(
    here: Shop, there: Shop, accept: str, headers: dict[str, str]
) -> None:
    """No reader has so many events of it. An EventSource stops at that as it does at 204."""
    first = ask(here, accept=NDJSON)
    path, after = f"/responses/{first.headers['X-Response-Id']}/stream", seqs(first.data)[-1] + 1
    for shop in (here, there):
        given = {name: value % after for name, value in headers.items()}
        told = get(shop, path if given else f"{path}?after={after}", Accept=accept, **given)
        problem = cast(dict[str, str], told.json)
        assert (told.status_code, problem["code"]) == (400, "invalid_request")
        assert '"after"' in problem["detail"] and f" {after - 1}" in problem["detail"]


def test_text_and_one_whole_object_are_told_again_too(here: Shop, there: Shop) -> None:
    whole = ask(here, accept=WHOLE)
    path = f"/responses/{whole.headers['X-Response-Id']}/stream"
    assert get(there, path, Accept=TEXT).data == b"Hello, world!"
    for after in ("", "?after=0", "?after=2"):
        assert get(there, path + after, Accept=WHOLE).json == whole.json


@pytest.mark.parametrize("reason", ["stop", "length", "content_filter"])
def test_a_whole_answer_is_the_object_that_is_kept_of_it(upstream: FakeUpstream, here: Shop, reason: str) -> None:
    upstream.script = answer(["Hel"], finish_reason=reason)
    whole = ask(here, accept=WHOLE)
    assert get(here, f"/responses/{whole.headers['X-Response-Id']}").json == whole.json


def test_a_failed_answer_has_its_true_status_where_nothing_was_said(upstream: FakeUpstream, here: Shop) -> None:
    upstream.script = error(400)
    id = ask(here).headers["X-Response-Id"]
    here.the_record()
    expect_settled_in(here)
    for accept in (TEXT, WHOLE):
        told = get(here, f"/responses/{id}/stream", Accept=accept)
        assert (told.status_code, told.json["code"]) == (502, "upstream_rejected")  # type: ignore[index]
    (start, failure) = ndjson_events(get(here, f"/responses/{id}/stream", Accept=NDJSON).data)
    assert (start["type"], failure["type"], failure["code"]) == ("start", "error", "upstream_rejected")


def expect_settled_in(shop: Shop) -> None:
    log = shop.mounts[0].process.log
    assert log is not None
    wait_until(lambda: not log.running, "an answer has not ended in the log")


def test_text_of_a_cut_answer_ends_broken_for_every_reader(upstream: FakeUpstream, here: Shop) -> None:
    upstream.script = [head(), text("Hel"), Rst()]
    id = ask(here, accept=NDJSON).headers["X-Response-Id"]
    expect_settled_in(here)
    with serve(here.app) as port, call(port, get_bytes(f"/responses/{id}/stream", TEXT)) as sock:
        body = read_all(sock)
    assert b"Hel" in body
    assert not body.endswith(b"0\r\n\r\n")


# --- reading along


def read_all_chunks(caller: Started) -> bytes:
    rest = read_until(caller.sock, b"0\r\n\r\n")
    return caller.seen + rest


@pytest.mark.parametrize("accept", [SSE, NDJSON])
def test_readers_of_a_running_answer_get_each_event_once(
    upstream: FakeUpstream, here: Shop, there: Shop, accept: str
) -> None:
    gate, upstream.script = gated()
    with serve(here.app) as port, serve(there.app) as other, Started(port, accept) as caller:
        readers = [call(each, get_bytes(f"/responses/{caller.id}/stream", accept)) for each in (port, other)]
        seen = [read_until(sock, b"Hel") for sock in readers]
        gate.open()
        whole = [
            read_all_chunks(caller),
            *(head + read_until(sock, b"0\r\n\r\n") for head, sock in zip(seen, readers, strict=True)),
        ]
        for sock in readers:
            sock.close()
    told = [events_in(accept, body) for body in whole]
    assert told[0] == told[1] == told[2]
    assert [event["seq"] for event in told[0]] == [0, 1, 2, 3]


def events_in(accept: str, raw: bytes) -> list[dict[str, Any]]:
    lines = [line.removeprefix(b"data: ") for line in raw.split(b"\n")]
    events = [json.loads(line) for line in lines if line.startswith(b'{"type"')]
    return [event for event in events if event["type"] != "heartbeat"]


def test_a_silent_stream_opens_within_the_status_hold(upstream: FakeUpstream, here: Shop, there: Shop) -> None:
    gate, upstream.script = gated()
    with serve(here.app) as port, serve(there.app) as other, Started(port) as caller:
        with call(other, get_bytes(f"/responses/{caller.id}/stream?after=1", NDJSON)) as sock:
            begun = time.monotonic()
            read_until(sock, b'{"type":"heartbeat"}')
            assert time.monotonic() - begun < 3
            gate.open()
            assert [event["seq"] for event in events_in(NDJSON, read_until(sock, b"0\r\n\r\n"))] == [2, 3]
        read_all_chunks(caller)


def test_a_producer_that_died_is_told_as_interrupted(
    upstream: FakeUpstream, here: Shop, there: Shop, store: FaultyStore
) -> None:
    upstream.script = [head(), text("Hel"), Hang()]
    with serve(here.app) as port, serve(there.app) as other, Started(port) as caller:
        with call(other, get_bytes(f"/responses/{caller.id}/stream", NDJSON)) as sock:
            read_until(sock, b"Hel")
            store.lose_leases()
            assert store.memory.reap() == [caller.id]
            last = events_in(NDJSON, read_until(sock, b"0\r\n\r\n"))[-1]
        assert (last["code"], last["seq"], last["retryable"]) == ("interrupted", 2, True)
        told = get(there, f"/responses/{caller.id}").json
        assert told is not None
        assert (told["status"], told["text"], told["error"]["code"]) == ("failed", "Hel", "interrupted")
        post(here, f"/responses/{caller.id}/cancel")
        here.mounts[0].process.log.cancel(caller.id)  # type: ignore[union-attr]
        read_until(caller.sock, b'"error"')


def test_an_end_that_nobody_told_is_found_in_the_store(
    upstream: FakeUpstream, here: Shop, there: Shop, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamchat.replay.LOOK", 0.2)
    assert LOOK > 0.2
    gate, upstream.script = gated()
    with serve(here.app) as port, serve(there.app) as other, Started(port) as caller:
        with call(other, get_bytes(f"/responses/{caller.id}/stream", NDJSON)) as sock:
            seen = read_until(sock, b"Hel")
            for listener in list(store.memory._listeners):
                listener.drop(caller.id)
            gate.open()
            seen += read_until(sock, b"0\r\n\r\n")
        assert [event["seq"] for event in events_in(NDJSON, seen)] == [0, 1, 2, 3]
        read_all_chunks(caller)


def test_who_has_read_finish_and_comes_back_before_the_log_has_it_is_told_no_error(
    upstream: FakeUpstream, here: Shop, there: Shop, store: FaultyStore
) -> None:
    gate, upstream.script = gated()
    with serve(here.app) as port, serve(there.app) as other, Started(port) as caller:
        slow = store.before["write"] = Block()
        gate.open()
        read_until(caller.sock, b'"finish"')  # after a warning
        path = f"/responses/{caller.id}/stream?after=3"
        readers = [call(each, get_bytes(path, NDJSON)) for each in (port, other)]
        read_until(readers[1], b"heartbeat")
        store.before.clear()
        slow.open()
        bodies = [read_until(sock, b"0\r\n\r\n") for sock in readers]
        for sock in readers:
            sock.close()
    assert [events_in(NDJSON, body) for body in bodies] == [[], []]


# --- cancelling


def test_a_running_answer_is_cancelled_from_every_process(upstream: FakeUpstream, here: Shop, there: Shop) -> None:
    upstream.script = [head(), text("Hel"), Hang()]
    with serve(here.app) as port:
        for count, shop in enumerate((here, there), 1):
            with Started(port) as caller:
                begun = time.monotonic()
                told = post(shop, f"/responses/{caller.id}/cancel").json
                assert told is not None
                assert time.monotonic() - begun < 1.5
                assert (told["status"], told["text"], told["error"]["code"]) == ("cancelled", "Hel", "cancelled")
                assert b'"code":"cancelled"' in read_until(caller.sock, b"0\r\n\r\n")
                assert post(shop, f"/responses/{caller.id}/cancel").json == told
            upstream.requests[-1].wait_left()
            assert here.wait_records(count)[-1].outcome == "cancelled"


def test_an_answer_is_cancelled_where_it_is_made_though_the_store_is_away(
    upstream: FakeUpstream, here: Shop, store: FaultyStore
) -> None:
    upstream.script = [head(), text("Hel"), Hang()]
    with serve(here.app) as port, Started(port) as caller:
        store.fall()
        assert post(here, f"/responses/{caller.id}/cancel", "bob").status_code == 503
        assert not here.mounts[0].log.running[caller.id].cancellation.error
        told = post(here, f"/responses/{caller.id}/cancel")
        assert (told.status_code, told.headers["Retry-After"]) == (503, "2")
        upstream.requests[0].wait_left()
        store.rise()
    assert here.the_record().outcome == "cancelled"


def test_an_ended_answer_cannot_be_cancelled(here: Shop) -> None:
    id = ask(here).headers["X-Response-Id"]
    told = post(here, f"/responses/{id}/cancel")
    assert (told.status_code, told.json["status"]) == (200, "completed")  # type: ignore[index]
    assert here.the_record().outcome == "completed"


def test_cancelling_needs_no_body_and_no_content_type(here: Shop) -> None:
    assert post(here, f"{GONE}/cancel").status_code == 404


# --- chats


def chat_body(chat: str) -> dict[str, Any]:
    return {"id": chat, "messages": [{"id": "m1", "role": "user", "parts": [{"type": "text", "text": "hi"}]}]}


def test_a_chat_is_resumed_by_its_own_user_only(upstream: FakeUpstream, here: Shop, there: Shop) -> None:
    gate, upstream.script = gated()
    body = json.dumps(chat_body("c1")).encode()
    with serve(here.app) as port, serve(there.app) as other:
        with Started(port, SSE, body=body, url="/api/chat") as caller:
            assert get(there, "/chat/c1/stream", "bob").status_code == 204
            assert get(there, "/chat/c2/stream").status_code == 204
            with call(other, get_bytes("/chat/c1/stream", "*/*")) as sock:
                seen = read_until(sock, b"Hel")
                gate.open()
                seen += read_until(sock, b"0\r\n\r\n")
            whole = read_all_chunks(caller)
    assert b"[DONE]" in seen and b'"delta":"lo"' in seen
    assert [line for line in seen.split(b"\n") if b"delta" in line] == [x for x in whole.split(b"\n") if b"delta" in x]
    assert get(there, "/chat/c1/stream").status_code == 204  # it has ended


def test_without_a_user_a_chat_is_nobodys(
    upstream: FakeUpstream, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, upstream.script = gated()
    body = json.dumps(chat_body("c1")).encode()
    with keeping_shop(monkeypatch, store, public=True) as shop, serve(shop.app) as port:
        with Started(port, SSE, body=body, url="/api/chat") as caller:
            assert get(shop, "/chat/c1/stream").status_code == 204
            gate.open()
            read_all_chunks(caller)


# --- nothing stays


def test_readers_that_leave_leave_nothing(upstream: FakeUpstream, here: Shop, there: Shop) -> None:
    gate, upstream.script = gated()
    with serve(here.app) as port, serve(there.app) as other, Started(port) as caller:
        log = there.mounts[0].process.log
        assert log is not None
        for each in (port, other):
            with call(each, get_bytes(f"/responses/{caller.id}/stream", SSE)) as sock:
                read_until(sock, b"Hel")
        wait_until(lambda: not log.tails.ids, "a reader is still followed")
        there.expect_nothing_held()
        gate.open()
        read_all_chunks(caller)
    here.expect_nothing_held()


def test_a_closed_log_leaves_no_thread_and_no_lease(
    upstream: FakeUpstream, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(threading.enumerate())
    with keeping_shop(monkeypatch, store) as shop:
        ask(shop)
        shop.the_record()
    left = [each for each in set(threading.enumerate()) - before if each.name == "streamchat"]
    assert left == []
    assert store.memory.gauges()["owners"] == 0
    assert store.calls[-2:] == ["give_up", "close"]
