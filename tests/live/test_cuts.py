"""A cut answer is visible to its caller, a finished one is whole: every fault, format, server, hop and reader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.fake_upstream import (
    FakeUpstream,
    Fin,
    Hang,
    RecordedRequest,
    Rst,
    Step,
    answer,
    error,
    head,
    http_chunk,
    last_chunk,
    sse,
    text,
)
from tests.live.hops import HOPS
from tests.live.readers import FORMATS, JSON, READERS, TEXT, Seen, by_curl, by_socket
from tests.live.servers import Server, flask_run, gunicorn, nginx

pytestmark = pytest.mark.live

PIECES = ["Hel", "lo, ", "world", "!"]
WHOLE = b"Hello, world!"
CUT = b"Hello, "  # what comes before each fault


@dataclass(frozen=True)
class Fault:
    """What the upstream does after two pieces, and what the caller is told."""

    steps: list[Step]
    code: str
    status: int


@dataclass(frozen=True)
class Early:
    """What the upstream does instead of a first piece."""

    step: Step
    code: str
    status: int


FAULTS = {
    "fin in a chunk": Fault([b'80\r\ndata: {"id":', Fin()], "upstream_incomplete", 502),
    "reset": Fault([Rst()], "upstream_incomplete", 502),
    "clean end without finish_reason": Fault([last_chunk()], "upstream_incomplete", 502),
    "error object": Fault(
        [http_chunk(sse({"error": {"message": "gone", "type": "server_error", "code": None}})), Hang()],
        "upstream_error",
        502,
    ),
    "malformed JSON": Fault([http_chunk(b'data: {"choices": [}\n\n'), Hang()], "upstream_malformed", 502),
    "stall": Fault([Hang()], "upstream_stalled", 504),
}
# Before the first piece: the true status in every format.
EARLY = {
    "early reset": Early(Rst(), "upstream_incomplete", 502),
    "early end": Early([head(), last_chunk()], "upstream_incomplete", 502),
    "early 500": Early(error(500), "upstream_error", 502),
    "early 429": Early(error(429, "rate_limit_exceeded"), "upstream_rate_limited", 503),
    "early silence": Early(Hang(), "upstream_timeout", 504),
}
SETTINGS: dict[str, Any] = {"idle_timeout": "0.3", "first_token_timeout": "0.4", "status_hold": "3", "max_retries": "0"}

Start = Callable[[str, Path], AbstractContextManager[Server]]
SERVERS: dict[str, Start] = {
    "gunicorn gevent": lambda url, folder: gunicorn(url, folder, **SETTINGS),
    "gunicorn gevent, the SDK's HTTP": lambda url, folder: gunicorn(url, folder, http="sdk", **SETTINGS),
    "gunicorn gthread": lambda url, folder: gunicorn(url, folder, "-k", "gthread", "--threads", "20", **SETTINGS),
    "flask run": lambda url, folder: flask_run(url, folder, **SETTINGS),
    "flask run --debug": lambda url, folder: flask_run(url, folder, "--debug", **SETTINGS),
}


def script_of(request: RecordedRequest) -> Step:
    name = request.message
    if name in EARLY:
        return EARLY[name].step
    if name in FAULTS:
        return [head(), text(PIECES[0]), text(PIECES[1]), *FAULTS[name].steps]
    return answer(PIECES)


ROUTES = [(server, hop) for server in SERVERS for hop in ("direct", *HOPS)]


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], int]]:
    """All servers, each with its hops, started once; the port of each way. What they logged is judged at the end."""
    found = {}
    with ExitStack() as stack:
        upstream = stack.enter_context(FakeUpstream())
        upstream.choose = script_of
        servers = []
        for name, start in SERVERS.items():
            server = stack.enter_context(start(upstream.base_url, tmp_path_factory.mktemp("server")))
            servers.append(server)
            found[name, "direct"] = server.port
            for hop, change in HOPS.items():
                proxy = nginx(server, tmp_path_factory.mktemp("nginx"), change=change)
                found[name, hop] = stack.enter_context(proxy).port
        yield found
        for server in servers:
            assert "Traceback" not in server.log
            assert "ERROR" not in server.log


@pytest.fixture(params=ROUTES, ids=lambda route: f"{route[0]}, {route[1]}")
def port(request: pytest.FixtureRequest, ports: dict[tuple[str, str], int]) -> int:
    return ports[request.param]


@pytest.fixture(params=SERVERS)
def server_port(request: pytest.FixtureRequest, ports: dict[tuple[str, str], int]) -> int:
    return ports[request.param, "direct"]


def ask_all(port: int, message: str) -> dict[tuple[str, str], Seen]:
    """The same question in every format by every reader, all at once."""
    rows = [(accept, name) for accept in FORMATS for name in READERS]
    with ThreadPoolExecutor(len(rows)) as pool:
        seen = pool.map(lambda row: READERS[row[1]](port, message, row[0]), rows)
        return dict(zip(rows, seen, strict=True))


def assert_clean(seen: Seen) -> None:
    assert b"HTTP/1." not in seen.body
    assert b"Traceback" not in seen.body


@pytest.mark.parametrize("name", FAULTS)
def test_a_cut_answer_is_visible_to_its_caller(port: int, name: str) -> None:
    fault = FAULTS[name]
    for (accept, reader), seen in ask_all(port, name).items():
        row = f"{accept} by {reader}: {seen}"
        assert_clean(seen)
        if accept == JSON:
            assert (seen.status, seen.whole, seen.kind) == (fault.status, True, "application/problem+json"), row
            assert seen.document["code"] == fault.code, row
        elif accept == TEXT:
            assert (seen.status, seen.whole) == (200, False), row
            assert seen.body == CUT, row
        else:
            assert (seen.status, seen.whole) == (200, True), row
            assert [event["type"] for event in seen.events] == ["start", "text", "text", "error"], row
            assert seen.events[-1]["code"] == fault.code, row


def test_a_finished_answer_is_seen_as_whole(port: int) -> None:
    for (accept, reader), seen in ask_all(port, "whole").items():
        row = f"{accept} by {reader}: {seen}"
        assert_clean(seen)
        assert (seen.status, seen.whole, seen.kind) == (200, True, accept), row
        if accept == TEXT:
            assert seen.body == WHOLE, row
        elif accept == JSON:
            assert (seen.document["text"], seen.document["finish_reason"]) == (WHOLE.decode(), "stop"), row
        else:
            assert [event["type"] for event in seen.events] == ["start", *["text"] * 4, "finish"], row


@pytest.mark.parametrize("name", EARLY)
def test_a_failure_before_the_first_piece_has_its_true_status_in_every_format(port: int, name: str) -> None:
    early = EARLY[name]
    for (accept, reader), seen in ask_all(port, name).items():
        row = f"{accept} by {reader}: {seen}"
        assert_clean(seen)
        assert (seen.status, seen.whole, seen.kind) == (early.status, True, "application/problem+json"), row
        assert seen.document["code"] == early.code, row


@pytest.mark.parametrize("name", FAULTS)
def test_a_cut_text_is_visible_to_a_caller_that_speaks_http_1_0(server_port: int, name: str) -> None:
    for seen in (by_socket(server_port, name, TEXT, version="1.0"), by_curl(server_port, name, TEXT, "--http1.0")):
        assert_clean(seen)
        assert (seen.status, seen.whole) == (200, False), seen
        assert CUT.startswith(seen.body)


def test_a_finished_text_is_whole_to_a_caller_that_speaks_http_1_0(server_port: int) -> None:
    curl = by_curl(server_port, "whole", TEXT, "--http1.0")
    for seen in (by_socket(server_port, "whole", TEXT, version="1.0"), curl):
        assert (seen.status, seen.whole, seen.body) == (200, True, WHOLE), seen
