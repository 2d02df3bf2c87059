"""The README's programs run. Its tables are looked at by test_docs.py, as those of all documents."""

from __future__ import annotations

from typing import Any

import pytest
from flask import Flask

from tests.documents import README, app_of, blocks, closing_mounts, run
from tests.fake_upstream import FakeUpstream, answer
from tests.shop import serve

BLOCKS = blocks(README.read_text())
APPS = [block for block in BLOCKS if "Flask(" in block]
CALLERS = [block for block in BLOCKS if "requests.post" in block]


def _served(block: str, monkeypatch: pytest.MonkeyPatch, upstream: FakeUpstream) -> Flask:
    monkeypatch.setenv("OPENAI_BASE_URL", upstream.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-readme")
    return app_of(block, "README.md")


def test_each_program_is_an_app_or_a_caller() -> None:
    assert sorted(APPS + CALLERS) == sorted(BLOCKS)


# What a caller of each app has to send; the order is that of the README.
CALLS: list[tuple[str, dict[str, str]]] = [
    ("/api/get-response", {}),
    ("/api/get-response", {"Authorization": "Bearer a-long-random-token"}),
    ("/api/get-response", {"X-Employee": "ada"}),
    ("/short/get-response", {}),
]


@pytest.mark.parametrize(("block", "call"), list(zip(APPS, CALLS, strict=True)))
def test_each_way_in_of_the_readme_answers(
    block: str, call: tuple[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeUpstream() as upstream:
        upstream.script = answer(["Hello", "!"])
        with closing_mounts(_served(block, monkeypatch, upstream)) as app:
            client = app.test_client()
            with client.session_transaction() if app.secret_key else _Nothing() as session:
                session["user_id"] = "ada"
            response = client.post(call[0], json={"message": "hi"}, headers=call[1])
            assert (response.status_code, response.text) == (200, "Hello!")


class _Nothing(dict[str, Any]):
    def __enter__(self) -> dict[str, Any]:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


@pytest.mark.parametrize("block", CALLERS)
def test_each_caller_of_the_readme_reads_a_whole_answer(
    block: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeUpstream() as upstream:
        upstream.script = answer(["Hel", "lo ", "caller"])
        with_prefix = block.replace("/api/get-response", "/short/get-response")
        with closing_mounts(_served(APPS[3], monkeypatch, upstream)) as app, serve(app) as port:
            run(with_prefix, "README.md", URL=f"http://127.0.0.1:{port}")
    assert "Hello caller" in capsys.readouterr().out
