"""Several answers to one question, and probabilities, as OpenAI's wire has them: streamed, and whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from streamchat.client_encoders import DONE, OpenAiEncoder, OpenAiWholeEncoder
from streamchat.encoders import Encoder, JsonEncoder, NdjsonEncoder, TextEncoder
from streamchat.events import ChoiceEnd, Event, Failure, Finish, Reasoning, Refusal, Start, Text, ToolCall, Usage

START = Start("resp_1", "m", 1790000000)
FINISH = Finish("stop", Usage(19, 10))
USAGE = {"prompt_tokens": 19, "completion_tokens": 10, "total_tokens": 29}
SURE: dict[str, Any] = {"token": "A", "logprob": -0.5, "bytes": [65], "top_logprobs": []}
ALSO: dict[str, Any] = {"token": "a", "logprob": -1, "bytes": None, "top_logprobs": []}
A, B = {"content": [SURE], "refusal": None}, {"content": [ALSO], "refusal": None}
TWO: list[Event] = [
    START,
    Text("B", 1, B),
    Text("A", 0, A),
    Reasoning("hm", 1),
    ToolCall(0, "c", "f", "{", 1),
    ChoiceEnd("length"),
    ToolCall(0, None, None, "}", 1),
    Refusal("no", 1, {"content": None, "refusal": [SURE]}),
    ChoiceEnd("tool_calls", 1),
    FINISH,
]


def encoded(encoder: Encoder, events: list[Event]) -> bytes:
    return b"".join(encoder.encode(seq, event) for seq, event in enumerate(events))


def chunks(body: bytes) -> list[dict[str, Any]]:
    """The chunks of a whole stream, each of them one that the SDK knows."""
    assert body.endswith(DONE)
    told = [json.loads(event.removeprefix("data: ")) for event in body.decode().split("\n\n")[:-2]]
    for each in told:
        assert not ChatCompletionChunk.model_validate(each, strict=True).model_extra
    return told


def test_each_choice_begins_with_its_role_and_ends_with_its_reason() -> None:
    told = chunks(encoded(OpenAiEncoder(choices=2), TWO))
    assert [(each["index"], each["delta"], each["finish_reason"]) for (each,) in (one["choices"] for one in told)] == [
        (0, {"role": "assistant", "content": ""}, None),
        (1, {"role": "assistant", "content": ""}, None),
        (1, {"content": "B"}, None),
        (0, {"content": "A"}, None),
        (1, {"reasoning_content": "hm"}, None),
        (1, {"tool_calls": [{"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}]}, None),  # noqa: E501
        (0, {}, "length"),
        (1, {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}, None),
        (1, {"refusal": "no"}, None),
        (1, {}, "tool_calls"),
    ]  # fmt: skip
    assert {(one["id"], one["model"], one["created"]) for one in told} == {("resp_1", "m", 1790000000)}


def test_probabilities_stand_in_the_chunk_of_their_piece() -> None:
    told = chunks(encoded(OpenAiEncoder(choices=2), TWO))
    logprobs = [choice["logprobs"] for one in told for choice in one["choices"]]
    assert logprobs == [None, None, B, A, None, None, None, None, {"content": None, "refusal": [SURE]}, None]


def test_usage_is_told_once_for_all_choices() -> None:
    *others, last = chunks(encoded(OpenAiEncoder(include_usage=True, choices=2), TWO))
    assert (last["choices"], last["usage"]) == ([], USAGE)
    assert {one["usage"] for one in others} == {None}


def test_a_failure_after_the_end_of_one_choice_is_an_error_and_no_end_mark() -> None:
    events: list[Event] = [
        START,
        Text("A"),
        ChoiceEnd("stop"),
        Failure("upstream_incomplete", "The answer was cut off.", True),
    ]
    *_, last = encoded(OpenAiEncoder(choices=2), events).decode().split("\n\n")[:-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "upstream_incomplete"


def whole(events: list[Event]) -> dict[str, Any]:
    body = encoded(OpenAiWholeEncoder(), events)
    ChatCompletion.model_validate_json(body, strict=True)
    return dict(json.loads(body))


def test_whole_choices_stand_in_their_order_each_with_its_own() -> None:
    told = whole(TWO)
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert told["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "A", "refusal": None},
            "logprobs": A,
            "finish_reason": "length",
        },
        {
            "index": 1,
            "message": {
                "role": "assistant",
                "content": "B",
                "refusal": "no",
                "reasoning_content": "hm",
                "tool_calls": [call],
            },
            "logprobs": {"content": [ALSO], "refusal": [SURE]},
            "finish_reason": "tool_calls",
        },
    ]
    assert told["usage"] == USAGE


def test_probabilities_of_all_pieces_are_joined() -> None:
    (choice,) = whole([START, Text("A", 0, A), Text("", 0, B), Text("x"), FINISH])["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Ax", "stop")
    assert choice["logprobs"] == {"content": [SURE, ALSO], "refusal": None}


def test_choices_that_said_nothing_are_there_all_the_same() -> None:
    told = whole([START, ChoiceEnd("stop", 1), ChoiceEnd("length"), FINISH])["choices"]
    assert [(each["message"]["content"], each["finish_reason"]) for each in told] == [(None, "length"), (None, "stop")]


@pytest.mark.parametrize("encoder", [TextEncoder(), JsonEncoder()], ids=["text", "json"])
def test_where_there_is_room_for_one_answer_it_is_the_first(encoder: Encoder) -> None:
    body = encoded(encoder, [START, Text("B", 1), Text("A"), ChoiceEnd("stop", 1), ChoiceEnd("length"), FINISH])
    assert (json.loads(body)["text"] if isinstance(encoder, JsonEncoder) else body.decode()) == "A"


def test_lines_of_json_name_the_choice_where_it_is_not_the_first() -> None:
    lines = encoded(NdjsonEncoder(), [Text("A"), Text("B", 1, B), ChoiceEnd("stop"), ChoiceEnd("stop", 1)])
    assert [json.loads(line) for line in lines.splitlines()] == [
        {"type": "text", "seq": 0, "text": "A"},
        {"type": "text", "seq": 1, "text": "B", "choice": 1, "logprobs": B},
        {"type": "choice_end", "seq": 2, "finish_reason": "stop"},
        {"type": "choice_end", "seq": 3, "finish_reason": "stop", "choice": 1},
    ]
