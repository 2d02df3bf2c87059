"""Connections to the upstream are kept between answers, and one that died meanwhile costs nobody a second question."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
import requests

from tests.fake_upstream import FakeUpstream, answer, tls_pair
from tests.live.servers import Server, gunicorn, wait_for

pytestmark = pytest.mark.live


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "TLS"])
def chain(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[FakeUpstream, Server]]:
    """An upstream, plain or with TLS, and a gunicorn that asks it."""
    folder = tmp_path_factory.mktemp("kept")
    context, authority = tls_pair(folder) if request.param else (None, None)
    extra = {"SSL_CERT_FILE": str(authority)} if authority else {}
    with FakeUpstream(context) as upstream, gunicorn(upstream.base_url, folder, extra=extra) as server:
        yield upstream, server


def keeps_connection(server: Server, upstream: FakeUpstream) -> bool:
    """Whether the worker has a connection to the upstream that both ends hold open."""
    (worker,) = server.workers()
    connections = psutil.Process(worker).net_connections("tcp")
    ends = [connection.raddr.port for connection in connections if connection.status == psutil.CONN_ESTABLISHED]
    return upstream.port in ends


def ask(server: Server, message: str) -> str:
    response = requests.post(f"{server.url}/api/get-response", json={"message": message}, timeout=10)
    assert response.status_code == 200, response.text
    return response.text


def test_a_hundred_answers_share_two_connections(chain: tuple[FakeUpstream, Server]) -> None:
    upstream, server = chain
    before = upstream.connections
    for number in range(100):
        assert ask(server, f"number {number}") == "Hello, world!"
    assert upstream.connections - before <= 2


@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
def test_a_kept_connection_that_died_idle_costs_no_second_post(chain: tuple[FakeUpstream, Server], reset: bool) -> None:
    upstream, server = chain
    for number in range(20):
        ask(server, f"{reset} before {number}")
        upstream.requests[-1].wait_finished()
        assert keeps_connection(server, upstream)
        upstream.close_idle(reset=reset)
        wait_for(lambda: not keeps_connection(server, upstream), what="the end of the kept connection")
        assert ask(server, f"{reset} after {number}") == "Hello, world!"
        asked = [request.message for request in upstream.requests]
        assert asked.count(f"{reset} before {number}") == asked.count(f"{reset} after {number}") == 1
    wait_for(lambda: len(server.records()) == len(upstream.requests), what="a record for each answer")
    assert {record["attempts"] for record in server.records()} == {"1"}


def test_an_upstream_that_closes_after_each_answer_is_asked_once_each(chain: tuple[FakeUpstream, Server]) -> None:
    upstream, server = chain
    before = len(upstream.requests)
    upstream.scripts.extend(answer(["a", "b"], framing="close") for _ in range(10))
    for number in range(10):
        assert ask(server, f"closing {number}") == "ab"
    assert len(upstream.requests) - before == 10
