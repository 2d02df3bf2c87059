"""Callers leave answers in every state and every way; the fake upstream's clock says how soon it was let go.

    python -m tests.live.hangup_trials --trials 200

prints a row for each state, hop and kind of upstream. test_hangup.py runs a few trials of each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.fake_upstream import FakeUpstream, Hang, Pause, RecordedRequest, Repeat, Step, error, head, text, tls_pair
from tests.live.servers import Server, gunicorn, nginx, wait_for

TARGET = 0.050  # seconds from the caller's leaving to the end of the upstream connection, at p99
PIECE = b"token"
LONGEST_DELAY = 0.03  # seconds; a caller leaves at any moment of a state, not always at its beginning
STATUS_HOLD = 0.01  # below LONGEST_DELAY: some leave while the view waits, some when the stream has been opened
LONGEST_BACKOFF = 0.5  # seconds before the second attempt: upstream.FIRST_BACKOFF
FORMATS = ("text/plain", "text/event-stream", "application/x-ndjson", "application/json")
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


# --- states: what the upstream does until the caller leaves -----------------------------------------------


@dataclass(frozen=True)
class State:
    """`script` is the upstream's; `reached` says, for one upstream request, that the state has begun."""

    name: str
    script: Callable[[], Step]
    reached: Callable[[RecordedRequest], bool]
    pieces: bool = False  # a caller who can see pieces waits for one


def _flow() -> Step:
    return [head(), Repeat([Pause(0.003), text("token ")], 3000)]


FIRST_PIECE = len(head() + text("token "))
STATES = (
    State("tokens flow", _flow, lambda request: request.sent > FIRST_PIECE, pieces=True),
    State(
        "between tokens",
        lambda: [head(), text("token "), Hang()],
        lambda request: request.sent >= FIRST_PIECE,
        pieces=True,
    ),
    State("before the first token", lambda: [head(), Hang()], lambda request: request.sent >= len(head())),
    State("before the headers", Hang, lambda request: True),
    State(
        "before a retry",
        lambda: random.choice((error(429, "rate_limit_exceeded"), error(500))),
        lambda request: request.finished is not None,
    ),
)


# --- ways to leave ----------------------------------------------------------------------------------------


def fin(caller: socket.socket) -> None:
    """With nothing unread: close() would send a reset then."""
    caller.setblocking(False)
    try:
        while caller.recv(65536):
            pass
    except BlockingIOError:
        pass
    caller.close()


def reset(caller: socket.socket) -> None:
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    caller.close()


def half_close(caller: socket.socket) -> None:
    caller.shutdown(socket.SHUT_WR)


@dataclass(frozen=True)
class Way:
    name: str
    leave: Callable[[socket.socket], None]
    behind: str = ""  # sent behind the request: "", "CRLF" or "request"


WAYS = (
    Way("FIN", fin),
    Way("RST", reset),
    Way("half-close", half_close),
    Way("CRLF, FIN", fin, "CRLF"),
    Way("CRLF, half-close", half_close, "CRLF"),
    Way("second request, FIN", fin, "request"),
    Way("second request, half-close", half_close, "request"),
    Way("second request, RST", reset, "request"),
)


# --- one trial --------------------------------------------------------------------------------------------


@dataclass
class Chain:
    """A fake upstream, gunicorn and nginx."""

    upstream: FakeUpstream
    hops: dict[str, Server]

    @property
    def gunicorn(self) -> Server:
        return self.hops["direct"]


@contextmanager
def chain(folder: Path, tls: bool, *arguments: str, http: str = "auto") -> Iterator[Chain]:
    """`arguments` are gunicorn's."""
    context, authority = tls_pair(folder) if tls else (None, None)
    trust = {"SSL_CERT_FILE": str(authority)} if authority else {}
    with ExitStack() as stack:
        upstream = stack.enter_context(FakeUpstream(context))
        limits = {"status_hold": str(STATUS_HOLD), "max_retries": "1"}
        server = stack.enter_context(gunicorn(upstream.base_url, folder, *arguments, extra=trust, http=http, **limits))
        yield Chain(upstream, {"direct": server, "nginx": stack.enter_context(nginx(server, folder))})


@dataclass
class Trial:
    """What became of one leaving caller. Times are monotonic."""

    state: State
    hop: str
    tls: bool
    way: Way
    accept: str
    message: str
    left: float = 0.0  # the caller's clock
    left_wall: float = 0.0
    closed: float = math.inf  # the upstream's clock; for `before a retry` the record's end
    clean_end: bool = False
    posts: int = 0
    outcome: str = "no record"

    @property
    def seconds(self) -> float:
        return self.closed - self.left


def request_bytes(message: str, accept: str, version: str = "1.1") -> bytes:
    body = json.dumps({"message": message}).encode()
    lines = (
        f"POST /api/get-response HTTP/{version}",
        "Host: localhost",
        "Content-Type: application/json",
        f"Accept: {accept}",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def run(trial: Trial, chain: Chain) -> None:
    upstream, before = chain.upstream, len(chain.upstream.requests)
    upstream.choose = lambda request: trial.state.script() if request.message == trial.message else Hang()
    first = request_bytes(trial.message, trial.accept)
    behind = {"": b"", "CRLF": b"\r\n", "request": first}[trial.way.behind]
    at_once = random.random() < 0.5
    with socket.create_connection(("127.0.0.1", chain.hops[trial.hop].port), timeout=5) as caller:
        caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        caller.sendall(first + behind if at_once else first)
        upstream.wait_for(lambda: len(upstream.requests) > before)
        asked = upstream.requests[before]
        assert asked.message == trial.message, f"{asked.message} was asked again during {trial.message}"
        upstream.wait_for(lambda: trial.state.reached(asked))
        received = b""
        if trial.state.pieces and trial.accept != "application/json":
            while PIECE not in received:
                received += caller.recv(65536)
        if not at_once:
            caller.sendall(behind)
        time.sleep(random.uniform(0, LONGEST_DELAY))
        trial.left, trial.left_wall = time.monotonic(), time.time()
        trial.way.leave(caller)
        if asked.finished is None:
            trial.closed = asked.wait_left(5)
        if trial.way.leave is half_close:
            trial.clean_end = ends_clean(received + rest(caller))


def rest(caller: socket.socket) -> bytes:
    """What a caller that still reads gets until the connection ends."""
    received = b""
    try:
        while data := caller.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def ends_clean(received: bytes) -> bool:
    """Whether an HTTP client would take this for a whole response."""
    head_bytes, blank, body = received.partition(b"\r\n\r\n")
    if not blank:
        return False
    lines = head_bytes.lower().split(b"\r\n")
    if b"transfer-encoding: chunked" in lines:
        return body.endswith(b"0\r\n\r\n")
    return True  # with a length, or with the end of the connection for its end


# --- many trials ------------------------------------------------------------------------------------------


def trials_of(states: Iterable[State], hops: Iterable[str], tls: bool, count: int, name: str = "trial") -> list[Trial]:
    """`count` trials for each state and hop: every way in turn, every format with each of them."""
    made = []
    for state, hop in itertools.product(states, hops):
        start = random.randrange(len(WAYS) * len(FORMATS))
        for number in range(start, start + count):
            way, accept = WAYS[number % len(WAYS)], FORMATS[(number + number // len(WAYS)) % len(FORMATS)]
            made.append(Trial(state, hop, tls, way, accept, f"{name} {state.name} {hop} {tls} {number}"))
    return made


def run_all(trials: Sequence[Trial], chain: Chain) -> None:
    """Runs them one after the other, then looks what the records say, and whether anybody asked once more."""
    told_before = len(chain.gunicorn.records())
    for trial in trials:
        run(trial, chain)
    wait_for(lambda: len(chain.gunicorn.records()) >= told_before + len(trials), what="a record for each trial")
    time.sleep(LONGEST_BACKOFF + 0.1)  # a second attempt would be late, and nothing announces that it does not come
    # A record may wait for the end of a coalescing pause, and be overtaken by the next.
    records = sorted(chain.gunicorn.records()[told_before:], key=lambda record: float(record["started"]))
    assert len(records) == len(trials), f"{len(records)} records of {len(trials)} answers"
    for trial, record in zip(trials, records, strict=True):
        trial.outcome = record["outcome"]
        if trial.closed == math.inf:
            ended = float(record["started"]) + float(record["duration"])
            trial.closed = trial.left + ended - trial.left_wall
    asked = [request.message for request in chain.upstream.requests]
    for trial in trials:
        trial.posts = asked.count(trial.message)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of all do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def row(trials: Sequence[Trial]) -> str:
    first, times = trials[0], [trial.seconds * 1000 for trial in trials]
    closed = sum(trial.outcome == "caller_left" for trial in trials)
    return (
        f"| {first.state.name} | {first.hop} | {'TLS' if first.tls else 'plain'} | {closed}/{len(trials)} "
        f"| {quantile(times, 0.5):.1f} | {quantile(times, 0.99):.1f} | {max(times):.1f} "
        f"| {sum(trial.posts for trial in trials)} | {sum(trial.clean_end for trial in trials)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.live.hangup_trials", description=__doc__)
    parser.add_argument("--trials", type=int, default=200, help="of each state, hop and kind of upstream")
    count = parser.parse_args().trials
    print("| state | hop | upstream | closed | p50 ms | p99 ms | max ms | POSTs | clean ends |")
    print("|---|---|---|---|---|---|---|---|---|")
    everything = []
    for tls in (False, True):
        with tempfile.TemporaryDirectory() as folder, chain(Path(folder), tls) as servers:
            for state, hop in itertools.product(STATES, servers.hops):
                trials = trials_of([state], [hop], tls, count)
                run_all(trials, servers)
                print(row(trials), flush=True)
                everything += trials
    slowest = sorted(everything, key=lambda trial: trial.seconds)[-5:]
    for trial in slowest:
        print(f"slow: {trial.seconds * 1000:.1f} ms: {trial.way.name}, {trial.accept}, {trial.message}")


if __name__ == "__main__":
    main()
