"""docs/resume.md and docs/limits.md are true: commands are run, the Python answers, the table is the code's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ops.serve import ON_DISCONNECT
from streamchat import lease, log, sheet
from streamchat.encoders import SseEncoder
from streamchat.settings import TABLE, Settings, key
from streamchat.spending import table
from streamchat.store import Spent
from tests.documents import ROOT, app_of, blocks, made_parts, read
from tests.fake_upstream import FakeUpstream, answer
from tests.shop import Shop, open_shop, serve

RESUME, LIMITS = read("resume.md"), read("limits.md")
COMMANDS, BLOCKS = blocks(RESUME, "sh"), blocks(LIMITS)
BETWEEN = "--8<--\n"
SUMS = [Spent("", 1, 0, 9, 0, 1), Spent("ann", 41, 39, 18_204, 30_122, 2), Spent("bob", 3, 3, 512, 1_730, 0)]


@pytest.fixture
def upstream(upstream: FakeUpstream) -> FakeUpstream:
    upstream.script = answer(["Hello, ", "world!"])
    return upstream


def run_all(commands: list[str], address: str, folder: Path) -> list[str]:
    """What each command prints, in one shell as a reader of the page has it."""
    assert shutil.which("curl"), "curl is missing: install Debian's package curl"
    script = f"printf '%s' '{BETWEEN}'\n".join(["set -eu\n", *commands])
    environ = {"PATH": os.environ["PATH"], "ADDRESS": address}
    run = subprocess.run(["bash", "-c", script], cwd=folder, env=environ, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout.split(BETWEEN)[1:]


def test_the_commands_of_the_page_do_what_it_says(upstream: FakeUpstream, tmp_path: Path) -> None:
    with open_shop(store_url=f"sqlite:///{tmp_path}/log.db") as shop, serve(shop.app) as port:
        told = run_all(COMMANDS, f"http://127.0.0.1:{port}", tmp_path)
        shop.wait_records(2)
    asked, kept, ndjson, sse, ended, chat, cancelled, once, mismatch = told
    assert asked == "Hello, world!"
    document = json.loads(kept)
    usage = {"input_tokens": 19, "output_tokens": 10, "total_tokens": 29, "estimated": False}
    assert document | {"id": "", "model": "", "created_at": 0} == {
        "id": "",
        "status": "completed",
        "model": "",
        "created_at": 0,
        "text": "Hello, world!",
        "finish_reason": "stop",
        "usage": usage,
        "error": None,
    }
    assert [json.loads(line)["seq"] for line in ndjson.splitlines()] == [2, 3]
    assert re.findall(r"^id: (.*)$", sse, re.MULTILINE) == ["2", "3"]
    assert (ended, chat) == ("204\n", "204\n")
    assert json.loads(cancelled) == document
    assert once == "Hello, world! asked\nHello, world!Idempotency-Replayed: true\n"
    assert json.loads(mismatch)["code"] == "idempotency_mismatch"
    assert len(upstream.requests) == 2


def test_other_formats_and_a_missing_log_are_as_the_page_says(upstream: FakeUpstream, tmp_path: Path) -> None:
    with open_shop(store_url="memory://") as shop, serve(shop.app) as port:
        id = shop.ask().headers["X-Response-Id"]
        whole = f'curl -s "$ADDRESS/api/responses/{id}/stream" -H "Accept: application/json"\n'
        text = f'curl -s "$ADDRESS/api/responses/{id}/stream"\n'
        first, second = run_all([whole, text], f"http://127.0.0.1:{port}", tmp_path)
    assert (json.loads(first)["text"], second) == ("Hello, world!", "Hello, world!")
    with open_shop() as shop, serve(shop.app) as port:
        (refused,) = run_all(['curl -s "$ADDRESS/api/responses/resp_1"\n'], f"http://127.0.0.1:{port}", tmp_path)
    assert "STREAMCHAT_STORE_URL" in json.loads(refused)["detail"]


def test_a_backup_as_the_page_makes_it_has_the_answers_and_the_files_are_those_it_names(
    upstream: FakeUpstream, tmp_path: Path
) -> None:
    command = re.search(r'`python (-m apsw) log.db "(.*?) copy.db"`', RESUME)
    assert command
    with open_shop(store_url=f"sqlite:///{tmp_path}/log.db") as shop:
        id = shop.ask().headers["X-Response-Id"]
        names = {file.name for file in tmp_path.iterdir()}
        arguments = [sys.executable, *command[1].split(), "log.db", f"{command[2]} copy.db"]
        subprocess.run(arguments, cwd=tmp_path, check=True, capture_output=True, timeout=30)
    named = re.search(r"made with mode 0600\. (.*) beside it", RESUME)
    assert named
    assert names == {"log.db"} | {f"log.db{end}" for end in re.findall(r"`(-\w+)`", named[1])}
    with open_shop(store_url=f"sqlite:///{tmp_path}/copy.db") as shop:
        assert json.loads(shop.app.test_client().get(f"/api/responses/{id}").data)["text"] == "Hello, world!"


def test_the_table_of_the_page_is_what_the_command_prints() -> None:
    lines = ["# streamchat, since 2026-11-01 00:00 UTC", *table("user", SUMS).splitlines()]
    assert made_parts(LIMITS)["usage"] == "\n".join(f"    {line}" for line in lines)


@pytest.mark.parametrize("page", [RESUME, LIMITS], ids=["resume", "limits"])
def test_every_setting_that_a_page_names_is_one(page: str) -> None:
    named = set(re.findall(r"\bSTREAMCHAT_[A-Z_]+\b", page))
    assert named and named <= {key(name) for name in TABLE}


def test_flask_limiter_counts_questions_and_nothing_else(upstream: FakeUpstream) -> None:
    (block,) = BLOCKS
    app = app_of(block.replace("20/minute", "3/minute"), "limits.md")
    shop = Shop(app)
    client = app.test_client()
    question = {"message": "hi"}
    ui = {"messages": [{"id": "1", "role": "user", "parts": [{"type": "text", "text": "hi"}]}]}

    def become(user: str) -> None:
        with client.session_transaction() as session:
            session["user_id"] = user

    become("ann")
    asked = [client.post("/api/get-response", json=question).status_code for _ in range(2)]
    asked.append(client.post("/api/chat", json=ui).status_code)
    assert asked == [200, 200, 200]
    refused = client.post("/api/get-response", json=question)
    assert (refused.status_code, refused.mimetype) == (429, "application/json")
    assert 0 < int(refused.headers["Retry-After"]) <= 60
    assert refused.headers["X-Response-Id"]
    assert json.loads(refused.data)["code"] == "too_many_requests"
    assert client.post("/api/chat", json=ui).status_code == 429
    # Nothing else is refused: stopping, reading again, preflights, health.
    assert [client.post("/api/responses/resp_1/cancel").status_code for _ in range(4)] == [404] * 4
    assert [client.get("/api/responses/resp_1/stream").status_code for _ in range(4)] == [404] * 4
    assert client.get("/api/healthz").status_code == 200
    become("bob")
    assert client.post("/api/get-response", json=question).status_code == 200
    assert len(upstream.requests) == 4
    shop.close()


def test_the_warning_of_the_page_is_the_one_that_is_sent() -> None:
    shown = re.search(r"^ {4}event: warning\n {4}data: (\{.*\})$", RESUME, re.MULTILINE)
    assert shown
    message = json.loads(shown[1])["message"]
    assert f"event: warning\ndata: {shown[1]}\n\n".encode() == SseEncoder().warn("not_resumable", message)
    assert f'"{message}"' in (ROOT / "streamchat" / "sheet.py").read_text()


def test_the_sizes_and_times_of_the_page_are_the_code_s() -> None:
    assert log.GATHER < 0.1
    assert f"at most 100 ms or {sheet.FULL >> 10} KiB behind" in RESUME
    assert f"takes more than {sheet.HOLD * 1000:.0f} ms" in RESUME
    assert (
        f"away for {sheet.OLDEST:.0f} s, or {sheet.MOST >> 20} MiB of an answer ({log.MOST_OF_ALL >> 20} MiB" in RESUME
    )
    assert f"within STREAMCHAT_LEASE and {Settings().lease / lease.BEATS:.0f} s its readers" in RESUME
    assert f"`./serve` sets {ON_DISCONNECT} seconds" in RESUME
