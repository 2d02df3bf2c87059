"""Answers that nobody waits for: taken in by a request, made by a worker, read in the log, told by a letter."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from werkzeug.test import TestResponse

from streamchat import stores
from streamchat.background import Worker, run
from streamchat.errors import StoreDown
from streamchat.store import Limits
from streamchat.webhooks import new_secret
from tests.fake_upstream import FakeUpstream, Gate, answer, error, finish, head, last_chunk, text
from tests.keeping import FaultyStore, down, expect_settled, get, keeping_shop, post
from tests.shop import KEY, NDJSON, Shop, ndjson_events, wait_until

HOOK = "https://shop.example/hook"
JOB = {"message": "hi", "background": True}


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        server.script = answer(["Hello", " world"])
        yield server


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore()


@contextmanager
def shop_of(monkeypatch: pytest.MonkeyPatch, store: FaultyStore, folder: Path, **options: Any) -> Iterator[Shop]:
    monkeypatch.setitem(stores.STORES, "sqlite", lambda settings, loop: store.store)
    given = {"store_url": f"sqlite:///{folder}/log.db", "background": True} | options
    with keeping_shop(monkeypatch, store, **given) as made:
        yield made


@pytest.fixture
def shop(monkeypatch: pytest.MonkeyPatch, store: FaultyStore, upstream: FakeUpstream, tmp_path: Path) -> Iterator[Shop]:
    with shop_of(monkeypatch, store, tmp_path) as made:
        yield made


@contextmanager
def working(shop: Shop) -> Iterator[Worker]:
    [mount] = shop.mounts
    worker = Worker(mount)
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join(5)
        assert not thread.is_alive()
        worker.end()
        wait_until(lambda: not worker.busy, "the worker still works")


def asked(shop: Shop, body: Any = None, user: str = "ann", **headers: str) -> TestResponse:
    given = {"X-User": user} | {name.replace("_", "-"): value for name, value in headers.items()}
    return shop.ask(json=JOB | (body or {}), headers=given)


def id_of(response: TestResponse) -> str:
    assert response.status_code == 202, response.text
    id: str = response.json["id"]  # type: ignore[index]
    return id


def state(shop: Shop, id: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(get(shop, f"/responses/{id}").data)
    return found


def wait_for(shop: Shop, id: str, status: str) -> dict[str, Any]:
    wait_until(lambda: state(shop, id)["status"] == status, f"it is not {status}")
    return state(shop, id)


# taken in


def test_a_background_request_is_accepted_and_nothing_is_asked(shop: Shop, upstream: FakeUpstream) -> None:
    response = asked(shop)
    id = id_of(response)
    assert response.headers["Location"] == f"/api/responses/{id}"
    assert response.headers["X-Response-Id"] == id
    assert response.content_type == "application/json"
    assert response.json == state(shop, id)
    assert (state(shop, id)["status"], state(shop, id)["text"]) == ("queued", "")
    assert (upstream.requests, shop.records) == ([], [])


def test_an_idempotency_key_finds_the_background_answer(shop: Shop, store: FaultyStore) -> None:
    first, second = (asked(shop, Idempotency_Key="k") for _ in range(2))
    assert id_of(first) == id_of(second)
    assert "Idempotency-Replayed" not in first.headers
    assert second.headers["Idempotency-Replayed"] == "true"
    assert second.headers["X-Response-Id"] == id_of(first)
    assert asked(shop, {"message": "other"}, Idempotency_Key="k").status_code == 422
    assert store.memory.gauges()["queued"] == 1


def test_a_request_that_is_not_in_the_background_is_answered_as_ever(shop: Shop, upstream: FakeUpstream) -> None:
    response = shop.ask(json={"message": "hi", "background": False}, headers={"X-User": "ann"})
    assert (response.status_code, response.data) == (200, b"Hello world")


def test_the_caps_of_a_user_hold_for_what_is_queued(
    monkeypatch: pytest.MonkeyPatch, store: FaultyStore, upstream: FakeUpstream, tmp_path: Path
) -> None:
    with shop_of(monkeypatch, store, tmp_path, max_streams_per_user=2) as shop:
        assert [asked(shop).status_code for _ in range(3)] == [202, 202, 429]
        assert asked(shop, user="bob").status_code == 202
        assert shop.ask(headers={"X-User": "ann"}).status_code == 429


def test_a_store_that_is_down_refuses_the_job(shop: Shop, store: FaultyStore, upstream: FakeUpstream) -> None:
    store.fall()
    response = asked(shop)
    assert (response.status_code, response.json["code"]) == (503, "overloaded")  # type: ignore[index]
    store.rise()
    assert store.memory.gauges()["queued"] == 0


def test_a_job_of_which_nobody_knows_whether_it_is_kept_is_taken_back(shop: Shop, store: FaultyStore) -> None:
    store.after["admit"] = down  # kept, and not said
    assert asked(shop).status_code == 503
    wait_until(lambda: store.memory.gauges()["queued"] == 0, "the job is still there")
    expect_settled(store)


def test_with_a_key_such_a_job_is_found_again(shop: Shop, store: FaultyStore) -> None:
    store.after["admit"] = down
    assert asked(shop, Idempotency_Key="k").status_code == 503
    store.rise()
    id = id_of(asked(shop, Idempotency_Key="k"))
    assert state(shop, id)["status"] == "queued"
    assert store.memory.gauges()["queued"] == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"background": "yes"}, "background"),
        ({"webhook_url": "https://elsewhere.example/hook"}, "not allowed here"),
        ({"webhook_url": "http://shop.example/hook"}, "must begin https://"),
        ({"webhook_url": "https://10.0.0.1/hook"}, "private"),
        ({"webhook_url": "https://shop.example:8443/hook"}, "not allowed here"),
        ({"webhook_url": 3}, "webhook_url"),
        ({"webhook_url": HOOK, "background": False}, '"background": true'),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
    store: FaultyStore,
    upstream: FakeUpstream,
    tmp_path: Path,
    body: dict[str, Any],
    words: str,
) -> None:
    hosts = {"webhook_hosts": ["shop.example"], "webhook_secrets": [new_secret()]}
    with shop_of(monkeypatch, store, tmp_path, **hosts) as shop:
        response = asked(shop, body)
        assert (response.status_code, response.json["code"]) == (400, "invalid_request")  # type: ignore[index]
        assert words in response.json["detail"]  # type: ignore[index]
        assert store.memory.gauges()["queued"] == 0


def test_where_the_settings_do_not_allow_it_nothing_is_accepted(
    monkeypatch: pytest.MonkeyPatch, store: FaultyStore, upstream: FakeUpstream, tmp_path: Path
) -> None:
    with shop_of(monkeypatch, store, tmp_path, background=False) as shop:
        response = asked(shop)
        assert (response.status_code, response.json["detail"]) == (  # type: ignore[index]
            400,
            'The field "background" may not be set here.',
        )
        assert asked(shop, {"background": False, "webhook_url": HOOK}).status_code == 400


def test_the_carrier_is_told_of_each_job_once(
    monkeypatch: pytest.MonkeyPatch, store: FaultyStore, upstream: FakeUpstream, tmp_path: Path
) -> None:
    carried: list[str] = []
    with shop_of(monkeypatch, store, tmp_path, enqueue=carried.append) as shop:
        ids = [id_of(asked(shop, Idempotency_Key="k")) for _ in range(2)]
        assert carried == ids[:1]


def test_a_carrier_that_fails_loses_no_job(
    monkeypatch: pytest.MonkeyPatch,
    store: FaultyStore,
    upstream: FakeUpstream,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(id: str) -> None:
        raise ConnectionError("the broker is away")

    with shop_of(monkeypatch, store, tmp_path, enqueue=fail) as shop:
        id = id_of(asked(shop))
        assert state(shop, id)["status"] == "queued"
    assert "a hook of the application failed" in caplog.text


# made


def test_a_worker_makes_the_answer_for_those_who_read_it(shop: Shop, upstream: FakeUpstream) -> None:
    id = id_of(asked(shop))
    with working(shop):
        document = wait_for(shop, id, "completed")
    assert (document["text"], document["finish_reason"], document["id"]) == ("Hello world", "stop", id)
    events = ndjson_events(get(shop, f"/responses/{id}/stream", Accept=NDJSON).data)
    assert [event["type"] for event in events] == ["start", "text", "text", "finish"]
    assert events[0]["created_at"] == document["created_at"]
    [record] = shop.wait_records()
    assert (record.id, record.user, record.outcome, record.output_tokens) == (id, "ann", "completed", 10)


def test_a_reader_sees_the_answer_while_it_is_made(shop: Shop, upstream: FakeUpstream, store: FaultyStore) -> None:
    gate = Gate()
    upstream.script = [head(), text("first"), gate, text("second"), finish(), last_chunk()]
    id = id_of(asked(shop))
    with working(shop):
        wait_until(lambda: state(shop, id)["text"] == "first", "nothing is seen")
        assert state(shop, id)["status"] == "in_progress"
        gate.open()
        assert wait_for(shop, id, "completed")["text"] == "firstsecond"


def test_what_was_asked_reaches_the_model(
    monkeypatch: pytest.MonkeyPatch, store: FaultyStore, upstream: FakeUpstream, tmp_path: Path
) -> None:
    options = {"params": ["temperature"], "models": ["m2"], "system_prompt": "Be brief."}
    with shop_of(monkeypatch, store, tmp_path, **options) as shop, working(shop):
        id = id_of(asked(shop, {"message": "é \U0001f600", "temperature": 0.5, "model": "m2"}))
        wait_for(shop, id, "completed")
    sent = json.loads(upstream.requests[0].raw_body)
    assert (sent["model"], sent["temperature"]) == ("m2", 0.5)
    assert sent["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "é \U0001f600"},
    ]


def test_a_failure_is_told_as_ever(shop: Shop, upstream: FakeUpstream) -> None:
    upstream.script = error(401, "invalid_api_key", "wrong")
    id = id_of(asked(shop))
    with working(shop):
        document = wait_for(shop, id, "failed")
    assert (document["error"]["code"], document["text"]) == ("upstream_auth", "")
    assert shop.wait_records()[0].outcome == "upstream_auth"


def test_a_queued_answer_is_cancelled_and_never_asked_for(shop: Shop, upstream: FakeUpstream) -> None:
    id = id_of(asked(shop))
    assert post(shop, f"/responses/{id}/cancel").json["status"] == "cancelled"  # type: ignore[index]
    with working(shop) as worker:
        worker.look()
    assert (state(shop, id)["status"], upstream.requests) == ("cancelled", [])
    assert post(shop, f"/responses/{id}/cancel").json["status"] == "cancelled"  # type: ignore[index]
    record = shop.the_record()
    assert (record.id, record.outcome, record.output_tokens) == (id, "cancelled", 0)


def test_a_running_answer_is_cancelled(shop: Shop, upstream: FakeUpstream) -> None:
    upstream.script = [head(), text("first"), Gate()]
    id = id_of(asked(shop))
    with working(shop):
        wait_until(lambda: state(shop, id)["text"] == "first", "nothing is seen")
        assert post(shop, f"/responses/{id}/cancel").json["status"] == "cancelled"  # type: ignore[index]
        upstream.requests[0].wait_left()


def test_a_worker_that_ends_leaves_no_answer_open(shop: Shop, upstream: FakeUpstream, store: FaultyStore) -> None:
    upstream.script = [head(), text("first"), Gate()]
    id = id_of(asked(shop))
    with working(shop) as worker:
        wait_until(lambda: state(shop, id)["text"] == "first", "nothing is seen")
        worker.stop()
        assert worker.busy
    assert wait_for(shop, id, "failed")["error"]["code"] == "interrupted"
    expect_settled(store)


def test_a_job_that_waits_while_its_worker_stops_waits_for_the_next(shop: Shop, upstream: FakeUpstream) -> None:
    with working(shop) as worker:
        worker.stop()
        id = id_of(asked(shop))
        worker.look()
        assert state(shop, id)["status"] == "queued"
    with working(shop):
        wait_for(shop, id, "completed")


def test_a_store_that_is_away_before_the_model_is_asked_is_waited_for(
    shop: Shop, upstream: FakeUpstream, store: FaultyStore
) -> None:
    store.fall("begin")
    id = id_of(asked(shop))
    with working(shop):
        wait_until(lambda: store.calls.count("begin") > 2, "it is not tried again")
        assert upstream.requests == []
        store.rise()
        wait_for(shop, id, "completed")
    assert len(upstream.requests) == 1


def test_a_begin_whose_answer_was_lost_counts(shop: Shop, upstream: FakeUpstream, store: FaultyStore) -> None:
    def lose_once() -> None:
        store.after.clear()
        down()

    store.after["begin"] = lose_once
    id = id_of(asked(shop))
    with working(shop):
        wait_for(shop, id, "completed")
    assert len(upstream.requests) == 1


def test_a_lease_that_is_lost_before_the_model_is_asked_leaves_the_job_to_others(
    shop: Shop, upstream: FakeUpstream, store: FaultyStore
) -> None:
    def lose() -> None:
        store.before.clear()
        store.lose_leases()

    store.before["begin"] = lose
    id = id_of(asked(shop))
    with working(shop):
        wait_until(lambda: "begin" in store.calls, "it was not claimed")
        store.memory.reap()
        wait_for(shop, id, "completed")
    assert len(upstream.requests) == 1


def test_a_job_that_cannot_be_read_fails_and_is_told(
    shop: Shop, upstream: FakeUpstream, store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.queue_contract import queued

    upstream.script = error(400, "invalid_value", "messages")
    [mount] = shop.mounts
    owner = store.memory.take_lease()
    broken = queued(owner, user="ann", queue=mount.name, request="[broken")
    store.memory.admit(broken, Limits())
    with working(shop):
        document = wait_for(shop, broken.id, "failed")
    assert document["error"]["code"] == "upstream_rejected"
    assert "broke: " in caplog.text


def test_a_background_answer_may_take_longer_than_a_connection(
    monkeypatch: pytest.MonkeyPatch, store: FaultyStore, upstream: FakeUpstream, tmp_path: Path
) -> None:
    gate = Gate()
    upstream.script = [head(), text("first"), gate, text("second"), finish(), last_chunk()]
    with shop_of(monkeypatch, store, tmp_path, total_timeout=0.3, background_timeout=30) as shop:
        id = id_of(asked(shop))
        with working(shop):
            wait_until(lambda: state(shop, id)["text"] == "first", "nothing is seen")
            threading.Event().wait(0.5)
            gate.open()
            wait_for(shop, id, "completed")


def test_hundreds_are_made_at_once(
    monkeypatch: pytest.MonkeyPatch, store: FaultyStore, upstream: FakeUpstream, tmp_path: Path
) -> None:
    gate = Gate()
    upstream.script = [head(), text("first"), gate, finish(), last_chunk()]
    with shop_of(monkeypatch, store, tmp_path, max_streams=50, max_streams_per_user=0) as shop:
        ids = [id_of(asked(shop)) for _ in range(60)]
        with working(shop) as worker:
            wait_until(lambda: len(upstream.requests) == 50, "there are not 50 at once", 20)
            worker.look()
            assert store.memory.gauges()["queued"] == 10
            gate.open()
            wait_until(lambda: len(shop.records) == 60, "not all are made", 20)
        assert {state(shop, id)["status"] for id in ids} == {"completed"}


def test_a_task_queue_of_the_shops_own_makes_one_by_its_id(shop: Shop, upstream: FakeUpstream) -> None:
    ids = [id_of(asked(shop)) for _ in range(2)]
    run(shop.app, ids[1])
    assert [state(shop, id)["status"] for id in ids] == ["queued", "completed"]
    run(shop.app, ids[1])
    run(shop.app, "resp_unknown")
    assert len(upstream.requests) == 1


def test_a_task_queue_is_told_that_the_store_is_away(shop: Shop, store: FaultyStore) -> None:
    id = id_of(asked(shop))
    store.fall()
    with pytest.raises(StoreDown):
        run(shop.app, id)


# told


@pytest.mark.parametrize("with_text", [False, True])
def test_the_end_is_told_by_a_letter_to_the_shops_address(
    monkeypatch: pytest.MonkeyPatch, store: FaultyStore, upstream: FakeUpstream, tmp_path: Path, with_text: bool
) -> None:
    options = {"webhook_url": HOOK, "webhook_secrets": [new_secret()], "webhook_text": with_text}
    with shop_of(monkeypatch, store, tmp_path, **options) as shop:
        id = id_of(asked(shop))
        run(shop.app, id)
        document = state(shop, id)
    [letter] = store.memory.outbox.letters(None, 10)
    assert (letter.target, letter.answer, letter.queue, letter.state) == (HOOK, id, "streamchat", "waiting")
    told = json.loads(letter.body)
    assert told["type"] == "response.completed"
    if not with_text:
        del document["text"]
    assert told["data"] == document


def test_a_request_may_name_its_own_address_on_an_allowed_host(
    monkeypatch: pytest.MonkeyPatch, store: FaultyStore, upstream: FakeUpstream, tmp_path: Path
) -> None:
    options = {"webhook_url": HOOK, "webhook_secrets": [new_secret()], "webhook_hosts": [".ann.example"]}
    with shop_of(monkeypatch, store, tmp_path, **options) as shop:
        run(shop.app, id_of(asked(shop, {"webhook_url": "https://hooks.ann.example/x?y"})))
    assert [letter.target for letter in store.memory.outbox.letters(None, 10)] == ["https://hooks.ann.example/x?y"]


@pytest.mark.parametrize(
    ("script", "type"),
    [
        (answer(["Hi"], finish_reason="length"), "response.incomplete"),
        (error(401, "invalid_api_key", "wrong"), "response.failed"),
    ],
)
def test_each_end_has_its_event(
    monkeypatch: pytest.MonkeyPatch,
    store: FaultyStore,
    upstream: FakeUpstream,
    tmp_path: Path,
    script: Any,
    type: str,
) -> None:
    upstream.script = script
    with shop_of(monkeypatch, store, tmp_path, webhook_url=HOOK, webhook_secrets=[new_secret()]) as shop:
        run(shop.app, id_of(asked(shop)))
    [letter] = store.memory.outbox.letters(None, 10)
    assert json.loads(letter.body)["type"] == type


def test_an_ordinary_stream_sends_no_letter(
    monkeypatch: pytest.MonkeyPatch, store: FaultyStore, upstream: FakeUpstream, tmp_path: Path
) -> None:
    with shop_of(monkeypatch, store, tmp_path, webhook_url=HOOK, webhook_secrets=[new_secret()]) as shop:
        assert shop.ask(headers={"X-User": "ann"}).status_code == 200
        shop.the_record()
    assert store.memory.outbox.letters(None, 10) == []


def test_no_prompt_is_kept_or_logged_after_the_end(
    shop: Shop, store: FaultyStore, upstream: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "streamchat")
    run(shop.app, id_of(asked(shop, {"message": "canary of a prompt"})))
    assert "canary of a prompt" not in caplog.text
