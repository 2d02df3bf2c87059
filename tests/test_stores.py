"""STREAMCHAT_STORE_URL becomes a store, or one sentence at the start; until its first call nothing is opened."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest

from streamchat import SettingsError, sqlite_schema
from streamchat.loop import ThreadLoop
from streamchat.memory_store import MemoryStore
from streamchat.mount import check_environ
from streamchat.redis_store import RedisStore
from streamchat.settings import Settings
from streamchat.sqlite_store import SqliteStore
from streamchat.stores import check_store, file_of, open_store
from tests.sqlite_lock import locked

ENVIRON = {"STREAMCHAT_PUBLIC": "true"}


def settings(url: str) -> Settings:
    return Settings.from_mapping({"STREAMCHAT_STORE_URL": url})


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("", type(None)),
        ("memory://", MemoryStore),
        ("sqlite:///log.db", SqliteStore),
        ("redis://127.0.0.1:9/3", RedisStore),
        ("rediss://user:secret@redis.example", RedisStore),
    ],
)
def test_the_scheme_names_the_store(url: str, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store(settings(url), ThreadLoop())
    assert type(store) is kind
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///log.db", "log.db"),
        ("sqlite:////var/lib/chat/log.db", "/var/lib/chat/log.db"),
        ("sqlite:///a%20folder/%C3%A4.db", "a folder/ä.db"),
        ("redis://localhost", None),
        ("", None),
    ],
)
def test_the_path_of_a_file_is_written_as_sqlalchemy_has_it(url: str, path: str | None) -> None:
    assert file_of(settings(url)) == (Path(path) if path else None)


@pytest.mark.parametrize(
    "url", ["log.db", "/var/log.db", "sqlite:log.db", "sqlite://", "sqlite:///", "sqlite://log.db", "sqlite:///a/"]
)
def test_a_url_that_is_none_is_refused_with_all_that_are(url: str) -> None:
    with pytest.raises(SettingsError, match="must be sqlite:///path, redis://host or memory://") as caught:
        settings(url)
    assert "log.db," not in str(caught.value)


def started(url: str) -> str:
    """What a start with this store is refused with."""
    with pytest.raises(SettingsError) as caught:
        check_store(settings(url), ThreadLoop())
    return caught.value.detail


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    sentence = f"STREAMCHAT_STORE_URL names {tmp_path}, which is a folder: name a file in it."
    assert started(f"sqlite:///{tmp_path}") == sentence


def test_a_folder_that_is_not_there_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sentence = "STREAMCHAT_STORE_URL names a file in {}, which is no folder: make it, or name another."
    assert started("sqlite:///state/log.db") == sentence.format(tmp_path / "state")
    (tmp_path / "state").write_text("a file")
    assert started("sqlite:///state/log.db") == sentence.format(tmp_path / "state")
    check_store(settings("sqlite:///log.db"), ThreadLoop())


def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    poem, other = tmp_path / "poem.txt", tmp_path / "other.db"
    poem.write_text("Shall I compare thee to a summer's day? " * 100)
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE poems (line TEXT)")
    before = {file: file.read_bytes() for file in (poem, other)}
    assert started(f"sqlite:///{poem}") == (
        "STREAMCHAT_STORE_URL names a file that is no database: name a file of its own."
    )
    assert started(f"sqlite:///{other}") == (
        "STREAMCHAT_STORE_URL names a database of something else: name a file of its own."
    )
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_file_of_ours_is_taken_also_while_others_write_it_and_none_is_made(tmp_path: Path) -> None:
    url = settings(f"sqlite:///{tmp_path}/log.db")
    check_store(url, ThreadLoop())
    assert not list(tmp_path.iterdir())
    with closing(SqliteStore(str(tmp_path / "log.db"), 15.0, ThreadLoop().lane)) as store:
        store.take_lease()
        with locked(str(tmp_path / "log.db")):
            began = time.monotonic()
            check_store(url, ThreadLoop())
            assert time.monotonic() - began < 1
    check_store(url, ThreadLoop())


def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_schema, "apsw", None)
    assert 'pip install "flask-streamchat[log]"' in started("sqlite:///log.db")


def test_a_redis_that_cannot_be_addressed_is_refused_without_its_password() -> None:
    assert "canary" not in started("redis://:canary@localhost:port")


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"STREAMCHAT_STORE_URL": "postgres://localhost"}, "STREAMCHAT_STORE_URL must be"),
        ({"STREAMCHAT_STORE_URL": "sqlite:////no/such/folder/log.db"}, "which is no folder"),
        ({"STREAMCHAT_STORE_URL": "redis://localhost:port"}, "STREAMCHAT_STORE_URL cannot be used"),
        ({"STREAMCHAT_TOKENS_PER_DAY": "1000"}, "STREAMCHAT_TOKENS_PER_DAY needs STREAMCHAT_STORE_URL"),
        ({"STREAMCHAT_ON_DISCONNECT": "30"}, "STREAMCHAT_ON_DISCONNECT needs STREAMCHAT_STORE_URL"),
        ({"STREAMCHAT_ON_DISCONNECT": "wait"}, 'must be "cancel", "finish" or a number'),
    ],
)
def test_a_server_is_told_before_it_forks(
    environ: Mapping[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-nobody")
    check_environ(ENVIRON)
    with pytest.raises(SettingsError, match=named) as caught:
        check_environ({**ENVIRON, **environ})
    assert "\n" not in caught.value.detail
