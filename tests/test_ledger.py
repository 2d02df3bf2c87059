"""The one record of an answer: a value, a signal, one line of the log."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

import pytest

from streamchat import ledger
from streamchat.ledger import Record, answer_finished, answer_started, log_record

RECORD = Record(
    id="resp_1",
    user="alice",
    model="gpt-4.1-mini",
    started=1790000000.25,
    first_piece=0.5,
    duration=2.75,
    outcome="completed",
    finish_reason="stop",
    pieces=42,
    input_tokens=19,
    output_tokens=10,
    estimated=False,
    attempts=1,
    upstream_status=200,
    upstream_request_id="req_9",
    upstream_code=None,
)
EMPTY = dataclasses.replace(
    RECORD, user=None, first_piece=None, finish_reason=None, upstream_status=None, upstream_request_id=None
)


def line_of(record: Record, caplog: pytest.LogCaptureFixture) -> logging.LogRecord:
    with caplog.at_level(logging.INFO, logger="streamchat"):
        log_record(record)
    assert len(caplog.records) == 1
    return caplog.records[0]


def fields_of(line: str) -> dict[str, Any]:
    told = json.loads(line.removeprefix("answer "))
    assert isinstance(told, dict)
    return told


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECORD.outcome = "completed"  # type: ignore[misc]


def test_a_record_has_no_room_for_what_was_asked_or_answered() -> None:
    names = {field.name for field in dataclasses.fields(Record)}
    assert not names & {"text", "message", "messages", "prompt", "system_prompt", "context", "key", "token"}


def test_the_line_tells_what_on_call_needs(caplog: pytest.LogCaptureFixture) -> None:
    line = line_of(RECORD, caplog).getMessage()
    assert fields_of(line) == {name: value for name, value in vars(RECORD).items() if value is not None}


def test_times_in_the_line_are_milliseconds(caplog: pytest.LogCaptureFixture) -> None:
    line = line_of(dataclasses.replace(RECORD, duration=0.123456), caplog).getMessage()
    assert '"duration":0.123,' in line


@pytest.mark.parametrize("record", [RECORD, EMPTY, dataclasses.replace(RECORD, outcome="upstream_incomplete")])
def test_the_line_is_information_whatever_the_outcome(record: Record, caplog: pytest.LogCaptureFixture) -> None:
    line = line_of(record, caplog)
    assert (line.name, line.levelno) == ("streamchat", logging.INFO)
    assert "\n" not in line.getMessage()


def test_a_handler_gets_the_record_itself(caplog: pytest.LogCaptureFixture) -> None:
    answer = vars(line_of(RECORD, caplog))["answer"]
    assert answer == RECORD or answer == dataclasses.asdict(RECORD)


@pytest.mark.parametrize(
    "user", ["a\nb", "a\r\nb", "a b", 'a"b', 'a","outcome":"completed', "a\u2028b", "a\x1b[31m", "ü", "\ud83d", ""]
)
def test_a_user_id_cannot_forge_another_line_or_another_field(user: str, caplog: pytest.LogCaptureFixture) -> None:
    line = line_of(dataclasses.replace(RECORD, user=user, outcome="cancelled"), caplog).getMessage()
    assert len(line.splitlines()) == 1
    assert line.isascii() and "\x1b" not in line
    assert (fields_of(line)["user"], fields_of(line)["outcome"]) == (user, "cancelled")


def test_the_signals_carry_the_record_to_whoever_listens() -> None:
    heard: list[Any] = []

    def listen(sender: object, record: Record) -> None:
        heard.append((sender, record))

    with answer_finished.connected_to(listen):
        answer_finished.send("app", record=RECORD)
    answer_finished.send("app", record=RECORD)
    assert heard == [("app", RECORD)]
    assert answer_started is not answer_finished
    assert set(ledger.signals) == {"answer-started", "answer-finished"}
