"""The documents are true: their tables are the code's, their links lead somewhere, their programs run.

`python -m tests.test_docs` makes the generated parts anew, those of README.md too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from bench import scale
from streamchat import Record, StreamChat, StreamChatError, create_blueprint
from streamchat.checks import PARAMS
from streamchat.cli import commands
from streamchat.encoders import ENCODERS
from streamchat.ledger import FIELDS
from streamchat.schema import CONTEXT_BYTES, _Body
from streamchat.settings import TABLE, Settings, key
from streamchat.sqlite_schema import MIGRATIONS
from tests import tables
from tests.documents import (
    DOCS,
    README,
    ROOT,
    anchors,
    app_of,
    blocks,
    closing_mounts,
    dead_links,
    documents,
    filled,
    links,
    made_parts,
    prose,
    read,
    run,
)
from tests.fake_upstream import FakeUpstream, answer
from tests.shop import KEY, serve

MAKERS: dict[str, Callable[[], str]] = {
    "settings": tables.settings_table,
    "errors": tables.errors_table,
    "allsettings": tables.all_settings,
    "allerrors": tables.all_errors,
    "events": tables.events_table,
    "whole": tables.whole_answer,
    "cut": tables.cut_answer,
    "routes": tables.routes_table,
    "commands": tables.commands_table,
    "machines": scale.machines_table,
}
PAGES = sorted(DOCS.glob("*.md"))
ALL = "".join(page.read_text() for page in PAGES)


def generated() -> list[tuple[Path, str]]:
    """Documents, and the names of their parts that are made from code."""
    return [(page, name) for page in documents() for name in made_parts(page.read_text()) if name in MAKERS]


# --- what is generated, and what must be there --------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "name"), [pytest.param(*each, id=f"{each[0].name}-{each[1]}") for each in generated()]
)
def test_a_generated_part_is_what_the_code_says(page: Path, name: str) -> None:
    assert made_parts(page.read_text())[name] == MAKERS[name](), "run: python -m tests.test_docs"


def test_each_table_of_the_code_stands_in_a_document() -> None:
    assert {name for _, name in generated()} == set(MAKERS)


def test_each_setting_stands_in_a_page_and_each_that_a_page_names_is_one() -> None:
    named = set(re.findall(r"\bSTREAMCHAT_[A-Z_]*[A-Z]\b", ALL))
    assert named == {key(name) for name in TABLE}


def test_each_error_code_has_its_advice() -> None:
    codes = [kind.code for kind in tables.error_kinds()]
    assert sorted(codes) == sorted(set(codes)) == sorted(tables.ADVICE)
    assert {kind.code for kind in tables.leaves(StreamChatError)} <= set(re.findall(r"`(\w+)`", ALL))


def test_each_type_of_event_is_described() -> None:
    described = re.findall(r"^\| `(\w+)` \|", made_parts(read("formats.md"))["events"], re.MULTILINE)
    assert described == [kind.type for kind in tables.event_kinds()]


def test_each_route_is_described() -> None:
    assert set(tables.rules()) <= set(tables.ROUTES)


def test_each_command_and_each_of_its_options_is_described() -> None:
    assert commands.commands
    for name, command in commands.commands.items():
        assert f"flask streamchat {name}" in ALL
        for option in (option for each in command.params for option in each.opts if option.startswith("-")):
            assert option in ALL


def test_each_field_of_a_request_and_of_a_record_is_described() -> None:
    formats, mount = read("formats.md"), read("mount.md")
    assert all(f"`{name}`" in formats for name in _Body.model_fields)
    assert all(f"`{name}`" in formats for name in (*PARAMS, *ENCODERS))
    assert f"at most {CONTEXT_BYTES >> 10} KB" in formats
    assert all(f"`{name}`" in mount for name in FIELDS)


def test_each_hook_is_described() -> None:
    hooks = set(create_blueprint.__kwdefaults__ or ()) - {"page", "decorators"}
    described = set(re.findall(r"^\| `(\w+)\(", read("mount.md"), re.MULTILINE))
    assert described == hooks


def test_the_numbers_of_the_pages_are_the_codes() -> None:
    settings, deploy = Settings(), read("deploy.md")
    assert f"TimeoutStopSec={settings.grace + 30:.0f}" in deploy
    assert f"`STREAMCHAT_GRACE` ({settings.grace:.0f} s)" in deploy
    assert f"`STREAMCHAT_MAX_STREAMS` ({settings.max_streams})" in deploy
    assert f"This release writes version {len(MIGRATIONS)}." in read("upgrade.md")
    assert f"`STREAMCHAT_STATUS_HOLD` ({settings.status_hold:.0f} s) at most" in read("formats.md")


def test_the_page_of_scale_reckons_with_the_results_of_the_bench() -> None:
    results, page, measured = (ROOT / "bench" / "RESULTS.md").read_text(), read("scale.md"), scale.Measured()
    figures = {
        row[0]: [float(re.split("[* ]", cell)[0]) for cell in (row[1], row[6])]
        for row in (
            line.strip("| ").split(" | ") for line in results.splitlines() if re.match(r"\| [^|]+ \| [\d.*]+ \(", line)
        )
    }
    piece, request = figures["streamchat as shipped"]
    relay, _ = figures["nginx alone, undecoded (a limit)"]
    assert (measured.piece * 1e6, measured.request * 1e3, measured.relay * 1e6) == pytest.approx(
        (piece, request, relay)
    )
    for words in (f"{piece:.0f} µs", f"{request:.2f} ms", f"{relay:.0f} µs"):
        assert f"| {words} |" in page


def test_the_unit_and_the_image_name_files_that_are_there() -> None:
    page = read("deploy.md")
    (image,) = blocks(page, "dockerfile")
    named = re.findall(r"^COPY (\S+)", image, re.MULTILINE) + re.findall(r"`(conf/\S+\.service)`", page)
    assert len(named) > 2 and all((ROOT / name).exists() for name in named)


def test_the_lines_for_nginx_are_a_configuration(tmp_path: Path) -> None:
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    assert program, "nginx is missing: install Debian's package nginx-light"
    (location,), (servers,) = blocks(read("deploy.md"), "nginx"), blocks(read("scale.md"), "nginx")
    http = f"access_log off; {servers} server {{ listen 127.0.0.1:1; {location} }}"
    whole = f"pid {tmp_path}/pid; events {{}} http {{ {http} }}"
    (tmp_path / "nginx.conf").write_text(whole)
    command = [program, "-t", "-e", f"{tmp_path}/error.log", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
    tested = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert tested.returncode == 0, tested.stderr


# --- pages and links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", documents(), ids=lambda page: page.name)
def test_no_link_leads_nowhere(page: Path) -> None:
    dead = list(dead_links(page))
    assert not dead


def test_the_contents_lead_to_every_page() -> None:
    here = {page.name for page in PAGES} - {"README.md"}
    assert set(links(read("README.md"))) == here


def test_the_readme_leads_to_the_contents() -> None:
    assert "docs/README.md" in links(README.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_begins_with_its_title_and_a_sentence(page: Path) -> None:
    assert re.match(r"# \S.*\n\n[A-Z`][^|]*?\.\s", page.read_text())


def test_a_dead_link_and_a_dead_anchor_are_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# One `two`, three\n\n## Twice\n\n## Twice\n")
    page = tmp_path / "a.md"
    page.write_text(
        "[1](b.md#one-two-three) [2](b.md#twice-1) [3](b.md#no) [4](c.md) [5](https://x.example) `[6](d.md)`"
    )
    assert list(dead_links(page)) == ["b.md#no", "c.md"]
    assert anchors("# It's a *b*\n") == {"its-a-b"}
    assert "[6]" not in prose(page.read_text())


# --- programs -----------------------------------------------------------------------------------------------


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        server.script = answer(["Hello, ", "world!"])
        yield server


def ask(client: FlaskClient, url: str = "/api/get-response", **headers: str) -> tuple[int, str]:
    """`headers`: an underscore for each dash."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    question = {"message": "hi", "context": {"topic": "orders"}}
    response = client.post(url, json=question, headers=named)
    return response.status_code, response.text


WHOLE = (200, "Hello, world!")


def code_of(told: tuple[int, str]) -> tuple[int, str]:
    return told[0], json.loads(told[1])["code"]


@contextmanager
def opened(block: str, page: str, **known: Any) -> Iterator[FlaskClient]:
    with closing_mounts(app_of(block, page, **known)) as app:
        yield app.test_client()


class Case:
    """What is told to a program of a page: the names that it finds, and what is asked of its app."""

    def __init__(self, page: str, block: str, upstream: FakeUpstream, output: pytest.CaptureFixture[str]) -> None:
        self.page, self.block, self.upstream, self.output = page, block, upstream, output

    def opened(self, **known: Any) -> Any:
        return opened(self.block, self.page, **known)


def a_first_app(case: Case) -> None:
    with case.opened() as client:
        assert ask(client) == WHOLE
        assert client.get("/").status_code == 200


def a_reader(case: Case) -> None:
    app = Flask("shop")
    StreamChat(app, public=True)
    with closing_mounts(app), serve(app) as port:
        run(case.block, case.page, ADDRESS=f"http://127.0.0.1:{port}")
    assert case.output.readouterr().out == "Hello, world!"


def an_app_with_sessions(case: Case) -> None:
    with case.opened() as client:
        assert code_of(ask(client)) == (401, "unauthorized")
        with client.session_transaction() as session:
            session["user_id"] = "ann"
        assert ask(client) == WHOLE


def all_hooks(case: Case) -> None:
    with case.opened() as client:
        refused = ask(client, Accept_Language="de-AT")
        assert code_of(refused) == (401, "unauthorized")
        assert json.loads(refused[1])["detail"] == "Bitte melde dich an."
        assert ask(client, X_Employee="secret-of-ann") == WHOLE
    system, question = case.upstream.requests[0].body["messages"]
    assert (system["content"], question["content"]) == ("You help ann with orders.", "hi")


def a_pool_of_its_own(case: Case) -> None:
    names = run(case.block, case.page)
    with closing_mounts(names["app"]) as app:
        client = app.test_client()
        assert code_of(ask(client)) == (401, "unauthorized")
        with app.app_context():
            assert names["database"]() is names["database"]()
            names["give_back"]()
            assert "database" not in names["g"]
        assert ask(client, X_Employee="ann") == WHOLE


def two_mounts(case: Case) -> None:
    with case.opened() as client:
        assert set(client.application.extensions["streamchat"]) == {"visitors", "staff"}
        assert ask(client, "/help/get-response") == WHOLE
        assert code_of(ask(client, "/staff/get-response")) == (401, "unauthorized")
        assert ask(client, "/staff/get-response", Authorization="Bearer a-long-random-token") == WHOLE
        assert client.get("/staff/v1/models").status_code == 401
        assert client.get("/help/v1/models").status_code == 404
    visitor, employee = (request.body for request in case.upstream.requests)
    assert (visitor["model"], employee["model"]) == ("gpt-4.1-mini", "gpt-4.1")
    assert visitor["messages"][0]["content"] == "You help customers of the shop."


def a_decorator(case: Case) -> None:
    with case.opened() as client:
        assert code_of(ask(client, X_Today="Sunday")) == (503, "closed")
        assert client.get("/api/healthz", headers={"X-Today": "Sunday"}).status_code == 200
        assert ask(client) == WHOLE


def signals_and_ids(case: Case) -> None:
    names = run(case.block, case.page)
    with closing_mounts(names["app"]) as app:
        seen: list[Record] = []
        names["answer_finished"].connect(lambda _, record: seen.append(record), app, weak=False)
        with app.test_client().post("/api/get-response", json={"message": "hi"}) as response:
            assert list(names["open_answers"].values()) == ["gpt-4.1-mini"]
            assert response.headers["X-Response-Id"] in names["open_answers"]
            assert response.get_data(as_text=True) == "Hello, world!"
        assert not names["open_answers"]
        assert [record.id.startswith("shop-") for record in seen] == [True]


def the_environment(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMCHAT_PUBLIC", "true")
        patch.setenv("STREAMCHAT_MODELS", '["m2"]')
        with case.opened() as client:
            assert ask(client) == WHOLE
            assert client.application.extensions["streamchat"]["streamchat"].settings.models == ("m2",)


def the_page(path: str) -> Callable[[Case], None]:
    def check(case: Case) -> None:
        app = Flask("shop")
        known = {"app": app, "authorize": lambda request: "ann"}
        known |= {"create_blueprint": create_blueprint, "StreamChat": StreamChat}
        with case.opened(**known) as client:
            assert client.get(path).status_code == 200

    return check


# What is asked of each program, in the order of its page.
CASES: dict[str, list[Callable[[Case], None]]] = {
    "browser.md": [the_page("/chat/"), the_page("/help")],
    "mount.md": [all_hooks, a_pool_of_its_own, two_mounts, a_decorator, signals_and_ids],
    "settings.md": [the_environment],
    "start.md": [a_first_app, a_reader, an_app_with_sessions],
}
# Whose programs other tests run.
ELSEWHERE = {
    "README.md": "test_readme.py",
    "carriers.md": "test_carrier_docs.py",
    "clients.md": "clients/test_docs.py",
    "limits.md": "test_log_docs.py",
    "neighbours.md": "neighbours/test_neighbours_docs.py",
    "operations.md": "test_operations_docs.py",
    "recipes.md": "test_recipes.py",
    "webhooks.md": "test_webhook_docs.py",
}


@pytest.mark.parametrize(
    ("page", "block", "check"),
    [
        pytest.param(page, block, check, id=f"{page}-{check.__name__}")
        for page, checks in CASES.items()
        for block, check in zip(blocks(read(page)), checks, strict=True)
    ],
)
def test_a_program_of_a_page_does_what_it_says(
    page: str, block: str, check: Callable[[Case], None], upstream: FakeUpstream, capsys: pytest.CaptureFixture[str]
) -> None:
    check(Case(page, block, upstream, capsys))


def test_no_page_has_programs_that_no_test_runs() -> None:
    with_programs = {page.name for page in [README, *PAGES] if blocks(page.read_text()) and page != DOCS / "README.md"}
    assert with_programs == set(CASES) | set(ELSEWHERE)
    for page, test in ELSEWHERE.items():
        text = (ROOT / "tests" / test).read_text()
        assert page in text or page == "README.md"
        assert "blocks(" in text


if __name__ == "__main__":
    for document in documents():
        before = document.read_text()
        if (after := filled(before, MAKERS)) != before:
            document.write_text(after)
            print(document.relative_to(ROOT))
