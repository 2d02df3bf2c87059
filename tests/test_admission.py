"""Answers are admitted once for an Idempotency-Key, within limits, and without the log where no promise needs it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import requests
from werkzeug.test import TestResponse

from streamchat import ChatRequest
from tests.fake_upstream import (
    FakeUpstream,
    Gate,
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
from tests.keeping import FaultyStore, ask, down, expect_settled, get, keeping_shop
from tests.shop import NDJSON, SSE, TEXT, URL, WHOLE, Shop, open_shop, serve, wait_until


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore()


@pytest.fixture
def shop(upstream: FakeUpstream, store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    with keeping_shop(monkeypatch, store) as made:
        yield made
    store.rise()
    expect_settled(store)


def gated() -> tuple[Gate, list[Step]]:
    gate = Gate()
    return gate, [head(), text("Hel"), gate, text("lo"), finish(), usage_chunk(19, 10), done(), last_chunk()]


def code(response: Any) -> tuple[int, str]:
    return response.status_code, json.loads(response.data)["code"]


# --- Idempotency-Key


def test_the_same_key_gives_the_answer_that_has_ended(upstream: FakeUpstream, shop: Shop) -> None:
    first = ask(shop, accept=NDJSON, Idempotency_Key="k")
    assert "Idempotency-Replayed" not in first.headers
    for accept, expected in ((NDJSON, first.data), (TEXT, b"Hello, world!")):
        again = ask(shop, accept=accept, Idempotency_Key="k")
        assert (again.status_code, again.data) == (200, expected)
        assert again.headers["Idempotency-Replayed"] == "true"
        assert again.headers["X-Response-Id"] == first.headers["X-Response-Id"]
    assert ask(shop, accept=WHOLE, Idempotency_Key="k").json["text"] == "Hello, world!"  # type: ignore[index]
    assert len(upstream.requests) == 1
    shop.the_record()


def test_the_same_key_gives_the_failure_again(upstream: FakeUpstream, shop: Shop, store: FaultyStore) -> None:
    upstream.script = error(400)
    for _ in range(2):
        assert code(ask(shop, Idempotency_Key="k")) == (502, "upstream_rejected")
        expect_settled(store)
    assert len(upstream.requests) == 1


def test_a_key_whose_admission_had_no_reply_may_be_sent_again(
    upstream: FakeUpstream, shop: Shop, store: FaultyStore
) -> None:
    store.after["admit"] = down  # done, and its reply is lost
    refused = ask(shop, Idempotency_Key="k")
    assert (code(refused), upstream.requests) == ((503, "overloaded"), [])
    store.rise()
    wait_until(lambda: not store.memory.gauges()["answers"], "the answer that nobody asked for is still there")
    again = ask(shop, Idempotency_Key="k")
    assert (again.status_code, len(upstream.requests)) == (200, 1)
    assert "Idempotency-Replayed" not in again.headers
    assert store.memory.usage(0, "user")[0].answers == 1


def test_a_key_that_meets_its_retraction_is_asked_anew(upstream: FakeUpstream, shop: Shop, store: FaultyStore) -> None:
    store.after["admit"] = store.before["write"] = down
    assert code(ask(shop, Idempotency_Key="k")) == (503, "overloaded")

    def rise() -> None:
        """Its id is told; before that is looked up, the store forgets it."""
        store.rise()
        wait_until(lambda: not store.memory.gauges()["answers"], "it is not retracted")

    store.after["admit"] = rise
    assert (ask(shop, Idempotency_Key="k").status_code, len(upstream.requests)) == (200, 1)


def test_the_same_key_is_told_again_to_wait(upstream: FakeUpstream, shop: Shop, store: FaultyStore) -> None:
    upstream.script = error(429, headers={"Retry-After": "7"})
    waits = []
    for _ in range(2):
        response = ask(shop, Idempotency_Key="k")
        assert code(response) == (503, "upstream_rate_limited")
        waits.append(response.headers["Retry-After"])
        expect_settled(store)
    assert waits == ["7", "5"]


def test_the_same_key_with_another_body_is_refused(upstream: FakeUpstream, shop: Shop) -> None:
    assert ask(shop, "a", Idempotency_Key="k").status_code == 200
    assert code(ask(shop, "b", Idempotency_Key="k")) == (422, "idempotency_mismatch")
    shop.the_record()


def test_a_body_is_the_same_however_its_json_is_written(upstream: FakeUpstream, shop: Shop) -> None:
    bodies = (b'{"message":"hi","context":{"a":1,"b":2}}', b'{ "context": {"b": 2, "a": 1}, "message": "hi" }')
    for body in bodies:
        headers = {"X-User": "ann", "Idempotency-Key": "k", "Content-Type": "application/json"}
        assert shop.app.test_client().post(URL, data=body, headers=headers, buffered=True).status_code == 200
    assert len(upstream.requests) == 1


def test_a_body_is_the_same_whatever_the_shop_makes_of_it(
    upstream: FakeUpstream, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(asked: ChatRequest, user: str | None) -> Sequence[Any]:
        return [{"role": "user", "content": f"{time.monotonic()}"}]

    with keeping_shop(monkeypatch, store, build_messages=build) as shop:
        assert [ask(shop, Idempotency_Key="k").status_code for _ in range(2)] == [200, 200]
    assert len(upstream.requests) == 1


def test_a_key_is_its_users_own(upstream: FakeUpstream, shop: Shop) -> None:
    ids = {ask(shop, user=user, Idempotency_Key="k").headers["X-Response-Id"] for user in ("ann", "bob")}
    assert len(ids) == len(upstream.requests) == 2


@pytest.mark.parametrize(("key", "status"), [("", 400), ("x", 200), ("x" * 255, 200), ("x" * 256, 400)])
def test_a_key_has_1_to_255_characters(shop: Shop, store: FaultyStore, key: str, status: int) -> None:
    assert ask(shop, Idempotency_Key=key).status_code == status
    if status == 400:
        store.fall()
        assert code(ask(shop, Idempotency_Key=key)) == (400, "invalid_request")


def test_a_key_whose_answer_is_forgotten_is_refused_in_words_of_its_own(
    upstream: FakeUpstream, shop: Shop, store: FaultyStore
) -> None:
    ask(shop, Idempotency_Key="k")
    expect_settled(store)
    assert store.memory.prune(-1, 0, 0) == 1
    again = ask(shop, Idempotency_Key="k")
    assert code(again) == (404, "not_found")
    assert b"The answer to this Idempotency-Key is no longer kept. Send a new key to ask again." in again.data
    assert len(upstream.requests) == 1


def test_duplicates_that_wait_all_hear_that_the_first_failed(upstream: FakeUpstream, shop: Shop) -> None:
    gate = Gate()
    upstream.script = [gate, *error(400)]
    formats = [WHOLE, TEXT, NDJSON, SSE]
    told: list[TestResponse] = []

    def ask_once(accept: str) -> None:
        told.append(ask(shop, accept=accept, Idempotency_Key="k"))

    callers = [threading.Thread(target=ask_once, args=(accept,)) for accept in formats]
    for caller in callers:
        caller.start()
    upstream.wait_for_requests(1)
    gate.open()
    for caller in callers:
        caller.join(10)
    assert len(told) == len(formats)
    assert all(b'"upstream_rejected"' in each.data for each in told)
    assert {each.status_code for each in told} <= {200, 502}  # 200: one that was told of the start before
    assert all(b'"type":"error"' in each.data for each in told if each.status_code == 200)
    assert len(upstream.requests) == 1


UI_BODY = {"id": "c1", "messages": [{"id": "m", "role": "user", "parts": [{"type": "text", "text": "hi"}]}]}
OPENAI_BODY = {"model": "gpt-4.1-mini", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [("chat", UI_BODY), ("v1/chat/completions", OPENAI_BODY), ("v1/chat/completions", OPENAI_BODY | {"stream": True})],
)
def test_a_key_holds_on_every_route_that_asks(
    upstream: FakeUpstream, store: FaultyStore, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    with keeping_shop(monkeypatch, store, gateway=True) as shop:
        client, headers = shop.app.test_client(), {"X-User": "ann", "Idempotency-Key": "k"}
        first, again = (client.post(f"/api/{path}", json=body, headers=headers, buffered=True) for _ in range(2))
        assert (first.status_code, again.status_code) == (200, 200)
        assert again.data == first.data
        assert [each.headers.get("Idempotency-Replayed") for each in (first, again)] == [None, "true"]
        another = json.loads(json.dumps(body).replace('"hi"', '"ho"'))
        assert client.post(f"/api/{path}", json=another, headers=headers).status_code == 422
    assert len(upstream.requests) == 1


def test_without_a_store_a_key_is_refused_and_names_the_setting(upstream: FakeUpstream) -> None:
    with open_shop() as shop:
        response = shop.ask(headers={"Idempotency-Key": "k"})
        assert code(response) == (400, "invalid_request")
        assert b"STREAMCHAT_STORE_URL" in response.data
        shop.expect_nothing_held()
    assert not upstream.requests


def test_two_hundred_duplicates_at_once_are_one_answer_for_all(
    upstream: FakeUpstream, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, upstream.script = gated()
    told: list[tuple[int, bytes]] = []
    with keeping_shop(monkeypatch, store) as here, keeping_shop(monkeypatch, store) as there:

        def duplicate(shop: Shop) -> None:
            response = ask(shop, accept=NDJSON, Idempotency_Key="k")
            told.append((response.status_code, response.data))

        callers = [threading.Thread(target=duplicate, args=((here, there)[place % 2],)) for place in range(200)]
        for caller in callers:
            caller.start()
        wait_until(lambda: sum(len(shop.mounts[0].process.live) for shop in (here, there)) == 200, "not all came", 30)
        gate.open()
        for caller in callers:
            caller.join(30)
        assert len(upstream.requests) == 1
        assert len(here.records) + len(there.records) == 1
        for shop in (here, there):
            shop.expect_nothing_held()
    events = [[json.loads(line) for line in body.splitlines()] for _, body in told]
    assert [status for status, _ in told] == [200] * 200
    assert all([e["seq"] for e in each if "seq" in e] == [0, 1, 2, 3] for each in events)


# --- limits


def holding(shop: Shop, count: int, users: Sequence[str]) -> list[threading.Thread]:
    """Callers whose answers run."""
    callers = [threading.Thread(target=ask, args=(shop,), kwargs={"user": user}) for user in users]
    for caller in callers:
        caller.start()
    wait_until(lambda: len(shop.mounts[0].process.live) == count, "not all came")
    return callers


def test_without_the_store_the_streams_of_all_are_counted_here(
    upstream: FakeUpstream, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, upstream.script = gated()
    with keeping_shop(monkeypatch, store, max_streams_in_all=2) as shop:
        store.fall()
        callers = holding(shop, 2, ["ann", "bob"])
        upstream.wait_for_requests(2)
        assert code(ask(shop, user="eve")) == (429, "too_many_streams")
        gate.open()
        for caller in callers:
            caller.join(10)
        assert ask(shop, user="eve").status_code == 200
        store.rise()
    assert len(upstream.requests) == 3


@pytest.mark.parametrize("kept", [True, False])
def test_a_user_has_so_many_streams(
    upstream: FakeUpstream, store: FaultyStore, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    gate, upstream.script = gated()
    options: dict[str, Any] = {} if kept else {"store_url": ""}
    with keeping_shop(monkeypatch, store, max_streams_per_user=2, **options) as shop:
        callers = holding(shop, 2, ["ann", "ann"])
        upstream.wait_for_requests(2)
        refused = ask(shop)
        assert (code(refused), refused.headers["Retry-After"]) == ((429, "too_many_streams"), "5")
        callers += holding(shop, 3, ["bob"])
        gate.open()
        for caller in callers:
            caller.join(10)
        shop.wait_records(3)
        assert ask(shop).status_code == 200
        assert len(shop.wait_records(4)) == 4


def test_streams_of_a_user_and_of_all_are_counted_over_processes(
    upstream: FakeUpstream, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, upstream.script = gated()
    limits = {"max_streams_per_user": 2, "max_streams_in_all": 3}
    with keeping_shop(monkeypatch, store, **limits) as here, keeping_shop(monkeypatch, store, **limits) as there:
        callers = [*holding(here, 1, ["ann"]), *holding(there, 1, ["ann"])]
        upstream.wait_for_requests(2)
        for shop in (here, there):
            assert code(ask(shop)) == (429, "too_many_streams")
        callers += holding(here, 2, ["bob"])
        upstream.wait_for_requests(3)
        for shop in (here, there):
            assert code(ask(shop, user="eve")) == (429, "too_many_streams")
        gate.open()
        for caller in callers:
            caller.join(10)
    expect_settled(store)


def test_a_user_who_has_no_stream_left_still_gets_an_answer_by_its_key(
    upstream: FakeUpstream, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with keeping_shop(monkeypatch, store, max_streams_per_user=1) as shop:
        assert ask(shop, Idempotency_Key="k").status_code == 200
        gate, upstream.script = gated()
        callers = holding(shop, 1, ["ann"])
        assert ask(shop, Idempotency_Key="k").data == b"Hello, world!"
        gate.open()
        callers[0].join(10)


def test_tokens_a_day_are_reserved_and_settled_with_what_was_used(
    upstream: FakeUpstream, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with keeping_shop(monkeypatch, store, tokens_per_day=1000, max_output_tokens=900) as shop:
        gate, upstream.script = gated()
        (caller,) = holding(shop, 1, ["ann"])
        upstream.wait_for_requests(1)
        assert store.memory.gauges()["reserved"] == 901
        refused = ask(shop)
        assert code(refused) == (429, "budget_exhausted")
        assert 0 < int(refused.headers["Retry-After"]) <= 86_400
        assert abs(int(refused.headers["Retry-After"]) - (86_400 - time.time() % 86_400)) < 60
        gate.open()
        caller.join(10)
        expect_settled(store)
        (spent,) = store.memory.usage(0, "user")
        assert (spent.input_tokens, spent.output_tokens) == (19, 10)
        assert ask(shop).status_code == 200  # 29 + 901
        upstream.script = answer(["x"], usage=(60, 900))
        assert ask(shop).status_code == 200
        expect_settled(store)
        assert code(ask(shop)) == (429, "budget_exhausted")
        assert ask(shop, user="bob").status_code == 200


def test_images_and_tools_are_reserved_too(
    upstream: FakeUpstream, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    tool = {"type": "function", "function": {"name": "f", "description": "x" * 4000, "parameters": {}}}
    asked = {"model": "gpt-4.1-mini", "messages": [{"role": "user", "content": "Hello?"}], "tools": [tool]}

    def build(asked: ChatRequest, user: str | None) -> Sequence[Any]:
        return [{"role": "user", "content": [image]}]

    options = {"tokens_per_day": 10_000, "max_output_tokens": 900, "gateway": True, "params": ["tools"]}
    with keeping_shop(monkeypatch, store, build_messages=build, **options) as shop:
        gate, upstream.script = gated()
        (caller,) = holding(shop, 1, ["ann"])
        upstream.wait_for_requests(1)
        assert store.memory.gauges()["reserved"] == 1900
        gate.open()
        caller.join(10)
        expect_settled(store)
        gate, upstream.script = gated()
        client, headers = shop.app.test_client(), {"X-User": "ann"}
        posted = threading.Thread(target=lambda: client.post("/api/v1/chat/completions", json=asked, headers=headers))
        posted.start()
        upstream.wait_for_requests(2)
        assert 2900 <= store.memory.gauges()["reserved"] < 2950
        gate.open()
        posted.join(10)


# --- a store that is not there


def test_without_the_store_all_that_needs_no_count_is_served(
    upstream: FakeUpstream, shop: Shop, store: FaultyStore
) -> None:
    store.fall()
    for _ in range(2):
        begun = time.monotonic()
        response = ask(shop, accept=NDJSON)
        assert time.monotonic() - begun < 2
        assert response.status_code == 200
        assert "X-Stream-Resumable" not in response.headers
        assert b"warning" not in response.data
        refused = ask(shop, Idempotency_Key="k")
        assert code(refused) == (503, "overloaded")
    assert len(shop.wait_records(2)) == 2
    assert get(shop, "/responses/resp_1").status_code == 503
    shop.expect_nothing_held()


def test_without_the_store_a_budget_cannot_be_held(
    upstream: FakeUpstream, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with keeping_shop(monkeypatch, store, tokens_per_day=100_000) as shop:
        store.fall()
        assert code(ask(shop)) == (503, "overloaded")
        store.rise()
        wait_until(lambda: ask(shop).status_code == 200, "the store is not used again")


@pytest.mark.parametrize("fallen", [(), ("admit",)])
def test_without_the_store_a_users_streams_are_counted_here(
    upstream: FakeUpstream, store: FaultyStore, monkeypatch: pytest.MonkeyPatch, fallen: tuple[str, ...]
) -> None:
    gate, upstream.script = gated()
    with keeping_shop(monkeypatch, store, max_streams_per_user=2) as shop:
        first = holding(shop, 1, ["ann"])  # one that the store counted counts here too
        upstream.wait_for_requests(1)
        store.fall(*fallen)
        callers = first + holding(shop, 2, ["ann"])
        upstream.wait_for_requests(2)
        for _ in range(3):
            assert code(ask(shop)) == (429, "too_many_streams")
        store.rise()
        gate.open()
        for caller in callers:
            caller.join(10)
        shop.expect_nothing_held()
        log = shop.mounts[0].process.log
        assert log is not None
        wait_until(lambda: not log.running, "a sheet is held")
    expect_settled(store)


def test_an_answer_goes_on_while_the_store_is_gone_and_says_so_once(
    upstream: FakeUpstream, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamchat.sheet.OLDEST", 0.1)
    gates = [Gate(), Gate()]
    upstream.script = [head(), text("a"), gates[0], text("b"), gates[1], text("c"), finish(), done(), last_chunk()]
    with keeping_shop(monkeypatch, store, on_disconnect="finish") as shop, serve(shop.app) as port:
        with requests.post(
            f"http://127.0.0.1:{port}{URL}",
            json={"message": "hi"},
            headers={"X-User": "ann", "Accept": SSE},
            stream=True,
            timeout=10,
        ) as response:
            assert response.headers["X-Stream-Resumable"] == "?1"
            id = response.headers["X-Response-Id"]
            log = shop.mounts[0].process.log
            assert log is not None
            store.fall("write")
            gates[0].open()
            wait_until(lambda: log.running[id].lost, "it is not given up")
            gates[1].open()
            body = response.content
        assert body.count(b"event: warning") == 1
        assert body.index(b"event: warning") < body.index(b"event: finish")
        assert b'"code":"not_resumable"' in body
        seqs = [int(line[4:]) for line in body.split(b"\n") if line.startswith(b"id: ")]
        assert seqs == [0, 1, 2, 3, 4]
        store.rise()
        wait_until(lambda: not log.running, "its end is not told")
        told = get(shop, f"/responses/{id}").json
        assert told is not None
        assert (told["status"], told["text"], told["usage"]["output_tokens"]) == ("completed", None, 1)
        for after in ("", "?after=1", "?after=4"):
            lost = get(shop, f"/responses/{id}/stream{after}", Accept=NDJSON)
            assert b'"gap"' in lost.data


def test_a_finish_that_the_log_does_not_have_in_time_is_told_with_a_warning(
    upstream: FakeUpstream, shop: Shop, store: FaultyStore
) -> None:
    store.fall("write")
    begun = time.monotonic()
    response = ask(shop, accept=SSE)
    assert time.monotonic() - begun < 2
    assert response.data.count(b"event: warning") == 1
    assert response.data.index(b"event: warning") < response.data.index(b"event: finish")
    store.rise()
    id = response.headers["X-Response-Id"]
    wait_until(lambda: get(shop, f"/responses/{id}").json["status"] == "completed", "no end")  # type: ignore[index]
    again = get(shop, f"/responses/{id}/stream", Accept=SSE)
    assert b"warning" not in again.data and b"event: finish" in again.data
