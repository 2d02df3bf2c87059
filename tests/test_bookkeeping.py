"""What every store reckons alike."""

from __future__ import annotations

import json

import pytest

from streamchat.bookkeeping import (
    DAY,
    Unfinished,
    chars_of,
    interrupted,
    is_over,
    midnight,
    needs_count,
    unseen,
    withdrawn,
)
from streamchat.events import ChoiceEnd, Event, Failure, Finish, Reasoning, Refusal, Start, Text, ToolCall, Usage
from streamchat.store import Batch, Limits, pack, unpack


@pytest.mark.parametrize(
    ("limit", "used", "more", "over"),
    [(0, 10**9, 10**9, False), (10, 5, 5, False), (10, 5, 6, True), (10, 9, 0, False), (10, 10, 0, True)],
)
def test_a_budget_has_room_up_to_its_last_token(limit: int, used: int, more: int, over: bool) -> None:
    assert is_over(limit, used, more) is over


def test_a_day_begins_at_midnight_of_utc() -> None:
    assert midnight(0.5) == 0
    assert midnight(DAY - 0.5) == 0
    assert midnight(DAY) == DAY


def test_without_a_user_only_the_limit_of_the_service_holds() -> None:
    assert needs_count(Limits(1, 1, 1), None) == (False, True, False)
    assert needs_count(Limits(1, 1, 1), "ann") == (True, True, True)
    assert needs_count(Limits(), "ann") == (False, False, False)


@pytest.mark.parametrize(("seq", "kept"), [(0, "abc"), (2, "abc"), (3, "bc"), (4, "c"), (5, "")])
def test_what_was_seen_is_taken_off_a_batch(seq: int, kept: str) -> None:
    new = unseen(Batch("resp_1", 2, 3, pack([Text(letter) for letter in "abc"])), seq)
    assert [event.text for event in (unpack(new.payload) if new else []) if isinstance(event, Text)] == list(kept)
    assert (new.first, new.count) == (max(seq, 2), len(kept)) if new else not kept


def test_an_orphan_is_charged_for_what_was_kept_of_it() -> None:
    record = interrupted(Unfinished("resp_1", "ann", "m", 100.0, 100, 399), 107.0)[1].record
    assert (record.outcome, record.estimated, record.duration) == ("interrupted", True, 7.0)
    assert (record.output_tokens, record.pieces) == (100, 99)
    nothing = interrupted(Unfinished("resp_1", "ann", "m", 100.0), 99.0)[1].record
    assert (nothing.output_tokens, nothing.pieces, nothing.attempts, nothing.duration) == (0, 0, 0, 0.0)


@pytest.mark.parametrize(
    ("events", "chars"),
    [
        ([Start("resp_1", "gpt-4.1-mini", 1790000000)], 0),
        ([Start("resp_1", "gpt-4.1-mini", 1790000000), Text("Hello"), Text("")], 5),
        ([Text("Привет"), Reasoning("日本"), Refusal("\n\n"), Text("\ud800", 1)], 11),
        ([ToolCall(0, "call_1", "search", '{"a'), ToolCall(0, None, None, '": 1}')], 8),
        ([Text("a", 0, {"content": [{"token": "a", "logprob": -0.1}]}), ChoiceEnd("stop", 1)], 1),
        ([Text("abc"), Finish("stop", Usage(3, 4)), Failure("gap", "words", True)], 3),
    ],
)
def test_the_characters_that_were_said_are_counted(events: list[Event], chars: int) -> None:
    payloads = [pack([event]) for event in events]
    assert chars_of(payloads) == chars_of([pack(events)]) == chars
    for wrong in (
        b'[["text","half',
        b"5",
        b"[5]",
        b"[[]]",
        b'[["text"]]',
        b'[["text",null]]',
        b'[[["text"]]]',
        b"\xff",
    ):
        assert chars_of([*payloads, wrong]) == chars


def test_who_stops_an_answer_in_its_queue_pays_nothing() -> None:
    last, ending = withdrawn(Unfinished("resp_1", "ann", "m", 100.0), 107.0)
    assert (last.first, unpack(last.payload)) == (0, [Failure("cancelled", "The answer was stopped.", False)])
    assert (ending.status, ending.error, ending.letter) == ("cancelled", "cancelled", None)
    assert (ending.record.outcome, ending.record.output_tokens, ending.record.estimated) == ("cancelled", 0, False)


def test_whoever_finds_an_answer_without_a_producer_writes_the_same_letter() -> None:
    orphan = Unfinished("resp_1", "ann", "m", 100.0, 3, 90, "jobs", "https://shop.example/hook")
    (_, one), (_, other) = interrupted(orphan, 107.0), interrupted(orphan, 107.0)
    assert one.letter is not None and one.letter == other.letter
    assert (one.letter.queue, one.letter.target, one.letter.state) == ("jobs", "https://shop.example/hook", "waiting")
    assert json.loads(one.letter.body)["type"] == "response.failed"
