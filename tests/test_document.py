"""The object of a kept answer: its text as far as it is known to be whole, and its error as it was told."""

from __future__ import annotations

from typing import Any

import pytest

from streamchat.document import document
from streamchat.events import ChoiceEnd, Event, Failure, Finish, Reasoning, Refusal, Start, Text, ToolCall, Usage
from streamchat.store import Batch, Kept, Status, pack

ID = "resp_1"
START = Start(ID, "m", 7)
FINISH = Finish("stop", Usage(1, 2))


def batches(*groups: tuple[int, list[Event]]) -> list[Batch]:
    return [Batch(ID, first, len(events), pack(events)) for first, events in groups]


def told(status: Status, *groups: tuple[int, list[Event]], **values: Any) -> dict[str, Any]:
    kept = Kept(ID, None, None, "m", 7.9, status, "owner", 0, **values)
    return document(kept, batches(*groups))


def test_the_object_holds_what_the_store_knows() -> None:
    events: list[Event] = [START, Reasoning("hm"), Text("a"), ToolCall(0, "c", "f", "{}"), Refusal("b"), FINISH]
    assert told("completed", (0, events[:3]), (3, events[3:]), finish_reason="stop", usage=Usage(1, 2)) == {
        "id": ID,
        "status": "completed",
        "model": "m",
        "created_at": 7,
        "text": "ab",
        "finish_reason": "stop",
        "usage": {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3, "estimated": False},
        "error": None,
    }


def test_of_several_answers_the_text_is_that_of_the_first() -> None:
    events: list[Event] = [
        START,
        Text("a", 0),
        Text("x", 1),
        Text("b", 0),
        Refusal("y", 2),
        ChoiceEnd("stop", 1),
        FINISH,
    ]
    assert told("completed", (0, events))["text"] == "ab"


@pytest.mark.parametrize("status", ["queued", "in_progress"])
def test_a_live_answer_has_the_text_so_far(status: Status) -> None:
    assert told(status)["text"] == ""
    assert told(status, (0, [START, Text("a")]))["text"] == "a"


@pytest.mark.parametrize(
    "groups",
    [
        [],
        [(0, [START, Text("a")])],
        [(1, [Text("a"), FINISH])],
        [(0, [START]), (2, [FINISH])],
    ],
)
def test_an_ended_answer_that_is_not_whole_has_no_text(groups: list[tuple[int, list[Event]]]) -> None:
    assert told("completed", *groups)["text"] is None


def test_a_live_answer_with_a_gap_has_no_text() -> None:
    assert told("in_progress", (0, [START]), (2, [Text("b")]))["text"] is None


def test_what_is_half_written_is_not_told() -> None:
    (whole,) = batches((0, [START, Text("a"), FINISH]))
    cut = Batch(ID, 0, 3, whole.payload[:-4])
    kept = Kept(ID, None, None, "m", 7, "completed", "owner", 3)
    assert document(kept, [cut])["text"] is None


def test_an_error_is_told_as_its_readers_read_it() -> None:
    failure = Failure("upstream_error", "In the shop's words.", True)
    assert told("failed", (0, [START, Text("a"), failure]), error="upstream_error")["error"] == {
        "code": "upstream_error",
        "message": "In the shop's words.",
        "retryable": True,
    }


@pytest.mark.parametrize(
    ("code", "retryable"),
    [
        ("upstream_error", True),
        ("upstream_rejected", False),
        ("interrupted", True),
        ("cancelled", False),
        ("new", True),
    ],
)
def test_an_error_whose_event_is_lost_is_told_in_our_words(code: str, retryable: bool) -> None:
    error = told("failed", (0, [START]), error=code)["error"]
    assert (error["code"], error["retryable"]) == (code, retryable)
    assert error["message"]
