"""nginx with conf/nginx.conf, and behind it a server that tells what reached it: headers, connections, refusals."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ops import nginx_conf
from tests.live.servers import Server, free_port, running

pytestmark = pytest.mark.live
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or "nginx"


@dataclass
class Reached:
    """One request as it arrived behind nginx."""

    version: str
    path: str
    headers: dict[str, str]
    connection: int


@dataclass
class Behind:
    """The server behind nginx. Answers everything with 200, but dies in the middle of /dies before it has answered."""

    port: int
    requests: list[Reached] = field(default_factory=list)
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    leave: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    behind: Behind

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        reached = Reached(self.request_version, self.path, dict(self.headers), self.client_address[1])
        self.behind.requests.append(reached)
        if self.path == "/waits":
            self.behind.entered.release()
            self.behind.leave.wait(30)
        if self.path == "/dies":
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("X-Accel-Buffering", "no")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        """To nobody."""


class HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    # The default of 5 has a hundred callers wait for the kernel.
    request_queue_size = 200


@contextmanager
def behind_nginx(
    folder: Path, limits: bool = False, change: Callable[[str], str] = str
) -> Iterator[tuple[Behind, Server]]:
    class Own(Handler):
        pass

    with HttpServer(("127.0.0.1", 0), Own) as server:
        Own.behind = behind = Behind(server.server_address[1])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            port = free_port()
            addresses = {"listen": f"127.0.0.1:{port}", "upstream": f"127.0.0.1:{behind.port}"}
            copy = nginx_conf.write_copy(folder, **addresses, limits=limits)
            copy.write_text(change(copy.read_text()))
            with running(nginx_conf.command(NGINX, copy), port, folder, os.environ, "nginx") as front:
                yield behind, front
        finally:
            behind.leave.set()
            server.shutdown()


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Behind, Server]]:
    with behind_nginx(tmp_path_factory.mktemp("nginx")) as servers:
        yield servers


@dataclass
class Answer:
    status: int
    headers: HTTPMessage
    body: bytes

    @property
    def problem(self) -> dict[str, object]:
        assert self.headers["Content-Type"] == "application/problem+json"
        found = json.loads(self.body)
        assert isinstance(found, dict)
        assert found["request_id"] == self.headers["X-Response-Id"]
        assert found["status"] == self.status
        return found


def ask(
    front: Server,
    path: str = "/",
    body: bytes = b"{}",
    headers: Mapping[str, str] | None = None,
    address: str = "127.0.0.1",
    method: str = "POST",
) -> Answer:
    """`address` is the caller's: on Linux all of 127.0.0.0/8 is this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", front.port, timeout=10, source_address=(address, 0))
    with closing(connection):
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())


def ask_in_turn(front: Server, method: str, *paths: str) -> list[int]:
    """The statuses, all over one connection and so from one of nginx's workers, which keep theirs for themselves."""
    with closing(http.client.HTTPConnection("127.0.0.1", front.port, timeout=10)) as connection:
        return [status_in_turn(connection, method, path) for path in paths]


def status_in_turn(connection: http.client.HTTPConnection, method: str, path: str) -> int:
    connection.request(method, path, b"{}")
    response = connection.getresponse()
    response.read()
    return response.status


def test_no_forwarding_header_of_a_caller_gets_through(chain: tuple[Behind, Server]) -> None:
    behind, front = chain
    names = ["For", "Host", "Proto", "Port", "Prefix", "Protocol", "Ssl"]
    forged = {f"X-Forwarded-{name}": "forged" for name in names}
    forged |= {"Forwarded": "for=forged", "X-Real-IP": "forged", "X_Forwarded_For": "forged", "Connection": "forged"}
    ask(front, headers=forged | {"Host": "shop.example:8443"}, address="127.0.0.9")
    seen = behind.requests[-1].headers
    assert {name: value for name, value in seen.items() if "orward" in name} == {
        "X-Forwarded-For": "127.0.0.9",
        "X-Forwarded-Host": "shop.example:8443",
        "X-Forwarded-Proto": "http",
    }
    assert seen["Host"] == "shop.example:8443"
    assert "forged" not in " ".join(seen.values())


def test_connections_to_gunicorn_speak_http_1_1_and_are_kept(tmp_path: Path) -> None:
    with behind_nginx(tmp_path) as (behind, front):
        ask_in_turn(front, "POST", "/", "/")
    first, second = behind.requests
    assert first.version == second.version == "HTTP/1.1"
    assert "Connection" not in first.headers
    assert first.connection == second.connection


@pytest.mark.parametrize("method", ["POST", "GET"])
def test_a_request_whose_server_died_is_not_sent_again(chain: tuple[Behind, Server], method: str) -> None:
    behind, front = chain
    before = len(behind.requests)
    # The first one leaves a connection behind, on which nginx takes the death of the second for that of the connection.
    assert ask_in_turn(front, method, "/", "/dies") == [200, 502]
    assert [request.path for request in behind.requests[before:]] == ["/", "/dies"]


def test_a_second_proxy_is_told_not_to_buffer(chain: tuple[Behind, Server]) -> None:
    assert ask(chain[1]).headers["X-Accel-Buffering"] == "no"


def test_the_version_is_told_to_nobody(chain: tuple[Behind, Server]) -> None:
    answer = ask(chain[1], "/dies")
    assert answer.headers["Server"] == "nginx"
    assert b"nginx/" not in answer.body


def test_a_question_of_128_kib_touches_no_disk_and_a_longer_one_arrives(chain: tuple[Behind, Server]) -> None:
    behind, front = chain
    log = front.log_file.parent / "error.log"
    for size, on_disk in ((128 * 1024, False), (1_100_000, True)):
        assert ask(front, body=b"x" * size).status == 200
        assert behind.requests[-1].headers["Content-Length"] == str(size)
        assert ("temporary file" in log.read_text()) == on_disk


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_far_over_the_limit_is_refused_in_the_apps_words(chain: tuple[Behind, Server], chunked: bool) -> None:
    behind, front = chain
    before = len(behind.requests)
    with socket.create_connection(("127.0.0.1", front.port), timeout=10) as caller:
        framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 1200000"
        caller.sendall(b"POST / HTTP/1.1\r\nHost: x\r\n" + framing + b"\r\n\r\n")
        if chunked:
            caller.sendall(b"124f80\r\nx")
        response = http.client.HTTPResponse(caller, method="POST")
        response.begin()
        answer = Answer(response.status, response.headers, response.read())
    assert answer.status == 413
    assert answer.problem["code"] == "payload_too_large"
    assert len(behind.requests) == before


@pytest.mark.parametrize(
    "path",
    [
        "/metrics",
        "/api/metrics",
        "/api/diagnostics",
        "/api/diagnostics/cut",
        "//metrics",
        "/x/../metrics",
        "/%6detrics",
    ],
)
def test_numbers_and_probes_are_for_this_machine_alone(chain: tuple[Behind, Server], path: str) -> None:
    behind, front = chain
    before = len(behind.requests)
    assert ask(front, path, method="GET", address="127.0.0.2").status == 403
    assert len(behind.requests) == before
    assert ask(front, path, method="GET").status == 200


def test_other_paths_are_for_everybody(chain: tuple[Behind, Server]) -> None:
    for path in ("/api/get-response", "/metricsx", "/api/diagnostics-of-mine", "/mymetrics"):
        assert ask(chain[1], path, address="127.0.0.2").status == 200


def test_an_address_that_asks_too_often_is_told_so_and_others_are_served(tmp_path: Path) -> None:
    with behind_nginx(tmp_path, limits=True) as (behind, front):
        answers = [ask(front, address="127.0.0.2") for _ in range(200)]
        refused = [answer for answer in answers if answer.status != 200]
        # 120 at once, and 20 more for every second that the test took.
        assert 20 <= len(refused) <= 80
        assert len(behind.requests) == 200 - len(refused)
        for answer in refused:
            assert answer.status == 429
            assert answer.problem["code"] == "too_many_streams"
            assert answer.headers["Retry-After"] == "1"
        assert ask(front, address="127.0.0.3").status == 200


def test_an_address_that_holds_a_hundred_streams_gets_no_other(tmp_path: Path) -> None:
    def without_the_rate(text: str) -> str:
        return text.replace("limit_req zone=requests burst=120 nodelay;", "")

    with behind_nginx(tmp_path, limits=True, change=without_the_rate) as (behind, front), ExitStack() as stack:
        for _ in range(100):
            caller = socket.create_connection(("127.0.0.1", front.port), 10, source_address=("127.0.0.2", 0))
            stack.enter_context(closing(caller))
            caller.sendall(b"GET /waits HTTP/1.1\r\nHost: x\r\n\r\n")
        for _ in range(100):
            assert behind.entered.acquire(timeout=10)
        refused = ask(front, address="127.0.0.2")
        assert (refused.status, refused.problem["code"]) == (429, "too_many_streams")
        assert ask(front, address="127.0.0.3").status == 200
