"""`flask streamchat ...` as an operator types it."""

from __future__ import annotations

import pytest
from flask import Flask

from streamchat import StreamChat
from streamchat.settings import TABLE, key
from tests.shop import KEY, PROMPT


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Flask:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return Flask("shop")


def shown(app: Flask) -> list[str]:
    result = app.test_cli_runner().invoke(args=["streamchat", "settings"], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output.splitlines()


def test_every_setting_is_shown_with_value_and_sentence(app: Flask) -> None:
    StreamChat(app, public=True, model="m1", models=["a", "b"])
    first, *lines = shown(app)
    assert first == "# blueprint streamchat"
    assert [line.split()[0] for line in lines] == [key(name) for name in TABLE]
    for line, setting in zip(lines, TABLE.values(), strict=True):
        assert line.endswith(setting.metadata["help"])
    assert any(line.split()[:2] == ["STREAMCHAT_MODEL", "'m1'"] for line in lines)
    assert any("STREAMCHAT_MODELS" in line and "['a', 'b']" in line for line in lines)


def test_secrets_are_not_shown(app: Flask) -> None:
    StreamChat(app, tokens={"ann": "token-of-ann"}, system_prompt=PROMPT, store_url="redis://:pass-of-redis@localhost")
    StreamChat(app, public=True, name="second", url_prefix="/second")
    output = "\n".join(shown(app))
    assert not [secret for secret in ("token-of-ann", PROMPT, KEY, "pass-of-redis") if secret in output]
    secrets = sum(setting.metadata["secret"] for setting in TABLE.values())
    assert (output.count("(set)"), output.count("(not set)")) == (3, 2 * secrets - 3)


def test_every_mount_is_shown(app: Flask) -> None:
    StreamChat(app, public=True, model="m1")
    StreamChat(app, public=True, model="m2", name="second", url_prefix="/second")
    lines = shown(app)
    assert [line for line in lines if line.startswith("#")] == ["# blueprint streamchat", "# blueprint second"]
    assert [line.split()[1] for line in lines if line.startswith("STREAMCHAT_MODEL ")] == ["'m1'", "'m2'"]


def test_the_commands_have_help(app: Flask) -> None:
    StreamChat(app, public=True)
    result = app.test_cli_runner().invoke(args=["streamchat", "--help"])
    assert result.exit_code == 0
    assert "settings" in result.output
