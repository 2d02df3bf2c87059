"""A worker that stops: answers that can end do, the others say so, nothing is lost; and one that is killed."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pytest

from tests.fake_upstream import (
    FakeUpstream,
    Gate,
    Hang,
    RecordedRequest,
    Repeat,
    Step,
    answer,
    done,
    finish,
    head,
    last_chunk,
    text,
    usage_chunk,
)
from tests.live.hops import HOPS
from tests.live.readers import (
    FORMATS,
    JSON,
    NDJSON,
    PATH,
    RESET_ON_CLOSE,
    SSE,
    TEXT,
    Seen,
    by_http_client,
    by_socket,
    finish_reading,
    head_of,
    question,
    read_to_the_end,
)
from tests.live.servers import Server, gunicorn, nginx, wait_for

pytestmark = pytest.mark.live

GRACE = 8  # seconds; conf/gunicorn.conf.py ends what still runs after two of them
STREAMED = (TEXT, SSE, NDJSON)


class Model:
    """An upstream whose answers begin at once; "ends" ends when its gate is opened, "hangs" never does."""

    def __init__(self, fake: FakeUpstream) -> None:
        self.fake = fake
        self.ending = Gate()
        fake.choose = self._script

    def _script(self, request: RecordedRequest) -> Step:
        match request.message:
            case "ends":
                tail = [text("lo"), finish(), usage_chunk(19, 2), done(), last_chunk()]
                return [head(), text("Hel"), self.ending, *tail]
            case "hangs":
                return [head(), text("Hel"), Hang()]
            case "floods":
                return [head(), Repeat(text("x" * 60_000), 10_000), Hang()]
        return answer(["Hello"])

    def wait_sent(self, count: int) -> None:
        """Until the first piece of so many answers is on its way."""
        self.fake.wait_for(lambda: sum(request.sent > 0 for request in self.fake.requests) >= count, 20)

    def wait_closed(self) -> None:
        self.fake.wait_for(lambda: self.fake.open_connections == 0, 5)


@pytest.fixture
def model() -> Iterator[Model]:
    with FakeUpstream() as fake:
        yield Model(fake)


class Line:
    """A connection that was kept alive: its worker closes its doors, but goes on to serve it."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        assert self.get_health().status == 200

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def get_health(self) -> Seen:
        self._connection.request("GET", "/api/healthz")
        return finish_reading(self._connection.getresponse())

    def ask(self, accept: str) -> Seen:
        headers = {"Content-Type": "application/json", "Accept": accept}
        self._connection.request("POST", PATH, question("whole"), headers)
        return finish_reading(self._connection.getresponse())


def assert_finished(accept: str, seen: Seen) -> None:
    assert (seen.status, seen.whole) == (200, True), seen
    if accept == TEXT:
        assert seen.body == b"Hello"
    elif accept == JSON:
        assert seen.document["text"] == "Hello"
    else:
        assert [event["type"] for event in seen.events] == ["start", "text", "text", "finish"]


def assert_drained(accept: str, seen: Seen) -> None:
    if accept == TEXT:
        assert (seen.status, seen.body, seen.whole) == (200, b"Hel", False)
    elif accept == JSON:
        assert (seen.status, seen.document["code"], seen.whole) == (503, "draining", True)
    else:
        assert (seen.status, seen.whole) == (200, True)
        assert [event["type"] for event in seen.events] == ["start", "text", "error"]
        assert seen.events[-1]["code"] == "draining"


def ask_many(pool: ThreadPoolExecutor, port: int, message: str, count: int) -> list[tuple[str, Future[Seen]]]:
    accepts = [FORMATS[each % len(FORMATS)] for each in range(count)]
    return [(accept, pool.submit(by_http_client, port, message, accept)) for accept in accepts]


def test_a_stop_lets_answers_end_in_the_grace_time_and_tells_those_that_cannot(model: Model, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"grace": str(GRACE), "coalesce_ms": "0", "status_hold": "60"}
    with ExitStack() as stack:
        server = stack.enter_context(gunicorn(model.fake.base_url, tmp_path, **settings))
        pool = stack.enter_context(ThreadPoolExecutor(100))
        ending = ask_many(pool, server.port, "ends", 50)
        hanging = ask_many(pool, server.port, "hangs", 50)
        model.wait_sent(100)
        lines = [stack.enter_context(Line(server.port)) for _ in range(1 + len(FORMATS))]

        server.terminate()
        told = time.monotonic()
        wait_for(lambda: lines[0].get_health().status == 503, 3, "draining")
        refused = [line.ask(accept) for line, accept in zip(lines[1:], FORMATS, strict=True)]
        for seen in refused:
            assert (seen.status, seen.document["code"], seen.headers["Retry-After"]) == (503, "draining", "5"), seen
        model.ending.open()

        for accept, answered in ending:
            assert_finished(accept, answered.result())
        for accept, answered in hanging:
            assert_drained(accept, answered.result())
        assert server.process.wait(GRACE) == 0
        assert time.monotonic() - told < GRACE

    model.wait_closed()
    assert len(model.fake.requests) == 100
    assert Counter(request.left is not None for request in model.fake.requests) == {True: 50, False: 50}
    assert Counter(record["outcome"] for record in server.records()) == {"completed": 50, "draining": 50}
    assert len({record["id"] for record in server.records()}) == 100
    assert_quiet(server)


def assert_quiet(server: Server) -> None:
    for word in ("ERROR", "CRITICAL", "Traceback", "SIGKILL", "graceful timeout"):
        assert word not in server.log, server.log


def test_a_stopping_server_without_answers_ends_at_once(model: Model, tmp_path: Path) -> None:
    with gunicorn(model.fake.base_url, tmp_path, grace=str(GRACE)) as server:
        assert by_http_client(server.port, "whole", TEXT).body == b"Hello"
        server.terminate()
        assert server.process.wait(4) == 0
    assert_quiet(server)


def test_an_idle_connection_does_not_keep_a_stopping_worker(model: Model, tmp_path: Path) -> None:
    with gunicorn(model.fake.base_url, tmp_path) as server, Line(server.port) as line:
        server.terminate()
        assert server.process.wait(GRACE) == 0
        with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
            line.get_health()
    assert_quiet(server)


def test_a_reload_lets_old_answers_finish_while_new_workers_answer(model: Model, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"grace": str(GRACE), "coalesce_ms": "0"}
    with gunicorn(model.fake.base_url, tmp_path, **settings) as server, ThreadPoolExecutor(20) as pool:
        running = ask_many(pool, server.port, "ends", 12)
        model.wait_sent(12)
        (old,) = server.workers()

        server.process.send_signal(signal.SIGHUP)
        wait_for(lambda: not set(server.workers()) <= {old}, what="a new worker")
        wait_for(lambda: f"[{old}] INFO gunicorn.error: Worker exiting" in server.log or stopped_listening(old), 4)
        for accept in FORMATS:
            seen = by_http_client(server.port, "whole", accept)
            assert seen.status == 200 and seen.whole, seen
        assert not any(answered.done() for _, answered in running)

        model.ending.open()
        for accept, answered in running:
            assert_finished(accept, answered.result())
        wait_for(lambda: old not in server.workers(), GRACE, "the old worker's end")
        assert len(server.workers()) == 1
    assert Counter(record["outcome"] for record in server.records()) == {"completed": 16}
    assert_quiet(server)


def stopped_listening(pid: int) -> bool:
    """Whether a worker has closed its copy of the listening socket: it takes no further connection."""
    listening = {line.split()[9] for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines() if " 0A " in line}
    open_sockets = set()
    for each in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(each)
        except FileNotFoundError:  # closed since it was listed
            continue
        open_sockets.add(target.removeprefix("socket:[").removesuffix("]"))
    return not listening & open_sockets


@pytest.mark.parametrize("hop", ["direct", "nginx", "nginx by HTTP/1.0"])
def test_a_killed_worker_is_a_broken_end_in_every_format(model: Model, tmp_path: Path, hop: str) -> None:
    with gunicorn(model.fake.base_url, tmp_path, coalesce_ms="0") as server, ThreadPoolExecutor(8) as pool:
        if hop == "direct":
            seen = kill_under(model, server, pool, server.port)
        else:
            with nginx(server, tmp_path, HOPS[hop]) as proxy:
                seen = kill_under(model, server, pool, proxy.port)
    for accept, cut in seen:
        assert (cut.status, cut.whole) == (200, False), (accept, cut)
        assert b"Hel" in cut.body
        assert b"HTTP/1." not in cut.body
        assert b'"finish"' not in cut.body and b'"error"' not in cut.body


def kill_under(model: Model, server: Server, pool: ThreadPoolExecutor, port: int) -> list[tuple[str, Seen]]:
    """Kills the only worker under three answers, read by two readers each; JSON has no byte to break yet."""
    readers = [(accept, read) for accept in STREAMED for read in (by_http_client, by_socket)]
    reading = [(accept, pool.submit(read, port, "hangs", accept)) for accept, read in readers]
    model.wait_sent(len(readers))
    time.sleep(0.3)  # what is on its way to six callers can only be waited for
    (worker,) = server.workers()
    os.kill(worker, signal.SIGKILL)
    return [(accept, each.result()) for accept, each in reading]


@pytest.mark.parametrize("ending", ["stays", "leaves by reset at the end"])
def test_a_caller_that_reads_nothing_does_not_keep_a_worker_from_cleaning_up(
    model: Model, tmp_path: Path, ending: str
) -> None:
    settings: dict[str, Any] = {"grace": str(GRACE), "write_timeout": "600"}
    with gunicorn(model.fake.base_url, tmp_path, **settings) as server, ThreadPoolExecutor(8) as pool:
        stalled = [stall(server.port, accept) for accept in STREAMED]
        model.wait_sent(3)
        wait_for(lambda: is_standing(model), 10, "the stall")
        others = ask_many(pool, server.port, "hangs", 4)
        model.wait_sent(7)

        server.terminate()
        for accept, answered in others:
            assert_drained(accept, answered.result())
        if ending.startswith("leaves"):
            for caller in stalled:
                caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                caller.close()
        assert server.process.wait(GRACE) == 0
        for caller in stalled if ending == "stays" else ():
            with caller:
                wire, _ = read_to_the_end(caller)
            assert not wire.endswith(b"0\r\n\r\n")

    model.wait_closed()
    assert len(server.records()) == 7
    assert Counter(record["outcome"] for record in server.records())["draining"] == 7
    assert_quiet(server)


def stall(port: int, accept: str) -> socket.socket:
    caller = socket.socket()
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    caller.settimeout(20)
    caller.connect(("127.0.0.1", port))
    caller.sendall(head_of(question("floods"), accept))
    return caller


def is_standing(model: Model) -> bool:
    """The kernel takes no more of any flood: the way to the caller is full to its beginning."""
    before = [request.sent for request in model.fake.requests]
    time.sleep(0.5)  # longer than any pause of a stream that flows
    return before == [request.sent for request in model.fake.requests]
