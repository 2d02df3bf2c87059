"""What a piece costs, in things that can be counted: the same on every machine."""

from __future__ import annotations

import http.client
from collections import Counter
from pathlib import Path

import pytest
import requests

from tests.fake_upstream import FakeUpstream, Gate, Pause, Step, chunk, done, finish, head, last_chunk, text
from tests.live.servers import Server, gunicorn

PIECES = 100


def counts(server: Server) -> Counter[str]:
    return Counter(requests.get(f"{server.url}/counts", timeout=10).json())


def test_a_piece_costs_one_recv_and_one_send_and_nothing_is_started_for_it(tmp_path: Path) -> None:
    gates = [Gate() for _ in range(PIECES)]
    with FakeUpstream() as upstream:
        upstream.script = [
            head(),
            text("first"),
            *(step for gate in gates for step in (gate, text("piece"))),
            finish(),
            done(),
            last_chunk(),
        ]
        with gunicorn(upstream.base_url, tmp_path, app="tests.live.counting_app:app", coalesce_ms="0") as server:
            spent = one_answer(server, gates)
    # The requests for the counts cost a few calls themselves.
    assert PIECES <= spent["send"] <= PIECES + 10
    assert PIECES <= spent["recv"] <= PIECES + 10
    assert spent["greenlets"] <= 2
    assert spent["threads"] == 0
    assert spent["timers"] <= 10


def one_answer(server: Server, gates: list[Gate]) -> Counter[str]:
    """What the pieces after the first cost, each of them read before the next one is made."""
    caller = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    caller.request("POST", "/api/get-response", b'{"message": "hi"}', {"Content-Type": "application/json"})
    answer = caller.getresponse()
    assert answer.read(5) == b"first"
    before = counts(server)
    for gate in gates:
        gate.open()
        assert answer.read(5) == b"piece"
    spent = counts(server)
    spent.subtract(before)
    answer.read()
    caller.close()
    return spent


@pytest.mark.parametrize("coalesce_ms", ["0", "40"])
def test_pieces_that_come_in_one_read_leave_in_one_write(tmp_path: Path, coalesce_ms: str) -> None:
    gate = Gate()
    together = b"".join(chunk({"content": "piece"}) for _ in range(20))  # fits into one read
    with FakeUpstream() as upstream:
        upstream.script = [head(), text("first"), gate, together, finish(), done(), last_chunk()]
        with gunicorn(
            upstream.base_url, tmp_path, app="tests.live.counting_app:app", coalesce_ms=coalesce_ms
        ) as server:
            caller = requests.post(f"{server.url}/api/get-response", json={"message": "hi"}, stream=True, timeout=10)
            pieces = caller.iter_content(chunk_size=None)
            assert next(pieces) == b"first"
            gate.open()
            assert next(pieces) == b"piece" * 20


def paced(pieces: int) -> list[Step]:
    return [step for _ in range(pieces) for step in (Pause(0.005), text("piece"))]


def test_joined_pieces_cost_no_timer_each(tmp_path: Path) -> None:
    with FakeUpstream() as upstream:
        upstream.script = [head(), *(text("piece") for _ in range(3)), *paced(PIECES), finish(), done(), last_chunk()]
        with gunicorn(upstream.base_url, tmp_path, app="tests.live.counting_app:app") as server:
            before = counts(server)
            whole = requests.post(f"{server.url}/api/get-response", json={"message": "hi"}, timeout=10)
            spent = counts(server)
            spent.subtract(before)
    assert whole.text == "piece" * (PIECES + 3)
    assert spent["send"] < PIECES  # they were joined
    assert spent["timers"] < PIECES / 5
