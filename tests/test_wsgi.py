"""wsgi.py, the app that is deployed as it is: environment variables in, answers out; run from a checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest

from streamchat import SettingsError
from streamchat.settings import TABLE, key
from tests.fake_upstream import FakeUpstream
from tests.shop import KEY, PROMPT, URL, Shop

ROOT = Path(__file__).parent.parent


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield server


@pytest.fixture
def wsgi(upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("STREAMCHAT_PUBLIC", "true")
    import wsgi as module

    return module


def opened(wsgi: ModuleType, environ: Mapping[str, str]) -> Shop:
    return Shop(wsgi.create_app(environ))


def test_the_environment_configures_the_app(wsgi: ModuleType, upstream: FakeUpstream) -> None:
    environ = {
        "STREAMCHAT_TOKENS": '{"ann": "t"}',
        "STREAMCHAT_MODEL": "m1",
        "STREAMCHAT_MODELS": '["m2"]',
        "STREAMCHAT_SYSTEM_PROMPT": PROMPT,
        "STREAMCHAT_IDLE_TIMEOUT": "7.5",
        "STREAMCHAT_HEARTBEAT": "",
        "SECRET_KEY": "s",
        "UNRELATED": "x",
    }
    shop = opened(wsgi, environ)
    assert shop.ask().status_code == 401
    response = shop.ask(headers={"Authorization": "Bearer t"})
    assert response.data == b"Hello, world!"
    assert shop.the_record().user == "ann"
    assert upstream.requests[0].body["model"] == "m1"
    assert upstream.requests[0].body["messages"][0] == {"role": "system", "content": PROMPT}
    settings = shop.mounts[0].settings
    assert (settings.models, settings.idle_timeout, settings.heartbeat) == (("m2",), 7.5, 15.0)
    assert shop.app.secret_key == "s"
    shop.close()


def test_without_a_secret_key_each_start_makes_one(wsgi: ModuleType) -> None:
    keys = {wsgi.create_app({"STREAMCHAT_PUBLIC": "true"}).secret_key for _ in range(2)}
    assert len(keys) == 2 and all(len(key) >= 32 for key in keys)


@pytest.mark.parametrize(
    ("value", "public"), [("true", True), ("True", True), ("1", True), ("false", False), ("0", False)]
)
def test_flags_are_written_as_people_write_them(value: str, public: bool, wsgi: ModuleType) -> None:
    app = wsgi.create_app({"STREAMCHAT_PUBLIC": value, "STREAMCHAT_TOKENS": '["t"]'})
    assert Shop(app).mounts[0].settings.public is public


BAD: dict[str, tuple[dict[str, str], str]] = {
    "nobody is asked": ({}, "STREAMCHAT_PUBLIC"),
    "not JSON": ({"STREAMCHAT_TOKENS": "secret-token"}, "STREAMCHAT_TOKENS must be JSON"),
    "a bad number": ({"STREAMCHAT_PUBLIC": "true", "STREAMCHAT_MAX_STREAMS": "many"}, "STREAMCHAT_MAX_STREAMS"),
    "a bad flag": ({"STREAMCHAT_PUBLIC": "maybe"}, "STREAMCHAT_PUBLIC must be true or false"),
    "a log in no folder": (
        {"STREAMCHAT_PUBLIC": "true", "STREAMCHAT_STORE_URL": "sqlite:////no/such/folder/log.db"},
        "STREAMCHAT_STORE_URL",
    ),
    "a log of no kind that is known": (
        {"STREAMCHAT_PUBLIC": "true", "STREAMCHAT_STORE_URL": "postgres://:secret-token@host"},
        "STREAMCHAT_STORE_URL must be sqlite:///path",
    ),
    "a limit that nobody counts": (
        {"STREAMCHAT_PUBLIC": "true", "STREAMCHAT_MAX_STREAMS_IN_ALL": "9"},
        "STREAMCHAT_MAX_STREAMS_IN_ALL needs STREAMCHAT_STORE_URL",
    ),
    "a misspelt key": ({"STREAMCHAT_PUBLIK": "true"}, "STREAMCHAT_PUBLIC"),
}


@pytest.mark.parametrize(("environ", "named"), BAD.values(), ids=BAD)
def test_what_cannot_be_used_is_said_in_one_sentence(environ: dict[str, str], named: str, wsgi: ModuleType) -> None:
    with pytest.raises(SettingsError, match=named) as caught:
        wsgi.create_app(environ)
    assert "\n" not in str(caught.value) and "secret-token" not in str(caught.value)


def test_every_setting_has_a_variable(wsgi: ModuleType) -> None:
    environ = {key(name): "" for name in TABLE} | {"STREAMCHAT_PUBLIC": "true"}
    assert Shop(wsgi.create_app(environ)).mounts[0].settings.public is True


def test_a_log_that_the_environment_names_keeps_answers(wsgi: ModuleType, tmp_path: Path) -> None:
    log = {"STREAMCHAT_STORE_URL": f"sqlite:///{tmp_path}/log.db", "STREAMCHAT_ON_DISCONNECT": "finish"}
    shop = opened(wsgi, {"STREAMCHAT_PUBLIC": "true", **log})
    id = shop.ask().headers["X-Response-Id"]
    kept = shop.app.test_client().get(f"/api/responses/{id}")
    document = json.loads(kept.data)
    assert (kept.status_code, document["status"], document["text"]) == (200, "completed", "Hello, world!")
    shop.close()


def test_nothing_is_kept_unless_the_environment_says_so(wsgi: ModuleType) -> None:
    shop = opened(wsgi, {"STREAMCHAT_PUBLIC": "true"})
    kept = shop.app.test_client().get("/api/responses/resp_1")
    document = json.loads(kept.data)
    assert (kept.status_code, document["code"]) == (404, "not_found")
    assert "STREAMCHAT_STORE_URL" in document["detail"]
    shop.close()


def test_the_app_answers_under_api(wsgi: ModuleType) -> None:
    shop = opened(wsgi, {"STREAMCHAT_PUBLIC": "true"})
    assert shop.ask(url=URL).data == b"Hello, world!"
    assert shop.app.test_client().get("/api/healthz").status_code == 200
    shop.close()


def test_it_runs_from_a_checkout() -> None:
    code = "import wsgi; assert wsgi.app.secret_key; print(wsgi.app.name)"
    environ = {**os.environ, "STREAMCHAT_PUBLIC": "true", "OPENAI_API_KEY": KEY}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "wsgi\n", "")
