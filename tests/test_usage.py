"""`flask streamchat usage` and `prune`: the ledger summed and old answers forgotten, from an operator's shell."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from flask import Flask

from streamchat import StreamChat
from streamchat.spending import as_csv, csv_rows, table
from streamchat.store import Spent
from tests.fake_upstream import FakeUpstream, answer
from tests.redis_server import RedisServer
from tests.shop import KEY, Shop, open_shop

TOKENS = {"ann": "token-of-ann", "bob": "token-of-bob"}


@contextmanager
def shop_with(url: str, **options: Any) -> Iterator[Shop]:
    """One mount that two people ask."""
    with open_shop(tokens=TOKENS, store_url=url, **options) as shop:
        yield shop


def ask(shop: Shop, user: str, times: int = 1) -> None:
    for _ in range(times):
        response = shop.ask(headers={"Authorization": f"Bearer {TOKENS[user]}"})
        assert response.status_code == 200


def run(app: Flask, *arguments: str) -> Result:
    return app.test_cli_runner().invoke(args=["streamchat", *arguments])


def printed(app: Flask, *arguments: str) -> list[str]:
    result = run(app, *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        server.script = answer(["Hello", "!"])
        yield server


@pytest.fixture
def file(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'log.db'}"


def test_the_tokens_of_each_user_stand_in_a_row_and_a_total(upstream: FakeUpstream, file: str) -> None:
    with shop_with(file) as shop:
        ask(shop, "ann", 2)
        ask(shop, "bob")
        lines = printed(shop.app, "usage")
    assert re.fullmatch(r"# streamchat, since \d{4}-\d\d-\d\d \d\d:\d\d UTC", lines[0])
    cells = [re.split(r"  +", line.strip()) for line in lines[1:]]
    assert cells == [
        ["user", "answers", "completed", "input tokens", "output tokens", "tokens"],
        ["ann", "2", "2", "38", "20", "58"],
        ["bob", "1", "1", "19", "10", "29"],
        ["total", "3", "3", "57", "30", "87"],
    ]
    assert len({len(line) for line in lines[1:]}) == 1


def test_a_log_in_redis_is_summed_alike(upstream: FakeUpstream, tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server, shop_with(server.url) as shop:
        ask(shop, "ann")
        lines = printed(shop.app, "usage", "--by", "model")
    assert [line.split()[0] for line in lines[1:]] == ["model", "gpt-4.1-mini", "total"]


def test_days_are_rows_too(upstream: FakeUpstream, file: str) -> None:
    with shop_with(file) as shop:
        before = datetime.now(UTC)
        ask(shop, "ann")
        lines = printed(shop.app, "usage", "--by", "day")
        days = {f"{at:%Y-%m-%d}" for at in (before, datetime.now(UTC))}
    assert lines[2].split()[0] in days


def test_what_was_before_the_day_does_not_count(upstream: FakeUpstream, file: str) -> None:
    with shop_with(file) as shop:
        ask(shop, "ann")
        assert len(printed(shop.app, "usage", "--since", "2026-01-01")) == 4
        assert len(printed(shop.app, "usage", "--since", "1h")) == 4
        assert printed(shop.app, "usage", "--since", "9999-12-31")[2].split() == ["total", "0", "0", "0", "0", "0"]


def test_programs_read_csv_without_totals(upstream: FakeUpstream, file: str) -> None:
    with shop_with(file) as shop:
        ask(shop, "bob")
        rows = list(csv.reader(printed(shop.app, "usage", "--csv")))
    assert rows == [
        ["blueprints", "user", "answers", "completed", "input_tokens", "output_tokens", "estimated"],
        ["streamchat", "bob", "1", "1", "19", "10", "0"],
    ]


def test_tokens_that_nobody_counted_are_marked() -> None:
    lines = table("user", [Spent("ann", 2, 1, 1000, 234, 1), Spent("bob", 1, 1, 1, 1, 0)]).splitlines()
    assert [line.split()[-1] for line in lines[:-1]] == ["tokens", "~1,234", "2", "~1,236"]
    assert lines[-1] == "~ The tokens of 1 answer are estimated: the model did not count them."


def test_no_user_id_breaks_a_row_or_commands_the_terminal() -> None:
    lines = table("user", [Spent("", 1, 1, 1, 1, 0), Spent("a\n\x1b[2Jb", 1, 1, 1, 1, 0)]).splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("(no user) ") and lines[2].startswith(r"'a\n\x1b[2Jb' ")
    names = ['a "quoted", \n one', "a\rb", "a\r\nb", "7"]
    rows = csv_rows("streamchat", "user", [Spent(name, 1, 1, 1, 1, 0) for name in (*names, "\ud800")])
    read = [row[1] for row in csv.reader(io.StringIO(as_csv(rows), newline=""))]
    assert read == ["user", *names, "\\ud800"]


def test_each_log_has_its_section_and_one_that_two_share_comes_once(upstream: FakeUpstream, tmp_path: Path) -> None:
    def build(app: Flask) -> None:
        for name, log in (("one", "a"), ("two", "b"), ("three", "a"), ("none", "")):
            url = f"sqlite:///{tmp_path}/{log}.db" if log else ""
            StreamChat(app, name=name, url_prefix=f"/{name}", public=True, store_url=url)

    with open_shop(build) as shop:
        for name in ("one", "two", "three"):
            assert shop.ask(url=f"/{name}/get-response").status_code == 200
        lines = printed(shop.app, "usage")
        assert [line.split(",")[0] for line in lines if line.startswith("#")] == ["# one three", "# two"]
        assert [line.split()[1] for line in lines if line.startswith("total")] == ["2", "1"]
        assert [row[0] for row in csv.reader(printed(shop.app, "usage", "--csv"))] == ["blueprints", "one three", "two"]
        assert printed(shop.app, "usage", "--mount", "two")[0].startswith("# two, since ")
        assert printed(shop.app, "usage", "--mount", "three")[0].startswith("# one three, since ")
        assert printed(shop.app, "prune") == ["# one three: 0 answers forgotten", "# two: 0 answers forgotten"]
        unknown = run(shop.app, "usage", "--mount", "four")
        assert (unknown.exit_code, unknown.stdout) == (1, "")
        assert unknown.stderr == "Error: There is no blueprint four; there is: one, two, three, none.\n"
        assert run(shop.app, "usage", "--mount", "none").exit_code == 1


def test_two_spellings_of_one_file_are_one_log(
    upstream: FakeUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def build(app: Flask) -> None:
        for name, path in (("one", "a.db"), ("two", f"{tmp_path}/a.db")):
            StreamChat(app, name=name, url_prefix=f"/{name}", public=True, store_url=f"sqlite:///{path}")

    with open_shop(build) as shop:
        assert shop.ask(url="/one/get-response").status_code == 200
        assert [line.split(",")[0] for line in printed(shop.app, "usage") if line.startswith("#")] == ["# one two"]


@pytest.mark.parametrize("options", [["usage"], ["usage", "--csv"], ["prune"], ["webhooks", "list"]])
def test_a_log_that_cannot_be_asked_hides_no_other(options: list[str], upstream: FakeUpstream, tmp_path: Path) -> None:
    def build(app: Flask) -> None:
        for name, url in (
            ("one", "memory://"),
            ("two", f"sqlite:///{tmp_path}/a.db"),
            ("three", "redis://127.0.0.1:9"),
        ):
            StreamChat(app, name=name, url_prefix=f"/{name}", public=True, store_url=url)

    with open_shop(build) as shop:
        assert shop.ask(url="/two/get-response").status_code == 200
        result = run(shop.app, *options)
    assert (result.exit_code, "two" in result.stdout) == (1, True)
    assert "The log of one is in the server's memory" in result.stderr
    assert "The log of three does not answer" in result.stderr


def test_old_answers_are_forgotten_and_counted_and_their_cost_is_not(upstream: FakeUpstream, file: str) -> None:
    with shop_with(file, kept_bytes=1) as shop:
        ask(shop, "ann", 2)
        assert printed(shop.app, "prune") == ["# streamchat: 2 answers forgotten"]
        assert printed(shop.app, "prune") == ["# streamchat: 0 answers forgotten"]
        assert printed(shop.app, "usage")[-1].split()[1] == "2"


@pytest.mark.parametrize("command", ["usage", "prune"])
@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("", "Error: No answers are kept: set STREAMCHAT_STORE_URL, such as sqlite:///streamchat.db."),
        (
            "memory://",
            "Error: The log of streamchat is in the server's memory: for this, STREAMCHAT_STORE_URL must name a file "
            "or a Redis.",
        ),
        ("redis://127.0.0.1:9", "Error: The log of streamchat does not answer: see STREAMCHAT_STORE_URL."),
    ],
)
def test_a_log_that_cannot_be_asked_is_said_in_one_sentence(
    url: str, sentence: str, command: str, upstream: FakeUpstream
) -> None:
    with shop_with(url) as shop:
        result = run(shop.app, command)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1] == sentence


@pytest.mark.parametrize("command", ["usage", "prune"])
def test_a_file_that_is_not_there_is_named_and_not_made(command: str, upstream: FakeUpstream, tmp_path: Path) -> None:
    file = tmp_path / "log.db"
    with shop_with(f"sqlite:///{file}") as shop:
        result = run(shop.app, command)
    assert result.exit_code == 1
    assert result.stderr.startswith(
        f"Error: The log of streamchat is not there yet: STREAMCHAT_STORE_URL names {file}. "
    )
    assert not file.exists()


@pytest.mark.parametrize("command", ["usage", "prune"])
def test_a_file_of_another_account_is_told_with_the_cure(
    command: str, upstream: FakeUpstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "log.db"
    with shop_with(f"sqlite:///{file}") as shop:
        ask(shop, "ann")
        monkeypatch.setattr("os.access", lambda *_: False)  # root may open all
        result = run(shop.app, command)
    sentence = f"The log of streamchat, {file}, may not be opened by this account: run the command as the server's."
    assert (result.exit_code, result.stderr) == (1, f"Error: {sentence}\n")


@pytest.mark.parametrize("when", ["yesterday", "2026-13-01", "7", "d", "-7d", "\u0667d"])
def test_a_time_that_is_none_is_refused_with_examples(when: str, upstream: FakeUpstream, file: str) -> None:
    with shop_with(file) as shop:
        result = run(shop.app, "usage", f"--since={when}")
    assert result.exit_code == 2
    assert "2026-11-01" in result.stderr and "24h" in result.stderr


def test_the_help_says_what_each_option_is(upstream: FakeUpstream, file: str) -> None:
    with shop_with(file) as shop:
        lists, usage, prune = (printed(shop.app, *command, "--help") for command in ((), ("usage",), ("prune",)))
    assert [line.split()[0] for line in lists if re.match(r"  [a-z]", line)] == [
        "doctor",
        "doctor-token",
        "prune",
        "settings",
        "usage",
        "webhooks",
        "worker",
    ]
    for word in ("--since WHEN", "--by [user|model|day]", "--csv", "--mount NAME", "30d", "24h"):
        assert word in "\n".join(usage)
    assert "STREAMCHAT_RETENTION" in "\n".join(prune)
