"""The pool and its bodies against a real server: connections are kept, strict about TLS, and given back."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx2
import pytest
import trustme

from streamchat.cancellation import Cancellation
from streamchat.errors import CallerGone
from streamchat.loop import ThreadLoop
from streamchat.transport import BODY, CURRENT, ERROR_BYTES, Body, FastTransport
from tests.asking import Background, nothing_left, server_context, wait_until
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
    done,
    event,
    finish,
    head,
    http_chunk,
    last_chunk,
    text,
)

AUTHORITY = trustme.CA()
YESTERDAY = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)


@pytest.fixture(scope="module")
def trust() -> ssl.SSLContext:
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    return context


@pytest.fixture(params=["plain", "tls"])
def upstream(request: pytest.FixtureRequest) -> Iterator[FakeUpstream]:
    tls = server_context(AUTHORITY, "127.0.0.1") if request.param == "tls" else None
    with FakeUpstream(tls) as server:
        yield server


@pytest.fixture
def transport(upstream: FakeUpstream, trust: ssl.SSLContext) -> Iterator[FastTransport]:
    with nothing_left(), closing(FastTransport(ThreadLoop(), 8, trust)) as fast:
        yield fast


def post(transport: FastTransport, url: str, *, connect: float = 5, read: float = 5, size: int = 2) -> httpx2.Response:
    timeout = {"connect": connect, "read": read}
    request = httpx2.Request("POST", url, content=b"{" + b" " * (size - 2) + b"}", extensions={"timeout": timeout})
    return transport.handle_request(request)


def body_of(response: httpx2.Response) -> Body:
    body: Body = response.extensions[BODY]
    return body


def read_whole(body: Body) -> bytes:
    data = b""
    while piece := body.read(time.monotonic() + 5):
        data += piece
    return data


def ask(transport: FastTransport, upstream: FakeUpstream) -> bytes:
    body = body_of(post(transport, upstream.base_url))
    try:
        return read_whole(body)
    finally:
        body.close()


def test_a_hundred_answers_one_after_the_other_open_one_connection(
    transport: FastTransport, upstream: FakeUpstream
) -> None:
    for _ in range(100):
        assert b"[DONE]" in ask(transport, upstream)
    assert upstream.connections == 1
    assert len(upstream.requests) == 100


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_each_framing_gives_the_same_body(transport: FastTransport, upstream: FakeUpstream, framing: str) -> None:
    upstream.script = answer(["a", "b"])
    whole = ask(transport, upstream)
    upstream.script = answer(["a", "b"], framing=framing)
    assert ask(transport, upstream) == whole


def test_an_end_that_comes_a_little_after_the_answer_still_saves_the_connection(
    transport: FastTransport, upstream: FakeUpstream
) -> None:
    upstream.script = [head(), done(), Pause(0.015), last_chunk()]
    for _ in range(3):
        body = body_of(post(transport, upstream.base_url))
        assert body.read(time.monotonic() + 5) == b"data: [DONE]\n\n"
        body.drain()
        body.close()
    assert upstream.connections == 1


@pytest.mark.parametrize(
    "end",
    [Hang(), Repeat([Pause(0.005), http_chunk(b": trickle\n\n")], 1000), Repeat(http_chunk(b"x" * 5000), 100_000)],
)
def test_an_end_that_does_not_come_costs_less_than_100_ms(
    transport: FastTransport, upstream: FakeUpstream, end: Step
) -> None:
    upstream.script = [head(), done(), end]
    took = []
    for number in range(3):
        body = body_of(post(transport, upstream.base_url))
        assert body.read(time.monotonic() + 5)
        started = time.monotonic()
        body.drain()
        body.close()
        took.append(time.monotonic() - started)
        upstream.requests[number].wait_left()
    assert sorted(took)[1] < 0.1, took  # the median: the machine has other work too


@pytest.mark.parametrize("how", ["fin", "rst", "speaks out of turn"])
def test_a_pooled_connection_that_died_idle_costs_no_second_post(
    transport: FastTransport, upstream: FakeUpstream, how: str
) -> None:
    surplus = Gate()
    if how == "speaks out of turn":
        upstream.scripts.append([answer(["a"]), surplus, b"HTTP/1.1 408 Request Timeout\r\n\r\n"])
    assert ask(transport, upstream)
    if how == "speaks out of turn":
        surplus.open()
        upstream.requests[0].wait_finished()
    else:
        upstream.requests[0].wait_finished()
        upstream.close_idle(reset=how == "rst")
    kept = next(iter(transport._idle.values()))[0]
    wait_until(lambda: kept.is_stale(time.monotonic(), 60))
    assert b"[DONE]" in ask(transport, upstream)
    assert (len(upstream.requests), upstream.connections) == (2, 2)


def test_connections_left_over_from_a_busier_time_are_closed(
    transport: FastTransport, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = [body_of(post(transport, upstream.base_url)) for _ in range(5)]
    for body in together:
        read_whole(body)
        body.close()
    assert upstream.open_connections == 5
    transport.reap()
    assert len(next(iter(transport._idle.values()))) == 5
    monkeypatch.setattr("streamchat.transport.KEEP_SECONDS", 0.0)
    transport.reap()
    upstream.wait_for(lambda: upstream.open_connections == 0)


def test_a_full_pool_refuses_at_once_and_has_room_again_after_a_close(
    transport: FastTransport, upstream: FakeUpstream
) -> None:
    upstream.script = [head(), text("a"), Hang()]
    running = [body_of(post(transport, upstream.base_url)) for _ in range(8)]
    started = time.monotonic()
    with pytest.raises(httpx2.PoolTimeout):
        post(transport, upstream.base_url)
    assert time.monotonic() - started < 0.05
    running.pop().close()
    running.append(body_of(post(transport, upstream.base_url)))
    for body in running:
        body.close()
        body.close()
    assert transport._live == 0
    assert len(upstream.requests) == 9


def test_requests_that_failed_take_no_room(transport: FastTransport, upstream: FakeUpstream) -> None:
    upstream.script = Rst()
    for _ in range(20):
        with pytest.raises(httpx2.TransportError):
            post(transport, upstream.base_url)
    with pytest.raises(httpx2.UnsupportedProtocol):
        post(transport, "ftp://127.0.0.1/")
    assert transport._live == 0


def test_many_threads_at_once_get_their_own_answers(transport: FastTransport, upstream: FakeUpstream) -> None:
    upstream.choose = lambda request: answer([request.path])
    failures: list[str] = []

    def ask_often(name: str) -> None:
        for number in range(15):
            path = f"/{name}-{number}"
            body = body_of(post(transport, upstream.base_url.removesuffix("/v1") + path))
            if path.encode() not in read_whole(body):
                failures.append(path)
            body.close()

    threads = [threading.Thread(target=ask_often, args=(f"t{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert upstream.connections <= 8
    assert transport._live == 0


def test_a_read_times_out_and_the_stream_goes_on(transport: FastTransport, upstream: FakeUpstream) -> None:
    first, second = Gate(), Gate()
    upstream.script = [head(), text("a"), first, text("b")[:9], second, text("b")[9:], last_chunk()]
    body = body_of(post(transport, upstream.base_url))
    begun = b""
    for gate in (first, second):
        assert (begun := body.read(time.monotonic() + 5) or b"")
        started = time.monotonic()
        assert body.read(started + 0.03) is None
        assert 0.03 <= time.monotonic() - started < 0.3
        gate.open()
    assert read_whole(body) == event({"content": "b"})[len(begun) :]
    body.close()


def test_bytes_without_a_body_do_not_hold_a_read_beyond_its_time(
    transport: FastTransport, upstream: FakeUpstream
) -> None:
    upstream.script = [head(), b"1;", Repeat(b"x" * 60_000, 100_000)]
    body = body_of(post(transport, upstream.base_url))
    started = time.monotonic()
    assert body.read(started + 0.1) is None
    assert time.monotonic() - started < 0.5
    body.close()


def test_a_response_that_does_not_begin_times_out(transport: FastTransport, upstream: FakeUpstream) -> None:
    upstream.script = Repeat([b"HTTP/1.1 100 Continue\r\n\r\n", Pause(0.02)], 1000)
    started = time.monotonic()
    with pytest.raises(httpx2.ReadTimeout):
        post(transport, upstream.base_url, read=0.15)
    assert 0.14 <= time.monotonic() - started < 0.6
    upstream.requests[0].wait_left()


@pytest.mark.parametrize("end", [Fin(), Fin(close_notify=False), Rst()], ids=["fin", "cut", "rst"])
@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_a_cut_body_raises(transport: FastTransport, upstream: FakeUpstream, end: Step, framing: str) -> None:
    whole = answer(["a", "b"], framing=framing)
    upstream.script = [whole[:3], end]
    body = body_of(post(transport, upstream.base_url))
    with pytest.raises((httpx2.RemoteProtocolError, httpx2.ReadError)):
        read_whole(body)
    body.close()


@pytest.mark.parametrize(
    "flood",
    [
        [Repeat(b"x" * 50_000, 100), Hang()],
        [b"{", Repeat([Pause(0.05), b" "], 1000)],
        [b"{", Fin()],
        [b"{", Rst()],
    ],
    ids=["large", "dripping", "cut", "reset"],
)
def test_an_error_body_is_read_for_a_bounded_time_and_size_and_never_raises(
    transport: FastTransport, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch, flood: Step
) -> None:
    monkeypatch.setattr("streamchat.transport.ERROR_SECONDS", 0.3)
    upstream.script = [head(500, {"Content-Length": "9000000"}, chunked=False), flood]
    response = post(transport, upstream.base_url)
    started = time.monotonic()
    assert len(response.read()) <= ERROR_BYTES
    assert time.monotonic() - started < 0.8
    assert response.status_code == 500
    upstream.wait_for(lambda: upstream.open_connections == 0)


def test_a_refusal_that_comes_before_the_request_was_read_is_seen() -> None:
    """Servers say 413 and close without reading on."""
    refusal = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\n{}"
    with socket.create_server(("127.0.0.1", 0)) as listener, nothing_left():

        def refuse() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(1000)
                client.sendall(refusal)

        refusing = Background(refuse)
        with closing(FastTransport(ThreadLoop(), 8)) as transport:
            response = post(transport, f"http://127.0.0.1:{listener.getsockname()[1]}/", size=10_000_000)
            assert response.status_code == 413
            response.close()
        refusing.join()
        assert transport._idle == {}


def expired() -> ssl.SSLContext:
    return server_context(AUTHORITY, "127.0.0.1", not_before=YESTERDAY - datetime.timedelta(1), not_after=YESTERDAY)


@pytest.mark.parametrize(
    "tls",
    [
        lambda: server_context(AUTHORITY, "other.example"),
        expired,
        lambda: server_context(trustme.CA(), "127.0.0.1"),
    ],
    ids=["another host's name", "expired", "unknown authority"],
)
def test_a_certificate_that_is_not_right_is_refused_before_a_byte_of_the_request(
    trust: ssl.SSLContext, tls: Callable[[], ssl.SSLContext]
) -> None:
    with FakeUpstream(tls()) as upstream, nothing_left(), closing(FastTransport(ThreadLoop(), 8, trust)) as transport:
        with pytest.raises(httpx2.ConnectError):
            post(transport, upstream.base_url)
        upstream.wait_for(lambda: upstream.connections == 1 and upstream.open_connections == 0)
        assert upstream.requests == []


def test_a_name_in_the_certificate_is_accepted(trust: ssl.SSLContext) -> None:
    with FakeUpstream(server_context(AUTHORITY, "localhost")) as upstream, nothing_left():
        with closing(FastTransport(ThreadLoop(), 8, trust)) as transport:
            body = body_of(post(transport, f"https://localhost:{upstream.port}/v1"))
            assert b"[DONE]" in read_whole(body)
            body.close()


def test_tls_to_a_server_that_speaks_none_and_plain_to_one_that_does_fail(trust: ssl.SSLContext) -> None:
    with FakeUpstream() as plain, nothing_left(), closing(FastTransport(ThreadLoop(), 8, trust)) as transport:
        with pytest.raises(httpx2.ConnectTimeout):  # the fake waits for the rest of what it takes for a request
            post(transport, plain.base_url.replace("http:", "https:"), connect=0.1)
    tls = server_context(AUTHORITY, "127.0.0.1")
    with FakeUpstream(tls) as secure, nothing_left(), closing(FastTransport(ThreadLoop(), 8, trust)) as transport:
        with pytest.raises(httpx2.TransportError):
            post(transport, secure.base_url.replace("https:", "http:"))


def test_authorities_come_from_the_environment_as_with_other_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AUTHORITY.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with FakeUpstream(server_context(AUTHORITY, "127.0.0.1")) as upstream, nothing_left():
        with closing(FastTransport(ThreadLoop(), 8)) as transport:
            assert b"[DONE]" in ask(transport, upstream)


def test_the_cancellation_of_the_moment_ends_the_request_that_is_sent_then(
    transport: FastTransport, upstream: FakeUpstream
) -> None:
    upstream.script = Hang()
    cancellation = Cancellation()

    def send() -> None:
        CURRENT.set(cancellation)
        post(transport, upstream.base_url)

    sending = Background(send)
    upstream.wait_for_requests(1)
    cancelled = time.monotonic()
    cancellation.cancel(CallerGone())
    assert upstream.requests[0].wait_left() - cancelled < 0.05
    sending.join()
    assert isinstance(sending.error, httpx2.TransportError)


def test_a_finished_answer_cannot_cancel_the_next_one_on_its_connection(
    transport: FastTransport, upstream: FakeUpstream
) -> None:
    first = Cancellation()
    token = CURRENT.set(first)
    ask(transport, upstream)
    CURRENT.reset(token)
    gate = Gate()
    upstream.script = [head(), text("a"), gate, finish(), done(), last_chunk()]
    body = body_of(post(transport, upstream.base_url))
    first.cancel(CallerGone())
    gate.open()
    assert b"[DONE]" in read_whole(body)
    body.close()
    assert upstream.connections == 1
