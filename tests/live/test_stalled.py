"""Callers that read nothing: they cost the worker little and are ended in time, and the model's work with them."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import psutil
import pytest
import requests

from tests.fake_upstream import (
    FakeUpstream,
    RecordedRequest,
    Repeat,
    Step,
    answer,
    done,
    finish,
    head,
    last_chunk,
    text,
)
from tests.live.hangup_trials import FORMATS, ends_clean, request_bytes, rest
from tests.live.servers import Server, gunicorn, nginx, wait_for

pytestmark = pytest.mark.live

CALLERS = 200
WRITE_TIMEOUT = 5.0  # all must be stalled before the first is ended, on a busy machine too
SPARE = 2.0  # seconds: the sweep comes once a second
WARM_UP = 20
MOST_BYTES = 64 * 1024  # of the worker's memory for each
STREAMED = [accept for accept in FORMATS if accept != "application/json"]
STALLS = "stall"
SEND_BUFFER = 65536  # the upstream notices soon that nobody takes its bytes


def long_answer(kilobytes: int) -> Step:
    return [head(), Repeat(text("x" * 1023 + " "), kilobytes), finish(), done(), last_chunk()]


def script_of(request: RecordedRequest) -> Step:
    if not request.message.startswith(STALLS):
        return answer(["Hello"])
    return long_answer(512 if request.message == f"{STALLS} json" else 8192)


def stalled_caller(port: int, name: object, accept: str, version: str = "1.1") -> socket.socket:
    """Has asked, and will never read; its kernel takes a few kilobytes for it."""
    caller = socket.socket()
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    caller.connect(("127.0.0.1", port))
    caller.sendall(request_bytes(f"{STALLS} {name}", accept, version))
    return caller


@contextmanager
def stalled_callers(port: int, count: int, upstream: FakeUpstream) -> Iterator[list[socket.socket]]:
    """One after the other: what grows is what they hold, not what a burst of questions passes through."""
    before = len(upstream.requests)
    with ExitStack() as stack:
        callers = []
        for number in range(count):
            caller = stalled_caller(port, number, STREAMED[number % len(STREAMED)])
            callers.append(stack.enter_context(closing(caller)))
            upstream.wait_for_requests(before + number + 1)
        yield callers


class Flow:
    """When each request of the upstream last got rid of bytes: from then on its caller was stalled."""

    def __init__(self, asked: Sequence[RecordedRequest]) -> None:
        self.last = dict.fromkeys(asked, (0, 0.0))

    def look(self) -> bool:
        """True when nothing has moved for half a second."""
        now = time.monotonic()
        for request, (sent, _) in self.last.items():
            if request.sent != sent:
                self.last[request] = (request.sent, now)
        return all(moved and now - moved > 0.5 for _, moved in self.last.values())


def ask(server: Server) -> requests.Response:
    return requests.post(f"{server.url}/api/get-response", json={"message": "hi"}, timeout=10)


def resident(server: Server) -> int:
    (worker,) = server.workers()
    return int(psutil.Process(worker).memory_info().rss)


def read_on(caller: socket.socket) -> None:
    while caller.recv(65536):
        pass


@pytest.fixture
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream(send_buffer=SEND_BUFFER) as upstream:
        upstream.choose = script_of
        yield upstream


@pytest.fixture
def server(upstream: FakeUpstream, tmp_path: Path) -> Iterator[Server]:
    timeout, most = f"{WRITE_TIMEOUT:.0f}", str(CALLERS)
    with gunicorn(upstream.base_url, tmp_path, write_timeout=timeout, max_streams=most) as server:
        yield server


def holds(server: Server, caller: socket.socket) -> bool:
    (worker,) = server.workers()
    ends = [end.raddr.port for end in psutil.Process(worker).net_connections("tcp") if end.raddr]
    return caller.getsockname()[1] in ends


def test_two_hundred_stalled_callers_cost_little_and_are_ended_in_time(upstream: FakeUpstream, server: Server) -> None:
    for _ in range(WARM_UP):
        assert ask(server).text == "Hello"
    warm = resident(server)
    with stalled_callers(server.port, CALLERS, upstream) as callers:
        flow = Flow(upstream.requests[WARM_UP:])
        wait_for(flow.look, 20, "a standstill")
        grown = resident(server) - warm
        assert ask(server).status_code == 503  # all slots are taken
        for request, (_, stalled) in flow.last.items():
            assert request.wait_left(20) - stalled < WRITE_TIMEOUT + SPARE
        upstream.wait_for(lambda: upstream.open_connections <= 1)  # one of the warm-up is kept
        assert ask(server).text == "Hello"  # the slots are free
        assert not any(ends_clean(rest(caller)) for caller in callers)
    wait_for(lambda: len(server.records()) == len(upstream.requests), what="a record for each answer")
    ended = [record for record in server.records() if record["outcome"] == "caller_stalled"]
    assert len(ended) == CALLERS
    assert min(float(record["duration"]) for record in ended) > WRITE_TIMEOUT
    assert "ERROR" not in server.log
    assert grown <= CALLERS * MOST_BYTES, f"{grown / CALLERS / 1024:.0f} KiB each"


def test_a_stalled_caller_that_reads_again_sees_a_broken_end_over_http_1_0(
    upstream: FakeUpstream, server: Server
) -> None:
    """Such an answer ends with its connection: only a reset tells a cut from an end."""
    with closing(stalled_caller(server.port, "1.0", "text/plain", "1.0")) as caller:
        upstream.wait_for_requests(1)[0].wait_left(WRITE_TIMEOUT + SPARE + 2)
        wait_for(lambda: not holds(server, caller), what="the end of the connection")
        with pytest.raises(ConnectionResetError):
            read_on(caller)
    assert server.records()[0]["outcome"] == "caller_stalled"


def test_a_caller_that_stalls_behind_nginx_is_ended_in_time(
    upstream: FakeUpstream, server: Server, tmp_path: Path
) -> None:
    with nginx(server, tmp_path) as hop, closing(stalled_caller(hop.port, "nginx", "text/event-stream")) as caller:
        (asked,) = upstream.wait_for_requests(1)
        flow = Flow([asked])
        wait_for(flow.look, 20, "a standstill")
        assert asked.wait_left(20) - flow.last[asked][1] < WRITE_TIMEOUT + SPARE
        wait_for(lambda: len(server.records()) == 1, what="the record")
        assert not ends_clean(rest(caller))
    assert server.records()[0]["outcome"] == "caller_stalled"
    assert ask(server).text == "Hello"


def test_a_caller_that_does_not_read_its_json_is_ended_in_time(upstream: FakeUpstream, server: Server) -> None:
    """The answer is whole, and its slot free, before its first byte is written: the time limit holds all the same."""
    with closing(stalled_caller(server.port, "json", "application/json")) as caller:
        upstream.wait_for_requests(1)[0].wait_finished(20)
        finished = time.monotonic()
        wait_for(lambda: len(server.records()) == 1, WRITE_TIMEOUT + SPARE + 2, "the record")
        assert time.monotonic() - finished > WRITE_TIMEOUT / 2
        wait_for(lambda: not holds(server, caller), what="the end of the connection")
        received = rest(caller)
    assert received.startswith(b"HTTP/1.1 200")
    assert len(received) < 512 << 10
    assert server.records()[0]["outcome"] == "completed"
    assert "ERROR" not in server.log
