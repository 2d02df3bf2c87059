"""One POST of a webhook: what came of it is told in time, and nothing private is ever reached."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from streamchat import delivery, pinned_connection
from streamchat.attempts import Reply
from streamchat.delivery import Courier
from streamchat.delivery import resolve as resolve_by_system
from streamchat.pinned_connection import REPLY_BYTES
from tests.fake_upstream import FakeUpstream, Fin, Hang, Pause, Repeat, Rst, Step, head, tls_pair

ROOT = Path(__file__).parent.parent
BODY = b'{"type":"response.completed","timestamp":"2026-11-22T20:00:00.000Z","data":{"id":"resp_1"}}'
HEADERS = {"webhook-id": "msg_1", "webhook-timestamp": "1790000000", "webhook-signature": "v1,c2lnbmVk"}
SHORT = 0.4  # seconds that a courier has where it is to run out of them
SLACK = 1.0  # that a noisy machine may add
EMPTY = {"Content-Length": "0"}
PUBLIC = "93.184.215.14"

pytestmark = pytest.mark.usefixtures("no_socket_left")


def reply_of(status: int, **headers: str) -> bytes:
    return head(status, EMPTY | {name.replace("_", "-"): value for name, value in headers.items()}, chunked=False)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    return tls_pair(tmp_path_factory.mktemp("tls"))


@pytest.fixture(params=["http", "https"])
def receiver(request: pytest.FixtureRequest, pair: tuple[ssl.SSLContext, Path]) -> Iterator[FakeUpstream]:
    with FakeUpstream(pair[0] if request.param == "https" else None) as server:
        server.script = reply_of(204)
        yield server


@pytest.fixture
def plain() -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        server.script = reply_of(204)
        yield server


def url_of(server: FakeUpstream, host: str = "localhost", path: str = "/hook?x=1") -> str:
    return f"{'https' if server.tls else 'http'}://{host}:{server.port}{path}"


def courier(pair: tuple[ssl.SSLContext, Path], seconds: float = 5) -> Courier:
    return Courier(loopback=True, seconds=seconds, ca=str(pair[1]), resolve=answers("127.0.0.1"))


def answers(*found: str) -> Callable[[str, int], list[str]]:
    return lambda _host, _port: list(found)


class Watch:
    """How long a block took."""

    def __enter__(self) -> Watch:
        self._start = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._start


# --- what is sent ----------------------------------------------------------------------------------------


def test_the_bytes_and_headers_arrive_as_they_were_given(
    receiver: FakeUpstream, pair: tuple[ssl.SSLContext, Path]
) -> None:
    assert courier(pair).post(url_of(receiver), HEADERS, BODY) == Reply(status=204)
    (request,) = receiver.requests
    assert (request.method, request.path, request.raw_body) == ("POST", "/hook?x=1", BODY)
    assert HEADERS.items() <= request.headers.items()
    assert (request.headers["content-type"], request.headers["connection"]) == ("application/json", "close")
    assert request.headers["host"] == f"localhost:{receiver.port}"
    assert set(request.headers) <= {
        *HEADERS, "host", "content-type", "content-length", "user-agent", "accept", "accept-encoding", "connection",
    }  # fmt: skip


def test_the_certificate_is_asked_for_and_checked_by_the_name(
    pair: tuple[ssl.SSLContext, Path], tmp_path: Path
) -> None:
    names: list[str | None] = []
    context, authority = tls_pair(tmp_path)
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    with FakeUpstream(context) as server:
        server.script = reply_of(204)
        sender = courier((context, authority))
        assert sender.post(url_of(server), HEADERS, BODY).status == 204
        # An address that the certificate holds does not make up for a name that it lacks.
        assert sender.post(url_of(server, "shop.localhost"), HEADERS, BODY) == Reply(fault="tls")
    assert names == ["localhost", "shop.localhost"]
    assert len(server.requests) == 1


def test_an_address_as_host_is_checked_as_one(receiver: FakeUpstream, pair: tuple[ssl.SSLContext, Path]) -> None:
    sender = Courier(loopback=True, ca=str(pair[1]))
    assert sender.post(url_of(receiver, "127.0.0.1"), HEADERS, BODY) == Reply(status=204)
    assert receiver.requests[0].headers["host"] == f"127.0.0.1:{receiver.port}"
    # Not in the certificate.
    other = courier(pair).post(url_of(receiver, "127.0.0.2"), HEADERS, BODY)
    assert other == (Reply(fault="tls") if receiver.tls else Reply(status=204))


def test_a_certificate_of_an_unknown_authority_is_a_tls_fault(pair: tuple[ssl.SSLContext, Path]) -> None:
    with FakeUpstream(pair[0]) as server:
        sender = Courier(loopback=True, resolve=answers("127.0.0.1"))
        assert sender.post(url_of(server), HEADERS, BODY) == Reply(fault="tls")
        assert server.requests == []


def test_a_receiver_that_speaks_no_tls_is_a_tls_fault(plain: FakeUpstream, pair: tuple[ssl.SSLContext, Path]) -> None:
    plain.script = reply_of(204)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=speak_first, args=(listener,))
        thread.start()
        url = f"https://localhost:{listener.getsockname()[1]}/"
        assert courier(pair).post(url, HEADERS, BODY) == Reply(fault="tls")
        thread.join()


def speak_first(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection, contextlib.suppress(OSError):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        while connection.recv(4096):
            pass


def test_nothing_of_the_environment_is_used(
    plain: FakeUpstream, pair: tuple[ssl.SSLContext, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine localhost login shop password canary\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with FakeUpstream() as proxy:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        assert courier(pair).post(url_of(plain), HEADERS, BODY).status == 204
        assert proxy.connections == 0
    assert "authorization" not in plain.requests[0].headers


# --- what receivers do -----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 204, 400, 404, 410, 429, 500, 503])
def test_a_status_is_told_as_it_is(receiver: FakeUpstream, pair: tuple[ssl.SSLContext, Path], status: int) -> None:
    receiver.script = reply_of(status)
    assert courier(pair).post(url_of(receiver), HEADERS, BODY) == Reply(status=status)


def test_a_slow_2xx_is_waited_for(receiver: FakeUpstream, pair: tuple[ssl.SSLContext, Path]) -> None:
    receiver.script = [Pause(0.3), reply_of(200)]
    assert courier(pair).post(url_of(receiver), HEADERS, BODY) == Reply(status=200)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(receiver: FakeUpstream, pair: tuple[ssl.SSLContext, Path], status: int) -> None:
    receiver.script = reply_of(status, Location=url_of(receiver, path="/elsewhere"))
    assert courier(pair).post(url_of(receiver), HEADERS, BODY) == Reply(status=status)
    assert [request.path for request in receiver.requests] == ["/hook?x=1"]


def test_retry_after_comes_with_the_status(plain: FakeUpstream, pair: tuple[ssl.SSLContext, Path]) -> None:
    plain.script = reply_of(429, Retry_After="120")
    assert courier(pair).post(url_of(plain), HEADERS, BODY) == Reply(status=429, retry_after=120.0)


# What a receiver sends, over either way: the fault that is told. TLS may tell a reset as an end.
HEADER = b"X-More: " + b"x" * 1000 + b"\r\n"
BROKEN: list[tuple[str, Step, str]] = [
    ("reset", Rst(), "connection"),
    ("closed", Fin(), "connection"),
    ("cut in the status line", [b"HTTP/1.1 20", Fin()], "protocol"),
    ("cut in the head", [b"HTTP/1.1 200 OK\r\nContent-Len", Fin()], "protocol"),
    ("cut after a header", [b"HTTP/1.1 200 OK\r\nServer: shop\r\n", Fin()], "protocol"),
    ("reset in the head", [b"HTTP/1.1 200 OK\r\n", Pause(0.05), Rst()], "connection or protocol"),
    ("not HTTP", [b"220 smtp.shop.example ESMTP\r\n", Fin()], "protocol"),
    ("an endless head", [b"HTTP/1.1 200 OK\r\n", Repeat(HEADER, 10_000)], "protocol"),
    ("one endless line", [b"HTTP/1.1 200 OK\r\nX-More: ", Repeat(b"x" * 1000, 10_000)], "protocol"),
    ("endless 100s", [Repeat(b"HTTP/1.1 100 Continue\r\n\r\n", 100_000)], "protocol"),
]  # fmt: skip


@pytest.mark.parametrize(("step", "fault"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
def test_a_broken_reply_is_no_delivery(
    receiver: FakeUpstream, pair: tuple[ssl.SSLContext, Path], step: Step, fault: str
) -> None:
    receiver.script = step
    reply = courier(pair).post(url_of(receiver), HEADERS, BODY)
    assert reply.status is None and reply.fault in fault.split()
    assert not reply.delivered


def test_interim_replies_are_not_the_reply(receiver: FakeUpstream, pair: tuple[ssl.SSLContext, Path]) -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\n\r\n"
    receiver.script = [b"HTTP/1.1 100 Continue\r\n\r\n", hints, hints, reply_of(200, Retry_After="7")]
    assert courier(pair).post(url_of(receiver), HEADERS, BODY) == Reply(status=200, retry_after=7.0)


def test_a_sloppy_head_is_read_and_neither_it_nor_the_url_is_logged(
    plain: FakeUpstream, pair: tuple[ssl.SSLContext, Path], caplog: pytest.LogCaptureFixture
) -> None:
    plain.script = [b"HTTP/1.1 200 OK\r\nX-One: 1\r\nno header canary\r\n\r\n", Fin()]
    with caplog.at_level("INFO"):
        assert courier(pair).post(url_of(plain), HEADERS, BODY) == Reply(status=200)
    assert caplog.records == []


# What never ends: over in the courier's time, and the receiver sees the connection closed.
DRIP = Repeat([b"x", Pause(0.02)], 10_000)
ENDLESS: list[tuple[str, Step, Reply]] = [
    ("silent", Hang(), Reply(fault="timeout")),
    ("a dripping status line", [b"HTTP/1.1 200 ", DRIP], Reply(fault="timeout")),
    ("a dripping header", [b"HTTP/1.1 200 OK\r\nX-Drip: ", DRIP], Reply(fault="timeout")),
    (
        "dripping headers",
        [b"HTTP/1.1 200 OK\r\n", Repeat([b"X-Drip: x\r\n", Pause(0.02)], 10_000)],
        Reply(fault="timeout"),
    ),
    ("a dripping body", [head(200, {"Content-Length": "100000"}, chunked=False), DRIP], Reply(status=200)),
    ("a body that hangs", [head(500, {"Content-Length": "5"}, chunked=False), Hang()], Reply(status=500)),
    ("a dripping chunk size", [head(200), Repeat([b"0", Pause(0.02)], 10_000)], Reply(status=200)),
]


@pytest.mark.parametrize(("step", "told"), [row[1:] for row in ENDLESS], ids=[row[0] for row in ENDLESS])
def test_a_reply_that_does_not_end_takes_no_longer_than_the_time(
    receiver: FakeUpstream, pair: tuple[ssl.SSLContext, Path], step: Step, told: Reply
) -> None:
    receiver.script = step
    with Watch() as watch:
        assert courier(pair, SHORT).post(url_of(receiver), HEADERS, BODY) == told
    assert SHORT * 0.9 < watch.seconds < SHORT + SLACK
    receiver.requests[0].wait_left()


@pytest.mark.parametrize("chunked", [False, True])
def test_of_an_endless_body_no_more_is_read_than_the_limit(
    receiver: FakeUpstream, pair: tuple[ssl.SSLContext, Path], monkeypatch: pytest.MonkeyPatch, chunked: bool
) -> None:
    piece = b"8000\r\n" + b"x" * 0x8000 + b"\r\n" if chunked else b"x" * 0x8000
    length = {} if chunked else {"Content-Length": str(10**10)}
    receiver.script = [head(200, length, chunked=chunked), Repeat(piece, 10**6)]
    read = count_bytes(monkeypatch)
    with Watch() as watch:
        assert courier(pair).post(url_of(receiver), HEADERS, BODY) == Reply(status=200)
    assert watch.seconds < SLACK
    assert 0 < sum(read) <= REPLY_BYTES
    receiver.requests[0].wait_left()


def count_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all reads off a socket's file from now on."""
    read: list[int] = []
    readinto = pinned_connection.Bounded.readinto

    def counted(self: pinned_connection.Bounded, buffer: memoryview) -> int | None:
        count = readinto(self, buffer)
        read.append(count or 0)
        return count

    monkeypatch.setattr(pinned_connection.Bounded, "readinto", counted)
    return read


def test_a_handshake_that_hangs_takes_no_longer_than_the_time(pair: tuple[ssl.SSLContext, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:  # the kernel accepts, nobody answers
        url = f"https://localhost:{listener.getsockname()[1]}/"
        with Watch() as watch:
            assert courier(pair, SHORT).post(url, HEADERS, BODY) == Reply(fault="timeout")
    assert watch.seconds < SHORT + SLACK


def test_a_port_where_nobody_listens_is_a_fault_of_the_connection(pair: tuple[ssl.SSLContext, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert courier(pair).post(f"http://localhost:{port}/", HEADERS, BODY) == Reply(fault="connection")


def test_a_waiting_courier_that_is_told_to_stop_lets_the_connection_go(
    plain: FakeUpstream, pair: tuple[ssl.SSLContext, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain.script = Hang()

    class Killed(BaseException):
        """As a greenlet is killed: at its wait."""

    class Over(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            plain.wait_for_requests(1)
            raise Killed

    class Errand(delivery.Errand):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.over = Over()

    monkeypatch.setattr(delivery, "Errand", Errand)
    with pytest.raises(Killed):
        courier(pair).post(url_of(plain), HEADERS, BODY)
    plain.requests[0].wait_left()


# --- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [socket.gaierror(socket.EAI_NONAME, "unknown"), TimeoutError(), UnicodeError()])
def test_a_name_that_nobody_knows_is_a_dns_fault(error: Exception) -> None:
    def unknown(_host: str, _port: int) -> list[str]:
        raise error

    assert Courier(resolve=unknown).post("https://shop.example/", HEADERS, BODY) == Reply(fault="dns")
    assert Courier(resolve=answers()).post("https://shop.example/", HEADERS, BODY) == Reply(fault="dns")


def test_a_resolver_that_hangs_takes_no_longer_than_the_time_and_nothing_is_sent_when_it_wakes(
    plain: FakeUpstream,
) -> None:
    woken, left = threading.Event(), threading.Event()

    def hang(_host: str, _port: int) -> list[str]:
        woken.wait(10)
        left.set()
        return ["127.0.0.1"]

    with Watch() as watch:
        sender = Courier(loopback=True, seconds=SHORT, resolve=hang)
        assert sender.post(url_of(plain), HEADERS, BODY) == Reply(fault="timeout")
    assert watch.seconds < SHORT + SLACK
    woken.set()
    assert left.wait(5)
    join_couriers()
    assert plain.requests == []


def couriers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "streamchat-webhook"]


def join_couriers() -> None:
    for thread in couriers():
        thread.join(5)
        assert not thread.is_alive()


def test_lookups_that_hang_are_only_so_many() -> None:
    woken = threading.Event()
    begun: list[str] = []

    def hang(host: str, _port: int) -> list[str]:
        begun.append(host)
        woken.wait(10)
        return []

    sender = Courier(seconds=SHORT, resolve=hang)
    threads = [
        threading.Thread(target=sender.post, args=(f"https://shop{number}.example/", HEADERS, BODY))
        for number in range(3 * delivery.LOOKUPS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(begun) == delivery.LOOKUPS
    until = time.monotonic() + 5
    while len(couriers()) > delivery.LOOKUPS and time.monotonic() < until:
        time.sleep(0.01)
    assert len(couriers()) == delivery.LOOKUPS  # who got no turn has left
    woken.set()
    join_couriers()


def dialled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that are connected to from now on; none of them answers."""
    found: list[str] = []

    def dial(_line: pinned_connection.Line, address: str) -> socket.socket:
        found.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(pinned_connection.Line, "_dial", dial)
    return found


@pytest.mark.parametrize(
    "found",
    [["10.0.0.1"], [PUBLIC, "10.0.0.1"], ["169.254.169.254", PUBLIC], ["2606:4700::1111", "::ffff:127.0.0.1"]],
)
def test_one_private_address_among_the_resolved_ones_is_enough_to_connect_to_none(
    found: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = dialled(monkeypatch)
    assert Courier(resolve=answers(*found)).post("https://shop.example/", HEADERS, BODY) == Reply(fault="address")
    assert tried == []


def test_a_name_that_flips_between_two_answers_is_asked_for_once_and_its_checked_address_is_dialled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = dialled(monkeypatch)
    told = iter([[PUBLIC], ["127.0.0.1"], ["127.0.0.1"]])
    asked: list[str] = []

    def flip(host: str, _port: int) -> list[str]:
        asked.append(host)
        return next(told)

    # Also by the system's own resolver, should anything below ask it.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("resolved a second time"))
    assert Courier(resolve=flip).post("https://shop.example/", HEADERS, BODY) == Reply(fault="connection")
    assert (asked, tried) == (["shop.example"], [PUBLIC])


def test_the_next_address_is_tried_where_one_refuses(plain: FakeUpstream, pair: tuple[ssl.SSLContext, Path]) -> None:
    sender = Courier(loopback=True, resolve=answers("::1", "127.0.0.1"))  # nobody listens on ::1
    assert sender.post(url_of(plain), HEADERS, BODY).status == 204


def test_addresses_that_do_not_answer_are_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float | None] = []

    class Silent(socket.socket):
        def connect(self, _: object) -> None:
            waits.append(self.gettimeout())
            raise TimeoutError

    monkeypatch.setattr(socket, "socket", Silent)
    reply = Courier(resolve=answers(PUBLIC, "2606:4700::1111")).post("https://shop.example/", HEADERS, BODY)
    assert reply == Reply(fault="timeout")
    assert waits == [pinned_connection.CONNECT_SECONDS] * 2


def test_only_so_many_addresses_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = dialled(monkeypatch)
    many = [f"93.184.215.{number}" for number in range(200)]
    Courier(resolve=answers(*many)).post("https://shop.example/", HEADERS, BODY)
    assert tried == many[: delivery.ADDRESSES]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "shop.localhost"])
def test_this_machine_is_reached_only_where_that_is_allowed(plain: FakeUpstream, host: str) -> None:
    assert Courier(resolve=answers("127.0.0.1")).post(url_of(plain, host), HEADERS, BODY) == Reply(fault="target")
    assert plain.connections == 0
    allowed = Courier(loopback=True, resolve=answers("127.0.0.1"))
    assert allowed.post(url_of(plain, host), HEADERS, BODY).status == 204


def test_another_name_does_not_lead_to_this_machine_also_where_loopback_is_allowed(plain: FakeUpstream) -> None:
    sender = Courier(loopback=True, resolve=answers("127.0.0.1"))
    assert sender.post(f"https://shop.example:{plain.port}/", HEADERS, BODY) == Reply(fault="address")
    assert plain.connections == 0


def test_a_local_name_does_not_lead_to_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = dialled(monkeypatch)
    sender = Courier(loopback=True, resolve=answers(PUBLIC))
    assert sender.post("http://shop.localhost/", HEADERS, BODY) == Reply(fault="address")
    assert tried == []


def test_the_systems_resolver_gives_each_address_once() -> None:
    assert resolve_by_system("127.0.0.1", 80) == ["127.0.0.1"]
    assert set(resolve_by_system("localhost", 80)) <= {"127.0.0.1", "::1"}


def test_a_bug_is_raised_where_the_courier_was_sent() -> None:
    def bug(_host: str, _port: int) -> list[str]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Courier(resolve=bug).post("https://shop.example/", HEADERS, BODY)


# --- under gevent ----------------------------------------------------------------------------------------

GEVENT = """
from gevent import monkey
monkey.patch_all()
import faulthandler
faulthandler.dump_traceback_later(20, exit=True)  # where it hangs
import gevent, json, sys, time
from streamchat.delivery import Courier

urls, seconds, authority = json.loads(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
courier = Courier(loopback=True, seconds=seconds, ca=authority)
longest, last = 0.0, time.monotonic()

def beat():
    global longest, last
    while True:
        gevent.sleep(0.01)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()

gevent.spawn(beat)
start = time.monotonic()
jobs = [gevent.spawn(courier.post, url, {"webhook-id": "msg_1"}, b"{}") for url in urls]
gevent.joinall(jobs, raise_error=True)
took = time.monotonic() - start
gevent.sleep(0.2)
import psutil
left = len(psutil.Process().net_connections("tcp"))
told = [[job.value.status, job.value.fault] for job in jobs]
print(json.dumps({"took": took, "longest": longest, "told": told, "left": left}))
"""


def test_under_gevent_faults_end_in_the_same_time_and_hold_nobody_up(
    receiver: FakeUpstream, pair: tuple[ssl.SSLContext, Path]
) -> None:
    scripts: dict[str, Step] = {
        "/ok": reply_of(204),
        "/hang": Hang(),
        "/drip": [b"HTTP/1.1 200 OK\r\nX-Drip: ", DRIP],
        "/body": [head(200, {"Content-Length": "100000"}, chunked=False), DRIP],
        "/reset": Rst(),
    }
    receiver.choose = lambda request: scripts[request.path]
    urls = [url_of(receiver, path=path) for path in scripts for _ in range(5)]
    command = [sys.executable, "-c", GEVENT, json.dumps(urls), "2.0", str(pair[1])]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    wanted = {
        "/ok": [204, None],
        "/hang": [None, "timeout"],
        "/drip": [None, "timeout"],
        "/body": [200, None],
        "/reset": [None, "connection"],
    }
    assert found["told"] == [wanted[path] for path in scripts for _ in range(5)]
    assert found["took"] < 2.0 + SLACK
    assert found["longest"] < 1.0
    assert found["left"] == 0
