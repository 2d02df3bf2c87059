"""The upstream's bytes -> events, under any split; judged by the SDK's own reading of the same bytes."""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamchat import errors
from streamchat.decoder import ChatDecoder, SurrogateJoiner, error_kind, public_code
from streamchat.errors import (
    ContentRefused,
    InputTooLong,
    UpstreamError,
    UpstreamFailure,
    UpstreamIncomplete,
    UpstreamMalformed,
    UpstreamQuota,
    UpstreamRateLimited,
    UpstreamRejected,
)
from streamchat.events import ENDS, Event, Finish, Reasoning, Refusal, Text, ToolCall, Usage
from streamchat.sse_decoder import EVENT_BYTES, SseDecoder
from tests.splits import Pieces, any_deltas, as_read, every_split, random_splits

CANARY = "sk-canary-7f3a org-canary-51c2"


def sse(data: object, end: str = "\n") -> bytes:
    text = data if isinstance(data, str) else json.dumps(data)
    return f"data: {text}{end}{end}".encode()


def chunk(delta: object = None, finish: object = None, **more: object) -> dict[str, object]:
    choice = {"index": 0, "delta": {} if delta is None else delta, "finish_reason": finish}
    return {"id": "c", "object": "chat.completion.chunk", "choices": [choice], **more}


def said(text: str) -> bytes:
    return sse(chunk({"content": text}))


STOP = sse(chunk(finish="stop"))
DONE = sse("[DONE]")
USAGE = sse({"choices": [], "usage": {"prompt_tokens": 19, "completion_tokens": 10, "total_tokens": 29}})
# The shortest whole answer, for two cuts at every pair of places.
BRIEF = b'data:{"choices":[{"delta":{"content":"\xc3\xa9"},"finish_reason":"stop"}]}\r\n\r\ndata:[DONE]\r\n\r\n'
HELLO = said("Hel") + said("lo") + STOP + DONE
HELLO_EVENTS: list[Event] = [Text("Hel"), Text("lo"), Finish("stop")]

Outcome = tuple[list[Event], type[BaseException] | None]


def outcome(pieces: Iterable[bytes]) -> Outcome:
    """Every event up to the end, and the failure that ended them."""
    decoder = ChatDecoder()
    seen: list[Event] = []
    try:
        for piece in (*pieces, b""):
            seen += decoder.feed(piece)
            if seen and isinstance(seen[-1], ENDS):
                return seen, None
        seen += decoder.conclude()
    except UpstreamFailure as failure:
        return seen, type(failure)
    return seen, None


def decoded(data: bytes) -> Outcome:
    """The outcome of these bytes, which is the same under every split."""
    found = outcome([data])
    for pieces in every_split(data):
        assert outcome(pieces) == found, pieces
    return found


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


# SSE framing


def framed(pieces: Iterable[bytes]) -> list[tuple[bytes, bytes]]:
    decoder = SseDecoder()
    return [pair for piece in pieces for pair in decoder.feed(piece)]


def pairs(data: bytes) -> list[tuple[str, str]]:
    found = framed([data])
    for pieces in every_split(data):
        assert framed(pieces) == found, pieces
    return [(kind.decode() or "message", payload.decode()) for kind, payload in found]


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        pytest.param(b"data: a\n\n", [("message", "a")], id="lf"),
        pytest.param(b"data: a\r\rdata: b\r\r", [("message", "a"), ("message", "b")], id="cr"),
        pytest.param(b"data: a\r\n\r\ndata: b\r\n\r\n", [("message", "a"), ("message", "b")], id="crlf"),
        pytest.param(b"data: a\r\n\rdata: b\n\r\n", [("message", "a"), ("message", "b")], id="mixed"),
        pytest.param(b"data: a\r\ndata: b\n\n", [("message", "a\nb")], id="crlf-is-one-line-end"),
        pytest.param(b"\xef\xbb\xbfdata: a\n\n", [("message", "a")], id="bom"),
        pytest.param(b"data:a\n\ndata:  a\n\n", [("message", "a"), ("message", " a")], id="one-space"),
        pytest.param(b"data: a\ndata\ndata: b\n\n", [("message", "a\n\nb")], id="data-without-colon"),
        pytest.param(b": note\n\n:\n\ndata: a\n: note\n\n", [("message", "a")], id="comments"),
        pytest.param(b"retry: 3000\n\nid: 7\n\ndata: a\n\n", [("message", "a")], id="no-data-no-event"),
        pytest.param(b"event: ping\n\ndata: a\n\n", [("message", "a")], id="type-is-forgotten"),
        pytest.param(b"event: error\ndata: a\n\ndata: b\n\n", [("error", "a"), ("message", "b")], id="type"),
        pytest.param(b"data: a\nevent: error\n\n", [("error", "a")], id="type-after-data"),
        pytest.param(b"id: 1\ndata: a\n\n: note\n\n\n\ndata: b\n\n", [("message", "a"), ("message", "b")], id="id"),
        pytest.param(b"Data: x\ndat: x\n data: x\ndata : x\ndata: a\n\n", [("message", "a")], id="other-fields"),
        pytest.param(b"data: a\n\ndata: lost", [("message", "a")], id="unfinished-line"),
        pytest.param(b"data: a\n\ndata: lost\n", [("message", "a")], id="unfinished-event"),
        pytest.param(b"data: a\xe2\x80\xa8b\xc2\x85c\x0bd\x0ce\x00\n\n",
                     [("message", "a\u2028b\x85c\x0bd\x0ce\x00")], id="other-separators"),
        pytest.param(b"data: a:b\n\n", [("message", "a:b")], id="colon-in-the-value"),
        pytest.param(b"\n\n\n\r\n", [], id="blank-lines"),
    ],
)  # fmt: skip
def test_sse_is_framed_as_the_html_standard_says_under_every_split(
    stream: bytes, expected: list[tuple[str, str]]
) -> None:
    assert pairs(stream) == expected


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_an_event_is_given_out_by_the_read_that_ends_it(end: str) -> None:
    decoder = SseDecoder()
    assert list(decoder.feed(f"data: a{end}{end}".encode())) == [(b"", b"a")] or end == "\r\n"
    assert list(decoder.feed(f"data: b{end}{end}".encode())) == [(b"", b"b")]


@given(st.data())
def test_framing_equals_httpx2s_for_any_lines_and_any_cuts(data: st.DataObject) -> None:
    line = st.sampled_from(
        [
            b"data: a",
            b"data:b",
            b"data",
            b"event: x",
            b"event",
            b": c",
            b"id: 1",
            b"retry: 5",
            b"",
            b"",
            b"data: \xf0\x9f\x98\x80",
        ]
    )
    ends = st.sampled_from([b"\n", b"\r\n", b"\r"])
    stream = b"".join(data.draw(st.lists(st.builds(lambda text, end: text + end, line, ends), max_size=20)))
    # At its end httpx2 takes a last CR for a line of its own only if nothing follows; a comment settles it.
    stream += b":\n"
    headers = {"Content-Type": "text/event-stream"}
    judge = httpx2.EventSource(httpx2.Response(200, headers=headers, content=stream, request=REQUEST))
    # It gives out events without data as well; the standard drops them.
    expected = [(event.event, event.data) for event in judge if event.data]
    found = [(kind.decode() or "message", text.decode()) for kind, text in framed(data.draw(random_splits(stream)))]
    assert [(kind, text) for kind, text in found if text] == expected


REQUEST = httpx2.Request("GET", "http://judge.invalid/")


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([b"data: "] + [b"x" * 65536] * 17, id="one-endless-line"),
        pytest.param([b"data: " + b"x" * 65536 + b"\n"] * 17, id="many-lines-of-data"),
        pytest.param([b"data: " + b"x" * (EVENT_BYTES + 1) + b"\n\n"], id="in-one-read"),
        pytest.param([b": "] + [b"x" * 65536] * 17, id="an-endless-comment"),
        pytest.param([b"x" * 65536] * 17, id="no-field-at-all"),
        pytest.param([b"data\n" * 13200] * 90, id="empty-lines-of-data"),
        pytest.param([b"event: "] + [b"x" * 65536] * 17, id="an-endless-type"),
    ],
)
def test_an_event_over_one_mebibyte_is_refused_before_it_ends(pieces: Pieces) -> None:
    with pytest.raises(UpstreamMalformed):
        framed(pieces)


@pytest.mark.parametrize("size", [16384, 65536, 1 << 21])
def test_an_event_just_below_one_mebibyte_passes_and_the_next_one_too(size: int) -> None:
    stream = (b"data: " + b"x" * (EVENT_BYTES - 100) + b"\n\n") * 3
    found = framed(stream[at : at + size] for at in range(0, len(stream), size))
    assert [len(payload) for _, payload in found] == [EVENT_BYTES - 100] * 3


def test_a_long_stream_of_small_events_is_not_one_large_event() -> None:
    assert len(framed([b": note\n\ndata: x\n\n" * 20000] * 4)) == 80000


# Chat Completions chunks


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        pytest.param(BRIEF, [Text("é"), Finish("stop")], id="brief"),
        pytest.param(HELLO, HELLO_EVENTS, id="two-pieces"),
        pytest.param(said("Hel") + said("lo") + STOP, HELLO_EVENTS, id="no-done"),
        pytest.param(HELLO + said("more") + sse({"error": "late"}), HELLO_EVENTS, id="after-done-nothing-counts"),
        pytest.param(
            said("a") + STOP + USAGE + DONE, [Text("a"), Finish("stop", Usage(19, 10))], id="usage-with-no-choices"
        ),
        pytest.param(said("a") + STOP + USAGE, [Text("a"), Finish("stop", Usage(19, 10))], id="usage-and-no-done"),
        pytest.param(
            said("a") + sse(chunk(finish="stop", usage={"prompt_tokens": 1, "completion_tokens": 2})) + DONE,
            [Text("a"), Finish("stop", Usage(1, 2))],
            id="usage-in-the-last-piece",
        ),
        pytest.param(
            sse(chunk({"content": "a"}, usage={"prompt_tokens": 1, "completion_tokens": 1}))
            + sse(chunk(finish="length", usage={"prompt_tokens": 1, "completion_tokens": 9}))
            + DONE,
            [Text("a"), Finish("length", Usage(1, 9))],
            id="usage-so-far-in-every-piece",
        ),
        pytest.param(sse(chunk({"content": "a"}, usage=None)) + STOP, [Text("a"), Finish("stop")], id="usage-null"),
        pytest.param(sse(chunk({"content": "a"}, "stop")), [Text("a"), Finish("stop")], id="text-and-finish-in-one"),
        pytest.param(sse({"choices": None}) + HELLO, HELLO_EVENTS, id="choices-null"),
        pytest.param(sse({"id": "c"}) + HELLO, HELLO_EVENTS, id="choices-missing"),
        pytest.param(sse({"choices": []}) + HELLO, HELLO_EVENTS, id="choices-empty"),
        pytest.param(sse({"choices": [{"index": 0, "delta": None}]}) + HELLO, HELLO_EVENTS, id="delta-null"),
        pytest.param(sse({"choices": [{"index": 0}]}) + HELLO, HELLO_EVENTS, id="delta-missing"),
        pytest.param(sse(chunk({"content": None})) + HELLO, HELLO_EVENTS, id="content-null"),
        pytest.param(sse(chunk({"content": ""})) + HELLO, HELLO_EVENTS, id="content-empty"),
        pytest.param(sse(chunk({"role": "assistant"})) + HELLO, HELLO_EVENTS, id="role-only"),
        pytest.param(
            sse(chunk({"role": "assistant", "content": "", "refusal": None})) + HELLO, HELLO_EVENTS, id="role-openai"
        ),
        pytest.param(sse({"error": None, **chunk()}) + HELLO, HELLO_EVENTS, id="error-null"),
        pytest.param(b": OPENROUTER PROCESSING\n\n" + HELLO, HELLO_EVENTS, id="comment"),
        pytest.param(b"id: 1\n" + HELLO.replace(STOP, b": ping\n\n" + STOP), HELLO_EVENTS, id="comment-after-id"),
        pytest.param(b"retry: 3000\n\n" + HELLO, HELLO_EVENTS, id="retry"),
        pytest.param(b"event: ping\n\n" + HELLO, HELLO_EVENTS, id="ping-without-data"),
        pytest.param(b"\xef\xbb\xbf" + HELLO, HELLO_EVENTS, id="bom"),
        pytest.param(HELLO.replace(b"\n", b"\r\n"), HELLO_EVENTS, id="crlf"),
        pytest.param(HELLO.replace(b"\n", b"\r"), HELLO_EVENTS, id="cr"),
        pytest.param(HELLO.replace(b"data: ", b"data:"), HELLO_EVENTS, id="no-space"),
        pytest.param(
            sse(chunk({"reasoning_content": "hm"})) + said("a") + STOP,
            [Reasoning("hm"), Text("a"), Finish("stop")],
            id="reasoning_content",
        ),
        pytest.param(
            sse(chunk({"reasoning": "hm", "content": ""})) + said("a") + STOP,
            [Reasoning("hm"), Text("a"), Finish("stop")],
            id="reasoning",
        ),
        pytest.param(
            sse(chunk({"content": None, "refusal": ""})) + sse(chunk({"refusal": "I'm"})) + STOP,
            [Refusal("I'm"), Finish("stop")],
            id="refusal",
        ),
        pytest.param(
            sse({"choices": [{"index": 1, "delta": {"content": "B"}}, {"index": 0, "delta": {"content": "A"}}]})
            + sse({"choices": [{"index": 1, "delta": {}, "finish_reason": "stop"}]})
            + sse({"choices": [{"index": 1, "delta": {"content": "C"}}]})
            + said("a")
            + STOP,
            [Text("A"), Text("a"), Finish("stop")],
            id="only-the-first-of-several-answers",
        ),
    ],
)
def test_a_stream_becomes_its_events_under_every_split(stream: bytes, events: list[Event]) -> None:
    assert decoded(stream) == (events, None)


def test_a_tool_call_arrives_in_its_pieces() -> None:
    def call(**fields: object) -> bytes:
        return sse(chunk({"tool_calls": [fields]}))

    stream = (
        call(index=0, id="call_1", type="function", function={"name": "get_weather", "arguments": ""})
        + call(index=0, function={"arguments": '{"ci'})
        + call(index=0, function={"arguments": 'ty":"Ö"}'})
        + call(index=1, id="call_2", type="function", function={"name": "now", "arguments": "{}"})
        + sse(chunk(finish="tool_calls"))
        + DONE
    )
    assert decoded(stream) == (
        [
            ToolCall(0, "call_1", "get_weather", ""),
            ToolCall(0, None, None, '{"ci'),
            ToolCall(0, None, None, 'ty":"Ö"}'),
            ToolCall(1, "call_2", "now", "{}"),
            Finish("tool_calls"),
        ],
        None,
    )


def test_a_thought_that_a_server_sends_under_both_its_names_is_told_once() -> None:
    stream = sse(chunk({"reasoning": "hm", "reasoning_content": "hm"})) + said("a") + STOP
    assert decoded(stream) == ([Reasoning("hm"), Text("a"), Finish("stop")], None)


@pytest.mark.parametrize(
    "usage",
    [
        {"total_tokens": 5},
        {"prompt_tokens": -1, "completion_tokens": 2},
        {"prompt_tokens": 1.5, "completion_tokens": 2},
        {"prompt_tokens": True, "completion_tokens": 2},
        {"prompt_tokens": 10**12 + 1, "completion_tokens": 2},
        {"prompt_tokens": 1, "completion_tokens": 2**63},
    ],
)
def test_an_answer_that_is_whole_is_not_lost_for_a_usage_that_cannot_be_read(usage: dict[str, Any]) -> None:
    events, failure = decoded(said("a") + STOP + sse({"choices": [], "usage": usage}) + DONE)
    assert (text_of(events), failure) == ("a", None)
    assert events[-1] == Finish("stop")


def test_two_tool_calls_in_one_delta_are_both_told() -> None:
    calls = [{"index": index, "id": f"c{index}", "function": {"name": "f", "arguments": ""}} for index in (0, 1)]
    events, _ = decoded(sse(chunk({"tool_calls": calls})) + sse(chunk(finish="tool_calls")))
    assert [event.index for event in events if isinstance(event, ToolCall)] == [0, 1]


def test_one_delta_is_one_event_and_reads_join_none() -> None:
    events, _ = outcome([b"".join(said(word) for word in ("a", "b", "c", "d")) + STOP])
    assert events == [Text("a"), Text("b"), Text("c"), Text("d"), Finish("stop")]


def test_the_text_of_a_delta_is_given_out_by_the_read_that_ends_it() -> None:
    decoder = ChatDecoder()
    assert decoder.feed(said("Hel")) == [Text("Hel")]
    assert decoder.feed(said("lo")[:-1]) == []
    assert decoder.feed(b"\n") == [Text("lo")]


def test_an_answer_concludes_once_its_finish_reason_is_known() -> None:
    decoder = ChatDecoder()
    decoder.feed(said("a"))
    assert not decoder.concluding
    decoder.feed(STOP)
    assert decoder.concluding


# Cut and broken answers


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(said("a"), id="clean-end-of-file"),
        pytest.param(said("a") + DONE, id="done-without-finish-reason"),
        pytest.param(said("a") + STOP[:-1], id="finish-without-its-blank-line"),
        pytest.param(said("a") + STOP[:-2], id="finish-without-its-line-end"),
        pytest.param(said("a") + USAGE, id="usage-without-finish-reason"),
        pytest.param(said("a") + USAGE + DONE, id="usage-and-done-without-finish-reason"),
        pytest.param(sse(chunk({"content": "a"}, finish="")), id="an-empty-finish-reason"),
        pytest.param(said("a") + sse({"choices": [{"index": 1, "delta": {}, "finish_reason": "stop"}]}) + DONE,
                     id="only-another-answer-finished"),
    ],
)  # fmt: skip
def test_an_end_without_a_finish_reason_is_a_cut(stream: bytes) -> None:
    events, failure = decoded(stream)
    assert failure is UpstreamIncomplete
    assert text_of(events) == ("a" if stream else "")


@pytest.mark.parametrize("cut", range(len(said("a")) + len(STOP)))
def test_a_cut_at_any_byte_before_the_finish_is_known_never_looks_whole(cut: int) -> None:
    assert outcome([(said("a") + STOP)[:cut]])[1] is UpstreamIncomplete


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ({"error": {"message": CANARY, "type": "server_error", "param": None, "code": None}}, UpstreamError),
        ({"error": CANARY}, UpstreamError),
        ({"error": {"message": CANARY, "code": 500}}, UpstreamError),
        ({"error": [CANARY]}, UpstreamError),
        ({"error": True}, UpstreamError),
        ({"error": {"code": {"deep": CANARY}, "type": [CANARY], "message": None}}, UpstreamError),
        ({"error": {"message": CANARY, "code": "rate_limit_exceeded"}}, UpstreamRateLimited),
        ({"error": {"message": CANARY, "code": "insufficient_quota"}}, UpstreamQuota),
        ({"error": {"message": CANARY, "type": "insufficient_quota", "code": None}}, UpstreamQuota),
        ({"error": {"message": CANARY, "code": "context_length_exceeded"}}, InputTooLong),
        ({"error": {"message": CANARY, "code": "content_policy_violation"}}, ContentRefused),
        ({"error": {"message": CANARY}, "choices": []}, UpstreamError),
        ({"error": {"message": CANARY}, **chunk(finish="stop")}, UpstreamError),
    ],
)
def test_an_error_inside_the_stream_is_its_failure_without_its_words(data: object, kind: type[UpstreamFailure]) -> None:
    events, failure = decoded(said("a") + sse(data) + STOP + DONE)
    assert failure is kind
    assert text_of(events) == "a"
    assert not [event for event in events if isinstance(event, Finish)]
    for name in ("", "event: error\n"):
        assert decoded(name.encode() + sse(data))[1] is kind


@pytest.mark.parametrize("data", [{"message": CANARY}, {"code": "x"}, {}, [], "text", None, 5])
def test_an_error_event_without_an_error_key_is_a_failure_too(data: object) -> None:
    events, failure = decoded(said("a") + b"event: error\n" + sse(json.dumps(data)) + STOP + DONE)
    assert failure is not None and issubclass(failure, UpstreamFailure) and failure is not UpstreamIncomplete
    assert text_of(events) == "a"


MALFORMED = {
    "bad-json": sse('{"choices":'),
    "two-values": sse("{} {}"),
    "single-quotes": sse("{'choices': []}"),
    "html": sse("<html>"),
    "bad-utf8": sse("{}").replace(b"{}", b'{"choices":[{"index":0,"delta":{"content":"\xff\xfe"}}]}'),
    "cut-utf8": b'data: {"choices":[{"index":0,"delta":{"content":"\xc3"}}]}\n\n',
    "deep-lists": sse("[" * 100_000),
    "deep-objects": sse('{"a":' * 100_000),
    "deep-and-whole": sse('{"choices":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "array": sse([]),
    "number": sse("5"),
    "null": sse("null"),
    "string": sse('"text"'),
    "control-character": b'data: {"choices":[{"index":0,"delta":{"content":"\x01"}}]}\n\n',
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_is_no_chunk_is_malformed_and_what_came_before_it_is_kept(data: bytes) -> None:
    stream = said("a") + data + STOP + DONE
    assert outcome([stream]) == ([Text("a")], UpstreamMalformed)
    assert outcome([said("a"), data, STOP, DONE]) == ([Text("a")], UpstreamMalformed)
    if len(stream) < 1000:
        decoded(stream)


def test_an_event_over_the_limit_is_malformed_and_what_came_before_it_is_kept() -> None:
    stream = said("a") + b"data: " + b" " * EVENT_BYTES + b"\n\n" + STOP
    assert outcome([stream]) == ([Text("a")], UpstreamMalformed)
    assert outcome(stream[at : at + 65536] for at in range(0, len(stream), 65536)) == ([Text("a")], UpstreamMalformed)


SHAPES: dict[str, object] = {
    "choices-text": {"choices": "text"},
    "choices-object": {"choices": {"0": {}}},
    "choices-number": {"choices": 1},
    "choice-null": {"choices": [None]},
    "choice-number": {"choices": [1]},
    "choice-list": {"choices": [[]]},
    "index-text": {"choices": [{"index": "0", "delta": {"content": "x"}}]},
    "index-object": {"choices": [{"index": {}, "delta": {"content": "x"}}]},
    "delta-text": {"choices": [{"index": 0, "delta": "text"}]},
    "delta-list": {"choices": [{"index": 0, "delta": [1]}]},
    "delta-number": {"choices": [{"index": 0, "delta": 1}]},
    "content-number": chunk({"content": 5}),
    "content-object": chunk({"content": {"text": "x"}}),
    "content-list": chunk({"content": [{"type": "text", "text": "x"}]}),
    "content-true": chunk({"content": True}),
    "reasoning-object": chunk({"reasoning": {"x": 1}}),
    "refusal-list": chunk({"refusal": ["x"]}),
    "finish-number": chunk(finish=5),
    "finish-object": chunk(finish={"reason": "stop"}),
    "finish-list": chunk(finish=["stop"]),
    "finish-true": chunk(finish=True),
    "tools-object": chunk({"tool_calls": {"0": {}}}),
    "tools-text": chunk({"tool_calls": "text"}),
    "tools-number": chunk({"tool_calls": 3}),
    "tool-null": chunk({"tool_calls": [None]}),
    "tool-text": chunk({"tool_calls": ["text"]}),
    "tool-empty": chunk({"tool_calls": [{}]}),
    "tool-function-null": chunk({"tool_calls": [{"index": 0, "function": None}]}),
    "tool-function-text": chunk({"tool_calls": [{"index": 0, "function": "f"}]}),
    "tool-index-text": chunk({"tool_calls": [{"index": "0", "function": {"arguments": "x"}}]}),
    "tool-index-huge": chunk({"tool_calls": [{"index": 10**400, "function": {"arguments": "x"}}]}),
    "tool-arguments-object": chunk({"tool_calls": [{"index": 0, "id": 7, "function": {"name": 8, "arguments": {}}}]}),
    "usage-text": {"choices": [], "usage": "many"},
    "usage-list": {"choices": [], "usage": [1]},
    "usage-of-texts": {"choices": [], "usage": {"prompt_tokens": "1", "completion_tokens": None}},
    "usage-of-objects": {"choices": [], "usage": {"prompt_tokens": {}, "completion_tokens": []}},
    "usage-negative": {"choices": [], "usage": {"prompt_tokens": -1, "completion_tokens": -5}},
    "usage-true": {"choices": [], "usage": {"prompt_tokens": True, "completion_tokens": 1.5}},
    "usage-empty": {"choices": [], "usage": {}},
}


def assert_well_typed(event: Event) -> None:
    """Whatever the upstream sent, our own values are what their annotations say."""
    match event:
        case Text() | Reasoning() | Refusal():
            assert isinstance(event.text, str)
        case ToolCall():
            assert type(event.index) is int
            assert event.id is None or isinstance(event.id, str)
            assert event.name is None or isinstance(event.name, str)
            assert isinstance(event.arguments, str)
        case Finish():
            assert isinstance(event.finish_reason, str) and event.finish_reason
            if event.usage is not None:
                assert type(event.usage.input_tokens) is int and event.usage.input_tokens >= 0
                assert type(event.usage.output_tokens) is int and event.usage.output_tokens >= 0


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_wrong_shape_ends_in_a_named_failure_never_in_an_accident(shape: object) -> None:
    events, failure = decoded(said("a") + sse(shape))
    assert failure in (UpstreamMalformed, UpstreamIncomplete)
    assert events[0] == Text("a")
    for event in events:
        assert_well_typed(event)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_wrong_shape_before_the_finish_is_malformed_or_passed_over(shape: object) -> None:
    events, failure = outcome([said("a") + sse(shape) + STOP + DONE])
    assert failure in (None, UpstreamMalformed)
    for event in events:
        assert_well_typed(event)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(["content", "reasoning", "reasoning_content", "refusal", "tool_calls", "role"])
choices = st.fixed_dictionaries(
    {},
    optional={
        "index": json_values,
        "delta": st.dictionaries(names, json_values, max_size=3) | json_values,
        "finish_reason": json_values,
    },
)
chunks = st.fixed_dictionaries(
    {}, optional={"choices": st.lists(choices, max_size=2) | json_values, "usage": json_values, "error": json_values}
)


@given(st.lists(chunks | json_values, max_size=4), st.data())
def test_any_json_gives_the_same_under_any_split_and_no_other_exception(
    values: list[object], data: st.DataObject
) -> None:
    stream = said("a") + b"".join(sse(json.dumps(value)) for value in values)
    found = outcome([stream])
    for event in found[0]:
        assert_well_typed(event)
    assert repr(outcome(data.draw(random_splits(stream)))) == repr(found)


@given(st.binary(max_size=300), st.data())
def test_any_bytes_give_the_same_under_any_split_and_no_other_exception(noise: bytes, data: st.DataObject) -> None:
    stream = said("a") + noise + STOP
    assert outcome(data.draw(random_splits(stream))) == outcome([stream])


def test_a_number_of_many_digits_is_no_accident() -> None:
    # int() refuses more than 4,300 digits with a ValueError.
    events, failure = outcome([said("a") + sse('{"created":' + "1" * 5000 + "}") + STOP])
    assert failure in (None, UpstreamMalformed)
    assert events[0] == Text("a")


@pytest.mark.parametrize(
    "data",
    [
        sse({"error": {"message": CANARY, "code": CANARY, "type": CANARY}}),
        sse({"error": CANARY}),
        b"event: error\n" + sse({"message": CANARY}),
        sse("{" + CANARY),
        b"data: " + CANARY.encode() + b"\xff\n\n",
        sse({"choices": CANARY}),
    ],
)
def test_no_failure_repeats_the_upstreams_words_not_even_in_its_traceback(data: bytes) -> None:
    decoder = ChatDecoder()
    with pytest.raises(UpstreamFailure) as caught:
        decoder.feed(data) + decoder.feed(b"")
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + repr(vars(caught.value))
    assert "canary" not in shown
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


# Halves of emoji


@pytest.mark.parametrize(
    ("deltas", "pieces"),
    [
        (["\ud83d", "\ude00"], ["😀"]),
        (["a\ud83d", "\ude00b"], ["a", "😀b"]),
        (["\ud83d\ude00"], ["😀"]),
        (["a\ud83d"], ["a", "\ufffd"]),
        (["\ud83d", "b"], ["\ufffdb"]),
        (["\ude00"], ["\ufffd"]),
        (["\ude00\ud83d"], ["\ufffd", "\ufffd"]),
        (["\ud83d", "\ud83d", "\ude00"], ["\ufffd", "😀"]),
        (["\ud83d", "", "\ude00"], ["😀"]),
        (["\ud83da"], ["\ufffda"]),
    ],
)
def test_halves_of_an_emoji_meet_across_deltas(deltas: list[str], pieces: list[str]) -> None:
    events, failure = decoded(b"".join(said(delta) for delta in deltas) + STOP + DONE)
    assert failure is None
    assert [event.text for event in events if isinstance(event, Text)] == pieces
    assert isinstance(events[-1], Finish)


def test_a_half_waits_for_the_next_delta_of_its_own_kind() -> None:
    stream = (
        said("\ud83d")
        + sse(chunk({"reasoning_content": "\ud83d"}))
        + said("\ude00")
        + sse(chunk({"reasoning_content": "\ude01"}))
        + STOP
    )
    assert decoded(stream)[0] == [Text("😀"), Reasoning("😁"), Finish("stop")]


def test_a_half_that_stays_alone_at_the_end_stands_before_the_finish() -> None:
    assert decoded(said("\ud83d") + STOP + USAGE + DONE)[0] == [Text("\ufffd"), Finish("stop", Usage(19, 10))]


def test_a_half_that_stays_alone_in_a_tool_calls_arguments_is_not_lost() -> None:
    call = sse(chunk({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "a\ud83d"}}]}))
    events, _ = decoded(call + sse(chunk(finish="tool_calls")))
    assert "".join(event.arguments for event in events if isinstance(event, ToolCall)) == "a\ufffd"


def test_a_half_in_bytes_of_its_own_becomes_no_text_that_utf8_cannot_write() -> None:
    # CESU-8: a high surrogate as three bytes. Python's json reads it, strict readers refuse it.
    stream = b'data: {"choices":[{"index":0,"delta":{"content":"\xed\xa0\xbd"}}]}\n\n' + STOP
    events, failure = decoded(stream)
    assert failure in (None, UpstreamMalformed)
    assert text_of(events).encode() in (b"", "\ufffd".encode())


def test_the_joiner_gives_what_waits_in_the_end() -> None:
    joiner = SurrogateJoiner()
    assert joiner.join("text", "a\ud83d") == "a"
    assert joiner.join("refusal", "\ud83d") == ""
    assert sorted(joiner.rest()) == [("refusal", "\ufffd"), ("text", "\ufffd")]


@given(any_deltas)
def test_the_joiner_writes_only_what_utf8_can_write_and_loses_nothing(deltas: list[str]) -> None:
    joiner = SurrogateJoiner()
    joined = "".join([joiner.join("text", delta) for delta in deltas] + [text for _, text in joiner.rest()])
    assert joined.encode().decode() == as_read(deltas)


@given(any_deltas, st.booleans(), st.data())
def test_any_text_survives_any_split(deltas: list[str], escaped: bool, data: st.DataObject) -> None:
    def piece(delta: str) -> bytes:
        text = json.dumps(chunk({"content": delta}), ensure_ascii=False)
        try:
            return sse(text) if not escaped else said(delta)
        except UnicodeEncodeError:  # a half has no UTF-8: servers that send one escape it
            return said(delta)

    stream = b"".join(map(piece, deltas)) + STOP + DONE
    events, failure = outcome(data.draw(random_splits(stream)))
    assert failure is None
    assert text_of(events) == as_read(deltas)


# What the SDK makes of the same bytes


class Judge:
    """The SDK's own Stream over bytes that never leave the process."""

    def __init__(self) -> None:
        self.pieces: Pieces = []
        self.client = openai.OpenAI(
            api_key="sk-test",
            base_url="http://judge.invalid/v1",
            max_retries=0,
            http_client=httpx2.Client(transport=httpx2.MockTransport(self.answer)),
        )

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"Content-Type": "text/event-stream"}, content=iter(self.pieces))

    def read(self, pieces: Pieces) -> dict[str, Any]:
        self.pieces = pieces
        heard: dict[str, Any] = {"text": "", "refusal": "", "arguments": "", "finish": None, "usage": None}
        stream = self.client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        for part in stream:
            if part.usage:
                heard["usage"] = (part.usage.prompt_tokens, part.usage.completion_tokens)
            for choice in part.choices:
                if choice.index == 0:
                    heard["text"] += choice.delta.content or ""
                    heard["refusal"] += choice.delta.refusal or ""
                    for call in choice.delta.tool_calls or []:
                        heard["arguments"] += (call.function.arguments if call.function else "") or ""
                    heard["finish"] = choice.finish_reason or heard["finish"]
        for name in ("text", "refusal", "arguments"):
            heard[name] = as_read([heard[name]])
        return heard


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    judge = Judge()
    yield judge
    judge.client.close()


def ours(pieces: Pieces) -> dict[str, Any]:
    events, failure = outcome(pieces)
    assert failure is None
    finish = events[-1]
    assert isinstance(finish, Finish)
    return {
        "text": text_of(events),
        "refusal": "".join(event.text for event in events if isinstance(event, Refusal)),
        "arguments": "".join(event.arguments for event in events if isinstance(event, ToolCall)),
        "finish": finish.finish_reason,
        "usage": finish.usage and (finish.usage.input_tokens, finish.usage.output_tokens),
    }


def openai_like(words: list[str]) -> bytes:
    """The fields that OpenAI sends, padding included."""
    common = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1770933892, "model": "m", "usage": None}

    def part(delta: dict[str, object], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return sse({**common, "choices": [choice], "obfuscation": "Qup1B"})

    usage = {"prompt_tokens": 16, "completion_tokens": 300, "total_tokens": 316}
    return b"".join(
        [
            part({"role": "assistant", "content": "", "refusal": None}),
            *(part({"content": word}) for word in words),
            part({}, "stop"),
            sse({**common, "choices": [], "usage": usage}),
            DONE,
        ]
    )


CORPORA = {
    "openai": openai_like(["Holiday", " é", " 😀", "\u2028", "\r\n", "\x00"]),
    "openai-crlf": openai_like(["Holi", "day"]).replace(b"\n", b"\r\n"),
    "openai-cr": openai_like(["Holi", "day"]).replace(b"\n", b"\r"),
    "comments": b": hello\n\n" + openai_like(["a"]).replace(DONE, b": still here\n\n" + DONE),
    "halves": openai_like(["\ud83d", "\ude00", "\ud83d"]),
    "two-answers": sse({"choices": [{"index": 1, "delta": {"content": "B"}}, {"index": 0, "delta": {"content": "A"}}]})
    + STOP
    + DONE,
    "refusal": sse(chunk({"content": None, "refusal": ""})) + sse(chunk({"refusal": "I'm"})) + STOP + DONE,
    "tools": sse(chunk({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": ""}}]}))
    + sse(chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"é":1}'}}]}))
    + sse(chunk(finish="tool_calls"))
    + DONE,
    "data-over-lines": b'data: {"choices": [{"index": 0,\ndata: "delta": {"content": "a"},\n'
    b'data: "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n',
    "no-done": said("a") + STOP,
    "words-after-done": said("a") + STOP + b"data: [DONE] bye\n\n" + said("b"),
}


@pytest.mark.parametrize("stream", CORPORA.values(), ids=CORPORA.keys())
def test_the_sdk_hears_the_same_answer(stream: bytes, judge: Judge) -> None:
    heard = judge.read([stream])
    for pieces in every_split(stream):
        assert ours(pieces) == heard, pieces
    assert judge.read([stream[at : at + 1] for at in range(len(stream))]) == heard


@given(any_deltas, st.sampled_from([b"\n", b"\r\n", b"\r"]), st.data())
def test_the_sdk_hears_the_same_text_whatever_it_is(
    judge: Judge, deltas: list[str], end: bytes, data: st.DataObject
) -> None:
    stream = openai_like(deltas).replace(b"\n", end)
    pieces = data.draw(random_splits(stream))
    assert ours(pieces) == judge.read(pieces)


# Error objects


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"code": "context_length_exceeded"}, InputTooLong),
        ({"code": "content_policy_violation", "type": "invalid_request_error"}, ContentRefused),
        ({"code": "insufficient_quota", "type": "insufficient_quota"}, UpstreamQuota),
        ({"code": None, "type": "insufficient_quota"}, UpstreamQuota),
        ({"code": "rate_limit_exceeded"}, UpstreamRateLimited),
        ({"code": "something_else"}, UpstreamRejected),
        ({"code": 400}, UpstreamRejected),
        ({}, UpstreamRejected),
        ("insufficient funds", UpstreamRejected),
        (None, UpstreamRejected),
        ([], UpstreamRejected),
    ],
)
def test_an_error_object_means_a_failure_or_the_one_of_its_status(error: object, kind: type[UpstreamFailure]) -> None:
    assert error_kind(error, UpstreamRejected) is kind


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ({"code": "context_length_exceeded"}, "context_length_exceeded"),
        ({"code": "a" * 64}, "a" * 64),
        ({"code": "v1.2_x"}, "v1.2_x"),
        ({"code": "a" * 65}, None),
        ({"code": ""}, None),
        ({"code": "Bad"}, None),
        ({"code": "sk-key"}, None),
        ({"code": "a b"}, None),
        ({"code": "abc\n"}, None),
        ({"code": "é"}, None),
        ({"code": ["abc"]}, None),
        ({"message": "abc"}, None),
        ("abc def", None),
        (None, None),
    ],
)
def test_only_a_code_that_is_one_plain_word_may_be_logged(error: object, code: str | None) -> None:
    assert public_code(error) == code


@given(json_values)
def test_a_logged_code_is_always_one_plain_word(error: object) -> None:
    code = public_code({"code": error})
    assert code is None or re.fullmatch(r"[a-z0-9_.]{1,64}", code)
    assert issubclass(error_kind(error, UpstreamRejected), errors.UpstreamFailure)


def test_an_event_field_without_a_value_takes_the_type_back() -> None:
    assert list(SseDecoder().feed(b"data: a\nevent: x\nevent\n\n")) == [(b"", b"a")]
