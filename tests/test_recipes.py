"""docs/recipes.md is true: each of its programs runs, and does what the page says of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from tests.documents import blocks, closing_mounts, read, run
from tests.fake_upstream import FakeUpstream, Fin, answer, head, text
from tests.shop import KEY, serve

CONVERSATIONS, LOGIN, CSRF, AZURE = blocks(read("recipes.md"))
URL = "/api/get-response"


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        server.script = answer(["Hello, ", "world!"])
        yield server


@contextmanager
def opened(block: str) -> Iterator[dict[str, Any]]:
    """The names of a program, whose app is closed in the end."""
    names = run(block, "recipes.md")
    with closing_mounts(names["app"]):
        yield names


def logged_in(app: Flask, user: str) -> FlaskClient:
    client = app.test_client()
    with client.session_transaction() as session:
        session["user_id"] = user
    return client


# --- conversations ----------------------------------------------------------------------------------------


@pytest.fixture
def conversing(upstream: FakeUpstream, tmp_path: Path) -> Iterator[dict[str, Any]]:
    with opened(CONVERSATIONS.replace("sqlite:///shop.db", f"sqlite:///{tmp_path}/shop.db")) as names:
        yield names
        with names["app"].app_context():
            names["db"].session.remove()
            names["db"].engine.dispose()


def say(client: FlaskClient, message: str, conversation: str = "7") -> str:
    return client.post(URL, json={"message": message, "context": {"conversation": conversation}}).text


def told(upstream: FakeUpstream) -> list[str]:
    """What the model was sent last."""
    return [message["content"] for message in upstream.requests[-1].body["messages"]]


def test_the_model_is_told_what_was_said_before_in_this_conversation(
    conversing: dict[str, Any], upstream: FakeUpstream
) -> None:
    ann = logged_in(conversing["app"], "ann")
    assert say(ann, "one") == "Hello, world!"
    assert told(upstream) == ["one"]
    say(ann, "two")
    assert told(upstream) == ["one", "Hello, world!", "two"]
    say(ann, "other", "8")
    assert told(upstream) == ["other"]
    say(logged_in(conversing["app"], "bob"), "bob's")
    assert told(upstream) == ["bob's"]


def test_the_chat_of_the_ai_sdk_names_the_conversation(conversing: dict[str, Any], upstream: FakeUpstream) -> None:
    ann = logged_in(conversing["app"], "ann")
    say(ann, "one", "chat-1")
    parts = [{"type": "text", "text": "two"}]
    ann.post("/api/chat", json={"id": "chat-1", "messages": [{"id": "1", "role": "user", "parts": parts}]})
    assert told(upstream) == ["one", "Hello, world!", "two"]


def test_a_cut_answer_is_kept_and_not_told_again(conversing: dict[str, Any], upstream: FakeUpstream) -> None:
    ann, events = logged_in(conversing["app"], "ann"), {"Accept": "text/event-stream"}
    upstream.script = [head(), text("Half an"), Fin()]
    question = {"message": "one", "context": {"conversation": "7"}}
    assert "event: error" in ann.post(URL, json=question, headers=events).text
    with conversing["app"].app_context():
        (exchange,) = conversing["db"].session.scalars(conversing["db"].select(conversing["Exchange"]))
        assert (exchange.question, exchange.answer, exchange.outcome) == ("one", "Half an", "upstream_incomplete")
    upstream.script = answer(["Hello"])
    say(ann, "two")
    assert told(upstream) == ["two"]


def test_no_connection_is_held_while_the_model_writes(conversing: dict[str, Any], upstream: FakeUpstream) -> None:
    with conversing["app"].app_context():
        pool = conversing["db"].engine.pool
    ann = logged_in(conversing["app"], "ann")
    with ann.post(URL, json={"message": "one", "context": {"conversation": "7"}}) as response:
        assert next(iter(response.response))
        assert pool.checkedout() == 0


def test_a_question_that_names_no_conversation_is_refused(conversing: dict[str, Any], upstream: FakeUpstream) -> None:
    ann = logged_in(conversing["app"], "ann")
    assert ann.post(URL, json={"message": "one"}).status_code == 400
    assert not upstream.requests


# --- users, tokens, providers -----------------------------------------------------------------------------


def test_flask_login_s_users_may_ask_and_nobody_else(upstream: FakeUpstream) -> None:
    with opened(LOGIN) as names:
        client = names["app"].test_client()
        refused = client.post(URL, json={"message": "hi"})
        assert (refused.status_code, refused.get_json()["code"]) == (401, "unauthorized")
        client.post("/login", data={"name": "ann"})
        assert client.post(URL, json={"message": "hi"}).text == "Hello, world!"


def test_pages_send_flask_wtf_s_token_and_programs_need_none(upstream: FakeUpstream) -> None:
    with opened(CSRF) as names:
        ann = logged_in(names["app"], "ann")
        refused = ann.post(URL, json={"message": "hi"})
        assert (refused.status_code, refused.get_json(force=True)["code"]) == (400, "csrf")
        token = re.search(r'content="(.+?)"', ann.get("/").text)
        assert token is not None
        assert ann.post(URL, json={"message": "hi"}, headers={"X-CSRFToken": token[1]}).text == "Hello, world!"
        bearer = {"Authorization": "Bearer a-long-random-token"}
        program = names["app"].test_client()
        assert program.post("/programs/get-response", json={"message": "hi"}).status_code == 401
        assert program.post("/programs/get-response", json={"message": "hi"}, headers=bearer).text == "Hello, world!"


def test_azure_is_asked_for_the_deployment_with_its_own_key(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", upstream.base_url.removesuffix("/v1"))
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "azure-key")
    monkeypatch.delenv("OPENAI_BASE_URL")
    with opened(AZURE) as names, serve(names["app"]):
        headers = {"Authorization": "Bearer a-long-random-token"}
        for _ in range(2):
            response = names["app"].test_client().post(URL, json={"message": "hi"}, headers=headers)
            assert response.text == "Hello, world!"
        names["client"]().close()
    assert len(upstream.requests) == 2
    asked = upstream.requests[0]
    assert asked.path.startswith("/openai/deployments/our-deployment/chat/completions?api-version=")
    assert asked.headers["api-key"] == "azure-key"
