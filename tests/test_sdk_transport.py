"""httpx2's own HTTP behind our interface: for proxies, for a shop's own client, where settings ask for it."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from streamchat.cancellation import Cancellation
from streamchat.errors import CallerGone, StreamChatError, UpstreamError, UpstreamIncomplete, UpstreamRejected
from streamchat.events import Finish, Text, Usage
from streamchat.sdk_transport import proxy_of
from tests.asking import Asking, Background, asking, helpers, read_all, wait_until
from tests.fake_upstream import (
    FakeUpstream,
    Gate,
    Hang,
    Pause,
    Repeat,
    Step,
    answer,
    error,
    head,
    http_chunk,
    text,
    text_chunks,
    tls_pair,
)

HELLO = [Text("Hello"), Text(", "), Text("world"), Text("!"), Finish("stop", Usage(19, 10))]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    return tls_pair(tmp_path_factory.mktemp("tls"))


class Proxy:
    """A forward proxy: CONNECT makes a tunnel, an absolute URL is relayed. Counts what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Proxy:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()

    def _start(self, task: Callable[[], None]) -> None:
        thread = threading.Thread(target=task, name="proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._start(lambda client=client: self._serve(client))  # type: ignore[misc]

    def _serve(self, client: socket.socket) -> None:
        with client:
            asked = b""
            while b"\r\n\r\n" not in asked:
                asked += client.recv(65536)
            method, target, _ = asked.split(b"\r\n")[0].decode().split(" ")
            self.asked.append(f"{method} {target}")
            address = target if method == "CONNECT" else target.split("/")[2]
            host, _, port = address.rpartition(":")
            with socket.create_connection((host, int(port))) as server:
                if method == "CONNECT":
                    client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                else:
                    server.sendall(asked)
                back = threading.Thread(target=relay, args=(server, client), daemon=True)
                back.start()
                relay(client, server)
                back.join(5)


def relay(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for each in (source, sink):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


@pytest.fixture(params=["plain", "tls"])
def server(request: pytest.FixtureRequest, tls: tuple[ssl.SSLContext, Path]) -> Iterator[FakeUpstream]:
    with FakeUpstream(tls[0] if request.param == "tls" else None) as upstream:
        yield upstream


@pytest.fixture(params=["setting", "shop"])
def asked(request: pytest.FixtureRequest, server: FakeUpstream, tls: tuple[ssl.SSLContext, Path]) -> Iterator[Asking]:
    """An Upstream over STREAMCHAT_HTTP=sdk, or over a plain client of the shop's."""
    clients: list[openai.OpenAI] = []

    def client() -> openai.OpenAI:
        if not clients:
            clients.append(openai.OpenAI(base_url=server.base_url, api_key="sk-shop"))
        return clients[0]

    factory = client if request.param == "shop" else None
    with contextlib.ExitStack() as stack:
        context = asking(
            server.base_url, client_factory=factory, authority=tls[1], http="sdk", max_retries=0, first_token_timeout=5
        )
        found = stack.enter_context(context)
        yield found
        for each in clients:
            each.close()


def test_an_answer_arrives_whole(asked: Asking) -> None:
    assert asked.ask() == HELLO
    assert asked.ask() == HELLO


def test_a_read_times_out_and_the_answer_goes_on(asked: Asking, server: FakeUpstream) -> None:
    gate = Gate()
    whole = answer(["a", "b"])
    server.script = [whole[:3], gate, whole[3:]]
    reply = asked.open()
    events = reply.read(time.monotonic() + 5)
    while events == []:
        events = reply.read(time.monotonic() + 5)
    assert events == [Text("a")]
    started = time.monotonic()
    assert reply.read(started + 0.05) is None
    assert 0.05 <= time.monotonic() - started < 0.4
    gate.open()
    assert read_all(reply) == [Text("b"), Finish("stop", Usage(19, 10))]
    reply.close()


def test_a_hang_up_between_pieces_closes_the_upstream_at_once(asked: Asking, server: FakeUpstream) -> None:
    server.script = [head(), text("a"), Hang()]
    cancellation = Cancellation()
    reply = asked.open(cancellation)
    reading = Background(lambda: read_all(reply))
    server.requests[0].wait_sent(len(head()) + len(text("a")))
    time.sleep(0.02)
    cancelled = time.monotonic()
    cancellation.cancel(CallerGone())
    assert server.requests[0].wait_left() - cancelled < 0.05
    reading.join()
    assert isinstance(reading.error, CallerGone)
    assert reading.ended - cancelled < 0.1
    reply.close()
    assert len(server.requests) == 1


def test_closing_a_reply_that_nobody_reads_ends_its_helper_at_once(asked: Asking, server: FakeUpstream) -> None:
    server.script = [head(), Repeat(text("x" * 2000), 100_000)]
    reply = asked.open()
    assert reply.read(time.monotonic() + 5) is not None
    time.sleep(0.05)  # the helper waits for a free place by now
    started = time.monotonic()
    reply.close()
    server.requests[0].wait_left()
    wait_until(lambda: not helpers())
    assert time.monotonic() - started < 0.2


def test_an_upstream_that_is_read_slowly_is_not_read_ahead_without_bounds(asked: Asking, server: FakeUpstream) -> None:
    server.script = [head(), Repeat(text("x" * 60_000), 1000)]
    reply = asked.open()
    time.sleep(0.2)
    assert server.requests[0].sent < 20_000_000
    reply.close()


def test_a_silence_longer_than_the_first_token_limit_is_the_readers_to_judge(
    server: FakeUpstream, tls: tuple[ssl.SSLContext, Path]
) -> None:
    whole = answer(["a", "b"])
    server.script = [whole[:3], Pause(0.5), whole[3:]]
    with asking(server.base_url, authority=tls[1], http="sdk", first_token_timeout=0.25) as asked:
        assert asked.ask() == [Text("a"), Text("b"), Finish("stop", Usage(19, 10))]


def test_a_redirect_is_not_followed(asked: Asking, server: FakeUpstream) -> None:
    server.script = error(307, headers={"Location": f"{server.base_url}/elsewhere"})
    with pytest.raises(UpstreamRejected):
        asked.open()
    assert len(server.requests) == 1


def test_the_next_answer_is_out_of_reach_of_the_last_ones_hang_up(asked: Asking, server: FakeUpstream) -> None:
    """A shop's client keeps connections: what one answer gave back is another's."""
    for _ in range(20):
        cancellation = Cancellation()
        reply = asked.open(cancellation)
        read_all(reply)
        while reply._body.read(time.monotonic() + 5):
            pass
        following = asked.open()
        cancellation.cancel(CallerGone())
        reply.close()
        assert read_all(following) == HELLO
        following.close()


def test_an_error_that_drips_is_read_for_a_bounded_time(
    server: FakeUpstream, tls: tuple[ssl.SSLContext, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamchat.transport.ERROR_SECONDS", 0.3)
    floods: list[Step] = [[b"{", Repeat([Pause(0.05), b" "], 1000)], Repeat(b"x" * 60_000, 1000)]
    for flood in floods:
        server.script = [head(500, {"Content-Length": "900000000"}, chunked=False), flood]
        with asking(server.base_url, authority=tls[1], http="sdk", max_retries=0) as asked:
            started = time.monotonic()
            with pytest.raises(UpstreamError):
                asked.open()
            assert time.monotonic() - started < 1
        server.wait_for(lambda: server.open_connections == 0)


def test_garbage_and_cuts_are_told_apart_as_over_the_fast_path(
    server: FakeUpstream, tls: tuple[ssl.SSLContext, Path]
) -> None:
    for script, code in (
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "upstream_malformed"),
        ([head(), http_chunk(b"data: {"), b"zz\r\n"], "upstream_malformed"),
    ):
        server.script = script
        for http in ("fast", "sdk"):
            with asking(server.base_url, authority=tls[1], http=http, max_retries=0) as asked:
                with pytest.raises(StreamChatError) as caught:
                    asked.ask()
                assert caught.value.code == code, http


@pytest.mark.parametrize("scheme", ["http://", ""])
def test_a_proxy_in_the_environment_is_used_and_a_hang_up_reaches_through_it(
    server: FakeUpstream, tls: tuple[ssl.SSLContext, Path], scheme: str
) -> None:
    with Proxy() as proxy:
        variable = "https_proxy" if server.tls else "http_proxy"
        environ = {variable: f"{scheme}127.0.0.1:{proxy.port}"}
        with asking(server.base_url, environ=environ, authority=tls[1]) as asked:
            assert asked.ask() == HELLO
            server.script = [head(), text("a"), Hang()]
            cancellation = Cancellation()
            reply = asked.open(cancellation)
            server.requests[1].wait_sent(len(head()) + len(text("a")))
            cancelled = time.monotonic()
            cancellation.cancel(CallerGone())
            assert server.requests[1].wait_left() - cancelled < 0.1  # two hops
            with pytest.raises(CallerGone):
                read_all(reply)
            reply.close()
            server.script = Hang()
            cancellation = Cancellation()
            opening = Background(lambda: asked.open(cancellation))
            server.wait_for_requests(3)
            cancelled = time.monotonic()
            cancellation.cancel(CallerGone())
            assert server.requests[2].wait_left() - cancelled < 0.1
            opening.join()
            assert isinstance(opening.error, CallerGone)
        assert len(proxy.asked) == 3
        assert proxy.asked[0].startswith("CONNECT 127.0.0.1" if server.tls else "POST http://127.0.0.1")


def test_a_proxy_that_refuses_or_is_not_there_is_an_unreachable_upstream() -> None:
    with socket.create_server(("127.0.0.1", 0)) as dead:
        port = dead.getsockname()[1]
    with asking("http://model.invalid/v1", environ={"http_proxy": f"127.0.0.1:{port}"}, max_retries=0) as asked:
        with pytest.raises(StreamChatError) as caught:
            asked.open()
        assert caught.value.code == "upstream_unreachable"


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        ({"http_proxy": "http://p:1"}, "http://p:1"),
        ({"http_proxy": "p:1"}, "http://p:1"),
        ({"all_proxy": "http://p:1"}, "http://p:1"),
        ({"https_proxy": "http://p:1"}, None),
        ({"http_proxy": "http://p:1", "no_proxy": "model.example"}, None),
        ({"http_proxy": "http://p:1", "no_proxy": "other.example"}, "http://p:1"),
    ],
)
def test_the_proxy_is_the_one_that_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], found: str | None
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert proxy_of("http://model.example/v1") == found


def test_a_clients_own_transport_without_a_socket_answers_too() -> None:
    """Shops put such transports into their tests."""
    body = b"".join(step for step in answer(["a"], framing="length")[1:] if isinstance(step, bytes))
    transport = httpx2.MockTransport(
        lambda request: httpx2.Response(200, headers={"Content-Type": "text/event-stream"}, content=body)
    )
    client = openai.OpenAI(base_url="http://x/v1", api_key="k", http_client=httpx2.Client(transport=transport))
    with asking("http://x/v1", client_factory=lambda: client, max_retries=0) as asked:
        assert asked.ask() == [Text("a"), Finish("stop", Usage(19, 10))]
    client.close()


def test_a_cut_answer_is_incomplete(asked: Asking, server: FakeUpstream) -> None:
    server.script = [head(), text_chunks(["a", "b"]), b"0\r\n\r\n"]
    with pytest.raises(UpstreamIncomplete):
        asked.ask()
