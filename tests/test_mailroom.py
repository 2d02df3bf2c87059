"""`flask streamchat webhooks ...` as an operator types it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result
from flask import Flask

from streamchat import StreamChat
from streamchat.attempts import Next
from streamchat.letters import Letter, State
from streamchat.loop import choose_loop
from streamchat.settings import Settings
from streamchat.store import Store
from streamchat.stores import open_store
from tests.queue_contract import LATER, posted
from tests.shop import KEY

TARGET = "https://shop.example/hook?token=secret-of-the-hook"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/log.db"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = open_store(Settings(store_url=url), choose_loop())
    assert store is not None
    yield store
    store.close()


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, url: str) -> Flask:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    app = Flask("shop")
    StreamChat(app, public=True, store_url=url)
    return app


def run(app: Flask, *words: str) -> Result:
    return app.test_cli_runner().invoke(args=["streamchat", "webhooks", *words])


def printed(app: Flask, *words: str) -> str:
    result = run(app, *words)
    assert result.exit_code == 0, result.output
    return result.output


def letter(store: Store, state: State = "waiting", told: str = "", switch_off: bool = False) -> Letter:
    owner = store.take_lease()
    made = posted(store, owner, target=TARGET)
    if told:
        store.outbox.take(owner, "jobs", LATER, 1)
        store.outbox.settle(owner, made.id, Next(state, LATER + 5 if state == "waiting" else None, switch_off), told)
    found = store.outbox.find(made.id)
    assert found is not None
    return found


def test_webhooks_are_listed_newest_first_with_what_became_of_them(app: Flask, store: Store) -> None:
    states: list[tuple[State, str]] = [("delivered", "204"), ("dead", "500"), ("waiting", "timeout")]
    letters = [letter(store, state, told) for state, told in states]
    title, head, *rows = printed(app, "list").splitlines()
    assert title == "# streamchat: 3 shown"
    assert head.split() == ["ID", "STATE", "ATTEMPTS", "NEXT", "(UTC)", "LAST", "HOST"]
    assert [row.split()[0] for row in rows] == [each.id for each in reversed(letters)]
    assert rows[1].split()[1:] == ["dead", "1", "-", "500", "shop.example"]
    assert rows[0].split()[1:3] == ["waiting", "1"]


def test_a_list_does_not_show_what_a_target_keeps_secret(app: Flask, store: Store) -> None:
    letter(store)
    assert "secret-of-the-hook" not in printed(app, "list")


def test_a_list_can_be_short_or_of_one_state(app: Flask, store: Store) -> None:
    dead, _ = letter(store, "dead", "500"), letter(store)
    assert dead.id in printed(app, "list", "--state", "dead")
    assert printed(app, "list", "--state", "dead").startswith("# streamchat: 1 shown")
    assert dead.id not in printed(app, "list", "--limit", "1")
    assert printed(app, "list", "--state", "delivered") == "# streamchat: 0 shown\n"


def test_one_is_shown_as_json_with_its_body(app: Flask, store: Store) -> None:
    made = letter(store, "dead", "410", switch_off=True)
    shown = json.loads(printed(app, "show", made.id))
    assert (shown["id"], shown["answer"], shown["target"]) == (made.id, made.answer, TARGET)
    assert (shown["state"], shown["attempts"], shown["last_result"], shown["next_attempt"]) == ("dead", 1, "410", None)
    assert shown["body"] == json.loads(made.body)


def test_what_is_replayed_is_due_at_once(app: Flask, store: Store) -> None:
    made = letter(store, "dead", "500")
    assert printed(app, "replay", made.id) == "1 webhook to be delivered again\n"
    found = store.outbox.find(made.id)
    assert found is not None
    assert (found.state, found.attempts, found.body) == ("waiting", 0, made.body)


def test_all_dead_ones_are_replayed_at_once(app: Flask, store: Store) -> None:
    made = [letter(store, "dead", "500") for _ in range(3)]
    done = letter(store, "delivered", "204")
    assert printed(app, "replay", "--dead") == "3 webhooks to be delivered again\n"
    assert {each.id for each in store.outbox.letters("waiting", 9)} == {each.id for each in made}
    found = store.outbox.find(done.id)
    assert found is not None
    assert found.state == "delivered"


@pytest.mark.parametrize("words", [("show", "msg_unknown"), ("replay", "msg_unknown")])
def test_one_that_is_unknown_is_said(app: Flask, store: Store, words: tuple[str, ...]) -> None:
    letter(store)
    result = run(app, *words)
    assert result.exit_code == 1
    assert "There is no webhook msg_unknown" in result.output


@pytest.mark.parametrize("words", [("replay",), ("replay", "--dead", "msg_1")])
def test_a_replay_says_what(app: Flask, store: Store, words: tuple[str, ...]) -> None:
    letter(store)
    result = run(app, *words)
    assert (result.exit_code, "--dead" in result.output) == (2, True)


def test_without_a_log_the_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    app = Flask("shop")
    StreamChat(app, public=True)
    result = run(app, "list")
    assert result.exit_code == 1
    assert "STREAMCHAT_STORE_URL" in result.output
