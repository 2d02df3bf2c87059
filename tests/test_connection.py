"""One connection and one exchange: bytes in, bodies out; waits that end; sockets that are let go of."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from streamchat.cancellation import Cancellation
from streamchat.connection import HEAD_BYTES, Connection, Exchange, connect, write_head
from streamchat.errors import CallerGone
from streamchat.loop import ThreadLoop
from tests.asking import Background, nothing_left

LOOP = ThreadLoop()
BODY = b"data: one\n\ndata: two\n\n"
HEAD = b"HTTP/1.1 200 OK\r\nX-Name: a\r\n"
CHUNKS = b"b\r\ndata: one\n\n\r\nb;ext=1\r\ndata: two\n\n\r\n0\r\nTrailer: t\r\n\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKS
LENGTH = HEAD + b"Content-Length: 22\r\n\r\n" + BODY
UNTIL_CLOSE = HEAD + b"\r\n" + BODY
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"


def fed(*parts: bytes) -> Exchange:
    exchange = Exchange()
    for part in parts:
        exchange.feed(part)
    return exchange


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    """A connection and the other end of its socket."""
    ours, theirs = socket.socketpair()
    connection = Connection(LOOP, ours, Cancellation())
    with contextlib.closing(connection), theirs:
        yield connection, theirs


@pytest.fixture
def full() -> Iterator[tuple[str, int]]:
    """The address of a listener that takes no more connections: its queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield listener.getsockname()


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> None:
    def resolved(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]

    monkeypatch.setattr("streamchat.connection.socket.getaddrinfo", resolved)


@pytest.mark.parametrize("response", [CHUNKED, LENGTH, UNTIL_CLOSE], ids=["chunked", "length", "until close"])
@pytest.mark.parametrize("interim", [b"", INTERIM], ids=["plain", "after interim responses"])
def test_a_response_split_at_every_byte_is_the_same_response(response: bytes, interim: bytes) -> None:
    wire = interim + response
    for cut in range(1, len(wire)):
        exchange = fed(wire[:cut], wire[cut:])
        if exchange.until_close:
            exchange.end()
        assert (exchange.status, exchange.headers[0]) == (200, (b"X-Name", b"a"))
        assert b"".join(exchange.pieces) == BODY
        assert exchange.complete
    assert b"".join(fed(*[wire[n : n + 1] for n in range(len(wire))]).pieces) == BODY


@pytest.mark.parametrize(("response", "least"), [(CHUNKED, 0), (LENGTH, 0), (UNTIL_CLOSE, len(HEAD) + 2)])
def test_a_response_cut_at_any_byte_is_not_taken_for_a_whole_one(response: bytes, least: int) -> None:
    for cut in range(len(response)):
        exchange = fed(response[:cut])
        if least and cut >= least:
            exchange.end()
            assert exchange.complete
            continue
        with pytest.raises(httpx2.RemoteProtocolError, match="ended"):
            exchange.end()


@pytest.mark.parametrize("response", [CHUNKED, LENGTH])
def test_a_connection_may_be_kept_once_its_response_is_whole_and_not_before(response: bytes) -> None:
    assert fed(response).may_be_kept()
    assert not fed(response[:-1]).may_be_kept()


@pytest.mark.parametrize(
    "response",
    [
        UNTIL_CLOSE,
        LENGTH.replace(b"X-Name: a", b"Connection: close"),
        CHUNKED.replace(b"X-Name: a", b"Connection: close"),
        LENGTH.replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
)
def test_a_connection_that_its_server_will_close_is_not_kept(response: bytes) -> None:
    exchange = fed(response)
    if exchange.until_close:
        exchange.end()
    assert exchange.complete
    assert not exchange.may_be_kept()


@pytest.mark.parametrize("surplus", [b"garbage", LENGTH, CHUNKED, b"HTTP/1.1 200 OK\r\n"])
def test_what_follows_a_whole_response_is_no_part_of_it_and_ends_the_connection(surplus: bytes) -> None:
    for response in (LENGTH, CHUNKED):
        exchange = fed(response + surplus)
        assert b"".join(exchange.pieces) == BODY
        assert not exchange.may_be_kept()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x00\x05hello",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"<html>not http</html>",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
        HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nnot a length\r\n",
    ],
)
def test_what_is_not_http_is_refused_without_being_repeated(garbage: bytes) -> None:
    with pytest.raises(httpx2.RemoteProtocolError, match=r"^not HTTP/1\.1$"):
        fed(garbage)


@pytest.mark.parametrize("ending", [b"", b"\r\n\r\n"], ids=["unfinished", "whole"])
@pytest.mark.parametrize("step", [1 << 12, 1 << 20])
def test_headers_over_64_kib_are_refused(ending: bytes, step: int) -> None:
    wire = HEAD + b"".join(b"X-%d: %s\r\n" % (n, b"x" * 1000) for n in range(66)) + ending
    with pytest.raises(httpx2.RemoteProtocolError, match="too large"):
        fed(*[wire[at : at + step] for at in range(0, len(wire), step)])


def test_headers_just_under_64_kib_with_a_large_body_behind_them_are_read() -> None:
    filler = b"X-Filler: " + b"x" * (HEAD_BYTES - 200) + b"\r\n"
    body = b"y" * 200_000
    exchange = fed(HEAD + filler + b"Content-Length: 200000\r\n\r\n" + body)
    assert b"".join(exchange.pieces) == body


def test_interim_responses_without_end_are_refused() -> None:
    with pytest.raises(httpx2.RemoteProtocolError, match="too large"):
        fed(*[INTERIM] * 2000)


@pytest.mark.parametrize("bad", [b"a\rb", b"a\nb", b"a\0b", b"sk-canary\r"])
@pytest.mark.parametrize("place", ["value", "name"])
def test_a_header_that_would_split_the_head_is_refused_without_being_repeated(bad: bytes, place: str) -> None:
    header = (b"X-Key", bad) if place == "value" else (bad, b"value")
    request = httpx2.Request("POST", "http://x/v1", headers=[header])
    with pytest.raises(httpx2.LocalProtocolError) as caught:
        write_head(request)
    assert bad.decode().strip() not in repr(caught.value)


def test_the_head_of_a_request_is_written_as_http_wants_it() -> None:
    request = httpx2.Request("POST", "http://x:81/v1/a%20b?c=d", headers={"X-Key": "one"})
    assert write_head(request).split(b"\r\n")[0] == b"POST /v1/a%20b?c=d HTTP/1.1"
    assert b"Host: x:81\r\n" in write_head(request)
    assert write_head(request).endswith(b"\r\n\r\n")


def test_a_read_that_times_out_breaks_nothing(pair: tuple[Connection, socket.socket]) -> None:
    connection, theirs = pair
    started = time.monotonic()
    assert connection.receive(started + 0.02) is None
    assert 0.02 <= time.monotonic() - started < 0.5
    theirs.sendall(b"later")
    assert connection.receive(time.monotonic() + 5) == b"later"
    theirs.close()
    assert connection.receive(time.monotonic() + 5) == b""


def test_each_piece_costs_one_recv(pair: tuple[Connection, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    connection, theirs = pair
    calls: list[int] = []
    real = connection._sock

    class Counting:
        def recv(self, size: int) -> bytes:
            calls.append(size)
            return real.recv(size)

    monkeypatch.setattr(connection, "_sock", Counting())
    for number in range(10):
        threading.Timer(0.002, theirs.sendall, [b"%d" % number]).start()
        assert connection.receive(time.monotonic() + 5) == b"%d" % number
    monkeypatch.undo()
    assert len(calls) == 10


def test_sending_to_a_peer_that_does_not_read_ends_in_time(pair: tuple[Connection, socket.socket]) -> None:
    connection, _ = pair
    with pytest.raises(httpx2.WriteTimeout):
        connection.send(b"x" * 10_000_000, time.monotonic() + 0.05)


def test_a_large_request_reaches_a_slow_reader_whole(pair: tuple[Connection, socket.socket]) -> None:
    connection, theirs = pair
    sending = Background(lambda: connection.send(b"x" * 3_000_000, time.monotonic() + 5))
    received = 0
    while received < 3_000_000:
        received += len(theirs.recv(50_000))
    sending.join()
    assert sending.error is None


@pytest.mark.parametrize("state", ["silent", "closed", "speaks out of turn", "too old"])
def test_only_a_silent_young_connection_is_fit_for_the_next_request(
    pair: tuple[Connection, socket.socket], state: str
) -> None:
    connection, theirs = pair
    connection.idle_since = now = time.monotonic()
    if state == "closed":
        theirs.close()
    if state == "speaks out of turn":
        theirs.sendall(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    assert connection.is_stale(now + (61 if state == "too old" else 1), 60) is (state != "silent")


def test_the_connect_timeout_is_a_total_over_all_addresses(
    full: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve_to(monkeypatch, full, full, full, full)
    started = time.monotonic()
    with nothing_left(), pytest.raises(httpx2.ConnectTimeout):
        connect(LOOP, "host", 1, None, Cancellation(), started + 0.2)
    assert 0.19 <= time.monotonic() - started < 0.6


def test_a_silent_address_leaves_time_for_the_next_one(full: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        resolve_to(monkeypatch, full, listener.getsockname())
        started = time.monotonic()
        connection = connect(LOOP, "host", 1, None, Cancellation(), started + 0.4)
        connection.close()
    assert time.monotonic() - started < 0.4


def test_a_refused_address_is_followed_by_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as dead:
        closed = dead.getsockname()
    with socket.create_server(("127.0.0.1", 0)) as listener, nothing_left():
        resolve_to(monkeypatch, closed, listener.getsockname())
        connect(LOOP, "host", 1, None, Cancellation(), time.monotonic() + 5).close()
        resolve_to(monkeypatch, closed, closed)
        with pytest.raises(httpx2.ConnectError):
            connect(LOOP, "host", 1, None, Cancellation(), time.monotonic() + 5)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 300 + ".invalid", "a..b"])
def test_a_host_name_that_cannot_be_resolved_is_a_connect_error(host: str) -> None:
    with pytest.raises(httpx2.ConnectError):
        connect(LOOP, host, 1, None, Cancellation(), time.monotonic() + 5)


def test_a_socket_that_was_cut_before_tls_begins_is_a_connect_error_and_closed() -> None:
    ours, theirs = socket.socketpair()
    connection = Connection(LOOP, ours, Cancellation())
    theirs.sendall(b"out of turn")
    theirs.close()
    with pytest.raises(httpx2.ConnectError):
        connection.secure(ssl.create_default_context(), "localhost", time.monotonic() + 1)
    connection.close()


def test_cancelling_while_connecting_ends_the_wait_at_once(full: tuple[str, int]) -> None:
    cancellation = Cancellation()
    dialling = Background(lambda: connect(LOOP, full[0], full[1], None, cancellation, time.monotonic() + 5))
    time.sleep(0.05)
    cancelled = time.monotonic()
    cancellation.cancel(CallerGone())
    dialling.join()
    assert dialling.ended - cancelled < 0.05
    assert isinstance(dialling.error, (httpx2.ConnectError, CallerGone))


def test_nothing_is_dialled_for_an_answer_that_was_cancelled() -> None:
    cancellation = Cancellation()
    cancellation.cancel(CallerGone())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(CallerGone):
            connect(LOOP, "127.0.0.1", listener.getsockname()[1], None, cancellation, time.monotonic() + 5)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_cancelling_ends_a_connection_also_when_no_descriptor_is_left(pair: tuple[Connection, socket.socket]) -> None:
    connection, theirs = pair
    cancellation = Cancellation()
    connection.serve(cancellation)
    taken: list[int] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(theirs.fileno()))
        cancellation.cancel(CallerGone())
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    theirs.settimeout(1)
    assert theirs.recv(1) == b""


def test_a_descriptor_is_never_shut_down_after_its_number_went_to_somebody_else() -> None:
    """Closing races with cancelling; right after the close the same number is a bystander's socket."""
    for _ in range(300):
        ours, theirs = socket.socketpair()
        number = ours.fileno()
        cancellation = Cancellation()
        connection = Connection(LOOP, ours, cancellation)
        ready = threading.Barrier(2)

        def cancel(ready: threading.Barrier = ready, cancellation: Cancellation = cancellation) -> None:
            ready.wait()
            cancellation.cancel(CallerGone())

        thread = threading.Thread(target=cancel)
        thread.start()
        ready.wait()
        connection.close()
        bystander, friend = socket.socketpair()
        thread.join()
        with theirs, bystander, friend:
            assert number in (bystander.fileno(), friend.fileno())
            bystander.sendall(b"alive")
            assert friend.recv(10) == b"alive"


def test_a_kept_connection_is_out_of_reach_of_the_answer_that_it_served(
    pair: tuple[Connection, socket.socket],
) -> None:
    connection, theirs = pair
    first = Cancellation()
    connection.serve(first)
    connection.rest()
    first.cancel(CallerGone())
    connection.send(b"still open", time.monotonic() + 1)
    assert theirs.recv(100) == b"still open"
