"""Answers in time: pieces, heartbeats, limits, endings; whatever happens there is one record and nothing is held."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

from streamchat import Record
from streamchat.answer import Answer
from streamchat.cancellation import Cancellation
from streamchat.encoders import ENCODERS
from streamchat.errors import CallerGone, Draining, StreamChatError, UpstreamError, UpstreamIncomplete
from streamchat.events import ChoiceEnd, Event, Finish, Reasoning, Refusal, Text, Usage
from streamchat.hangup import Caller
from streamchat.live import Live
from streamchat.loop import NEVER, choose_loop
from streamchat.opening import Opening
from streamchat.order import Order
from streamchat.prompt import Prompt
from streamchat.settings import Settings
from tests.fake_upstream import (
    FakeUpstream,
    Fin,
    Gate,
    Hang,
    Pause,
    Repeat,
    Rst,
    Step,
    answer,
    chunk,
    done,
    error,
    event,
    finish,
    head,
    http_chunk,
    last_chunk,
    text,
)
from tests.shop import (
    FORMATS,
    KEY,
    NDJSON,
    SSE,
    STREAMS,
    TEXT,
    URL,
    WHOLE,
    Shop,
    call,
    events_of,
    open_shop,
    post_bytes,
    read_all,
    read_until,
    serve,
    wait_until,
)

HEARTBEATS = {SSE: b": keep-alive\n", NDJSON: b'{"type":"heartbeat"}\n'}


@pytest.fixture
def upstream(http: str, upstream: FakeUpstream) -> FakeUpstream:
    return upstream


@pytest.fixture
def shop(upstream: FakeUpstream) -> Iterator[Shop]:
    with open_shop() as opened:
        yield opened


# --- the way of a good answer ---------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
@pytest.mark.parametrize("accept", [SSE, NDJSON])
def test_one_delta_is_one_event_with_one_number(accept: str, framing: str, shop: Shop, upstream: FakeUpstream) -> None:
    pieces = [f"piece {n}\r\n\u2028" for n in range(50)]
    upstream.script = answer(pieces, framing=framing)
    events = events_of(accept, shop.ask(accept=accept).data)
    assert [event["seq"] for event in events] == list(range(52))
    assert [event["type"] for event in events] == ["start", *["text"] * 50, "finish"]
    assert [event["text"] for event in events[1:-1]] == pieces
    assert events[-1]["usage"] == {"input_tokens": 19, "output_tokens": 10, "total_tokens": 29, "estimated": False}


def test_text_is_the_text_and_nothing_else(shop: Shop, upstream: FakeUpstream) -> None:
    upstream.script = [
        head(),
        chunk({"reasoning_content": "hm"}),
        text("Grüße "),
        chunk({"tool_calls": [{"index": 0, "id": "call_1", "function": {"name": "f", "arguments": "{}"}}]}),
        text("\u2028👋"),
        chunk({"refusal": " no"}),
        finish(),
        done(),
        last_chunk(),
    ]
    assert shop.ask().data == "Grüße \u2028👋 no".encode()
    record = shop.the_record()
    assert (record.outcome, record.finish_reason, record.pieces) == ("completed", "stop", 5)


def test_every_kind_of_piece_is_an_event_of_its_own(shop: Shop, upstream: FakeUpstream) -> None:
    piece = {"index": 0, "id": "call_1", "function": {"name": "f", "arguments": '{"a'}}
    deltas: list[dict[str, Any]] = [
        {"reasoning_content": "hm"},
        {"content": "a"},
        {"refusal": "no"},
        {"tool_calls": [piece]},
    ]
    upstream.script = [head(), [chunk(delta) for delta in deltas], finish("tool_calls"), done(), last_chunk()]
    events = events_of(NDJSON, shop.ask(accept=NDJSON).data)
    assert events[1:-1] == [
        {"type": "reasoning", "seq": 1, "text": "hm"},
        {"type": "text", "seq": 2, "text": "a"},
        {"type": "refusal", "seq": 3, "text": "no"},
        {"type": "tool_call", "seq": 4, "index": 0, "id": "call_1", "name": "f", "arguments": '{"a'},
    ]
    assert events[-1]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("accept", FORMATS)
def test_an_answer_without_a_word_is_complete(accept: str, shop: Shop, upstream: FakeUpstream) -> None:
    upstream.script = answer([])
    response = shop.ask(accept=accept)
    assert response.status_code == 200
    assert (response.data == b"") == (accept == TEXT)
    assert shop.the_record().outcome == "completed"


def test_tokens_are_estimated_where_the_upstream_does_not_count(shop: Shop, upstream: FakeUpstream) -> None:
    upstream.script = answer(["abcd", "efgh", "i"], usage=None)
    usage = events_of(SSE, shop.ask("x" * 41, accept=SSE).data)[-1]["usage"]
    assert usage == {"input_tokens": 11, "output_tokens": 3, "total_tokens": 14, "estimated": True}
    record = shop.the_record()
    assert (record.input_tokens, record.output_tokens, record.estimated) == (11, 3, True)


def test_usage_that_comes_late_is_not_waited_for_long(
    shop: Shop, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamchat.upstream.CONCLUDE_SECONDS", 0.1)
    upstream.script = [head(), text("a"), finish(), Hang()]
    assert shop.ask().data == b"a"
    record = shop.the_record()
    assert (record.outcome, record.estimated) == ("completed", True)


def test_the_record_says_what_on_call_needs(upstream: FakeUpstream) -> None:
    before = time.time()
    with open_shop(authorize=lambda _: "ann") as shop:
        response = shop.ask()
        record = shop.the_record()
    assert record == Record(
        id=response.headers["X-Response-Id"],
        user="ann",
        model="gpt-4.1-mini",
        started=record.started,
        first_piece=record.first_piece,
        duration=record.duration,
        outcome="completed",
        finish_reason="stop",
        pieces=4,
        input_tokens=19,
        output_tokens=10,
        estimated=False,
        attempts=1,
        upstream_status=200,
        upstream_request_id="req_fake",
        upstream_code=None,
    )
    assert before <= record.started <= time.time()
    assert record.first_piece is not None and 0 < record.first_piece <= record.duration < 5


# --- coalescing -----------------------------------------------------------------------------------------


class Many(list[Event]):
    """Events of a read that brought about as much as one can bring."""


class Script:
    """A source of events: each step is a list of events, an error, or a function that makes one."""

    ahead = False

    def __init__(self, *steps: Any) -> None:
        self._steps = list(steps)
        self.reads: list[float] = []
        self.closed = 0

    def read(self, until: float) -> list[Event] | None:
        self.reads.append(time.monotonic())
        step = self._steps.pop(0)
        if callable(step):
            step = step(until)
        if isinstance(step, BaseException):
            raise step
        self.ahead = isinstance(step, Many)
        return step  # type: ignore[no-any-return]

    def close(self) -> None:
        self.closed += 1


def tick(until: float) -> None:
    """A step: silence until the time is up."""
    assert until < NEVER
    time.sleep(max(0.0, until - time.monotonic()))


class Bench:
    """An answer from a script, without a server."""

    def __init__(self, script: Script, accept: str = SSE, keep_text: bool = False, **settings: Any) -> None:
        self.loop = choose_loop()
        self.live = Live(self.loop, 2, 30, 60, lambda: None)
        self.told: list[tuple[Record, str]] = []
        self.script = script
        order = Order("resp_1", "ann", Prompt([{"role": "user", "content": "12345678"}], "m", {}))
        self.answer = Answer(
            order,
            Settings(**settings),
            ENCODERS[accept](),
            Caller(),
            self.live,
            self.loop,
            lambda record, words: self.told.append((record, words)),
            keep_text=keep_text,
        )
        self.answer.admit()
        self.answer.begin(lambda _: script)

    def outcome(self) -> str:
        """Of the one record; nothing is held."""
        ((record, _),) = self.told
        assert len(self.live) == 0
        assert self.script.closed == 1
        return record.outcome


@contextlib.contextmanager
def bench(*steps: Any, **options: Any) -> Iterator[Bench]:
    made = Bench(Script(*steps), **options)
    try:
        yield made
    finally:
        made.answer.close()
        made.live.close()


END = Finish("stop", Usage(1, 1))


def read_times(made: Bench) -> list[float]:
    b"".join(made.answer.stream())
    return [later - earlier for earlier, later in zip(made.script.reads, made.script.reads[1:], strict=False)]


def test_the_first_three_pieces_are_not_held_back_and_later_ones_are_joined() -> None:
    pieces: list[list[Event]] = [[Text(str(n))] for n in range(6)]
    with bench(*pieces, [END], coalesce_ms=100) as made:
        gaps = read_times(made)
    assert max(gaps[:2]) < 0.05
    assert min(gaps[2:]) >= 0.099


def test_an_upstream_that_is_ahead_is_read_on_at_once() -> None:
    pieces = [Many([Text(str(n))]) for n in range(6)]
    with bench(*pieces, [Text("x")], [END], coalesce_ms=100) as made:
        gaps = read_times(made)
    assert max(gaps[:6]) < 0.05
    assert gaps[6] >= 0.099


def test_many_small_pieces_are_no_sign_that_the_upstream_is_ahead() -> None:
    pieces: list[list[Event]] = [[Text("x")] * 20 for _ in range(5)]
    with bench(*pieces, [END], coalesce_ms=100) as made:
        assert min(read_times(made)[2:]) >= 0.099


def test_heartbeats_do_not_count_as_first_pieces() -> None:
    pieces: list[list[Event]] = [[Text(str(n))] for n in range(4)]
    with bench(tick, tick, tick, *pieces, [END], coalesce_ms=100, status_hold=0, heartbeat=0.05) as made:
        gaps = read_times(made)
    assert max(gaps[3:5]) < 0.05
    assert min(gaps[5:]) >= 0.099


def test_pieces_that_come_slowly_are_never_held_back() -> None:
    def late(_: float) -> list[Event]:
        time.sleep(0.06)
        return [Text("x")]

    with bench(*[late] * 6, [END], coalesce_ms=50) as made:
        gaps = read_times(made)
    assert max(gaps) < 0.1


def test_coalescing_can_be_turned_off() -> None:
    pieces: list[list[Event]] = [[Text(str(n))] for n in range(20)]
    with bench(*pieces, [END], coalesce_ms=0) as made:
        assert sum(read_times(made)) < 0.2


def test_events_of_one_read_leave_in_one_write_as_events_of_their_own() -> None:
    with bench([Text("a"), Text("b")], [Text("c"), Text("d"), END]) as made:
        status, *writes = list(made.answer.stream())
    assert status == b""
    assert [[event["type"] for event in events_of(SSE, write)] for write in writes] == [
        ["start", "text", "text"],
        ["text", "text", "finish"],
    ]
    assert [event["seq"] for event in events_of(SSE, b"".join(writes))] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("accept", STREAMS)
def test_pieces_joined_on_the_wire_lose_nothing(accept: str, shop: Shop, upstream: FakeUpstream) -> None:
    upstream.script = [head(), Repeat([text("x"), Pause(0.001)], 200), finish(), done(), last_chunk()]
    data = shop.ask(accept=accept).data
    if accept == TEXT:
        assert data == b"x" * 200
    else:
        assert [event["seq"] for event in events_of(accept, data)] == list(range(202))


# --- heartbeats and limits ------------------------------------------------------------------------------


@pytest.mark.parametrize("accept", [SSE, NDJSON])
@pytest.mark.parametrize("silence", [[], [head()], [head(), text("one")]], ids=["no head", "no piece", "after one"])
def test_a_silent_model_is_bridged_by_heartbeats(accept: str, silence: list[Step], upstream: FakeUpstream) -> None:
    gate = Gate()
    rest: list[Step] = [text("two"), finish(), done(), last_chunk()]
    upstream.script = [*silence, gate, [] if silence else head(), *rest]
    with open_shop(status_hold=0.05, heartbeat=0.05) as shop, serve(shop.app) as port:
        with call(port, post_bytes(accept=accept)) as sock:
            heartbeat = HEARTBEATS[accept]
            read = read_until(sock, heartbeat)
            while read.count(heartbeat) < 3:
                read += sock.recv(65536)
            gate.open()
            rest_read = read_all(sock)
        assert b'"two"' in rest_read and b'"finish"' in rest_read
        assert b'"error"' not in rest_read
        assert shop.the_record().outcome == "completed"


def test_heartbeats_have_no_number(upstream: FakeUpstream) -> None:
    upstream.script = [Pause(0.3), head(), text("one"), Pause(0.3), text("two"), finish(), done(), last_chunk()]
    with open_shop(status_hold=0.05, heartbeat=0.05) as shop:
        lines = [json.loads(line) for line in shop.ask(accept=NDJSON).data.splitlines()]
    assert lines.count({"type": "heartbeat"}) >= 4
    assert [line["seq"] for line in lines if "seq" in line] == [0, 1, 2, 3]


SILENT: dict[str, tuple[dict[str, Any], list[Step]]] = {
    "no head": ({"first_token_timeout": 0.3}, [Hang()]),
    "no piece": ({"first_token_timeout": 0.3}, [head(), chunk({"role": "assistant"}), Hang()]),
    "only comments": ({"first_token_timeout": 0.3}, [head(), Repeat([http_chunk(b": busy\n\n"), Pause(0.05)], 1000)]),
    "the total, no head": ({"total_timeout": 0.3}, [Hang()]),
}


@pytest.mark.parametrize("accept", FORMATS)
@pytest.mark.parametrize(("limits", "script"), SILENT.values(), ids=SILENT)
def test_a_model_that_does_not_begin_in_time_is_a_504(
    accept: str, limits: dict[str, Any], script: list[Step], upstream: FakeUpstream
) -> None:
    upstream.script = script
    with open_shop(**limits, status_hold=2) as shop:
        began = time.monotonic()
        response = shop.ask(accept=accept)
        assert 0.25 < time.monotonic() - began < 1.5
        assert response.status_code == 504
        assert json.loads(response.data)["code"] == "upstream_timeout"
        assert shop.the_record().outcome == "upstream_timeout"
        upstream.requests[0].wait_left()
        assert len(upstream.requests) == 1


LATE: dict[str, tuple[dict[str, Any], list[Step], str]] = {
    "first token, after the hold": (
        {"first_token_timeout": 0.4, "status_hold": 0.05},
        [head(), Hang()],
        "upstream_timeout",
    ),
    "idle": ({"idle_timeout": 0.3}, [head(), text("one"), Hang()], "upstream_stalled"),
    "idle, with comments": (
        {"idle_timeout": 0.3},
        [head(), text("one"), Repeat([http_chunk(b": busy\n\n"), Pause(0.05)], 1000)],
        "upstream_stalled",
    ),
    "total, silent": ({"total_timeout": 0.4}, [head(), text("one"), Hang()], "upstream_timeout"),
    "total, talking": (
        {"total_timeout": 0.4, "coalesce_ms": 0},
        [head(), Repeat([text("one"), Pause(0.01)], 10_000)],
        "upstream_timeout",
    ),
}


@pytest.mark.parametrize("accept", [SSE, NDJSON])
@pytest.mark.parametrize(("limits", "script", "code"), LATE.values(), ids=LATE)
def test_a_model_that_is_late_after_the_first_byte_is_an_error_event(
    accept: str, limits: dict[str, Any], script: list[Step], code: str, upstream: FakeUpstream
) -> None:
    upstream.script = script
    with open_shop(**limits) as shop:
        response = shop.ask(accept=accept)
        assert response.status_code == 200
        events = events_of(accept, response.data)
        assert (events[-1]["type"], events[-1]["code"], events[-1]["retryable"]) == ("error", code, True)
        assert [event["seq"] for event in events] == list(range(len(events)))
        assert shop.the_record().outcome == code
        upstream.requests[0].wait_left()


def test_a_stalled_model_breaks_a_text_answer(upstream: FakeUpstream) -> None:
    upstream.script = [head(), text("one"), Hang()]
    with open_shop(idle_timeout=0.3) as shop:
        with pytest.raises(ConnectionResetError):
            shop.ask()
        assert shop.the_record().outcome == "upstream_stalled"


# --- retries --------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamchat.upstream.FIRST_BACKOFF", 0.01)


RETRIED: dict[str, Step] = {
    "500": error(500),
    "429": error(429),
    "reset": [Rst()],
    "closed": [Fin()],
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", RETRIED.values(), ids=RETRIED)
def test_a_fault_before_the_first_piece_is_tried_again(fault: Step, upstream: FakeUpstream) -> None:
    upstream.scripts.extend([fault, fault])
    with open_shop(max_retries=2) as shop:
        assert shop.ask().data == b"Hello, world!"
        assert shop.the_record().attempts == 3


@pytest.mark.usefixtures("impatient")
def test_retries_are_counted(upstream: FakeUpstream) -> None:
    upstream.script = error(500)
    with open_shop(max_retries=1) as shop:
        assert shop.ask().status_code == 502
        assert shop.the_record().attempts == len(upstream.requests) == 2


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", [error(400), error(401), error(404), error(429, "insufficient_quota")])
def test_what_a_retry_cannot_cure_is_asked_once(fault: Step, upstream: FakeUpstream) -> None:
    upstream.script = fault
    with open_shop(max_retries=5) as shop:
        assert shop.ask().status_code >= 502
        assert len(upstream.requests) == 1


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("accept", [SSE, NDJSON])
def test_after_the_first_piece_nothing_is_tried_again(accept: str, upstream: FakeUpstream) -> None:
    upstream.script = [head(), text("one"), Rst()]
    with open_shop(max_retries=5) as shop:
        assert events_of(accept, shop.ask(accept=accept).data)[-1]["code"] == "upstream_incomplete"
        assert len(upstream.requests) == 1


def test_a_retry_after_that_does_not_fit_is_not_waited_for(upstream: FakeUpstream) -> None:
    upstream.script = error(429, headers={"Retry-After": "60"})
    with open_shop(max_retries=2, first_token_timeout=5) as shop:
        began = time.monotonic()
        response = shop.ask()
        assert time.monotonic() - began < 1
        assert (response.status_code, response.headers["Retry-After"]) == (503, "60")
        assert len(upstream.requests) == 1


# --- endings --------------------------------------------------------------------------------------------

CUTS: dict[str, list[Step]] = {
    "reset": [Rst()],
    "closed inside the body": [Fin()],
    "closed inside a chunk": [b"20\r\ndata: {", Fin()],
    "a clean end without a reason": [last_chunk()],
    "done without a reason": [done(), last_chunk()],
    "bad JSON": [http_chunk(b"data: {oops\n\n"), last_chunk()],
    "an error event": [http_chunk(b'data: {"error": {"message": "x"}}\n\n'), last_chunk()],
}
CUT_CODES = {"bad JSON": "upstream_malformed", "an error event": "upstream_error"}


@pytest.mark.parametrize("accept", [SSE, NDJSON])
@pytest.mark.parametrize("name", CUTS)
def test_a_cut_answer_ends_with_its_error_and_never_with_finish(
    name: str, accept: str, shop: Shop, upstream: FakeUpstream
) -> None:
    gate = Gate()
    upstream.script = [head(), text("one"), gate, *CUTS[name]]
    with serve(shop.app) as port, call(port, post_bytes(accept=accept)) as sock:
        read_until(sock, b"one")
        gate.open()
        rest = read_all(sock)
    assert b'"error"' in rest and b"finish" not in rest
    record = shop.the_record()
    assert record.outcome == CUT_CODES.get(name, "upstream_incomplete")
    assert record.outcome.encode() in rest
    assert (record.finish_reason, record.pieces, record.estimated) == (None, 1, True)


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_text_answer_is_a_broken_connection(name: str, shop: Shop, upstream: FakeUpstream) -> None:
    upstream.script = [head(), text("one"), Pause(0.05), *CUTS[name]]
    seen: list[bytes] = []
    with serve(shop.app) as port:
        url, options = f"http://127.0.0.1:{port}{URL}", {"stream": True, "timeout": 10}
        with requests.post(url, json={"message": "hi"}, **options) as response:  # type: ignore[arg-type]
            pieces = response.iter_content(None)
            with pytest.raises(requests.exceptions.ChunkedEncodingError):
                seen.extend(pieces)
    assert b"".join(seen) == b"one"
    assert shop.the_record().outcome == CUT_CODES.get(name, "upstream_incomplete")


@pytest.mark.parametrize("accept", [SSE, NDJSON])
def test_a_piece_is_not_lost_where_the_cut_comes_in_the_same_read(
    accept: str, shop: Shop, upstream: FakeUpstream
) -> None:
    broken = event({"content": "one"}) + b'data: {"error": {"message": "x"}}\n\n'
    upstream.script = [head(), http_chunk(broken), last_chunk()]
    events = events_of(accept, shop.ask(accept=accept).data)
    assert [event["type"] for event in events] == ["start", "text", "error"]


@pytest.mark.parametrize("accept", STREAMS)
def test_the_caller_leaves_and_the_upstream_is_closed(accept: str, shop: Shop, upstream: FakeUpstream) -> None:
    upstream.script = [head(), text("one"), Hang()]
    with serve(shop.app) as port:
        with call(port, post_bytes(accept=accept)) as sock:
            read_until(sock, b"one")
            assert upstream.requests[0].left is None
        left = time.monotonic()
        assert upstream.requests[0].wait_left() - left < 0.5
        record = shop.the_record()
    assert (record.outcome, record.pieces, len(upstream.requests)) == ("caller_left", 1, 1)


def test_a_generator_that_is_closed_by_the_server_has_lost_its_caller(shop: Shop, upstream: FakeUpstream) -> None:
    upstream.script = [head(), text("one"), Hang()]
    response = shop.app.test_client().post(URL, json={"message": "hi"})
    assert next(iter(response.response)) == b"one"
    response.close()
    assert shop.the_record().outcome == "caller_left"
    upstream.requests[0].wait_left()


def test_a_body_that_is_never_iterated_frees_everything(shop: Shop, upstream: FakeUpstream) -> None:
    upstream.script = [head(), text("one"), Hang()]
    with shop.app.test_request_context(URL, method="POST", json={"message": "hi"}):
        response = shop.app.full_dispatch_request()
    assert shop.records == []
    response.close()
    assert shop.the_record().outcome == "caller_left"
    upstream.requests[0].wait_left()


def test_a_response_that_nobody_closes_frees_everything(shop: Shop, upstream: FakeUpstream) -> None:
    upstream.script = [head(), text("one"), Hang()]
    with shop.app.test_request_context(URL, method="POST", json={"message": "hi"}):
        response = shop.app.full_dispatch_request()
    del response
    assert shop.the_record().outcome == "interrupted"
    upstream.requests[0].wait_left()


class Alarm(BaseException):
    """Like gevent.Timeout: thrown in from outside, and no Exception."""


@pytest.mark.parametrize("accept", [SSE, NDJSON])
@pytest.mark.parametrize("thrown", [Alarm, ValueError])
def test_what_is_thrown_into_an_open_answer_ends_it_in_its_format(accept: str, thrown: type[BaseException]) -> None:
    with bench([Text("one")], thrown(KEY), accept=accept) as made:
        data = b"".join(made.answer.stream())
        assert events_of(accept, data)[-1]["code"] == "interrupted"
        made.answer.close()
        assert made.outcome() == "interrupted"


@pytest.mark.parametrize("thrown", [Alarm, ValueError])
def test_what_is_thrown_into_a_text_answer_breaks_it(thrown: type[BaseException]) -> None:
    with bench([Text("one")], thrown(KEY), accept=TEXT) as made:
        body = made.answer.stream()
        assert [next(body), next(body)] == [b"", b"one"]
        with pytest.raises(ConnectionResetError):
            next(body)
        made.answer.close()
        assert made.outcome() == "interrupted"


@pytest.mark.parametrize("accept", [SSE, NDJSON])
def test_what_is_thrown_in_at_a_write_ends_the_answer_in_its_format(accept: str) -> None:
    with bench([Text("one")], accept=accept) as made:
        body = made.answer.stream()
        assert isinstance(body, Iterator)
        next(body), next(body)
        last = body.throw(Alarm())  # type: ignore[attr-defined]
        assert events_of(accept, last)[-1]["code"] == "interrupted"
        assert list(body) == []
        made.answer.close()
        assert made.outcome() == "interrupted"


@pytest.mark.parametrize("thrown", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_passes_through_and_frees_everything(thrown: type[BaseException]) -> None:
    with bench([Text("one")], thrown()) as made:
        body = made.answer.stream()
        next(body), next(body)
        with pytest.raises(thrown):
            next(body)
        made.answer.close()
        assert made.outcome() == "interrupted"


@pytest.mark.parametrize("accept", STREAMS)
def test_a_killed_greenlet_writes_nothing_more_and_frees_everything(accept: str) -> None:
    with bench([Text("one")], Alarm(), accept=accept) as made:
        made.loop.killed = (Alarm,)
        body = made.answer.stream()
        next(body), next(body)
        with pytest.raises(Alarm):
            next(body)
        made.answer.close()
        assert made.outcome() == "interrupted"


def test_what_is_thrown_in_during_the_hold_frees_everything(
    shop: Shop, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(self: Opening, until: float) -> None:
        raise Alarm

    upstream.script = [Hang()]
    monkeypatch.setattr(Opening, "read", read)
    with pytest.raises(Alarm):
        shop.ask()
    assert shop.the_record().outcome == "interrupted"


def test_a_fault_of_our_own_is_logged_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    with bench(ValueError(KEY)) as made:
        with pytest.raises(StreamChatError) as caught:
            next(made.answer.stream())
        assert caught.value.code == "interrupted"
        assert caught.value.__cause__ is None and caught.value.__context__ is None
    (record,) = caplog.records
    assert record.exc_info is None
    assert "ValueError" in record.getMessage() and KEY not in record.getMessage()


@pytest.mark.parametrize("accept", STREAMS)
@pytest.mark.parametrize("close", [1, 2, 3])
def test_an_answer_is_recorded_once_however_often_it_is_closed(accept: str, close: int) -> None:
    with bench([Text("one")], [END], accept=accept, keep_text=True) as made:
        b"".join(made.answer.stream())
        for _ in range(close):
            made.answer.close()
        assert made.outcome() == "completed"
        assert made.told[0][1] == "one"


def test_many_who_close_at_once_leave_one_record() -> None:
    for _ in range(20):
        with bench([Text("one")], UpstreamIncomplete()) as made:
            b"".join(made.answer.stream())
            threads = [threading.Thread(target=made.answer.close) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert made.outcome() == "upstream_incomplete"


def test_the_record_is_told_in_close_and_not_in_the_generator() -> None:
    with bench([Text("one")], [END]) as made:
        b"".join(made.answer.stream())
        assert made.told == []
        made.answer.close()
        assert made.outcome() == "completed"


def test_the_text_is_kept_only_where_it_is_wanted() -> None:
    for keep, kept in ((True, "one two"), (False, "")):
        with bench([Text("one "), Reasoning("hm"), Text("two")], [END], keep_text=keep) as made:
            b"".join(made.answer.stream())
            made.answer.close()
            assert made.told[0][1] == kept


def test_the_text_of_several_answers_is_kept_one_after_the_other() -> None:
    pieces: list[Event] = [Text("B", 1), Text("A"), Refusal("b", 1), ChoiceEnd("stop", 1), Text("a"), ChoiceEnd("stop")]
    with bench(pieces, [END], keep_text=True) as made:
        b"".join(made.answer.stream())
        made.answer.close()
        ((record, kept),) = made.told
        assert (record.outcome, record.pieces, kept) == ("completed", 4, "Aa\n\nBb")


@pytest.mark.parametrize("broken", ["hangups.watch", "loop.spawn"])
def test_an_answer_that_cannot_begin_holds_nothing(
    broken: str, shop: Shop, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    process = shop.mounts[0].process
    owner: Any = process.loop if broken == "loop.spawn" else process.live.hangups
    monkeypatch.setattr(owner, broken.partition(".")[2], fail)
    shop.app.logger.disabled = True
    assert shop.ask().status_code == 500
    assert shop.the_record().outcome == "interrupted"
    assert upstream.connections == 0


# --- the opening ----------------------------------------------------------------------------------------


def opening_of(open_reply: Callable[[], Any]) -> tuple[Opening, Cancellation]:
    cancellation = Cancellation()
    return Opening(choose_loop(), open_reply, cancellation), cancellation


def test_waiting_for_the_opening_ends_in_time() -> None:
    go = threading.Event()

    def open_reply() -> Script:
        go.wait(5)
        return Script([Text("a")])

    opening, _ = opening_of(open_reply)
    assert opening.read(time.monotonic() + 0.05) is None
    go.set()
    assert opening.read(NEVER) == [Text("a")]
    opening.close()


def test_a_reply_that_comes_after_the_close_is_closed_at_once() -> None:
    go, reply = threading.Event(), Script()

    def open_reply() -> Script:
        go.wait(5)
        return reply

    opening, _ = opening_of(open_reply)
    opening.close()
    assert reply.closed == 0
    go.set()
    wait_until(lambda: reply.closed == 1, "the reply is still open")


def test_a_cancelled_opening_wakes_its_reader() -> None:
    go = threading.Event()

    def open_reply() -> Script:
        go.wait(5)
        return Script()

    opening, cancellation = opening_of(open_reply)
    timer = threading.Timer(0.05, cancellation.cancel, [CallerGone()])
    timer.start()
    with pytest.raises(CallerGone):
        opening.read(NEVER)
    go.set()
    timer.join()
    opening.close()


def test_an_opening_that_fails_raises_in_its_reader() -> None:
    def open_reply() -> Script:
        raise UpstreamError

    opening, _ = opening_of(open_reply)
    with pytest.raises(UpstreamError):
        opening.read(NEVER)
    opening.close()


def test_who_is_told_to_drain_before_the_first_piece_gets_a_503(upstream: FakeUpstream) -> None:
    upstream.script = [Hang()]
    with open_shop(status_hold=10) as shop, serve(shop.app) as port:
        with call(port, post_bytes()) as sock:
            upstream.wait_for_requests(1)
            (running,) = shop.mounts[0].process.live._running
            running.cancellation.cancel(Draining())
            assert read_all(sock).startswith(b"HTTP/1.1 503 ")
        assert shop.the_record().outcome == "draining"


def test_a_whole_answer_frees_its_slot_before_it_is_written(shop: Shop) -> None:
    with shop.app.test_request_context(URL, method="POST", json={"message": "hi"}, headers={"Accept": WHOLE}):
        response = shop.app.full_dispatch_request()
        shop.expect_nothing_held()
        response.close()
    assert shop.the_record().outcome == "completed"
