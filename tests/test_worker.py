"""Which blueprints a worker process works for, and what it says where there is none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from streamchat import StreamChat
from streamchat.errors import SettingsError
from streamchat.worker import command, workers_of
from tests.shop import KEY

ROOT = Path(__file__).parent.parent


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Flask]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    app = Flask("shop")
    kept: dict[str, Any] = {"public": True, "store_url": f"sqlite:///{tmp_path}/log.db"}
    StreamChat(app, name="live", url_prefix="/live", **kept)
    StreamChat(app, name="jobs", url_prefix="/jobs", background=True, **kept)
    StreamChat(app, name="other", url_prefix="/other", background=True, **kept)
    yield app
    for mount in app.extensions["streamchat"].values():
        mount.close()


def names(app: Flask, *chosen: str) -> list[str]:
    return [mount.name for mount in workers_of(app, chosen)]


def test_a_worker_works_for_each_blueprint_that_takes_background_answers(app: Flask) -> None:
    assert names(app) == ["jobs", "other"]


def test_a_worker_may_be_for_one_blueprint_alone(app: Flask) -> None:
    assert names(app, "other") == ["other"]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (("nobody",), "no blueprint nobody; there is: live, jobs, other"),
        (("jobs", "nobody"), "no blueprint nobody"),
        (("live",), "live takes no background answers: set STREAMCHAT_BACKGROUND"),
    ],
)
def test_what_cannot_be_worked_for_is_said(app: Flask, chosen: tuple[str, ...], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        names(app, *chosen)


def test_an_app_without_background_answers_is_told_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    app = Flask("shop")
    with pytest.raises(SettingsError, match="STREAMCHAT_BACKGROUND"):
        names(app)
    StreamChat(app, public=True)
    with pytest.raises(SettingsError, match="STREAMCHAT_BACKGROUND"):
        names(app)


@pytest.mark.parametrize("words", [[], ["--mount", "nobody"]])
def test_a_worker_that_cannot_start_says_so_in_one_line(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "shop.py").write_text(
        "from flask import Flask\nfrom streamchat import StreamChat\n"
        "app = Flask('shop')\nStreamChat(app, public=True)\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "OPENAI_API_KEY": KEY, "PATH": "/usr/bin:/bin"}
    started = [sys.executable, "-m", "flask", "--app", "shop", "streamchat", "worker", *words]
    ended = subprocess.run(started, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stderr.startswith("streamchat's worker cannot start: ")
    assert len(ended.stderr.splitlines()) == 1


def test_the_command_names_app_and_blueprints() -> None:
    python, _, code, *words = command("shop:make()", ["a", "b"])
    assert python == sys.executable
    assert code.startswith("from gevent import monkey; monkey.patch_all();")
    assert words == ["--app", "shop:make()", "--mount", "a", "--mount", "b"]
    assert command(None, [])[3:] == []
