"""docs/neighbours.md is true: its table is what the tests run, its Python does what the text beside it says."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import flask
import pytest
import sentry_sdk
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from tests.fake_upstream import FakeUpstream, answer
from tests.live.readers import PATH
from tests.neighbours.cases import SERVERS
from tests.neighbours.mounts import NEIGHBOURS, SENTRY
from tests.shop import KEY, Shop

PAGE = (Path(__file__).parents[2] / "docs" / "neighbours.md").read_text()
QUESTION = {"message": "hi"}


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeUpstream]:
    monkeypatch.chdir(tmp_path)
    with FakeUpstream() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        server.script = answer(["Hello, ", "world!"])
        yield server


def blocks(section: str) -> list[str]:
    found = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert found, section
    return re.findall(r"```python\n(.*?)```", found[1], re.DOTALL)


@contextlib.contextmanager
def running(*sources: str) -> Iterator[dict[str, Any]]:
    """What the blocks leave, with their app as a shop whose records are kept."""
    names: dict[str, Any] = {"__name__": "shop"}
    for source in sources:
        exec(compile(source, "neighbours.md", "exec"), names)
    shop = names["shop"] = Shop(cast(flask.Flask, names["app"]))
    try:
        yield names
    finally:
        shop.close()


def ask(client: FlaskClient, **options: Any) -> TestResponse:
    """The response, read to its end and closed."""
    return client.post(PATH, **({"json": QUESTION} | options), buffered=True)


def test_the_table_names_what_is_tested_in_the_versions_that_are_here() -> None:
    rows = re.findall(r"^\| ([\w\- ]+?) \| ([\w.]+) \|", PAGE, re.MULTILINE)
    here = [(name, version(neighbour.distribution)) for name, neighbour in NEIGHBOURS.items()]
    assert [row for row in rows if row[0] != "neighbour"] == here
    assert f"The tests run on Flask {version('flask')}." in PAGE


def test_the_servers_that_the_page_names_are_those_of_the_tests() -> None:
    named = re.findall(r"`(?:gunicorn -k )?(gevent|gthread|flask run)`", PAGE.partition("|")[0])
    assert named == list(SERVERS)


def test_the_parts_that_the_table_points_to_are_there() -> None:
    wanted = set(re.findall(r"\]\(#([a-z-]+)\)", PAGE))
    assert wanted == {title.lower().replace(" ", "-") for title in re.findall(r"^## (.*)$", PAGE, re.MULTILINE)}


def test_flask_login_s_user_is_whom_authorize_names(upstream: FakeUpstream) -> None:
    from flask_login import UserMixin

    with running(*blocks("Flask-Login")) as names:
        shop, client = names["shop"], names["app"].test_client()

        @names["login"].user_loader  # type: ignore[untyped-decorator]
        def load(id: str) -> UserMixin:
            user = UserMixin()
            user.id = id
            return user

        refused = ask(client)
        assert (refused.status_code, refused.get_json(force=True)["code"]) == (401, "unauthorized")
        with client.session_transaction() as session:
            session["_user_id"] = "7"
        assert ask(client).data == b"Hello, world!"
        assert shop.the_record().user == "7"


def test_csrf_protect_wants_its_token_until_the_blueprint_is_exempt(upstream: FakeUpstream) -> None:
    protected, exempt = blocks("CSRFProtect")
    with running(protected) as names:
        client = names["app"].test_client()
        with client.session_transaction() as session:
            session["user_id"] = "ann"
        refused = ask(client)
        assert (refused.status_code, refused.get_json()["code"]) == (400, "csrf")
        page = client.get("/api/").get_data(as_text=True)
        token = re.search(r'name="csrf-token" content="([^"]+)"', page)
        assert token
        assert ask(client, headers={"X-CSRFToken": token[1]}).data == b"Hello, world!"
        exec(compile(exempt, "neighbours.md", "exec"), names)
        assert ask(client).data == b"Hello, world!"
        assert ask(client, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
        assert ask(client, json=None, data="message=hi").status_code == 415
        names["shop"].wait_records(2)


def test_another_pool_is_given_back_before_the_wait(upstream: FakeUpstream) -> None:
    with running(*blocks("Other database pools")) as names:
        engine, held = names["engine"], []
        upstream.script = lambda request: held.append(engine.pool.checkedout()) or answer(["Hello"])  # type: ignore[func-returns-value]
        assert ask(names["app"].test_client()).data == b"Hello"
        assert held == [0]
        assert names["shop"].the_record().user == "ann"
        engine.dispose()


def test_flask_cors_leaves_alone_what_streamchat_has_answered(upstream: FakeUpstream) -> None:
    with running(*blocks("Flask-CORS")) as names:
        client, (origin,) = names["app"].test_client(), names["PAGES"]
        for site, status in ((origin, 200), ("https://elsewhere.example", 403)):
            told = ask(client, headers={"Origin": site})
            assert told.status_code == status
            assert told.headers.getlist("Access-Control-Allow-Origin") == ([origin] if status == 200 else [])
        names["shop"].the_record()


def test_the_chat_page_keeps_its_own_policy_where_talisman_is_told_so(upstream: FakeUpstream) -> None:
    source = blocks("Flask-Talisman")[0]
    *mounting, _, _ = source.splitlines()
    policies = []
    for block in ("\n".join(mounting), source):
        with running(block) as names:
            page = names["app"].test_client().get("/api/", base_url="https://shop.example")
            policies.append(page.headers.getlist("Content-Security-Policy"))
    ((others,), (own,)) = policies
    assert others.startswith("default-src 'self'") and "trusted-types" not in others
    assert own.startswith("default-src 'self'") and "trusted-types" in own


def test_sentry_s_options_are_those_that_the_tests_have(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(sentry_sdk, "init", lambda **options: given.append(options))
    exec(compile(blocks("Sentry")[0], "neighbours.md", "exec"), {})
    ((options),) = given
    assert options.pop("dsn") and options == SENTRY


def test_proxy_fix_gives_hooks_the_address_of_the_caller(upstream: FakeUpstream) -> None:
    with running(*blocks("ProxyFix")) as names:
        headers = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Host": "shop.example", "X-Forwarded-Proto": "https"}
        own = ask(names["app"].test_client(), headers=headers | {"Origin": "https://shop.example"})
        assert own.data == b"Hello, world!"
        assert names["shop"].the_record().user == "203.0.113.7"
