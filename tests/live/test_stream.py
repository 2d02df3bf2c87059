"""Pieces reach the caller while the answer is being made, in each format, through gunicorn and nginx."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import requests

from tests.fake_upstream import FakeUpstream, Gate, Hang, Step, done, finish, head, last_chunk, stamped, text, tls_pair
from tests.live.servers import Server, gunicorn, nginx, wait_for

pytestmark = pytest.mark.live

STREAMED = {
    "text/plain": "text/plain; charset=utf-8",
    "text/event-stream": "text/event-stream; charset=utf-8",
    "application/x-ndjson": "application/x-ndjson; charset=utf-8",
}
ENDS = {"text/plain": b"second", "text/event-stream": b"event: finish", "application/x-ndjson": b'"type":"finish"'}
HEARTBEATS = {"text/event-stream": b": keep-alive\n", "application/x-ndjson": b'{"type":"heartbeat"}\n'}
SILENCE = 0.1  # seconds until a heartbeat
MOST_STREAMS = 3

Hops = dict[str, Server]
HOPS = pytest.mark.parametrize("hop", ["direct", "nginx"])
FORMATS = pytest.mark.parametrize("accept", list(STREAMED))


@pytest.fixture(scope="module", params=["auto", "sdk"])
def http(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def upstream(http: str) -> Iterator[FakeUpstream]:
    with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def hops(http: str, upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hops]:
    folder = tmp_path_factory.mktemp("stream")
    silence, most = str(SILENCE), str(MOST_STREAMS)
    with (
        gunicorn(
            upstream.base_url, folder, heartbeat=silence, status_hold=silence, max_streams=most, http=http
        ) as server,
        nginx(server, folder) as hop,
    ):
        yield {"direct": server, "nginx": hop}


@pytest.fixture(autouse=True)
def _nobody_is_left(upstream: FakeUpstream, hops: Hops) -> Iterator[None]:
    """What one test leaves behind would take slots from the next."""
    yield
    wait_for(lambda: len(hops["direct"].records()) == len(upstream.requests), what="a record for each answer")


def ask(server: Server, accept: str, message: str = "hi") -> requests.Response:
    return requests.post(
        f"{server.url}/api/get-response", json={"message": message}, headers={"Accept": accept}, stream=True, timeout=10
    )


def two_pieces(gate: Gate) -> list[Step]:
    return [head(), text("first "), gate, text("second"), finish(), done(), last_chunk()]


def read_until(pieces: Iterator[bytes], wanted: bytes) -> bytes:
    received = b""
    for piece in pieces:
        received += piece
        if wanted in received:
            return received
    raise AssertionError(f"the answer ended without {wanted!r}: {received!r}")


# --- pieces -----------------------------------------------------------------------------------------------


@HOPS
@FORMATS
def test_requests_gets_the_first_piece_before_the_second_is_made(
    hop: str, accept: str, hops: Hops, upstream: FakeUpstream
) -> None:
    gate = Gate()
    upstream.script = two_pieces(gate)
    with ask(hops[hop], accept) as response:
        pieces = response.iter_content(chunk_size=None)
        assert b"second" not in read_until(pieces, b"first")
        gate.open()
        assert ENDS[accept] in b"".join(pieces)


@HOPS
@FORMATS
def test_curl_gets_the_first_piece_before_the_second_is_made(
    hop: str, accept: str, hops: Hops, upstream: FakeUpstream
) -> None:
    gate = Gate()
    upstream.script = two_pieces(gate)
    url, body = f"{hops[hop].url}/api/get-response", json.dumps({"message": "hi"})
    command = ["curl", "-sS", "-N", "--max-time", "10", "--json", body, "-H", f"Accept: {accept}", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as curl:
        assert curl.stdout is not None
        pieces = iter(lambda: os.read(curl.stdout.fileno(), 65536), b"")  # type: ignore[union-attr]
        assert b"second" not in read_until(pieces, b"first")
        gate.open()
        assert ENDS[accept] in b"".join(pieces)
    assert curl.returncode == 0


@HOPS
@FORMATS
def test_the_headers_of_a_stream_hold_nothing_back_on_their_way(
    hop: str, accept: str, hops: Hops, upstream: FakeUpstream
) -> None:
    gate = Gate()
    upstream.script = two_pieces(gate)
    with ask(hops[hop], accept) as response:
        gate.open()
        headers = response.headers
        assert response.status_code == 200
        assert headers["Content-Type"] == STREAMED[accept]
        assert headers["X-Accel-Buffering"] == "no"
        assert headers["Cache-Control"] == "no-cache, no-transform"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Transfer-Encoding"] == "chunked"
        assert headers["X-Response-Id"].startswith("resp_")
        assert not {"Content-Length", "Content-Encoding", "X-Stream-Resumable"} & set(headers)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_no_piece_of_a_fast_answer_falls_behind(tls: bool, http: str, tmp_path: Path) -> None:
    """Over TLS each piece is a record of its own, and a recv brings one record; the SDK's HTTP gives chunk by chunk."""
    context, authority = tls_pair(tmp_path) if tls else (None, None)
    trust = {"SSL_CERT_FILE": str(authority)} if authority else {}
    with FakeUpstream(context) as upstream, gunicorn(upstream.base_url, tmp_path, extra=trust, http=http) as server:
        upstream.script = stamped(100, 0.005)
        late, rest = [], ""
        with ask(server, "text/plain") as response:
            for piece in response.iter_content(chunk_size=None):
                now = time.monotonic()
                *stamps, rest = (rest + piece.decode()).split(" ")
                late += [now - float(stamp) for stamp in stamps]
        assert len(late) == 100
        assert sorted(late)[-5] < 0.1  # four times the coalescing time


# --- heartbeats -------------------------------------------------------------------------------------------


@HOPS
@pytest.mark.parametrize("accept", list(HEARTBEATS))
def test_heartbeats_come_while_the_upstream_has_not_even_sent_its_headers(
    hop: str, accept: str, hops: Hops, upstream: FakeUpstream
) -> None:
    upstream.script = Hang()
    with ask(hops[hop], accept) as response:
        assert response.status_code == 200
        received = read_until(response.iter_content(chunk_size=None), HEARTBEATS[accept] * 2)
    assert received.index(b"start") < received.index(HEARTBEATS[accept])


@HOPS
@pytest.mark.parametrize("accept", list(HEARTBEATS))
def test_heartbeats_come_between_two_pieces(hop: str, accept: str, hops: Hops, upstream: FakeUpstream) -> None:
    gate = Gate()
    upstream.script = two_pieces(gate)
    with ask(hops[hop], accept) as response:
        pieces = response.iter_content(chunk_size=None)
        received = read_until(pieces, HEARTBEATS[accept] * 2)
        assert b"first" in received
        gate.open()
        received += b"".join(pieces)
    assert ENDS[accept] in received


@HOPS
def test_plain_text_holds_the_text_alone_however_long_the_silence(hop: str, hops: Hops, upstream: FakeUpstream) -> None:
    gate = Gate()
    upstream.script = two_pieces(gate)
    with ask(hops[hop], "text/plain") as response:
        pieces = response.iter_content(chunk_size=None)
        received = read_until(pieces, b"first ")
        time.sleep(SILENCE * 3)  # a heartbeat that must not come announces itself by nothing
        gate.open()
        assert received + b"".join(pieces) == b"first second"


# --- a full worker ----------------------------------------------------------------------------------------


@HOPS
def test_a_full_worker_says_so_at_once_and_its_health_check_still_answers(
    hop: str, hops: Hops, upstream: FakeUpstream
) -> None:
    upstream.script = [head(), text("first "), Hang()]
    asked = len(upstream.requests)
    with ExitStack() as stack:
        for _ in range(MOST_STREAMS):
            stack.enter_context(ask(hops["direct"], "text/event-stream"))
        started = time.monotonic()
        refused = ask(hops[hop], "text/plain")
        assert time.monotonic() - started < 1
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert int(refused.headers["Retry-After"]) > 0
        assert refused.headers["Content-Type"] == "application/problem+json"
        health = requests.get(f"{hops[hop].url}/api/healthz", timeout=5)
        assert (health.status_code, health.json()) == (200, {"status": "ok"})
    assert len(upstream.requests) == asked + MOST_STREAMS


# --- the shop's database ----------------------------------------------------------------------------------


def test_waiting_callers_hold_no_connection_of_the_shops_database_pool(tmp_path: Path) -> None:
    gate = Gate()
    with FakeUpstream() as upstream, ExitStack() as stack:
        upstream.script = [head(), gate, text("hello"), finish(), done(), last_chunk()]
        server = stack.enter_context(
            gunicorn(
                upstream.base_url,
                tmp_path,
                app="tests.live.shop_app:create_app()",
                extra={"SHOP_DATABASE": str(tmp_path / "shop.sqlite")},
            )
        )
        pool = stack.enter_context(ThreadPoolExecutor(50))
        stack.callback(gate.open)  # also where an assertion fails: the pool waits for its callers

        def caller(_: int) -> str:
            headers = {"X-User": "1", "Accept": "text/plain"}
            url = f"{server.url}/api/get-response"
            return requests.post(url, json={"message": "hi"}, headers=headers, timeout=30).text

        answers = pool.map(caller, range(50))
        upstream.wait_for_requests(50, 20)
        view = requests.get(f"{server.url}/users", timeout=5)
        assert (view.status_code, view.json()) == (200, {"users": 1})
        gate.open()
        assert list(answers) == ["hello"] * 50
        wait_for(lambda: len(server.records()) == 50, what="50 records")
        assert {record["user"] for record in server.records()} == {"ada"}
