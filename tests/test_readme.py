"""The README is true: its Python runs, its tables are the code's.

`python -m tests.test_readme` writes the tables anew.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from werkzeug.serving import make_server

from streamchat import errors
from streamchat.settings import TABLE, key
from tests.fake_upstream import FakeUpstream, answer

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
APPS = [block for block in BLOCKS if "Flask(" in block]
CALLERS = [block for block in BLOCKS if "requests.post" in block]


def settings_table() -> str:
    rows = [f"| `{key(each.name)}` | `{_shown(each)}` | {each.metadata['help']} |" for each in TABLE.values()]
    return "\n".join(["| key | default | |", "|---|---|---|", *rows])


def _shown(setting: Any) -> str:
    return json.dumps(list(setting.default) if isinstance(setting.default, tuple) else setting.default)


def errors_table() -> str:
    # Of a code that several classes share, the first met: the general one, whose children say the same more exactly.
    kinds = {kind.code: kind for kind in reversed(list(_leaves(errors.StreamChatError)))}
    told = [kind for kind in sorted(kinds.values(), key=lambda kind: (kind.status, kind.code)) if kind.status != 499]
    rows = [f"| `{kind.code}` | {kind.status} | {'yes' if kind.retryable else 'no'} | {kind.text} |" for kind in told]
    return "\n".join(["| code | status | try again | |", "|---|---|---|---|", *rows])


def _leaves(kind: type[errors.StreamChatError]) -> Iterator[type[errors.StreamChatError]]:
    groups = (errors.StreamChatError, errors.Refused, errors.UpstreamFailure)
    if kind not in groups and kind is not errors.SettingsError:
        yield kind
    for child in kind.__subclasses__():
        yield from _leaves(child)


TABLES = {"settings": settings_table, "errors": errors_table}


def _marked(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name} -->\n)(.*?)(<!-- /{name} -->)", re.DOTALL)


def test_each_code_stands_once_in_the_table_of_errors() -> None:
    codes = re.findall(r"^\| `(\w+)` ", errors_table(), re.MULTILINE)
    assert sorted(set(codes)) == sorted(codes)
    assert {kind.code for kind in _leaves(errors.StreamChatError) if kind.status != 499} == set(codes)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_the_readme_is_what_the_code_says(name: str) -> None:
    found = _marked(name).search(README.read_text())
    assert found is not None
    assert found[2].strip() == TABLES[name](), "run: python -m tests.test_readme"


def _served(block: str, monkeypatch: pytest.MonkeyPatch, upstream: FakeUpstream) -> Flask:
    monkeypatch.setenv("OPENAI_BASE_URL", upstream.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-readme")
    names: dict[str, Any] = {"__name__": "shop"}
    exec(compile(block, "README.md", "exec"), names)
    app = names["app"]
    assert isinstance(app, Flask)
    return app


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
        app = _served(block, monkeypatch, upstream)
        client = app.test_client()
        with client.session_transaction() if app.secret_key else _Nothing() as session:
            session["user_id"] = "ada"
        response = client.post(call[0], json={"message": "hi"}, headers=call[1])
        assert (response.status_code, response.text) == (200, "Hello!")
        _close(app)


class _Nothing(dict[str, Any]):
    def __enter__(self) -> dict[str, Any]:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


def _close(app: Flask) -> None:
    for mount in app.extensions["streamchat"].values():
        mount.close()


@pytest.mark.parametrize("block", CALLERS)
def test_each_caller_of_the_readme_reads_a_whole_answer(
    block: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeUpstream() as upstream:
        upstream.script = answer(["Hel", "lo ", "caller"])
        app = _served(APPS[3], monkeypatch, upstream)
        with_prefix = block.replace("/api/get-response", "/short/get-response")
        server = make_server("127.0.0.1", 0, app, threaded=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            exec(compile(with_prefix, "README.md", "exec"), {"URL": f"http://127.0.0.1:{server.server_port}"})
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
            _close(app)
    assert "Hello caller" in capsys.readouterr().out


if __name__ == "__main__":
    text = README.read_text()
    for table_name, table in TABLES.items():
        text = _marked(table_name).sub(lambda found, table=table: f"{found[1]}{table()}\n{found[3]}", text)  # type: ignore[misc]
    README.write_text(text)
