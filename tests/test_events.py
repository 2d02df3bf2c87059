"""Events and their JSON form, field by field in its order."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamchat.events import (
    ENDS,
    ChoiceEnd,
    Event,
    Failure,
    Finish,
    Reasoning,
    Refusal,
    Start,
    Text,
    ToolCall,
    Usage,
    to_json,
    usage_json,
)
from streamchat.store import pack, unpack

# The examples that the documentation gives, with spaces taken out.
EXAMPLES: list[tuple[int, Event, str]] = [
    (
        0,
        Start("resp_1", "gpt-4.1-mini", 1790000000),
        '{"type":"start","seq":0,"id":"resp_1","model":"gpt-4.1-mini","created_at":1790000000}',
    ),
    (1, Text("Hello"), '{"type":"text","seq":1,"text":"Hello"}'),
    (2, Reasoning("hm"), '{"type":"reasoning","seq":2,"text":"hm"}'),
    (3, Refusal("I'm"), '{"type":"refusal","seq":3,"text":"I\'m"}'),
    (
        4,
        ToolCall(0, "call_1", "get_weather", '{"ci'),
        '{"type":"tool_call","seq":4,"index":0,"id":"call_1","name":"get_weather","arguments":"{\\"ci"}',
    ),
    (5, Text("Hi", 1), '{"type":"text","seq":5,"text":"Hi","choice":1}'),
    (6, ChoiceEnd("length", 1), '{"type":"choice_end","seq":6,"finish_reason":"length","choice":1}'),
    (
        9,
        Finish("stop", Usage(19, 10)),
        '{"type":"finish","seq":9,"finish_reason":"stop",'
        '"usage":{"input_tokens":19,"output_tokens":10,"total_tokens":29,"estimated":false}}',
    ),
    (
        9,
        Failure("upstream_incomplete", "The answer was cut off.", True),
        '{"type":"error","seq":9,"code":"upstream_incomplete","message":"The answer was cut off.","retryable":true}',
    ),
]


@pytest.mark.parametrize(("seq", "event", "expected"), EXAMPLES, ids=[event.type for _, event, _ in EXAMPLES])
def test_an_event_in_json_is_as_documented_to_the_letter(seq: int, event: Event, expected: str) -> None:
    assert json.dumps(to_json(seq, event), separators=(",", ":")) == expected


@pytest.mark.parametrize("event", [event for _, event, _ in EXAMPLES], ids=lambda event: event.type)
def test_an_event_is_a_value(event: Event) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(event, dataclasses.fields(event)[0].name, "changed")
    assert event == dataclasses.replace(event)
    assert hash(event) == hash(dataclasses.replace(event))


@pytest.mark.parametrize("event", [event for _, event, _ in EXAMPLES], ids=lambda event: event.type)
def test_a_store_gives_back_the_event_that_it_was_given(event: Event) -> None:
    assert unpack(pack([event, event])) == [event, event]


PROBABLE: dict[str, object] = {"content": [{"token": "\ud83d", "logprob": -0.5}], "refusal": None}


@pytest.mark.parametrize("kind", [Text, Reasoning, Refusal])
def test_probabilities_stand_in_json_and_in_a_store_where_there_are_any(
    kind: type[Text | Reasoning | Refusal],
) -> None:
    event = kind("Hi", 0, PROBABLE)
    assert to_json(1, event) == {"type": kind.type, "seq": 1, "text": "Hi", "logprobs": PROBABLE}
    assert unpack(pack([event])) == [event]
    assert event != kind("Hi")
    assert hash(event) == hash(kind("Hi"))


def test_an_event_that_was_stored_without_choices_is_of_the_first() -> None:
    assert unpack(b'[["text","Hi"],["tool_call",0,null,null,"x"]]') == [Text("Hi"), ToolCall(0, None, None, "x")]


def test_only_finish_and_error_end_an_answer() -> None:
    assert {event.type for _, event, _ in EXAMPLES if isinstance(event, ENDS)} == {"finish", "error"}


def test_an_estimated_usage_says_so() -> None:
    assert usage_json(Usage(1, 2, estimated=True)) == {
        "input_tokens": 1,
        "output_tokens": 2,
        "total_tokens": 3,
        "estimated": True,
    }


def test_a_usage_that_nobody_counted_is_null() -> None:
    assert usage_json(None) is None
    assert to_json(3, Finish("stop")) == {"type": "finish", "seq": 3, "finish_reason": "stop", "usage": None}


def test_a_later_piece_of_a_tool_call_repeats_neither_id_nor_name() -> None:
    value = to_json(5, ToolCall(1, None, None, "x"))
    assert (value["index"], value["arguments"]) == (1, "x")
    assert (value.get("id"), value.get("name")) == (None, None)


@given(st.text(st.characters(exclude_categories=())), st.integers(0))
def test_the_json_form_holds_the_text_as_it_is(text: str, seq: int) -> None:
    assert to_json(seq, Text(text)) == {"type": "text", "seq": seq, "text": text}
