"""gunicorn starts wsgi.py, or ends at once and says in one sentence why; what a start adapts it says, too."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
import requests

from tests.fake_upstream import FakeUpstream, Hang, head, text
from tests.live.readers import PATH, SSE, TEXT, by_http_client, head_of, question
from tests.live.servers import ROOT, Server, environment, free_port, gunicorn, wait_for

pytestmark = pytest.mark.live

BASE_URL = "http://127.0.0.1:9/v1"  # nothing asks it: these servers do not start
START_SECONDS = 8.0

# What is set, and the one sentence.
NOBODY = "Nobody is asked who they are: pass authorize=..., or set STREAMCHAT_TOKENS, or set STREAMCHAT_PUBLIC to true."
NOWHERE = (
    "No upstream is named: set OPENAI_API_KEY, or OPENAI_BASE_URL for a server of your own, or pass client_factory."
)
REFUSALS: dict[str, tuple[Mapping[str, str], str]] = {
    "nobody is asked who they are": (
        {"STREAMCHAT_PUBLIC": ""},
        NOBODY,
    ),
    "public is false": (
        {"STREAMCHAT_PUBLIC": "false"},
        NOBODY,
    ),
    "no upstream": (
        {"OPENAI_API_KEY": "", "OPENAI_BASE_URL": ""},
        NOWHERE,
    ),
    "a key with a line break": (
        {"OPENAI_API_KEY": "sk-canary-0123456789\r"},
        "OPENAI_API_KEY holds a space, a line break or a character that no key has; check where it is set.",
    ),
    "a bad setting": (
        {"STREAMCHAT_IDLE_TIMEOUT": "-1"},
        "STREAMCHAT_IDLE_TIMEOUT must be a number of seconds from 0.01 to 86400, not -1.",
    ),
    "a setting that is not JSON": (
        {"STREAMCHAT_MODELS": "gpt-4.1"},
        """STREAMCHAT_MODELS must be JSON, such as ["a", "b"], not 'gpt-4.1'.""",
    ),
    "a bad grace": (
        {"STREAMCHAT_GRACE": "soon"},
        "STREAMCHAT_GRACE must be a number of seconds from 1 to 86400, not 'soon'.",
    ),
    "an unknown setting": (
        {"STREAMCHAT_IDEL_TIMEOUT": "5"},
        "STREAMCHAT_IDEL_TIMEOUT is not a setting; did you mean STREAMCHAT_IDLE_TIMEOUT?",
    ),
    "a log in no folder": (
        {"STREAMCHAT_STORE_URL": "sqlite:////no/such/folder/log.db"},
        "STREAMCHAT_STORE_URL names a file in /no/such/folder, which is no folder: make it, or name another.",
    ),
    "a log of no kind that is known": (
        {"STREAMCHAT_STORE_URL": "postgres://user:canary@localhost"},
        "STREAMCHAT_STORE_URL must be sqlite:///path, redis://host or memory://, not its value.",
    ),
    "a budget that nobody counts": (
        {"STREAMCHAT_TOKENS_PER_DAY": "1000"},
        "STREAMCHAT_TOKENS_PER_DAY needs STREAMCHAT_STORE_URL, such as sqlite:///streamchat.db.",
    ),
    "secret tokens": (
        {"STREAMCHAT_TOKENS": '{"shop": "geheim wort"}'},
        "STREAMCHAT_TOKENS must hold tokens of printable ASCII without spaces, not its value.",
    ),
}


def start(arguments: list[str], environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a server that is to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=dict(environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )


@pytest.mark.parametrize("preload", [(), ("--preload",)], ids=["", "preload"])
@pytest.mark.parametrize("name", REFUSALS)
def test_gunicorn_refuses_a_bad_start_once_in_one_sentence(name: str, preload: tuple[str, ...]) -> None:
    changes, sentence = REFUSALS[name]
    bind = ["-b", f"127.0.0.1:{free_port()}", "-w", "2"]
    arguments = ["gunicorn", "-c", "conf/gunicorn.conf.py", *bind, *preload, "wsgi:app"]
    ended = start(arguments, environment(BASE_URL) | dict(changes))
    assert ended.returncode != 0
    assert ended.stdout.count(sentence) == 1, ended.stdout
    assert "Traceback" not in ended.stdout
    assert "Booting worker" not in ended.stdout
    lines = [line for line in ended.stdout.splitlines() if " INFO gunicorn.error: " not in line]
    assert lines == [f"streamchat cannot start: {sentence}"]
    assert "canary" not in ended.stdout and "geheim" not in ended.stdout


def test_the_grace_is_read_from_the_environment(tmp_path: Path) -> None:
    with gunicorn(BASE_URL, tmp_path, grace="2.5") as server:
        server.terminate()
        began = time.monotonic()
        assert server.process.wait(5) == 0
        assert time.monotonic() - began < 3.5


def test_the_line_of_an_answer_is_seen_in_gunicorns_log(tmp_path: Path) -> None:
    with FakeUpstream() as upstream, gunicorn(upstream.base_url, tmp_path) as server:
        seen = by_http_client(server.port, "hi", TEXT)
        wait_for(lambda: len(server.records()) == 1, what="the record")
    (record,) = server.records()
    assert record["id"] == seen.headers["X-Response-Id"]
    assert (record["outcome"], record["finish_reason"], record["upstream_status"]) == ("completed", "stop", "200")
    assert (record["input_tokens"], record["output_tokens"], record["estimated"]) == ("19", "10", "False")
    assert " INFO streamchat: answer {" in server.log


def test_preload_works(tmp_path: Path) -> None:
    with FakeUpstream() as upstream, gunicorn(upstream.base_url, tmp_path, "--preload", "-w", "2") as server:
        wait_for(lambda: len(server.workers()) == 2, what="two workers")
        for _ in range(8):
            seen = by_http_client(server.port, "hi", TEXT)
            assert (seen.status, seen.body, seen.whole) == (200, b"Hello, world!", True)
    assert "Traceback" not in server.log and "ERROR" not in server.log and "Warning" not in server.log


@pytest.mark.parametrize("tokens", ['{"shop": "t0ken"}', '["t0ken", "other"]'], ids=["named", "listed"])
def test_a_token_is_asked_for_where_tokens_are_set(tmp_path: Path, tokens: str) -> None:
    with FakeUpstream() as upstream, gunicorn(upstream.base_url, tmp_path, public="", tokens=tokens) as server:
        url = server.url + PATH
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic t0ken"}):
            refused = requests.post(url, json={"message": "hi"}, headers=headers, timeout=10)
            assert (refused.status_code, refused.json()["code"]) == (401, "unauthorized")
            assert refused.headers["WWW-Authenticate"] == "Bearer"
        assert upstream.requests == []
        allowed = requests.post(url, json={"message": "hi"}, headers={"Authorization": "Bearer t0ken"}, timeout=10)
        assert (allowed.status_code, allowed.text) == (200, "Hello, world!")
        wait_for(lambda: len(server.records()) == 1, what="the record")
    (record,) = server.records()
    user = record["user"]
    assert user == "shop" if "shop" in tokens else re.fullmatch("token-[0-9a-f]{8}", user)
    assert "t0ken" not in server.log


WARNING = re.compile(r" WARNING .*: The limit of (\d+) open files allows (\d+) connections a worker, not (\d+)")


def soft_and_hard(pid: int) -> list[str]:
    """The limits of open files of a process."""
    (line,) = re.findall(r"Max open files +(\d+) +(\d+)", Path(f"/proc/{pid}/limits").read_text())
    return list(line)


def test_the_soft_limit_of_open_files_is_raised_to_the_hard_one(tmp_path: Path) -> None:
    with gunicorn(BASE_URL, tmp_path, files="256 4096") as server:
        assert soft_and_hard(server.workers()[0]) == ["4096", "4096"]
    assert WARNING.findall(server.log) == []


@pytest.mark.parametrize("workers", ["1", "2"])
def test_too_few_open_files_lower_the_connections_with_one_warning(tmp_path: Path, workers: str) -> None:
    with FakeUpstream() as upstream:
        upstream.script = [head(), text("Hel"), Hang()]
        with gunicorn(upstream.base_url, tmp_path, "-w", workers, files="64 296") as server, ExitStack() as stack:
            wait_for(lambda: len(server.workers()) == int(workers), what="the workers")
            assert {tuple(soft_and_hard(pid)) for pid in server.workers()} == {("296", "296")}
            assert WARNING.findall(server.log) == [("296", "20", "1000")]
            if workers == "1":
                assert_takes_nine_tenths(server, stack, 20)
    assert WARNING.findall(server.log) == [("296", "20", "1000")]
    assert "ERROR" not in server.log


def assert_takes_nine_tenths(server: Server, stack: ExitStack, connections: int) -> None:
    """So many answers run at a time, and whoever comes then is told so at once."""
    answers = connections * 9 // 10
    for _ in range(answers):
        caller = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=10))
        caller.sendall(head_of(question("hi"), SSE))
        assert b" 200 OK" in caller.recv(65536)
    refused = by_http_client(server.port, "hi", SSE)
    assert (refused.status, refused.document["code"], refused.headers["Retry-After"]) == (503, "overloaded", "5")


def test_flask_run_refuses_a_bad_start_too() -> None:
    ended = start(["flask", "--app", "wsgi:app", "run", "-p", str(free_port())], environment(BASE_URL, public=""))
    assert ended.returncode != 0
    assert "Nobody is asked who they are" in ended.stdout
