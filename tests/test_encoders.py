"""Events -> the bytes of each format, read back by readers that are not ours, under every split."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import httpx2
import httpx_sse
import pytest
import requests
import sseclient
import urllib3
from hypothesis import given
from hypothesis import strategies as st

from streamchat.decoder import ChatDecoder
from streamchat.encoders import (
    ENCODERS,
    Encoder,
    JsonEncoder,
    NdjsonEncoder,
    SseEncoder,
    TextEncoder,
    choose_encoder,
)
from streamchat.errors import NotAcceptable
from streamchat.events import Event, Failure, Finish, Reasoning, Refusal, Start, Text, ToolCall, Usage, to_json
from tests.splits import Pieces, any_deltas, as_read, every_split, random_splits

START = Start("resp_1", "gpt-4.1-mini", 1790000000)
FINISH = Finish("stop", Usage(19, 10))
CUT = Failure("upstream_incomplete", "The answer was cut off.", True)
ANSWER: list[Event] = [
    START,
    Reasoning("hm"),
    Text("Hé\n"),
    Text("\u2028\x85\r👋"),
    ToolCall(0, "call_1", "get_weather", '{"ci'),
    ToolCall(0, None, None, 'ty"}'),
    Refusal("no"),
    FINISH,
]


def encoded(kind: type[Encoder], events: list[Event]) -> bytes:
    encoder = kind()
    return b"".join(encoder.encode(seq, event) for seq, event in enumerate(events))


# Readers that are not ours: pieces of bytes -> (id, type, data), or JSON values


def read_by_httpx2(pieces: Pieces) -> list[tuple[str | None, str, str]]:
    request = httpx2.Request("GET", "http://judge.invalid/")
    headers = {"Content-Type": SseEncoder.content_type}
    response = httpx2.Response(200, headers=headers, content=iter(pieces), request=request)
    return [(event.id, event.event, event.data) for event in httpx2.EventSource(response)]


def read_by_httpx_sse(pieces: Pieces) -> list[tuple[str | None, str, str]]:
    response = httpx.Response(200, headers={"Content-Type": SseEncoder.content_type}, content=iter(pieces))
    return [(event.id, event.event, event.data) for event in httpx_sse.EventSource(response).iter_sse()]


def read_by_sseclient(pieces: Pieces) -> list[tuple[str | None, str, str]]:
    return [(event.id, event.event, event.data) for event in sseclient.SSEClient(iter(pieces)).events()]


SSE_READERS = {"httpx2": read_by_httpx2, "httpx-sse": read_by_httpx_sse, "sseclient": read_by_sseclient}


class Wire(io.RawIOBase):
    """A response's body that arrives in these pieces."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = list(pieces)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._pieces:
            return 0
        piece = self._pieces.pop(0)
        taken, rest = piece[: len(buffer)], piece[len(buffer) :]
        if rest:
            self._pieces.insert(0, rest)
        buffer[: len(taken)] = taken
        return len(taken)


def answered(pieces: Pieces, content_type: str) -> requests.Response:
    response = requests.Response()
    response.status_code = 200
    response.headers["Content-Type"] = content_type
    response.encoding = requests.utils.get_encoding_from_headers(response.headers)
    response.raw = urllib3.HTTPResponse(body=Wire(pieces), preload_content=False)
    return response


def read_lines(pieces: Pieces, size: int = 512) -> list[dict[str, Any]]:
    response = answered(pieces, NdjsonEncoder.content_type)
    return [json.loads(line) for line in response.iter_lines(size, decode_unicode=True)]


def read_text(pieces: Pieces, size: int = 512) -> str:
    response = answered(pieces, TextEncoder.content_type)
    return "".join(response.iter_content(size, decode_unicode=True))


# Bytes


def test_sse_is_id_type_data_and_a_blank_line() -> None:
    assert encoded(SseEncoder, [START, Text("Hello"), FINISH]) == (
        b"id: 0\nevent: start\n"
        b'data: {"type":"start","seq":0,"id":"resp_1","model":"gpt-4.1-mini","created_at":1790000000}\n\n'
        b'id: 1\nevent: text\ndata: {"type":"text","seq":1,"text":"Hello"}\n\n'
        b'id: 2\nevent: finish\ndata: {"type":"finish","seq":2,"finish_reason":"stop",'
        b'"usage":{"input_tokens":19,"output_tokens":10,"total_tokens":29,"estimated":false}}\n\n'
    )


def test_ndjson_is_one_object_a_line() -> None:
    assert encoded(NdjsonEncoder, [Text("Hello"), Text("a\nb\u2028é👋"), CUT]) == (
        b'{"type":"text","seq":0,"text":"Hello"}\n'
        b'{"type":"text","seq":1,"text":"a\\nb\\u2028\\u00e9\\ud83d\\udc4b"}\n'
        b'{"type":"error","seq":2,"code":"upstream_incomplete","message":"The answer was cut off.","retryable":true}\n'
    )


def test_text_is_the_text_and_nothing_else() -> None:
    events: list[Event] = [START, Reasoning("hm"), Text("Hé"), ToolCall(0, "c", "f", "{}"), Text("\r\n👋"), FINISH]
    assert encoded(TextEncoder, events) == "Hé\r\n👋".encode()


def test_a_failure_leaves_no_trace_in_the_text() -> None:
    assert encoded(TextEncoder, [START, Text("Hel"), CUT]) == b"Hel"


def test_whole_json_is_written_when_the_answer_is_whole_and_not_before() -> None:
    encoder = JsonEncoder()
    begun: list[Event] = [START, Reasoning("hm"), Text("Hé"), Text("\n👋")]
    for seq, event in enumerate(begun):
        assert encoder.encode(seq, event) == b""
    assert json.loads(encoder.encode(4, FINISH)) == {
        "id": "resp_1",
        "status": "completed",
        "model": "gpt-4.1-mini",
        "created_at": 1790000000,
        "text": "Hé\n👋",
        "finish_reason": "stop",
        "usage": {"input_tokens": 19, "output_tokens": 10, "total_tokens": 29, "estimated": False},
        "error": None,
    }


@pytest.mark.parametrize(
    ("reason", "status"),
    [("stop", "completed"), ("tool_calls", "completed"), ("length", "incomplete"), ("content_filter", "incomplete")],
)
def test_whole_json_says_whether_the_model_was_stopped(reason: str, status: str) -> None:
    assert json.loads(encoded(JsonEncoder, [START, Text("a"), Finish(reason)]))["status"] == status


def test_whole_json_of_a_failed_answer_is_not_written_at_all() -> None:
    assert encoded(JsonEncoder, [START, Text("Hel"), CUT]) == b""


def test_two_answers_in_whole_json_share_nothing() -> None:
    first, second = JsonEncoder(), JsonEncoder()
    for encoder, text in ((first, "a"), (second, "b")):
        encoder.encode(0, START)
        encoder.encode(1, Text(text))
    assert json.loads(first.encode(2, FINISH))["text"] == "a"
    assert json.loads(second.encode(2, FINISH))["text"] == "b"


@pytest.mark.parametrize("kind", ENCODERS.values(), ids=list(ENCODERS))
def test_each_format_names_its_charset(kind: type[Encoder]) -> None:
    assert kind.content_type == f"{kind.mimetype}; charset=utf-8"
    assert ENCODERS[kind.mimetype] is kind


@pytest.mark.parametrize("event", ANSWER, ids=lambda event: event.type)
def test_events_in_json_are_ascii_on_one_line(event: Event) -> None:
    line = NdjsonEncoder().encode(7, event)
    assert line.isascii()
    assert (line.count(b"\n"), line[-1:], line.count(b"\r")) == (1, b"\n", 0)
    frame = SseEncoder().encode(7, event)
    assert frame == b"id: 7\nevent: %s\ndata: %s\n" % (event.type.encode(), line)


# Heartbeats and the status


def test_there_is_no_heartbeat_where_it_would_be_part_of_the_answer() -> None:
    assert TextEncoder.heartbeat == b""
    assert JsonEncoder.heartbeat == b""
    assert SseEncoder.heartbeat.startswith(b": keep-alive\n")
    assert NdjsonEncoder.heartbeat == b'{"type":"heartbeat"}\n'


def test_only_where_there_is_room_for_it_a_failure_is_written() -> None:
    assert {kind for kind in ENCODERS.values() if kind.in_band} == {SseEncoder, NdjsonEncoder}


def test_only_formats_with_an_opening_answer_before_their_first_piece() -> None:
    assert {kind for kind in ENCODERS.values() if kind.patient} == {TextEncoder, JsonEncoder}


@pytest.mark.parametrize(
    ("kind", "events"),
    [
        (TextEncoder, {"text", "refusal", "finish"}),
        (SseEncoder, {"text", "reasoning", "refusal", "tool_call", "finish"}),
        (NdjsonEncoder, {"text", "reasoning", "refusal", "tool_call", "finish"}),
    ],
)
def test_the_status_is_decided_by_what_the_format_writes_and_never_by_the_start(
    kind: type[Encoder], events: set[str]
) -> None:
    decides = {event.type for event in ANSWER if kind().writes(event)}
    # An answer without a word still has a status: its finish decides in text too.
    assert decides == events


def test_the_status_of_whole_json_is_decided_by_its_end_alone() -> None:
    assert {event.type for event in ANSWER if JsonEncoder().writes(event)} == {"finish"}


# Read back


@pytest.mark.parametrize("read", SSE_READERS.values(), ids=list(SSE_READERS))
def test_every_sse_reader_reads_every_event_under_every_split(read: Any) -> None:
    expected = [(str(seq), event.type, to_json(seq, event)) for seq, event in enumerate(ANSWER)]
    for pieces in every_split(encoded(SseEncoder, ANSWER)):
        assert [(number, kind, json.loads(data)) for number, kind, data in read(pieces)] == expected, pieces


@pytest.mark.parametrize("read", SSE_READERS.values(), ids=list(SSE_READERS))
def test_a_heartbeat_is_no_event_to_any_sse_reader(read: Any) -> None:
    beat = SseEncoder.heartbeat
    before = encoded(SseEncoder, [START, Text("a")])
    after = SseEncoder().encode(2, FINISH)
    for stream in (beat + before + after, before + beat + after, before + beat * 3 + after, before + after + beat):
        for pieces in every_split(stream):
            assert [kind for _, kind, _ in read(pieces)] == ["start", "text", "finish"], pieces


def test_requests_reads_every_line_under_every_split() -> None:
    stream = encoded(NdjsonEncoder, ANSWER)
    expected = [to_json(seq, event) for seq, event in enumerate(ANSWER)]
    for pieces in every_split(stream):
        assert read_lines(pieces) == expected, pieces
    for size in (1, 2, 3, 7, 100_000):
        assert read_lines([stream], size) == expected


def test_a_heartbeat_is_a_line_of_its_own() -> None:
    stream = NdjsonEncoder.heartbeat + NdjsonEncoder().encode(0, Text("a")) + NdjsonEncoder.heartbeat
    for pieces in every_split(stream):
        assert [line["type"] for line in read_lines(pieces)] == ["heartbeat", "text", "heartbeat"]


def test_requests_reads_the_text_under_every_split() -> None:
    stream = encoded(TextEncoder, ANSWER)
    for pieces in every_split(stream):
        assert read_text(pieces) == read_text([stream])
        assert read_text(pieces, 1) == read_text([stream])
    assert (
        read_text([encoded(TextEncoder, [Text("Hé\n"), Text("\u2028\x85\r👋\x00\ufeff")])])
        == "Hé\n\u2028\x85\r👋\x00\ufeff"
    )


def decoded(deltas: list[str]) -> list[Event]:
    """What the upstream's deltas become: halves of emoji may be split over two of them."""
    decoder = ChatDecoder()
    events: list[Event] = [START]
    for delta in deltas:
        chunk = {"choices": [{"index": 0, "delta": {"content": delta}}]}
        events += decoder.feed(f"data: {json.dumps(chunk)}\n\n".encode())
    events += decoder.feed(b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n')
    return events


@pytest.mark.parametrize("read", SSE_READERS.values(), ids=list(SSE_READERS))
@given(deltas=any_deltas, data=st.data())
def test_any_text_comes_back_through_any_sse_reader(read: Any, deltas: list[str], data: st.DataObject) -> None:
    events = decoded(deltas)
    heard = read(data.draw(random_splits(encoded(SseEncoder, events))))
    assert [number for number, _, _ in heard] == [str(seq) for seq in range(len(events))]
    assert "".join(json.loads(text).get("text", "") for _, _, text in heard) == as_read(deltas)


@given(any_deltas, st.integers(1, 600), st.data())
def test_any_text_comes_back_through_lines(deltas: list[str], size: int, data: st.DataObject) -> None:
    events = decoded(deltas)
    heard = read_lines(data.draw(random_splits(encoded(NdjsonEncoder, events))), size)
    assert heard == [to_json(seq, event) for seq, event in enumerate(events)]
    assert "".join(value.get("text", "") for value in heard) == as_read(deltas)


@given(any_deltas, st.integers(1, 600), st.data())
def test_any_text_comes_back_as_text(deltas: list[str], size: int, data: st.DataObject) -> None:
    stream = encoded(TextEncoder, decoded(deltas))
    assert stream.decode() == as_read(deltas)
    assert read_text(data.draw(random_splits(stream)), size) == as_read(deltas)


@given(any_deltas)
def test_any_text_comes_back_whole(deltas: list[str]) -> None:
    assert json.loads(encoded(JsonEncoder, decoded(deltas)))["text"] == as_read(deltas)


# Negotiation


ACCEPTED: list[tuple[str | None, type[Encoder]]] = [
    (None, TextEncoder),
    ("", TextEncoder),
    ("*/*", TextEncoder),
    ("text/*", TextEncoder),
    ("text/plain", TextEncoder),
    ("text/event-stream", SseEncoder),
    ("application/x-ndjson", NdjsonEncoder),
    ("application/json", JsonEncoder),
    ("TEXT/Event-Stream", SseEncoder),
    ("text/event-stream; charset=utf-8", SseEncoder),
    ("application/json;charset=UTF-8", JsonEncoder),
    (" application/json ", JsonEncoder),
    ("text/html, application/json", JsonEncoder),
    ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", TextEncoder),
    ("text/plain;q=0.5, application/json;q=0.9", JsonEncoder),
    ("application/json;q=0.9, text/plain;q=0.5", JsonEncoder),
    ("text/event-stream, */*;q=0.1", SseEncoder),
    ("*/*;q=0.1, application/x-ndjson", NdjsonEncoder),
    ("text/event-stream;q=0.2, text/html;q=0.9", SseEncoder),
    ("text/event-stream;q=0.001", SseEncoder),
    ("text/plain;q=0, text/event-stream", SseEncoder),
    ("text/plain;q=0, text/*", SseEncoder),
    ("text/*;q=0, application/json", JsonEncoder),
    ("text/html, */*", TextEncoder),
    ("text/html;level=1, text/event-stream", SseEncoder),
]


@pytest.mark.parametrize(("accept", "kind"), ACCEPTED, ids=lambda part: str(part)[:50])
def test_accept_names_the_format(accept: str | None, kind: type[Encoder]) -> None:
    assert choose_encoder(accept) is kind


@pytest.mark.parametrize(
    "accept",
    [
        "text/html",
        "image/*",
        "application/xml, text/html;q=0.5",
        "text/event-stream;q=0",
        "*/*;q=0",
        "text/plain;q=0, application/json;q=0",
        "text/plain;q=0.0",
        "application/jsonp",
        "text/plain2",
        "application/problem+json",
    ],
)
def test_an_accept_that_names_only_what_cannot_be_written_is_refused(accept: str) -> None:
    with pytest.raises(NotAcceptable) as caught:
        choose_encoder(accept)
    assert caught.value.status == 406


def test_where_a_wildcard_excludes_the_default_another_format_is_found() -> None:
    assert choose_encoder("text/plain;q=0, */*") is not TextEncoder
    assert choose_encoder("application/*") in (JsonEncoder, NdjsonEncoder)


@given(st.text(st.characters(max_codepoint=255), max_size=60))
def test_no_accept_header_is_an_accident(accept: str) -> None:
    with contextlib.suppress(NotAcceptable):
        assert choose_encoder(accept) in ENCODERS.values()


def test_quality_decides_for_every_pair_of_formats() -> None:
    def pairs() -> Iterator[tuple[str, str]]:
        for better in ENCODERS:
            for worse in ENCODERS:
                if better != worse:
                    yield better, worse

    for better, worse in pairs():
        assert choose_encoder(f"{worse};q=0.3, {better};q=0.7") is ENCODERS[better]
        assert choose_encoder(f"{better};q=0.7, {worse};q=0.3") is ENCODERS[better]
