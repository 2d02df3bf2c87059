"""What the model's side does becomes events or one of our failures: over both transports, plain and TLS."""

from __future__ import annotations

import contextlib
import email.utils
import logging
import socket
import ssl
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamchat.cancellation import Cancellation
from streamchat.errors import (
    CallerGone,
    Overloaded,
    SettingsError,
    StreamChatError,
    UpstreamAuth,
    UpstreamIncomplete,
    UpstreamRateLimited,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from streamchat.events import Event, Finish, Text, Usage
from streamchat.prompt import Prompt
from streamchat.upstream import check_credentials
from tests.asking import KEY, PROMPT, Asking, Background, asking, nothing_left, read_all
from tests.fake_upstream import (
    FakeUpstream,
    Fin,
    Gate,
    Hang,
    Pause,
    Repeat,
    Rst,
    Step,
    chunk,
    done,
    error,
    event,
    finish,
    head,
    http_chunk,
    key_echoing_401,
    last_chunk,
    sse,
    text,
    text_chunks,
    tls_pair,
    usage_chunk,
)

HELLO = [Text("Hello"), Text(", "), Text("world"), Text("!"), Finish("stop", Usage(19, 10))]
ORGANISATION, SYSTEM = "org-canary-0815", "system-canary: be kind"
CANARIES = (KEY, ORGANISATION, SYSTEM, "canary")

JSON_ANSWER = [head(200, {"Content-Length": "2"}, content_type="application/json", chunked=False), b"{}"]
HTML = [head(200, {"Content-Length": "13"}, content_type="text/html", chunked=False), b"<html></html>"]
# Before the first event; each quotes the key, as such servers do.
ROWS: dict[str, tuple[Step, str]] = {
    "401": (key_echoing_401, "upstream_auth"),
    "403": (error(403, "forbidden", f"no {KEY}"), "upstream_auth"),
    "400": (error(400, None, f"no {KEY}"), "upstream_rejected"),
    "404": (error(404, "model_not_found", f"no {KEY}"), "upstream_rejected"),
    "422": (error(422, None, f"no {KEY}"), "upstream_rejected"),
    "302": (error(302, headers={"Location": f"http://127.0.0.1:1/{KEY}"}), "upstream_rejected"),
    "307": (error(307, headers={"Location": "/v1/other"}), "upstream_rejected"),
    "408": (error(408, None, f"no {KEY}"), "upstream_error"),
    "409": (error(409), "upstream_error"),
    "429": (error(429, "rate_limit_exceeded", f"no {KEY}"), "upstream_rate_limited"),
    "429 quota": (error(429, "insufficient_quota", f"no {KEY}"), "upstream_quota"),
    "500": (error(500, None, f"no {KEY}"), "upstream_error"),
    "503": (error(503), "upstream_error"),
    "500 html": (
        [head(500, {"Content-Length": "3"}, content_type="text/html", chunked=False), b"<p>"],
        "upstream_error",
    ),
    "500 cut": ([head(500, {"Content-Length": "30"}, chunked=False), b"<p>", Fin()], "upstream_error"),
    "401 cut": ([head(401, {"Content-Length": "30"}, chunked=False), b"{", Rst()], "upstream_auth"),
    "too long": (error(400, "context_length_exceeded", f"no {KEY}"), "input_too_long"),
    "refused": (error(400, "content_policy_violation", f"no {KEY}"), "refused"),
    "azure's filter": (error(400, "content_filter", f"no {KEY}"), "refused"),
    "json": (JSON_ANSWER, "upstream_malformed"),
    "html": (HTML, "upstream_malformed"),
    "gzip": (head(200, {"Content-Encoding": "gzip"}), "upstream_malformed"),
    "garbage": (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "upstream_malformed"),
    "large head": (
        [b"HTTP/1.1 200 OK\r\n", Repeat(b"X-Filler: %s\r\n" % (b"x" * 1000), 150), b"\r\n"],
        "upstream_malformed",
    ),
    "cut before its head": (Fin(), "upstream_incomplete"),
    "reset before its head": (Rst(), "upstream_incomplete"),
    "cut in its head": ([b"HTTP/1.1 200 OK\r\nX-", Fin()], "upstream_incomplete"),
    # In the stream.
    "no event": ([head(), last_chunk()], "upstream_incomplete"),
    "no finish_reason": ([head(), text("a"), last_chunk()], "upstream_incomplete"),
    "done without finish_reason": ([head(), text("a"), done(), last_chunk()], "upstream_incomplete"),
    "cut": ([head(), text("a"), Fin()], "upstream_incomplete"),
    "reset": ([head(), text("a"), Pause(0.02), Rst()], "upstream_incomplete"),
    "cut until-close": ([head(chunked=False), event({"content": "a"}), Fin()], "upstream_incomplete"),
    "cut length": (
        [head(headers={"Content-Length": "9999"}, chunked=False), event({"content": "a"}), Fin()],
        "upstream_incomplete",
    ),
    "bad json after text": (
        [head(), http_chunk(event({"content": "a"}) + b"data: {%s\n\n" % KEY.encode())],
        "upstream_malformed",
    ),
    "odd types after text": (
        [head(), http_chunk(event({"content": "a"}) + sse({"choices": [{"delta": {"content": {"x": KEY}}}]}))],
        "upstream_malformed",
    ),
    "bad json": ([head(), http_chunk(b"data: {%s\n\n" % KEY.encode())], "upstream_malformed"),
    "not an object": ([head(), http_chunk(sse([KEY]))], "upstream_malformed"),
    "odd types": ([head(), http_chunk(sse({"choices": [{"delta": {"content": {"x": KEY}}}]}))], "upstream_malformed"),
    "endless event": ([head(), Repeat(http_chunk(b"data: " + b"x" * 60_000), 100)], "upstream_malformed"),
    "error object": ([head(), http_chunk(sse({"error": {"message": KEY, "code": None}}))], "upstream_error"),
    "error text": ([head(), http_chunk(sse({"error": KEY}))], "upstream_error"),
    "error event": ([head(), http_chunk(b"event: error\n" + sse({"message": KEY}))], "upstream_error"),
    "error in the middle": (
        [head(), text("a"), http_chunk(sse({"error": {"code": "rate_limit_exceeded"}}))],
        "upstream_rate_limited",
    ),
    "too long in the stream": (
        [head(), http_chunk(sse({"error": {"code": "context_length_exceeded"}}))],
        "input_too_long",
    ),
}


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    return tls_pair(tmp_path_factory.mktemp("tls"))


@pytest.fixture(params=["plain", "tls"])
def server(request: pytest.FixtureRequest, tls: tuple[ssl.SSLContext, Path]) -> Iterator[FakeUpstream]:
    with FakeUpstream(tls[0] if request.param == "tls" else None) as upstream:
        yield upstream


@pytest.fixture(params=["fast", "sdk"])
def http(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def asked(server: FakeUpstream, tls: tuple[ssl.SSLContext, Path], http: str) -> Iterator[Asking]:
    environ = {"OPENAI_ORG_ID": ORGANISATION, "OPENAI_PROJECT_ID": "project-canary"}
    with asking(server.base_url, environ=environ, authority=tls[1], http=http, first_token_timeout=5) as found:
        yield found


@pytest.fixture
def once(server: FakeUpstream, tls: tuple[ssl.SSLContext, Path], http: str) -> Iterator[Asking]:
    """Without retries."""
    environ = {"OPENAI_ORG_ID": ORGANISATION, "OPENAI_PROJECT_ID": "project-canary"}
    with asking(
        server.base_url, environ=environ, authority=tls[1], http=http, max_retries=0, first_token_timeout=5
    ) as found:
        yield found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backoffs of hundredths of a second."""
    monkeypatch.setattr("streamchat.upstream.FIRST_BACKOFF", 0.02)


def fails(asked: Asking, prompt: Prompt = PROMPT) -> StreamChatError:
    """The failure that one answer ends with."""

    def answered() -> list[Event]:
        with contextlib.closing(asked.open(prompt=prompt)) as reply:
            return read_all(reply)

    with pytest.raises(StreamChatError) as caught:
        answered()
    return caught.value


def everything_said(raised: BaseException | None, depth: int = 0) -> str:
    """All that a log could show of an exception and what lies under it."""
    if raised is None or depth > 9:
        return ""
    own = [str(raised), repr(raised), repr(raised.args), repr(vars(raised)), *traceback.format_exception(raised)]
    return "".join(own) + everything_said(raised.__cause__, depth + 1) + everything_said(raised.__context__, depth + 1)


def test_an_answer_becomes_events_and_its_request_is_what_the_model_wants(asked: Asking, server: FakeUpstream) -> None:
    assert asked.ask() == HELLO
    request = server.requests[0]
    assert (request.method, request.path) == ("POST", "/v1/chat/completions")
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["accept"] == "text/event-stream"
    assert request.headers["accept-encoding"] == "identity"
    assert request.body == {
        "model": "fake-model",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 4096,
    }
    assert (asked.trail.attempts, asked.trail.status, asked.trail.request_id) == (1, 200, "req_fake")


def test_parameters_of_the_caller_are_sent(once: Asking, server: FakeUpstream) -> None:
    prompt = Prompt([{"role": "user", "content": "hi"}], "other", {"temperature": 0.5, "max_output_tokens": 7})
    read_all(reply := once.open(prompt=prompt))
    reply.close()
    assert {"model": "other", "temperature": 0.5, "max_tokens": 7}.items() <= server.requests[0].body.items()


def test_a_hundred_answers_open_at_most_two_connections(server: FakeUpstream, tls: tuple[ssl.SSLContext, Path]) -> None:
    with asking(server.base_url, authority=tls[1]) as asked:
        for _ in range(100):
            assert asked.text() == "Hello, world!"
    assert server.connections <= 2


@pytest.mark.parametrize(("events_at_once", "ahead"), [(300, True), (6, False)])
def test_a_reply_knows_whether_the_upstream_is_ahead(
    once: Asking, server: FakeUpstream, events_at_once: int, ahead: bool
) -> None:
    server.script = [head(), http_chunk(event({"content": "x" * 100}) * events_at_once), finish(), last_chunk()]
    seen, events = [], list[Event]()
    with contextlib.closing(once.open()) as reply:
        while not (events and isinstance(events[-1], Finish)):
            events += reply.read(time.monotonic() + 5) or []
            seen.append(reply.ahead)
    assert any(seen) == ahead


@pytest.mark.parametrize("row", ROWS)
def test_each_fault_has_its_code_and_shows_nothing_of_what_was_said(
    once: Asking, server: FakeUpstream, caplog: pytest.LogCaptureFixture, row: str
) -> None:
    server.script, code = ROWS[row]
    caplog.set_level(logging.DEBUG, "streamchat")
    prompt = Prompt([{"role": "system", "content": SYSTEM}, {"role": "user", "content": "hi"}], "m", {})
    failure = fails(once, prompt)
    said = everything_said(failure) + repr(once.trail) + "".join(map(str, (r.__dict__ for r in caplog.records)))
    assert failure.code == code
    assert not [canary for canary in (*CANARIES, server.base_url) if canary in said]
    assert len(server.requests) == 1
    assert once.trail.attempts == 1


def test_what_on_call_needs_of_a_failure_is_kept(once: Asking, server: FakeUpstream) -> None:
    server.script = error(400, "context_length_exceeded")
    fails(once)
    assert (once.trail.status, once.trail.request_id, once.trail.code) == (400, "req_fake", "context_length_exceeded")
    server.script = error(400, "a sentence with sk-123", headers={"x-request-id": "has a blank"})
    fails(once)
    assert (once.trail.status, once.trail.request_id) == (400, None)
    assert once.trail.code == "invalid_request_error"


@pytest.mark.parametrize("key", [f"{KEY}\r", f"{KEY}\r\nX-Injected: 1", f"{KEY}\0", f"{KEY}é"])
def test_a_key_that_cannot_stand_in_a_header_is_refused_without_being_shown(
    server: FakeUpstream, tls: tuple[ssl.SSLContext, Path], http: str, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "streamchat")
    with asking(server.base_url, authority=tls[1], http=http) as asked:
        asked.upstream.client().api_key = key
        failure = fails(asked)
        assert isinstance(failure, UpstreamAuth)
        assert KEY not in everything_said(failure) + caplog.text
        assert server.requests == []
        assert asked.trail.attempts == 1


@pytest.mark.parametrize(
    ("environ", "complaint"),
    [
        ({}, "No upstream is named"),
        ({"OPENAI_API_KEY": f"{KEY}\r"}, "OPENAI_API_KEY holds"),
        ({"OPENAI_API_KEY": f" {KEY}"}, "OPENAI_API_KEY holds"),
        ({"OPENAI_API_KEY": f"{KEY}é"}, "OPENAI_API_KEY holds"),
    ],
)
def test_a_start_without_a_usable_upstream_is_refused_without_showing_the_key(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], complaint: str
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=complaint) as caught:
        check_credentials(None)
    assert KEY not in everything_said(caught.value)


def test_an_upstream_that_is_not_there_is_unreachable(quick: None, http: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as dead:
        port = dead.getsockname()[1]
    with asking(f"http://127.0.0.1:{port}/v1", http=http) as asked:
        assert isinstance(fails(asked), UpstreamUnreachable)
        assert asked.trail.attempts == 3
    with asking("http://no-such-host.invalid/v1", http=http, max_retries=0) as asked:
        assert isinstance(fails(asked), UpstreamUnreachable)


def test_an_upstream_with_an_unknown_authority_is_unreachable_and_gets_no_request(
    tls: tuple[ssl.SSLContext, Path], http: str
) -> None:
    with FakeUpstream(tls[0]) as server, asking(server.base_url, http=http, max_retries=0) as asked:
        assert isinstance(fails(asked), UpstreamUnreachable)
        assert server.requests == []


def test_more_answers_than_the_pool_holds_are_refused_as_overloaded(
    server: FakeUpstream, tls: tuple[ssl.SSLContext, Path], http: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamchat.upstream.SPARE_CONNECTIONS", 1)
    server.script = [head(), text("a"), Hang()]
    with asking(server.base_url, authority=tls[1], http=http, max_streams=2, connect_timeout=0.2) as asked:
        running = [asked.open() for _ in range(3)]
        started = time.monotonic()
        failure, took = fails(asked), time.monotonic() - started
        for reply in running:
            reply.close()
        assert isinstance(failure, Overloaded)
        assert took < (0.1 if http == "fast" else 0.5)
        assert asked.trail.attempts == 1
    assert len(server.requests) == 3


# --- retries --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", ["408", "409", "429", "500", "503", "500 cut", "cut before its head", "reset before its head"]
)
def test_what_may_pass_is_asked_again(quick: None, asked: Asking, server: FakeUpstream, fault: str) -> None:
    server.scripts.extend([ROWS[fault][0], ROWS[fault][0]])
    assert asked.ask() == HELLO
    assert asked.trail.attempts == len(server.requests) == 3
    assert asked.trail.status == 200


@pytest.mark.parametrize("fault", ["429", "500", "reset before its head"])
def test_attempts_are_counted(quick: None, asked: Asking, server: FakeUpstream, fault: str) -> None:
    server.script, code = ROWS[fault]
    assert fails(asked).code == code
    assert asked.trail.attempts == len(server.requests) == 3


@pytest.mark.parametrize(
    "fault",
    [
        "401",
        "403",
        "400",
        "404",
        "422",
        "302",
        "429 quota",
        "401 cut",
        "too long",
        "refused",
        "json",
        "html",
        "gzip",
        "garbage",
    ],
)
def test_what_cannot_pass_is_asked_once(quick: None, asked: Asking, server: FakeUpstream, fault: str) -> None:
    server.script, code = ROWS[fault]
    assert fails(asked).code == code
    assert asked.trail.attempts == len(server.requests) == 1


@pytest.mark.parametrize("fault", ["no finish_reason", "cut", "reset", "error in the middle", "bad json"])
def test_nothing_is_asked_again_once_the_answer_has_begun(
    quick: None, asked: Asking, server: FakeUpstream, fault: str
) -> None:
    server.script, code = ROWS[fault]
    assert fails(asked).code == code
    assert len(server.requests) == 1


def test_a_retry_after_that_fits_is_waited_for(quick: None, asked: Asking, server: FakeUpstream) -> None:
    server.scripts.append(error(429, headers={"Retry-After": "1"}))
    assert asked.ask() == HELLO
    assert 1 <= server.requests[1].arrived - server.requests[0].arrived < 2


def test_a_retry_after_that_is_a_date_is_waited_for(quick: None) -> None:
    with FakeUpstream() as server, asking(server.base_url) as asked:
        due = int(time.time()) + 2  # such dates have whole seconds
        server.scripts.append(error(429, headers={"Retry-After": email.utils.formatdate(due, usegmt=True)}))
        assert asked.ask() == HELLO
        assert time.time() >= due


def test_a_retry_after_that_does_not_fit_is_not_waited_for_but_told(asked: Asking, server: FakeUpstream) -> None:
    server.script = error(429, headers={"Retry-After": "6"})  # the first token may take 5 s
    started = time.monotonic()
    failure = fails(asked)
    assert time.monotonic() - started < 0.5
    assert isinstance(failure, UpstreamRateLimited)
    assert failure.retry_after == 6
    assert len(server.requests) == 1


@pytest.mark.parametrize("value", ["soon", "-5", "nan", "1e400", "²", "", "Mon, 99 Nov 2026 99:99:99 GMT"])
def test_a_retry_after_that_says_nothing_is_ignored(
    quick: None, asked: Asking, server: FakeUpstream, value: str
) -> None:
    if not value.isascii():
        value = value.encode().decode("latin-1")
    server.scripts.append(error(503, headers={"Retry-After": value}))
    assert asked.ask() == HELLO


def test_one_deadline_covers_all_attempts(server: FakeUpstream, tls: tuple[ssl.SSLContext, Path], http: str) -> None:
    server.script = [Pause(0.15), error(500)]
    with asking(server.base_url, authority=tls[1], http=http, max_retries=10, first_token_timeout=0.6) as asked:
        started = time.monotonic()
        assert fails(asked).code in ("upstream_error", "upstream_timeout")
        assert time.monotonic() - started < 0.9
    assert len(server.requests) <= 2


def test_an_upstream_that_is_silent_for_the_whole_time_is_not_asked_again(
    server: FakeUpstream, tls: tuple[ssl.SSLContext, Path], http: str
) -> None:
    server.script = Hang()
    with asking(server.base_url, authority=tls[1], http=http, first_token_timeout=0.2) as asked:
        started = time.monotonic()
        assert isinstance(fails(asked), UpstreamTimeout)
        assert 0.19 <= time.monotonic() - started < 0.7
        server.requests[0].wait_left()
    assert len(server.requests) == 1


def test_a_hang_up_in_the_wait_before_a_retry_ends_it_at_once_and_leaves_one_post(
    asked: Asking, server: FakeUpstream
) -> None:
    server.script = error(429, headers={"Retry-After": "3"})
    cancellation = Cancellation()
    opening = Background(lambda: asked.open(cancellation))
    server.wait_for_requests(1)[0].wait_finished()
    time.sleep(0.05)
    cancelled = time.monotonic()
    cancellation.cancel(CallerGone())
    opening.join()
    assert opening.ended - cancelled < 0.05
    assert isinstance(opening.error, CallerGone)
    time.sleep(0.1)
    assert len(server.requests) == 1


# --- hang-ups -------------------------------------------------------------------------------------------

STATES: dict[str, Step] = {
    "before headers": Hang(),
    "in the headers": [b"HTTP/1.1 200 OK\r\nX-", Hang()],
    "before the first event": [head(), Hang()],
    "between pieces": [head(), text("a"), Hang()],
    "in a piece": [head(), text("a")[:20], Hang()],
    "while pieces flow": [head(), Repeat([Pause(0.001), text("a")], 100_000)],
    "at full speed": [head(), Repeat(text("a") * 20, 100_000)],
    "after the last piece": [head(), text("a"), finish(), Hang()],
    "in an error's body": [head(500, {"Content-Length": "100"}, chunked=False), b"{", Hang()],
}


@pytest.mark.parametrize("state", STATES)
def test_a_hang_up_closes_the_upstream_within_50_ms(asked: Asking, server: FakeUpstream, state: str) -> None:
    server.script = STATES[state]
    delays = []
    for number in range(5):
        cancellation = Cancellation()

        def run(cancellation: Cancellation = cancellation) -> None:
            reply = asked.open(cancellation)
            with contextlib.closing(reply):
                read_all(reply)

        running = Background(run)
        request = server.wait_for_requests(number + 1)[number]
        time.sleep(0.03)
        cancelled = time.monotonic()
        cancellation.cancel(CallerGone())
        delays.append(request.wait_left() - cancelled)
        running.join()
        assert isinstance(running.error, CallerGone)
        assert running.ended - cancelled < 0.5
    assert len(server.requests) == 5  # and none again
    assert sorted(delays)[2] < 0.05, delays


def test_a_hang_up_in_the_tls_handshake_ends_it_at_once(tls: tuple[ssl.SSLContext, Path], http: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with asking(f"https://127.0.0.1:{listener.getsockname()[1]}/v1", authority=tls[1], http=http) as asked:
            cancellation = Cancellation()
            opening = Background(lambda: asked.open(cancellation))
            client, _ = listener.accept()
            with client:
                assert client.recv(65536)  # the hello
                cancelled = time.monotonic()
                cancellation.cancel(CallerGone())
                client.settimeout(5)
                with contextlib.suppress(ConnectionResetError):
                    assert client.recv(65536) == b""
                assert time.monotonic() - cancelled < 0.05
            opening.join()
            assert isinstance(opening.error, CallerGone)


def test_nothing_that_came_after_a_hang_up_is_decoded(asked: Asking, server: FakeUpstream) -> None:
    gate = Gate()
    server.script = [head(), text("a"), gate, text("b"), finish(), done(), last_chunk()]
    cancellation = Cancellation()
    reply = asked.open(cancellation)
    until = time.monotonic() + 5
    while not (events := reply.read(until)):
        assert events is not None
    gate.open()
    server.requests[0].wait_finished()
    cancellation.cancel(CallerGone())
    for _ in range(3):
        with pytest.raises(CallerGone):
            reply.read(time.monotonic() + 5)
    reply.close()


def test_an_answer_that_was_left_before_it_was_opened_is_not_asked_for(asked: Asking, server: FakeUpstream) -> None:
    asked.ask()  # so that a connection is kept
    for _ in range(3):
        cancellation = Cancellation()
        cancellation.cancel(CallerGone())
        with pytest.raises(CallerGone):
            asked.open(cancellation)
    assert asked.ask() == HELLO
    assert len(server.requests) == 2


# --- ends -----------------------------------------------------------------------------------------------


def test_a_whole_answer_without_usage_or_done_is_whole(
    asked: Asking, server: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [head(), text("a"), finish()]
    expected = [Text("a"), Finish("stop")]
    endings: list[Step] = [last_chunk(), Fin(), [Pause(0.02), Rst()], [done(), last_chunk()]]
    for ending in endings:
        server.script = [whole, ending]
        assert asked.ask() == expected, ending


@pytest.mark.parametrize(
    "after", [Hang(), Repeat([Pause(0.01), http_chunk(b": ping\n\n")], 1000)], ids=["silent", "pinging"]
)
def test_the_usage_of_a_whole_answer_is_waited_for_a_bounded_time(
    asked: Asking, server: FakeUpstream, monkeypatch: pytest.MonkeyPatch, after: Step
) -> None:
    monkeypatch.setattr("streamchat.upstream.CONCLUDE_SECONDS", 0.15)
    server.script = [head(), text("a"), finish(), after]
    started = time.monotonic()
    assert asked.ask() == [Text("a"), Finish("stop")]
    assert 0.14 <= time.monotonic() - started < 1


def test_a_reader_that_asks_often_gets_the_usage_that_comes_a_little_later(asked: Asking, server: FakeUpstream) -> None:
    server.script = [head(), text("a"), finish(), Pause(0.1), usage_chunk(3, 4), done(), last_chunk()]
    reply = asked.open()
    events: list[Event] = []
    while not events or not isinstance(events[-1], Finish):
        events += reply.read(time.monotonic() + 0.02) or []
    reply.close()
    assert events == [Text("a"), Finish("stop", Usage(3, 4))]


@pytest.mark.parametrize("end", [Hang(), Repeat([Pause(0.005), http_chunk(b": trickle\n\n")], 1000)])
def test_a_trickling_end_after_done_delays_nothing(asked: Asking, server: FakeUpstream, end: Step) -> None:
    server.script = [head(), text("a"), finish(), done(), end]
    sent = len(head() + text("a") + finish() + done())
    read, closed = [], []
    for number in range(3):
        reply = asked.open()
        server.requests[number].wait_sent(sent)
        started = time.monotonic()
        assert read_all(reply)[-1] == Finish("stop")
        read.append(time.monotonic() - started)
        reply.close()
        closed.append(time.monotonic() - started)
        server.requests[number].wait_left()
    assert sorted(read)[1] < 0.05, read  # the median: the machine has other work too
    assert sorted(closed)[1] < 0.1, closed


# --- both paths -----------------------------------------------------------------------------------------

DELTAS = st.one_of(
    st.builds(lambda value: {"content": value}, st.text()),
    st.builds(lambda value: {"reasoning_content": value}, st.text()),
    st.builds(lambda value: {"refusal": value}, st.text(max_size=3)),
    st.builds(
        lambda value: {"tool_calls": [{"index": 0, "id": "call_1", "function": {"name": "f", "arguments": value}}]},
        st.text(),
    ),
    st.sampled_from([{"content": "\ud83d"}, {"content": "\ude00"}, {"role": "assistant", "content": None}, {}]),
)


@pytest.fixture(scope="module")
def both(tls: tuple[ssl.SSLContext, Path]) -> Iterator[tuple[FakeUpstream, Asking, Asking]]:
    with FakeUpstream() as server:
        with asking(server.base_url, http="fast") as fast, asking(server.base_url, http="sdk") as sdk:
            yield server, fast, sdk
            fast.upstream.close()


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_both_paths_give_the_same_events_under_any_splitting(
    both: tuple[FakeUpstream, Asking, Asking], data: Any
) -> None:
    server, *paths = both
    deltas = data.draw(st.lists(DELTAS, max_size=6))
    stream = b"".join(event(delta) for delta in deltas) + event({}, "stop") + b"data: [DONE]\n\n"
    whole = [event({"content": ""}), stream]
    results = []
    for asked in (*paths, *paths):
        cuts = sorted(data.draw(st.lists(st.integers(1, len(stream)), max_size=8, unique=True)))
        parts = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
        server.script = [head(), *[http_chunk(part) for part in (whole[0], *parts) if part], last_chunk()]
        results.append(asked.ask())
    assert all(result == results[0] for result in results)


def test_one_client_is_made_however_many_ask_first(server: FakeUpstream, tls: tuple[ssl.SSLContext, Path]) -> None:
    with asking(server.base_url, authority=tls[1]) as asked:
        first = [Background(asked.upstream.client) for _ in range(8)]
        for each in first:
            each.join()
        assert len({id(each.result) for each in first}) == 1


def test_nothing_is_left_of_answers_that_were_not_read_to_their_end(asked: Asking, server: FakeUpstream) -> None:
    server.script = [head(), text_chunks(["a"] * 5), Hang()]
    with nothing_left():
        for _ in range(10):
            asked.open().close()
        server.wait_for(lambda: server.open_connections == 0)


def test_a_cut_is_not_hidden_by_a_kept_connection(quick: None, asked: Asking, server: FakeUpstream) -> None:
    asked.ask()
    server.script = [head(), chunk({"content": "a"}), Fin()]
    assert isinstance(fails(asked), UpstreamIncomplete)
