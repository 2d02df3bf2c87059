"""Kept answers behind nginx with conf/nginx.conf: read again piece by piece, followed while they run, stopped, once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing

import pytest
import requests

from tests.fake_upstream import FakeUpstream, Gate, Hang, Step, done, finish, head, last_chunk, text
from tests.live.servers import Server, gunicorn, nginx

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def front(upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """nginx, and behind it two workers with one log: who reads may meet another worker than who asked."""
    folder = tmp_path_factory.mktemp("kept")
    url = f"sqlite:///{folder}/log.db"
    with (
        gunicorn(upstream.base_url, folder, "-w", "2", store_url=url, on_disconnect="finish") as server,
        nginx(server, folder) as hop,
    ):
        yield hop


def pieces(gate: Gate) -> list[Step]:
    return [head(), text("first "), gate, text("second"), finish(), done(), last_chunk()]


def asked(front: Server) -> str:
    """Asks, reads the first piece and leaves; the answer's id."""
    headers = {"Accept": "application/x-ndjson"}
    url = f"{front.url}/api/get-response"
    with requests.post(url, json={"message": "hi"}, headers=headers, stream=True, timeout=10) as answer:
        assert answer.headers["X-Stream-Resumable"] == "?1"
        first = read_until(answer.iter_content(None), b"first ")
        assert json.loads(first.splitlines()[0])["id"] == answer.headers["X-Response-Id"]
        return str(answer.headers["X-Response-Id"])


def read_until(body: Iterator[bytes], wanted: bytes) -> bytes:
    received = b""
    while wanted not in received:
        received += next(body)
    return received


@pytest.mark.parametrize("accept", ["text/plain", "text/event-stream", "application/x-ndjson"])
def test_a_running_answer_is_followed_piece_by_piece(accept: str, front: Server, upstream: FakeUpstream) -> None:
    with closing(gate := Opened()):
        upstream.script = pieces(gate)
        url = f"{front.url}/api/responses/{asked(front)}/stream"
        with requests.get(url, headers={"Accept": accept}, stream=True, timeout=10) as answer:
            body = answer.iter_content(None)
            # The gate is closed: what has come was not held back until the end.
            received = read_until(body, b"first ")
            gate.open()
            received += b"".join(body)
    assert b"second" in received
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert "Content-Length" not in answer.headers


def test_an_answer_is_stopped_by_whoever_knows_its_id(front: Server, upstream: FakeUpstream) -> None:
    upstream.script = [head(), text("first "), Hang()]
    before = len(upstream.requests)
    url = f"{front.url}/api/responses/{asked(front)}"
    stopped = requests.post(f"{url}/cancel", timeout=10)
    assert (stopped.status_code, stopped.json()["status"]) == (200, "cancelled")
    upstream.requests[before].wait_left(5)
    assert requests.get(url, timeout=10).json()["error"]["code"] == "cancelled"
    assert len(upstream.requests) == before + 1


class Opened(Gate):
    """Opened in the end, whatever the test did."""

    def close(self) -> None:
        self.open()
