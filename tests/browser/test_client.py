"""streamchat.js by itself: bytes of a scripted server in, events or one StreamError out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from tests.fake_upstream import FakeUpstream, Fin, Gate, Hang, RecordedRequest, Step, head, http_chunk, last_chunk

MODULE = Path(__file__).parents[2] / "streamchat" / "static" / "streamchat.js"
NDJSON, SSE = "application/x-ndjson; charset=utf-8", "text/event-stream; charset=utf-8"
ASK = """async ([question, leaveAfter, abortAfter]) => {
  const {stream, StreamError} = await import("/streamchat.js");
  const [events, stopping] = [[], new AbortController()];
  try {
    for await (const event of stream("/api/get-response", {...question, signal: stopping.signal})) {
      events.push(event);
      await window.seen?.(events.length);
      if (events.length === leaveAfter) break;
      if (events.length === abortAfter) stopping.abort();
    }
    return {events};
  } catch (error) {
    const {name, message, code, status, retryAfter, retryable, requestId} = error;
    return {events, name, message, code, status, retryAfter, retryable, requestId, ours: error instanceof StreamError};
  }
}"""
START = {"type": "start", "seq": 0, "id": "resp_1", "model": "m", "created_at": 1790000000}
TEXTS: list[dict[str, Any]] = [
    {"type": "text", "seq": 1, "text": "Grüße, 世界 🌊"},
    {"type": "text", "seq": 2, "text": "line\nline\u2028line"},
]
FINISH = {"type": "finish", "seq": 3, "finish_reason": "stop", "usage": None}
WHOLE = [START, *TEXTS, FINISH]


def ndjson(events: list[dict[str, Any]], ascii_only: bool = False) -> bytes:
    return "".join(json.dumps(each, ensure_ascii=ascii_only) + "\n" for each in events).encode()


def sse(events: list[dict[str, Any]]) -> bytes:
    return b"".join(b"id: 1\nevent: x\ndata: " + ndjson([each]) + b"\n" for each in events)


def streamed(*parts: bytes, kind: str = NDJSON, **headers: str) -> list[Step]:
    """The opening of a stream and some of its bytes; the end is the caller's."""
    fields = {"X-Response-Id": "resp_1"} | {name.replace("_", "-"): value for name, value in headers.items()}
    return [head(200, fields, content_type=kind), *(http_chunk(part) for part in parts)]


def refusal(status: int, body: str, kind: str, **headers: str) -> Step:
    fields = {"Content-Length": str(len(body)), "X-Response-Id": "resp_1"}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    return head(status, fields, content_type=kind, chunked=False) + body.encode()


class Api:
    """A server of the page, the module, and whatever a test scripts for its API."""

    def __init__(self, server: FakeUpstream, page: Page) -> None:
        self.server, self.page = server, page
        self.answers: list[Step] = []
        self.asked: list[RecordedRequest] = []
        server.choose = self._answer
        page.goto(f"http://127.0.0.1:{server.port}/")

    def _answer(self, request: RecordedRequest) -> Step:
        if request.path.startswith("/api/"):
            self.asked.append(request)
            return self.answers.pop(0)
        kind, body = "text/html", b"<main></main>"
        if request.path == "/streamchat.js":
            kind, body = "text/javascript", MODULE.read_bytes()
        return head(200, {"Content-Length": str(len(body))}, content_type=kind, chunked=False) + body

    def ask(self, *answers: Step, leave_after: int = 0, abort_after: int = 0, **question: Any) -> dict[str, Any]:
        self.answers.extend(answers)
        result = self.page.evaluate(ASK, [{"message": "Hello?"} | question, leave_after, abort_after])
        assert isinstance(result, dict)
        return result


@pytest.fixture
def api(page: Page) -> Iterator[Api]:
    with FakeUpstream() as server:
        yield Api(server, page)


def test_the_events_of_an_answer_come_as_they_were_sent(api: Api) -> None:
    assert api.ask([*streamed(ndjson(WHOLE)), last_chunk()]) == {"events": WHOLE}


@pytest.mark.parametrize(("kind", "body"), [(NDJSON, ndjson(WHOLE)), (SSE, sse(WHOLE))], ids=["ndjson", "sse"])
def test_a_body_may_be_split_at_every_byte(api: Api, kind: str, body: bytes) -> None:
    parts = [body[place : place + 1] for place in range(len(body))]
    assert api.ask([*streamed(*parts, kind=kind), last_chunk()]) == {"events": WHOLE}


def test_heartbeats_comments_and_blank_lines_are_no_events(api: Api) -> None:
    body = b'\n{"type":"heartbeat"}\n' + ndjson(WHOLE, ascii_only=True)
    assert api.ask([*streamed(body), last_chunk()]) == {"events": WHOLE}
    assert api.ask([*streamed(b": keep-alive\n\n" + sse(WHOLE), kind=SSE), last_chunk()]) == {"events": WHOLE}


def test_lines_may_end_as_windows_ends_them(api: Api) -> None:
    body = sse(WHOLE).replace(b"\n", b"\r\n")
    assert api.ask([*streamed(body, kind=SSE), last_chunk()]) == {"events": WHOLE}


def test_the_question_its_headers_and_the_format_are_sent(api: Api) -> None:
    messages = [{"role": "user", "content": "Hello?"}]
    headers = {"X-CSRFToken": "a-csrf-token", "Authorization": "Bearer a-token"}
    api.ask(
        [*streamed(ndjson(WHOLE)), last_chunk()], message=None, messages=messages, context={"id": 7}, headers=headers
    )
    (request,) = api.asked
    assert (request.method, request.path) == ("POST", "/api/get-response")
    assert request.body == {"message": None, "messages": messages, "context": {"id": 7}}
    assert request.headers["content-type"] == "application/json"
    assert request.headers["accept"].startswith("application/x-ndjson")
    assert request.headers["x-csrftoken"] == "a-csrf-token"
    assert request.headers["authorization"] == "Bearer a-token"


@pytest.mark.parametrize(("credentials", "sent"), [(None, True), ("omit", False)])
def test_cookies_go_along_unless_the_caller_says_no(api: Api, credentials: str | None, sent: bool) -> None:
    api.page.evaluate("document.cookie = 'session=1'")
    chosen: dict[str, Any] = {"credentials": credentials} if credentials else {}
    api.ask([*streamed(ndjson(WHOLE)), last_chunk()], **chosen)
    assert ("cookie" in api.asked[0].headers) is sent


def test_a_refused_question_is_an_error_with_code_status_and_retry_after(api: Api) -> None:
    body = json.dumps({"code": "too_many_streams", "detail": "Too many.", "status": 429})
    result = api.ask(refusal(429, body, "application/problem+json", Retry_After="7"))
    told = {"name": "StreamError", "message": "Too many.", "code": "too_many_streams", "status": 429}
    assert result == told | {"events": [], "retryAfter": 7, "retryable": True, "requestId": "resp_1", "ours": True}


def test_a_retry_after_may_be_a_date(api: Api) -> None:
    result = api.ask(refusal(503, "{}", "application/json", Retry_After="Fri, 31 Dec 2999 23:59:59 GMT"))
    assert result["retryAfter"] > 1_000_000


def test_an_error_page_of_a_server_in_between_is_an_error_with_its_status(api: Api) -> None:
    result = api.ask(refusal(502, "<h1>Bad Gateway</h1>", "text/html"))
    assert (result["code"], result["status"], result["retryable"]) == ("http_502", 502, True)


def test_a_login_page_is_no_answer(api: Api) -> None:
    result = api.ask(refusal(200, "<h1>Log in</h1>", "text/html"))
    assert (result["code"], result["status"]) == ("not_a_stream", 200)


def test_a_server_that_cannot_be_reached_is_a_network_error(api: Api) -> None:
    result = api.ask([Fin()], [Fin()])
    assert (result["code"], result["status"], result["retryable"]) == ("network_error", 0, True)


def test_a_failure_in_the_stream_is_thrown_with_its_code(api: Api) -> None:
    failure = {"type": "error", "seq": 2, "code": "upstream_stalled", "message": "It stopped.", "retryable": True}
    result = api.ask([*streamed(ndjson([START, TEXTS[0], failure])), last_chunk()])
    assert result["events"] == [START, TEXTS[0]]
    assert (result["code"], result["message"], result["status"]) == ("upstream_stalled", "It stopped.", 200)


def cut_once_two_are_read(api: Api, **headers: str) -> Step:
    """Two events and a broken connection, once they are read: a browser drops what it has not handed out by then."""
    gate = Gate()
    api.page.expose_function("seen", lambda count: gate.open() if count == 2 else None)
    return [*streamed(ndjson([START, TEXTS[0]]), **headers), gate, Fin()]


def test_a_broken_end_is_an_error(api: Api) -> None:
    result = api.ask(cut_once_two_are_read(api))
    assert result["events"] == [START, TEXTS[0]]
    assert result["code"] == "connection_lost"


@pytest.mark.parametrize("rest", [b"", b'{"type":"fin'])
def test_an_end_without_finish_is_an_error(api: Api, rest: bytes) -> None:
    result = api.ask([*streamed(ndjson([START, TEXTS[0]]) + rest), last_chunk()])
    assert result["events"] == [START, TEXTS[0]]
    assert result["code"] == "incomplete"


def test_what_is_no_event_is_an_error(api: Api) -> None:
    assert api.ask([*streamed(b"Internal Server Error\n"), last_chunk()])["code"] == "malformed"


def test_the_signal_stops_the_answer_and_throws_its_reason(api: Api) -> None:
    result = api.ask([*streamed(ndjson([START, *TEXTS])), Hang()], abort_after=2)
    assert result["name"] == "AbortError"
    assert result["events"] == [START, TEXTS[0]]
    api.asked[0].wait_left()


def test_leaving_the_loop_closes_the_connection(api: Api) -> None:
    assert api.ask([*streamed(ndjson([START, *TEXTS])), Hang()], leave_after=1) == {"events": [START]}
    api.asked[0].wait_left()


# --- answers that the server keeps ----------------------------------------------------------------------

KEPT = {"X_Stream_Resumable": "?1"}


def test_a_kept_answer_is_taken_up_again_after_its_last_event(api: Api) -> None:
    broken = cut_once_two_are_read(api, **KEPT)
    unfinished = [*streamed(ndjson(TEXTS[1:])), last_chunk()]
    rest = [*streamed(ndjson([FINISH])), last_chunk()]
    assert api.ask(broken, unfinished, rest, headers={"Authorization": "Bearer a-token"}) == {"events": WHOLE}
    assert [(each.method, each.path) for each in api.asked] == [
        ("POST", "/api/get-response"),
        ("GET", "/api/responses/resp_1/stream?after=1"),
        ("GET", "/api/responses/resp_1/stream?after=2"),
    ]
    assert all(each.headers["authorization"] == "Bearer a-token" for each in api.asked)


def test_a_kept_answer_that_is_gone_is_an_error(api: Api) -> None:
    gone = refusal(404, json.dumps({"code": "not_found"}), "application/problem+json")
    result = api.ask(cut_once_two_are_read(api, **KEPT), gone)
    assert (result["code"], result["status"], result["events"]) == ("not_found", 404, [START, TEXTS[0]])


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_server_that_restarts_does_not_end_a_kept_answer(api: Api, status: int) -> None:
    restarts = refusal(status, "<h1>Later</h1>", "text/html")
    rest = [*streamed(ndjson([*TEXTS[1:], FINISH])), last_chunk()]
    assert api.ask(cut_once_two_are_read(api, **KEPT), restarts, rest) == {"events": WHOLE}
    assert [each.method for each in api.asked] == ["POST", "GET", "GET"]


def test_a_question_that_is_refused_is_not_asked_twice(api: Api) -> None:
    result = api.ask(refusal(503, "{}", "application/json", X_Stream_Resumable="?1"))
    assert (result["code"], len(api.asked)) == ("http_503", 1)


def test_a_kept_answer_is_stopped_by_a_word(api: Api) -> None:
    cancelled = refusal(200, "{}", "application/json")
    api.ask([*streamed(ndjson([START, *TEXTS]), **KEPT), Hang()], cancelled, abort_after=2)
    api.server.wait_for(lambda: len(api.asked) == 2)
    assert (api.asked[1].method, api.asked[1].path) == ("POST", "/api/responses/resp_1/cancel")


ABORT = """async (onHeaders) => {
  const {stream} = await import("/streamchat.js");
  const [stopping, {fetch}] = [new AbortController(), window];
  window.fetch = async (...asked) => {
    const response = await fetch(...asked);
    if (onHeaders) stopping.abort();
    return response;
  };
  if (!onHeaders) setTimeout(() => stopping.abort(), 100);
  return stream("/api/get-response", {message: "Hello?", signal: stopping.signal}).next().catch((error) => error.name);
}"""


def test_a_kept_answer_of_which_only_the_headers_have_come_is_stopped_by_a_word(api: Api) -> None:
    api.answers.extend([[*streamed(**KEPT), Hang()], refusal(200, "{}", "application/json")])
    assert api.page.evaluate(ABORT, True) == "AbortError"
    api.server.wait_for(lambda: len(api.asked) == 2)
    assert api.asked[1].path == "/api/responses/resp_1/cancel"


def test_before_the_headers_the_signal_closes_the_connection(api: Api) -> None:
    api.answers.append(Hang())
    assert api.page.evaluate(ABORT, False) == "AbortError"
    api.asked[0].wait_left()
    assert len(api.asked) == 1


def test_an_answer_that_broke_off_after_its_headers_is_taken_up_from_its_start(api: Api) -> None:
    rest = [*streamed(ndjson(WHOLE)), last_chunk()]
    assert api.ask([*streamed(**KEPT), last_chunk()], rest) == {"events": WHOLE}
    assert api.asked[1].path == "/api/responses/resp_1/stream?after=-1"
