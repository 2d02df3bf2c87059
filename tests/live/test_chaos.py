"""Two thousand chaotic requests to one worker leave nothing behind: no greenlet, socket or slot; one record each."""

from __future__ import annotations

import os
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.fake_upstream import (
    FakeUpstream,
    Fin,
    Hang,
    Pause,
    RecordedRequest,
    Repeat,
    Rst,
    Step,
    answer,
    error,
    finish,
    head,
    http_chunk,
    last_chunk,
    sse,
    text,
    tls_pair,
)
from tests.live.readers import FORMATS, JSON, RESET_ON_CLOSE, SSE, TEXT, head_of, question
from tests.live.servers import Server, gunicorn, wait_for

pytestmark = [pytest.mark.live, pytest.mark.timeout(170)]

COUNT = 2000
CALLERS = 48  # at a time
MOUNTS = ("plain", "tls", "own")

# What the upstream does. The first group answers or fails by itself, the second waits for the caller or a deadline.
ENDING: dict[str, Step] = {
    "whole": answer(["Hello", ", ", "world", "!"]),
    "slow": answer(["Hello", "world"], pause=0.05),
    "closing": answer(["Hello"], framing="close"),
    "counted": answer(["Hello"], framing="length"),
    "no usage": [head(), text("Hel"), finish(), last_chunk()],
    "fin": [head(), text("Hel"), b'80\r\ndata: {"id":', Fin()],
    "cut TLS": [head(), text("Hel"), Fin(close_notify=False)],
    "reset": [head(), text("Hel"), Rst()],
    "early reset": Rst(),
    "early end": [head(), last_chunk()],
    "no finish": [head(), text("Hel"), last_chunk()],
    "error object": [head(), text("Hel"), http_chunk(sse({"error": {"message": "gone"}})), Hang()],
    "malformed": [head(), text("Hel"), http_chunk(b'data: {"choices": [}\n\n'), Hang()],
    "not HTTP": [b"SSH-2.0-OpenSSH_9.2\r\n", Fin()],
    "another type": [head(content_type="text/html"), http_chunk(b"<html>"), last_chunk()],
    "400": error(400),
    "401": error(401, "invalid_api_key"),
    "429": error(429, "rate_limit_exceeded"),
    "500": error(500, headers={"Connection": "close"}),
}
WAITING: dict[str, Step] = {
    "no headers": Hang(),
    "no piece": [head(), Hang()],
    "stall": [head(), text("Hel"), Hang()],
    "endless": [head(), Repeat([Pause(0.1), text("piece ")], 100), Hang()],
    "flood": [head(), Repeat(text("x" * 60_000), 200), Hang()],
    "wait for retry": error(503, headers={"Retry-After": "1"}),
}
BEHAVIOURS = ("reads", "fin", "reset", "half-close", "stray bytes", "never reads", "raise", "replace", "close")
WEIGHTS = (6, 2, 2, 2, 2, 1, 1, 1, 1)


@dataclass(frozen=True)
class Trial:
    id: str
    mount: str
    upstream: str
    accept: str
    behaviour: str
    patience: float  # how long the caller stays before it does what it does


def trials(seed: int) -> list[Trial]:
    draw = random.Random(seed)
    scripts = [*ENDING, *WAITING]
    return [
        Trial(
            f"chaos-{number}",
            draw.choice(MOUNTS),
            draw.choice(scripts),
            draw.choice(FORMATS),
            draw.choices(BEHAVIOURS, WEIGHTS)[0],
            draw.choice((0.0, 0.01, 0.05, 0.3)),
        )
        for number in range(COUNT)
    ]


def script_of(request: RecordedRequest) -> Step:
    name = request.message.partition(" ")[2]
    return ENDING[name] if name in ENDING else WAITING[name]


class Caller:
    """One connection that asks one question, then behaves as its trial says."""

    def __init__(self, port: int, trial: Trial) -> None:
        self._trial = trial
        self._socket = socket.socket()
        if trial.behaviour == "never reads":
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.settimeout(20)
        self._socket.connect(("127.0.0.1", port))
        hook = trial.behaviour if trial.behaviour in ("raise", "replace", "close") else ""
        extra = f"X-Chaos-Id: {trial.id}\r\nX-Chaos: {hook}\r\nConnection: close\r\n"
        body = question(f"{trial.id} {trial.upstream}")
        self._socket.sendall(head_of(body, trial.accept, f"/{trial.mount}/get-response", extra))

    def behave(self) -> bytes:
        """What was read."""
        with self._socket:
            try:
                return ACTIONS.get(self._trial.behaviour, Caller._read)(self)
            except (ConnectionResetError, BrokenPipeError):
                return b""

    def _read(self) -> bytes:
        wire = b""
        while piece := self._socket.recv(1 << 20):
            wire = (wire + piece)[-100_000:]
        return wire

    def _stay(self) -> None:
        """Reads what comes for a while."""
        until = time.monotonic() + self._trial.patience
        while (left := until - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                if not self._socket.recv(65536):
                    return
            except TimeoutError:
                return
        self._socket.settimeout(20)

    def _fin(self) -> bytes:
        self._stay()
        return b""

    def _reset(self) -> bytes:
        self._stay()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        return b""

    def _half_close(self) -> bytes:
        self._stay()
        self._socket.settimeout(20)
        self._socket.shutdown(socket.SHUT_WR)
        return self._read()

    def _stray(self) -> bytes:
        self._socket.sendall(b"\r\n")
        self._stay()
        self._socket.settimeout(20)
        self._socket.sendall(b"GET /plain/healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        return b""

    def _never_read(self) -> bytes:
        """Until the server, which waits for a second, has let go: then there is nothing to write to."""
        time.sleep(2.5)
        return b""


ACTIONS: dict[str, Callable[[Caller], bytes]] = {
    "fin": Caller._fin,
    "reset": Caller._reset,
    "half-close": Caller._half_close,
    "stray bytes": Caller._stray,
    "never reads": Caller._never_read,
}


@pytest.fixture
def upstreams(tmp_path: Path) -> Iterator[tuple[FakeUpstream, FakeUpstream, Path]]:
    context, authority = tls_pair(tmp_path)
    with FakeUpstream() as plain, FakeUpstream(context) as secure:
        plain.choose = secure.choose = script_of
        yield plain, secure, authority


def report_of(server: Server) -> dict[str, Any]:
    report = requests.get(f"{server.url}/report", timeout=20, headers={"Connection": "close"}).json()
    assert isinstance(report, dict)
    return report


HELD = ("greenlets", "sockets", "watched", "answers", "replies", "threads", "slots", "pooled")


def held(report: dict[str, Any]) -> dict[str, Any]:
    return {name: report.get(name) for name in HELD}


def is_clean(report: dict[str, Any], before: dict[str, Any]) -> bool:
    """Nothing more than before; gevent may have ended helpers of its own meanwhile."""
    fewer = report["greenlets"] <= before["greenlets"]
    return fewer and held(report) == held(before | {"greenlets": report["greenlets"]})


def run(server: Server, chosen: list[Trial]) -> None:
    with ThreadPoolExecutor(CALLERS) as pool:
        wires = pool.map(lambda trial: Caller(server.port, trial).behave(), chosen)
        for trial, wire in zip(chosen, wires, strict=True):
            assert wire.count(b"HTTP/1.1 ") <= 1, (trial, wire)
            assert b"Traceback" not in wire, (trial, wire)
            if trial.behaviour == "reads":
                assert wire or trial.accept == TEXT, trial


def settle(server: Server, fakes: list[FakeUpstream], before: dict[str, Any] | None = None) -> dict[str, Any]:
    """The report when all is as `before`, or what is left after 30 s; without one, when 2 s brought no change."""
    same = 0
    report: dict[str, Any] = {}
    until = time.monotonic() + 30  # the last greenlets of a loaded machine wait for time limits of their own
    while time.monotonic() < until:
        requests.post(f"{server.url}/drop-idle", timeout=20, headers={"Connection": "close"})
        for fake in fakes:
            fake.close_idle()
        last, report = report, report_of(server)
        same = same + 1 if held(report) == held(last) else 0
        if is_clean(report, before) if before is not None else same >= 6:
            break
        time.sleep(0.3)
    return report


def test_two_thousand_chaotic_requests_leave_nothing_behind(
    upstreams: tuple[FakeUpstream, FakeUpstream, Path], tmp_path: Path
) -> None:
    seed = int(os.environ.get("CHAOS_SEED") or random.randrange(1 << 32))
    print(f"CHAOS_SEED={seed}")
    plain, secure, authority = upstreams
    extra = {"CHAOS_TLS": secure.base_url, "CHAOS_AUTHORITY": str(authority)}
    with gunicorn(plain.base_url, tmp_path, app="tests.live.chaos_app:app", extra=extra, grace="8") as server:
        run(server, [Trial(f"warm-{mount}", mount, "whole", SSE, "reads", 0) for mount in MOUNTS])
        before = settle(server, [plain, secure])
        run(server, trials(seed))
        after = settle(server, [plain, secure], before)

        assert is_clean(after, before), (held(after), held(before))
        assert after["started"] == after["finished"]
        assert len(set(after["started"])) == len(after["started"]) > COUNT * 0.9
        for fake in (plain, secure):  # TLS waits five seconds for the goodbye of a client that has nothing to read for
            fake.wait_for(lambda fake=fake: fake.open_connections == 0, 8)  # type: ignore[misc]
        assert_asked_for_the_admitted(plain, secure, set(after["started"]))
        drain(server)
    assert_one_record_each(server, after["started"])


def assert_asked_for_the_admitted(plain: FakeUpstream, secure: FakeUpstream, admitted: set[str]) -> None:
    """No upstream call without a record; no more than one and its retry for any."""
    calls = Counter(request.message.partition(" ")[0] for fake in (plain, secure) for request in fake.requests)
    assert set(calls) <= admitted
    assert max(calls.values()) <= 2


def drain(server: Server) -> None:
    """Stops under three last answers."""
    last = [Trial(f"drain-{accept}", "plain", "endless", accept, "reads", 0) for accept in FORMATS if accept != JSON]
    callers = [Caller(server.port, trial) for trial in last]
    wait_for(lambda: sum(report_of(server)["slots"].values()) == len(last), what="the last answers")
    server.terminate()
    for caller in callers:
        caller.behave()
    assert server.process.wait(8) == 0


def assert_one_record_each(server: Server, started: list[str]) -> None:
    told = Counter(record["id"] for record in server.records())
    assert {name for name, count in told.items() if count != 1} == set()
    assert set(told) == {*started, *(f"drain-{accept}" for accept in FORMATS if accept != JSON)}
    for line in server.log.splitlines():
        assert "ERROR streamchat" not in line and "ERROR gunicorn" not in line, line
    assert "SIGKILL" not in server.log
