"""docs/webhooks.md is true: its receiver takes what a courier brings, and its table is the schedule."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import pytest

from streamchat.attempts import PAUSES
from streamchat.delivery import SECONDS, Courier
from streamchat.pinned_connection import REPLY_BYTES
from streamchat.webhooks import EVENTS, TOLERANCE, Message, compose, new_secret, sign
from tests.documents import app_of, blocks, read
from tests.shop import serve

TEXT = read("webhooks.md")
(RECEIVER,) = blocks(TEXT)
OLD, NEW = new_secret(), new_secret()


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("WEBHOOK_SECRETS", f"{OLD} {NEW}")
    with serve(app_of(RECEIVER, "webhooks.md")) as port:
        yield f"http://127.0.0.1:{port}/hook"


def deliver(url: str, message: Message, *secrets: str, now: float | None = None) -> int | None:
    headers = sign(message, secrets, time.time() if now is None else now)
    return Courier(loopback=True).post(url, headers, message.body).status


def test_the_receiver_takes_each_event_once_while_secrets_are_rotated(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, secrets in enumerate([(OLD,), (NEW,), (OLD, NEW), (NEW, OLD)]):
        message = compose(f"msg_{number}", EVENTS[number], time.time(), {"id": f"resp_{number}"})
        assert deliver(url, message, *secrets) == 204
        assert deliver(url, message, *secrets) == 204
    assert capsys.readouterr().out.splitlines() == [f"{EVENTS[n]} resp_{n}" for n in range(4)]


def test_the_receiver_answers_400_to_what_is_forged_or_old(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = compose("msg_1", EVENTS[0], time.time(), {"id": "resp_1"})
    assert deliver(url, message, new_secret()) == 400
    assert deliver(url, message, OLD, now=time.time() - TOLERANCE - 1) == 400
    assert capsys.readouterr().out == ""


def test_the_example_is_what_is_sent() -> None:
    example = blocks(TEXT, "json")[0].rstrip()
    event = json.loads(example)
    assert compose("msg_1", event["type"], 1_790_000_000, event["data"]).body.decode() == example
    assert set(re.findall(r"`(response\.\w+)`", TEXT)) == set(EVENTS)


UNITS = {"s": 1, "min": 60, "h": 3600}


def test_the_table_is_the_schedule() -> None:
    rows = re.findall(r"^\| (\d+) \| (?:at once|(\d+) (\w+)) \|$", TEXT, re.MULTILINE)
    assert [int(row[0]) for row in rows] == list(range(1, len(PAUSES) + 1))
    assert tuple(int(count) * UNITS[unit] if count else 0 for _, count, unit in rows) == PAUSES


def test_the_numbers_in_the_text_are_the_codes() -> None:
    assert (SECONDS, REPLY_BYTES, TOLERANCE) == (10, 64 * 1024, 5 * 60)
    for words in ("within 10 seconds", "64 KiB", "5 minutes"):
        assert words in TEXT
