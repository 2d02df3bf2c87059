"""What a shop may override, and what one process holds for a mount: hooks, signals, settings, the database's pool."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from flask import Flask, Request, abort, current_app, has_request_context, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import select
from sqlalchemy.orm import Mapped, mapped_column
from sqlalchemy.pool import QueuePool

from streamchat import ChatRequest, Record, SettingsError, StreamChat, answer_finished, answer_started, create_blueprint
from streamchat.mount import check_environ
from tests.fake_upstream import (
    FakeUpstream,
    Gate,
    Hang,
    RecordedRequest,
    Rst,
    Step,
    answer,
    done,
    error,
    finish,
    head,
    last_chunk,
    text,
)
from tests.shop import (
    KEY,
    NDJSON,
    PROMPT,
    SSE,
    TEXT,
    URL,
    Shop,
    call,
    events_of,
    open_shop,
    post_bytes,
    read_all,
    read_until,
    serve,
)

# --- what is sent ---------------------------------------------------------------------------------------


def test_the_conversation_is_sent_after_the_servers_own_prompt(upstream: FakeUpstream) -> None:
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "and?"},
    ]
    with open_shop(system_prompt=PROMPT, max_output_tokens=77) as shop:
        assert shop.ask(json={"messages": turns, "context": {"conversation": 7}}).status_code == 200
    assert upstream.requests[0].body == {
        "model": "gpt-4.1-mini",
        "messages": [{"role": "system", "content": PROMPT}, *turns],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 77,
    }


def test_callers_choose_what_the_settings_let_them(upstream: FakeUpstream) -> None:
    with open_shop(model="m", models=["n"], params=["temperature", "max_output_tokens"]) as shop:
        body = {"message": "hi", "model": "n", "temperature": 0.5, "max_output_tokens": 9}
        assert shop.ask(json=body).status_code == 200
        assert shop.the_record().model == "n"
        assert shop.ask(json={"message": "hi", "model": "m"}).status_code == 200
        assert shop.ask(json={"message": "hi", "top_p": 0.5}).status_code == 400
    sent = upstream.requests[0].body
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("n", 0.5, 9)


def test_build_messages_decides_what_is_sent(upstream: FakeUpstream) -> None:
    def build(asked: ChatRequest, user: str | None) -> Sequence[Any]:
        words = f"{user} {asked.context['conversation']} {asked.messages[-1].content} {request.path}"
        return [{"role": "developer", "content": words}]

    with open_shop(authorize=lambda _: "ann", build_messages=build, system_prompt=PROMPT) as shop:
        assert shop.ask(json={"message": "hi", "context": {"conversation": 7}}).status_code == 200
    assert upstream.requests[0].body["messages"] == [{"role": "developer", "content": f"ann 7 hi {URL}"}]


def test_build_messages_may_abort(upstream: FakeUpstream) -> None:
    with open_shop(build_messages=lambda *_: abort(404)) as shop:
        response = shop.ask()
        assert (response.status_code, json.loads(response.data)["code"]) == (404, "not_found")
        assert (upstream.connections, shop.records) == (0, [])


def test_authorize_sees_the_request_and_its_body(upstream: FakeUpstream) -> None:
    def authorize(asked: Request) -> str:
        return str(asked.get_json()["context"]["user"]) + asked.headers["X-Shop"]

    with open_shop(authorize=authorize) as shop:
        body = {"message": "hi", "context": {"user": 7}}
        assert shop.ask(json=body, headers={"X-Shop": "!"}).data == b"Hello, world!"
        assert shop.the_record().user == "7!"


def test_authorize_is_asked_after_the_cheap_checks_and_before_the_body(upstream: FakeUpstream) -> None:
    asked: list[Request] = []

    def authorize(given: Request) -> None:
        asked.append(given)

    with open_shop(authorize=authorize) as shop:
        assert shop.ask(headers={"Origin": "https://evil.example"}).status_code == 403
        assert shop.ask(data="x", content_type="text/plain", json=None).status_code == 415
        assert asked == []
        assert shop.ask("").status_code == 401  # an unknown caller learns nothing about the body


# --- clients --------------------------------------------------------------------------------------------


def test_a_client_factory_decides_where_and_with_which_key(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL")

    clients = {name: openai.OpenAI(api_key=f"sk-{name}", base_url=upstream.base_url) for name in ("one", "two")}
    with open_shop(client_factory=lambda: clients[request.headers["X-Tenant"]]) as shop:
        for tenant in clients:
            assert shop.ask(headers={"X-Tenant": tenant}).data == b"Hello, world!"
    for client in clients.values():
        client.close()
    assert [request.headers["authorization"] for request in upstream.requests] == ["Bearer sk-one", "Bearer sk-two"]


def test_a_client_of_the_shops_own_is_not_retried_by_the_sdk(upstream: FakeUpstream) -> None:
    upstream.script = error(500)
    client = openai.OpenAI(api_key="k", base_url=upstream.base_url, max_retries=5)
    with client, open_shop(client_factory=lambda: client) as shop:
        assert shop.ask().status_code == 502
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("http", ["auto", "fast", "sdk"])
def test_both_ways_to_the_upstream_answer_alike(http: str, upstream: FakeUpstream) -> None:
    with open_shop(http=http) as shop:
        events = events_of(NDJSON, shop.ask(accept=NDJSON).data)
        assert [event.get("text") for event in events] == [None, "Hello", ", ", "world", "!", None]
        assert shop.the_record().upstream_request_id == "req_fake"


# --- the database ---------------------------------------------------------------------------------------


class Shelf:
    """A shop whose users stand in a database with a small pool."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.db = db = SQLAlchemy()

        class User(db.Model):  # type: ignore[name-defined,misc]
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str]

        self.user: Any = User
        self.options: dict[str, Any] = {"authorize": self.authorize, "status_hold": 0.2, "max_retries": 0} | options
        self.url = f"sqlite:///{folder / 'shop.db'}"

    def authorize(self, _: Request) -> str:
        user: str = self.db.session.scalars(select(self.user)).one().name
        return user

    def build(self, app: Flask) -> None:
        pool = {"poolclass": QueuePool, "pool_size": 5, "max_overflow": 0, "pool_timeout": 1}
        app.config.update(SQLALCHEMY_DATABASE_URI=self.url, SQLALCHEMY_ENGINE_OPTIONS=pool)
        self.db.init_app(app)
        app.add_url_rule("/name", "name", lambda: self.authorize(request))
        StreamChat(app, **self.options)
        with app.app_context():
            self.db.create_all()
            self.db.session.add(self.user(name="ann"))
            self.db.session.commit()

    def close(self, app: Flask) -> None:
        with app.app_context():
            self.db.engine.dispose()


@pytest.mark.parametrize("receives", [False, True], ids=["", "with a receiver that asks the database"])
def test_callers_who_wait_for_a_silent_model_hold_no_connection_of_the_pool(
    receives: bool, upstream: FakeUpstream, tmp_path: Path
) -> None:
    gate = Gate()
    upstream.script = [head(), gate, text("one"), finish(), done(), last_chunk()]
    shelf = Shelf(tmp_path, max_streams_per_user=50)

    def receive(app: Flask, **_: Any) -> None:
        shelf.authorize(request)

    with open_shop(shelf.build) as shop, serve(shop.app) as port:
        if receives:
            answer_started.connect(receive, shop.app)
        try:
            callers = [call(port, post_bytes()) for _ in range(50)]
            gate.wait_reached(50, timeout=20)
            assert requests.get(f"http://127.0.0.1:{port}/name", timeout=5).text == "ann"
            gate.open()
            for caller in callers:
                with caller:
                    assert b"one" in read_all(caller)
            assert {record.user for record in shop.wait_records(50)} == {"ann"}
        finally:
            shelf.close(shop.app)


def test_before_wait_replaces_the_default(upstream: FakeUpstream, tmp_path: Path) -> None:
    gate, released = Gate(), threading.Event()
    upstream.script = [gate, answer(["one"])]
    shelf = Shelf(tmp_path, before_wait=released.set)
    with open_shop(shelf.build) as shop, serve(shop.app) as port:
        try:
            with call(port, post_bytes()) as caller:
                gate.wait_reached()
                assert released.is_set()
                with shop.app.app_context():
                    pool: Any = shelf.db.engine.pool
                    assert pool.checkedout() == 1  # nobody has closed the session
                gate.open()
                read_all(caller)
        finally:
            shelf.close(shop.app)


def test_before_wait_that_fails_makes_no_call_and_frees_the_slot(upstream: FakeUpstream) -> None:
    def before_wait() -> None:
        raise ZeroDivisionError

    with open_shop(before_wait=before_wait) as shop:
        shop.app.logger.disabled = True
        assert shop.ask().status_code == 500
        assert shop.the_record().outcome == "interrupted"
        assert upstream.connections == 0


# --- the end --------------------------------------------------------------------------------------------


class Told:
    """An on_finish hook that keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Record, str, str, bool]] = []

    def __call__(self, record: Record, words: str) -> None:
        self.calls.append((record, words, current_app.name, has_request_context()))


def test_on_finish_is_told_the_record_and_the_text(upstream: FakeUpstream) -> None:
    told = Told()
    with open_shop(on_finish=told) as shop:
        shop.ask(accept=SSE)
        record = shop.the_record()
    ((given, words, name, in_request),) = told.calls
    assert (given, words, name, in_request) == (record, "Hello, world!", "shop", False)


ENDINGS: dict[str, tuple[Step, str, str]] = {
    "cut": ([head(), text("Hel"), Rst()], "upstream_incomplete", "Hel"),
    "refused by the upstream": (error(500), "upstream_error", ""),
}


@pytest.mark.parametrize(("script", "outcome", "words"), ENDINGS.values(), ids=ENDINGS)
def test_on_finish_is_told_partial_text_too(script: Step, outcome: str, words: str, upstream: FakeUpstream) -> None:
    told = Told()
    upstream.script = script
    with open_shop(on_finish=told) as shop:
        shop.ask(accept=SSE)
        assert shop.the_record().outcome == outcome
    assert [(record.outcome, given) for record, given, _, _ in told.calls] == [(outcome, words)]


def test_on_finish_is_told_when_the_caller_left(upstream: FakeUpstream) -> None:
    told = Told()
    upstream.script = [head(), text("Hel"), Hang()]
    with open_shop(on_finish=told) as shop, serve(shop.app) as port:
        with call(port, post_bytes()) as caller:
            read_until(caller, b"Hel")
        shop.the_record()
        deadline = time.monotonic() + 5
        while not told.calls and time.monotonic() < deadline:
            time.sleep(0.005)
    assert [(record.outcome, given) for record, given, _, _ in told.calls] == [("caller_left", "Hel")]


def test_on_finish_delays_nobody(upstream: FakeUpstream) -> None:
    held = threading.Event()
    with open_shop(on_finish=lambda *_: held.wait(5)) as shop, serve(shop.app) as port:
        with call(port, post_bytes()) as caller:
            assert read_until(caller, b"0\r\n\r\n")
        held.set()
        shop.the_record()


class Alarm(BaseException):
    """Like gevent.Timeout: no Exception."""


@pytest.mark.parametrize("raised", [ZeroDivisionError, Alarm])
def test_what_on_finish_raises_is_logged_and_swallowed(
    raised: type[BaseException], upstream: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    def on_finish(*_: object) -> None:
        raise raised

    with open_shop(on_finish=on_finish) as shop:
        assert shop.ask().data == b"Hello, world!"
        shop.the_record()
    (logged,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert logged.name == "streamchat" and logged.exc_info is not None and logged.exc_info[0] is raised


def test_signals_say_when_an_answer_starts_and_finishes(upstream: FakeUpstream) -> None:
    seen: list[Any] = []

    def started(app: Flask, **given: Any) -> None:
        seen.append((app.name, given))

    def finished(app: Flask, record: Record) -> None:
        seen.append((app.name, record))

    with open_shop(authorize=lambda _: "ann") as shop:
        with answer_started.connected_to(started, shop.app), answer_finished.connected_to(finished, shop.app):
            assert shop.ask("").status_code == 400
            assert seen == []
            response = shop.ask()
        expected = {"id": response.headers["X-Response-Id"], "user": "ann", "model": "gpt-4.1-mini"}
        assert seen == [("shop", expected), ("shop", shop.the_record())]


@pytest.mark.parametrize("signal", [answer_started, answer_finished])
def test_a_receiver_that_raises_does_not_touch_the_answer(
    signal: Any, upstream: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    def receive(app: Flask, **_: Any) -> None:
        raise ZeroDivisionError

    with open_shop() as shop, signal.connected_to(receive, shop.app):
        assert shop.ask().data == b"Hello, world!"
        shop.expect_nothing_held()
    assert [record.levelname for record in caplog.records if record.exc_info] == ["ERROR"]


def test_a_receiver_that_a_timeout_ends_holds_nothing(upstream: FakeUpstream) -> None:
    def receive(app: Flask, **_: Any) -> None:
        raise Alarm

    with open_shop() as shop, answer_started.connected_to(receive, shop.app):
        with pytest.raises(Alarm):
            shop.ask()
        assert shop.the_record().outcome == "interrupted"
        assert upstream.connections == 0


def test_an_answer_is_one_line_in_the_log(upstream: FakeUpstream, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "streamchat")
    with open_shop(authorize=lambda _: "ann\nadmin outcome=completed") as shop:
        shop.ask("a question")
        record = shop.the_record()
    (line,) = [each for each in caplog.records if each.name == "streamchat"]
    said = line.getMessage()
    told = json.loads(said.removeprefix("answer "))
    assert (told["id"], told["user"], told["outcome"]) == (record.id, record.user, "completed")
    assert "\n" not in said and "question" not in said and "Hello" not in said
    assert line.__dict__["answer"] == record


# --- words, ids, decorators -----------------------------------------------------------------------------


def in_german(code: str, locale: str | None) -> str | None:
    return f"Fehler: {code}" if locale == "de" else None


def test_the_shops_words_for_an_error_are_used(upstream: FakeUpstream) -> None:
    upstream.script = error(500)
    with open_shop(error_text=in_german) as shop:
        german = json.loads(shop.ask(headers={"Accept-Language": "de, en;q=0.5"}).data)
        assert (german["detail"], german["code"]) == ("Fehler: upstream_error", "upstream_error")
        assert json.loads(shop.ask().data)["detail"] == "The model's provider failed."


@pytest.mark.parametrize("accept", [SSE, NDJSON])
def test_the_shops_words_stand_in_error_events_too(accept: str, upstream: FakeUpstream) -> None:
    upstream.script = [head(), text("Hel"), Rst()]
    with open_shop(error_text=in_german) as shop:
        events = events_of(accept, shop.ask(accept=accept, headers={"Accept-Language": "de"}).data)
        assert events[-1]["message"] == "Fehler: upstream_incomplete"


@pytest.mark.parametrize("script", [error(500), [head(), text("Hel"), Rst()]], ids=["status", "event"])
def test_words_that_fail_are_replaced_by_ours(
    script: Step, upstream: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(code: str, locale: str | None) -> str:
        raise ZeroDivisionError

    upstream.script = script
    with open_shop(error_text=fail) as shop:
        said = shop.ask(accept=SSE).data
        assert b"The model's provider failed." in said or b"The answer was cut off." in said
    assert any(record.exc_info for record in caplog.records)


def test_ids_are_the_shops_own_where_it_makes_them(upstream: FakeUpstream) -> None:
    with open_shop(make_id=lambda: "order-7") as shop:
        response = shop.ask(accept=SSE)
        assert response.headers["X-Response-Id"] == "order-7"
        assert events_of(SSE, response.data)[0]["id"] == shop.the_record().id == "order-7"


def test_decorators_wrap_the_view_and_the_first_is_outermost(upstream: FakeUpstream) -> None:
    order: list[str] = []

    def named(name: str) -> Callable[[Any], Any]:
        def decorate(view: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                order.append(name)
                return view(*args, **kwargs)

            return wrapped

        return decorate

    with open_shop(decorators=[named("first"), named("second")]) as shop:
        assert shop.ask().data == b"Hello, world!"
        assert order == ["first", "second"]
        assert shop.app.test_client().get("/api/healthz").status_code == 200
        assert order == ["first", "second"]


def test_a_decorator_that_refuses_costs_nothing_and_has_an_id(upstream: FakeUpstream) -> None:
    with open_shop(decorators=[lambda view: lambda: ("log in first", 401)]) as shop:
        response = shop.ask()
        assert (response.status_code, response.data) == (401, b"log in first")
        assert response.headers["X-Response-Id"]
        assert upstream.connections == 0


# --- settings at the start ------------------------------------------------------------------------------

BAD_STARTS: dict[str, tuple[dict[str, Any], str]] = {
    "nobody is asked": ({}, "STREAMCHAT_PUBLIC"),
    "an unknown setting": ({"public": True, "modle": "x"}, "STREAMCHAT_MODEL"),
    "a wrong type": ({"public": "yes"}, "STREAMCHAT_PUBLIC"),
    "a number out of range": ({"public": True, "max_streams": 0}, "STREAMCHAT_MAX_STREAMS"),
    "a token that cannot be sent": ({"tokens": ["geheim\n"]}, "STREAMCHAT_TOKENS"),
    "an origin with a path": ({"public": True, "origins": ["https://a.example/"]}, "STREAMCHAT_ORIGINS"),
}


@pytest.mark.parametrize(("options", "named"), BAD_STARTS.values(), ids=BAD_STARTS)
def test_what_cannot_be_used_stops_the_start_in_one_sentence(
    options: dict[str, Any], named: str, upstream: FakeUpstream
) -> None:
    with pytest.raises(SettingsError) as caught:
        Flask("shop").register_blueprint(create_blueprint(**options))
    sentence = str(caught.value)
    assert named in sentence and sentence.endswith((".", "?")) and "\n" not in sentence
    assert "geheim" not in sentence


def test_settings_come_from_the_config_and_arguments_win(upstream: FakeUpstream) -> None:
    def build(app: Flask) -> None:
        app.config.update(STREAMCHAT_MODEL="config", STREAMCHAT_PUBLIC=True, STREAMCHAT_HEARTBEAT=3)
        app.register_blueprint(create_blueprint(model="argument"), url_prefix="/api")

    with open_shop(build) as shop:
        (mount,) = shop.mounts
        assert (mount.settings.model, mount.settings.heartbeat) == ("argument", 3.0)


@pytest.mark.parametrize("key", ["sk-x\r", " sk-x", "sk-ä", "sk\nx"])
def test_a_key_that_cannot_stand_in_a_header_stops_the_start(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(SettingsError, match="OPENAI_API_KEY") as caught:
        Flask("shop").register_blueprint(create_blueprint(public=True))
    assert key not in str(caught.value)


def test_no_upstream_stops_the_start_unless_there_is_a_factory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(SettingsError, match="OPENAI_BASE_URL"):
        Flask("shop").register_blueprint(create_blueprint(public=True))
    Flask("shop").register_blueprint(create_blueprint(public=True, client_factory=lambda: openai.OpenAI(api_key="k")))


def test_an_environment_is_checked_before_a_server_forks(upstream: FakeUpstream) -> None:
    check_environ({"STREAMCHAT_PUBLIC": "true"})
    check_environ({"STREAMCHAT_TOKENS": '{"ann": "t"}'})
    with pytest.raises(SettingsError, match="STREAMCHAT_PUBLIC"):
        check_environ({})


# --- processes ------------------------------------------------------------------------------------------


def test_nothing_is_started_before_the_first_answer(upstream: FakeUpstream) -> None:
    with open_shop() as shop:
        before = threading.active_count()
        assert shop.app.test_client().get("/api/healthz").status_code == 200
        assert shop.mounts[0]._process is None
        assert threading.active_count() == before


def test_a_process_makes_its_own_and_only_once(upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_shop() as shop:
        (mount,) = shop.mounts
        first = mount.process
        assert mount.process is first
        with monkeypatch.context() as forked:
            forked.setattr(os, "getpid", lambda: first.pid + 1)
            second = mount.process
            assert second is not first
            assert mount.process is second
        first.close()
        second.close()
        mount._process = None


def test_many_first_answers_share_one_client(upstream: FakeUpstream) -> None:
    with open_shop() as shop:
        seen: list[int] = []
        barrier = threading.Barrier(8)

        def first() -> None:
            barrier.wait()
            seen.append(id(shop.mounts[0].process))

        threads = [threading.Thread(target=first) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(seen)) == 1


def test_a_kept_connection_serves_the_next_answer(upstream: FakeUpstream) -> None:
    with open_shop() as shop:
        for _ in range(5):
            assert shop.ask().status_code == 200
        assert (upstream.connections, len(upstream.requests)) == (1, 5)


def test_callers_get_their_own_answers(upstream: FakeUpstream) -> None:
    def echo(asked: RecordedRequest) -> Step:
        return answer([f"{asked.message} ", asked.message])

    upstream.choose = echo
    got: dict[int, bytes] = {}
    with open_shop() as shop:

        def ask(number: int) -> None:
            got[number] = shop.ask(f"n{number}", accept=TEXT).data

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == {number: f"n{number} n{number}".encode() for number in range(20)}
        shop.wait_records(20)
        shop.expect_nothing_held()


def test_a_mount_shows_no_secret(upstream: FakeUpstream) -> None:
    with open_shop(tokens={"ann": KEY}, system_prompt=PROMPT) as shop:
        shown = repr(shop.mounts[0].settings) + repr(shop.mounts[0]) + repr(Shop)
        assert KEY not in shown and PROMPT not in shown
