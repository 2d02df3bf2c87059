"""An answer's end becomes the letter that a receiver reads."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from streamchat.envelopes import enclose, letter_id
from streamchat.events import Failure, Finish, Usage
from streamchat.store import Ending

from .store_contract import entry, record

TARGET = "https://shop.example/hook"
ANSWER = entry("owner_1", id="resp_1", created_at=1_790_000_000.5)
FINISH = Finish("stop", Usage(7, 3))


def ended(event: Finish | Failure, text: str | None = None) -> dict[str, Any]:
    is_finish = isinstance(event, Finish)
    told = record(ANSWER, duration=2.0)
    ending = (
        Ending(ANSWER.id, "completed", told, "stop", Usage(7, 3)) if is_finish else Ending("resp_1", "failed", told)
    )
    letter = enclose(ending, event, "jobs", TARGET, text).letter
    assert letter is not None
    assert (letter.answer, letter.queue, letter.target, letter.attempts) == ("resp_1", "jobs", TARGET, 0)
    assert (letter.state, letter.due, letter.created_at) == ("waiting", 1_790_000_002.5, 1_790_000_002.5)
    document: dict[str, Any] = json.loads(letter.body)
    return document


def test_a_letter_tells_what_the_answers_object_tells() -> None:
    assert ended(FINISH) == {
        "type": "response.completed",
        "timestamp": "2026-09-21T14:13:22.500Z",
        "data": {
            "id": "resp_1",
            "status": "completed",
            "model": "m",
            "created_at": 1_790_000_000,
            "finish_reason": "stop",
            "usage": {"input_tokens": 7, "output_tokens": 3, "total_tokens": 10, "estimated": False},
            "error": None,
        },
    }


def test_a_letter_has_the_text_where_one_is_given() -> None:
    assert ended(FINISH, "Hello")["data"]["text"] == "Hello"
    assert ended(FINISH, "")["data"]["text"] == ""


def test_a_failure_is_told_with_its_code_and_words() -> None:
    document = ended(Failure("upstream_error", "No.", True))
    assert document["type"] == "response.failed"
    assert document["data"]["error"] == {"code": "upstream_error", "message": "No.", "retryable": True}


def test_without_a_target_there_is_no_letter() -> None:
    ending = Ending("resp_1", "completed", record(ANSWER))
    assert enclose(ending, FINISH, "jobs", "") is ending


@pytest.mark.parametrize("id", ["resp_1", "shop.7/ö", "\ud800", "x" * 500])
def test_every_answers_letter_has_an_id_that_can_be_signed(id: str) -> None:
    assert re.fullmatch(r"msg_[0-9a-f]{32}", letter_id(id))
    assert letter_id(id) == letter_id(id) != letter_id(id + "x")
