"""Several answers to one question, and the probabilities of tokens: bytes -> events, under any split."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamchat.choices_decoder import LEAST, ChoicesDecoder
from streamchat.decoder import ChatDecoder
from streamchat.errors import UpstreamError, UpstreamFailure, UpstreamIncomplete, UpstreamMalformed
from streamchat.events import ChoiceEnd, Event, Finish, Reasoning, Refusal, Text, ToolCall, Usage
from streamchat.prompt import APIS, Prompt
from streamchat.store import pack, unpack
from tests.splits import any_deltas, as_read, every_split

DONE = b"data: [DONE]\n\n"
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}}\n\n'


def sse(*choices: dict[str, Any], **more: Any) -> bytes:
    return b"data: " + json.dumps({"choices": list(choices), **more}).encode() + b"\n\n"


def part(index: int, delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta or {}, "finish_reason": finish, **more}


def said(index: int, text: str, **more: Any) -> bytes:
    return sse(part(index, {"content": text}, **more))


def end(index: int, reason: str = "stop") -> bytes:
    return sse(part(index, finish=reason))


def token(word: str, logprob: Any = -0.5, **more: Any) -> dict[str, Any]:
    return {"token": word, "logprob": logprob, "bytes": list(word.encode()), **more}


def content(*tokens: dict[str, Any]) -> dict[str, Any]:
    return {"content": list(tokens), "refusal": None}


Outcome = tuple[list[Event], type[UpstreamFailure] | None]


def outcome(pieces: Iterable[bytes], choices: int, logprobs: bool) -> Outcome:
    decoder = ChoicesDecoder(choices, logprobs)
    seen: list[Event] = []
    try:
        for piece in (*pieces, b""):
            seen += decoder.feed(piece)
            if decoder.finished:
                return seen, None
    except UpstreamFailure as failure:
        return seen, type(failure)
    raise AssertionError("the decoder ended neither way")


def decoded(data: bytes, choices: int = 2, logprobs: bool = False) -> Outcome:
    """The outcome of these bytes, which is the same under every split; and a store keeps every event of it."""
    found = outcome([data], choices, logprobs)
    for pieces in every_split(data):
        assert outcome(pieces, choices, logprobs) == found, pieces
    assert unpack(pack(found[0])) == found[0]
    return found


def test_each_choice_has_its_pieces_and_its_end_and_one_finish_ends_them_all() -> None:
    stream = said(0, "A") + said(1, "B") + end(1, "length") + said(0, "a") + end(0) + USAGE + DONE
    assert decoded(stream) == (
        [
            Text("A"),
            Text("B", 1),
            ChoiceEnd("length", 1),
            Text("a"),
            ChoiceEnd("stop"),
            Finish("stop", Usage(9, 4)),
        ],
        None,
    )


def test_one_chunk_may_hold_pieces_of_all_choices() -> None:
    stream = sse(part(1, {"content": "B"}, "stop"), part(0, {"content": "A"}, "length")) + DONE
    assert decoded(stream) == (
        [Text("B", 1), ChoiceEnd("stop", 1), Text("A"), ChoiceEnd("length"), Finish("length")],
        None,
    )


def test_every_kind_of_piece_names_its_choice() -> None:
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}
    stream = (
        sse(part(1, {"reasoning_content": "hm", "refusal": "no", "tool_calls": [call]}, "tool_calls")) + end(0) + DONE
    )
    events, _ = decoded(stream)
    assert events[:4] == [
        Reasoning("hm", 1),
        Refusal("no", 1),
        ToolCall(0, "c", "f", "{}", 1),
        ChoiceEnd("tool_calls", 1),
    ]


def test_the_reason_of_the_whole_is_that_of_the_first_choice_whichever_ends_last() -> None:
    assert decoded(end(0, "length") + end(1) + DONE)[0][-1] == Finish("length")
    assert decoded(end(1) + end(0, "length") + DONE)[0][-1] == Finish("length")


@pytest.mark.parametrize("tail", [DONE, b"", USAGE + DONE], ids=["done", "end of file", "usage"])
@pytest.mark.parametrize("ended", [0, 1])
def test_an_answer_that_lacks_the_end_of_one_choice_was_cut(ended: int, tail: bytes) -> None:
    events, failure = decoded(said(0, "A") + said(1, "B") + end(ended) + tail)
    assert events == [Text("A"), Text("B", 1), ChoiceEnd("stop", ended)]
    assert failure is UpstreamIncomplete


def test_a_choice_that_never_came_is_missed() -> None:
    assert decoded(said(0, "A") + end(0) + DONE) == ([Text("A"), ChoiceEnd("stop")], UpstreamIncomplete)


def test_an_answer_concludes_only_when_all_its_choices_have_ended() -> None:
    decoder = ChoicesDecoder(2, False)
    decoder.feed(end(1))
    assert not decoder.concluding
    decoder.feed(end(0))
    assert decoder.concluding


@pytest.mark.parametrize("index", [2, -1, 1.0, True, "1", [1]])
def test_a_choice_that_nobody_asked_for_is_nobodys(index: Any) -> None:
    stream = sse(part(index, {"content": "x"}, "stop")) + said(0, "A") + end(0) + end(1) + DONE
    events, failure = decoded(stream)
    assert (events[0], failure) == (Text("A"), None)


def test_halves_of_an_emoji_meet_within_their_own_choice() -> None:
    stream = b"".join(
        [said(0, "\ud83d"), said(1, "\ud83c"), said(0, "\ude00"), said(1, "\udf0a"), end(0), end(1), DONE]
    )
    assert decoded(stream)[0][:2] == [Text("\U0001f600"), Text("\U0001f30a", 1)]


def test_half_an_emoji_at_the_end_of_a_choice_is_told_before_its_end() -> None:
    stream = said(0, "\ud83d") + said(1, "\ud83c") + end(1) + end(0) + DONE
    assert decoded(stream)[0] == [
        Text("\ufffd", 1),
        ChoiceEnd("stop", 1),
        Text("\ufffd"),
        ChoiceEnd("stop"),
        Finish("stop"),
    ]


def test_half_an_emoji_in_the_arguments_of_a_tool_stays_in_its_choice() -> None:
    halves = [{"index": 3, "function": {"arguments": half}} for half in ("\ud83d", "\ude00")]
    stream = sse(part(1, {"tool_calls": halves[:1]})) + sse(part(1, {"tool_calls": halves[1:]})) + end(1) + end(0)
    events, _ = decoded(stream + DONE)
    assert events[:2] == [ToolCall(3, None, None, "", 1), ToolCall(3, None, None, "\U0001f600", 1)]
    cut, _ = decoded(sse(part(1, {"tool_calls": halves[:1]}, "stop")) + end(0) + DONE)
    assert cut[1:3] == [ToolCall(3, None, None, "\ufffd", 1), ChoiceEnd("stop", 1)]


def test_words_after_the_end_of_their_choice_are_no_answer() -> None:
    events, failure = decoded(said(0, "A") + end(0) + said(0, "more") + end(1) + DONE)
    assert (events, failure) == ([Text("A"), ChoiceEnd("stop")], UpstreamMalformed)


def test_an_end_that_is_told_twice_is_one_end() -> None:
    events, failure = decoded(end(0) + said(0, "", finish="length") + end(1) + DONE)
    assert (events, failure) == ([ChoiceEnd("stop"), ChoiceEnd("stop", 1), Finish("stop")], None)


def test_an_error_after_the_end_of_one_choice_is_the_end_of_all() -> None:
    stream = said(1, "B") + end(0) + b'data: {"error": {"message": "no"}}\n\n'
    assert decoded(stream) == ([Text("B", 1), ChoiceEnd("stop")], UpstreamError)


@given(any_deltas, any_deltas, st.data())
def test_the_texts_of_two_choices_never_mix(first: list[str], second: list[str], data: st.DataObject) -> None:
    parts = data.draw(st.permutations([0] * len(first) + [1] * len(second)))
    rest = {0: iter(first), 1: iter(second)}
    stream = b"".join(said(index, next(rest[index])) for index in parts) + end(0) + end(1) + DONE
    events, failure = outcome([stream], 2, False)
    texts = ["".join(e.text for e in events if isinstance(e, Text) and e.choice == index) for index in (0, 1)]
    assert (texts, failure) == ([as_read(first), as_read(second)], None)


# Probabilities


def test_probabilities_stand_with_the_piece_of_their_delta() -> None:
    others = [token("Hi", -0.5), token("Ha", -2)]
    told = token("Hi", -0.5, top_logprobs=others)
    stream = said(0, "Hi", logprobs=content(told)) + end(0) + DONE
    assert decoded(stream, 1, True) == ([Text("Hi", 0, content(told)), Finish("stop")], None)


def test_probabilities_of_each_choice_are_its_own() -> None:
    tokens = [token(word, top_logprobs=[]) for word in "AB"]
    stream = said(1, "B", logprobs=content(tokens[1])) + said(0, "A", logprobs=content(tokens[0]))
    events, _ = decoded(stream + end(0) + end(1) + DONE, 2, True)
    assert events[:2] == [Text("B", 1, content(tokens[1])), Text("A", 0, content(tokens[0]))]


def test_probabilities_of_a_refusal_are_told_as_such() -> None:
    refused = {"content": None, "refusal": [token("no", top_logprobs=[])]}
    events, _ = decoded(sse(part(0, {"refusal": "no"}, "stop", logprobs=refused)) + DONE, 1, True)
    assert events == [Refusal("no", 0, refused), Finish("stop")]


def test_tokens_without_a_piece_are_told_all_the_same() -> None:
    half, other = token("?", top_logprobs=[]), token("!", top_logprobs=[])
    stream = said(0, "\ud83d", logprobs=content(half)) + said(0, "\ude00", logprobs=content(other)) + end(0) + DONE
    events, _ = decoded(stream, 1, True)
    assert events[:2] == [Text("", 0, content(half)), Text("\U0001f600", 0, content(other))]


@pytest.mark.parametrize("empty", [None, {}, content(), {"content": None}, {"tokens": ["a"], "token_logprobs": [-1]}])
def test_where_no_token_is_told_there_are_no_probabilities(empty: Any) -> None:
    events, _ = decoded(sse(part(0, {"content": ""}, logprobs=empty)) + end(0) + DONE, 1, True)
    assert events == [Finish("stop")]


def test_what_was_not_asked_for_is_not_told() -> None:
    assert decoded(said(0, "A", logprobs=content(token("A"))) + end(0) + end(1) + DONE)[0][0] == Text("A")


def test_of_a_token_only_what_openai_documents_is_told() -> None:
    stream = said(0, "A", logprobs=content(token("A", id=65, note="x"))) + end(0) + DONE
    assert decoded(stream, 1, True)[0][0] == Text("A", 0, content(token("A", top_logprobs=[])))


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "Infinity", "-3.4e38", "-1e999", "1" + "0" * 400])
def test_a_probability_that_is_no_number_for_json_readers_is_the_least_one(value: str) -> None:
    stream = said(0, "A", logprobs=content(token("A", 7777))).replace(b"7777", value.encode())
    (text, _), failure = decoded(stream + end(0) + DONE, 1, True)
    assert isinstance(text, Text) and text.logprobs is not None and failure is None
    assert text.logprobs["content"][0]["logprob"] == LEAST


@pytest.mark.parametrize(
    "broken",
    [
        ["A"],
        "A",
        {"content": "A"},
        {"content": 5},
        {"content": [5]},
        {"content": [{"token": "A"}]},
        {"content": [{"logprob": -1}]},
        {"content": [{"token": 5, "logprob": -1}]},
        {"content": [{"token": "A", "logprob": "-1"}]},
        {"content": [{"token": "A", "logprob": None}]},
        {"content": [{"token": "A", "logprob": -1, "bytes": [256]}]},
        {"content": [{"token": "A", "logprob": -1, "bytes": ["A"]}]},
        {"content": [{"token": "A", "logprob": -1, "top_logprobs": [5]}]},
    ],
)
def test_probabilities_of_a_wrong_shape_are_no_answer(broken: Any) -> None:
    assert decoded(said(0, "A", logprobs=broken) + end(0) + DONE, 1, True) == ([], UpstreamMalformed)


def test_a_token_that_is_half_an_emoji_is_told_as_text_that_every_reader_takes() -> None:
    half = {"token": "\ud83d", "logprob": -1, "bytes": [240, 159], "top_logprobs": []}
    events, _ = decoded(said(0, "\ud83d", logprobs=content(half)) + end(0) + DONE, 1, True)
    assert events[0] == Text("", 0, content({**half, "token": "\ufffd"}))


@pytest.mark.parametrize("odd", [None, 10**12, "A", {}])
def test_bytes_that_are_no_list_are_unknown(odd: Any) -> None:
    stream = said(0, "A", logprobs=content({"token": "A", "logprob": -1, "bytes": odd})) + end(0) + DONE
    (text, _), _ = decoded(stream, 1, True)
    assert isinstance(text, Text) and text.logprobs is not None
    assert text.logprobs["content"][0]["bytes"] is None


def test_one_choice_ends_with_the_answer_and_by_no_event_of_its_own() -> None:
    assert decoded(said(0, "A") + said(1, "B") + end(0, "length") + DONE, 1, True)[0] == [Text("A"), Finish("length")]


# Which decoder reads


@pytest.mark.parametrize(
    ("params", "kind"),
    [
        ({}, ChatDecoder),
        ({"temperature": 1}, ChatDecoder),
        ({"n": 2}, ChoicesDecoder),
        ({"logprobs": True}, ChoicesDecoder),
        ({"n": 8, "logprobs": True, "top_logprobs": 20}, ChoicesDecoder),
    ],
)
def test_only_who_asked_for_more_pays_for_reading_it(params: dict[str, Any], kind: type[ChatDecoder]) -> None:
    assert type(APIS["chat"].decoder(Prompt([], "m", params))) is kind
