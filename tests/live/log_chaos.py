"""Thousands of answers end in every way, workers are killed under them: what the log counts must come back to zero.

    python -m tests.live.log_chaos --endings 10000 --kills 20 [--store redis|sqlite]

Prints how the answers ended and how soon after the last one every gauge was at zero. test_log_chaos.py runs some.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import os
import random
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.fake_upstream import (
    Fin,
    Hang,
    Pause,
    RecordedRequest,
    Repeat,
    Rst,
    Step,
    answer,
    error,
    head,
    last_chunk,
    text,
)
from tests.live.pair import LEASE, STORES, TOKENS, Pair, Reading, ask, cancel, pair_over, resume
from tests.live.readers import RESET_ON_CLOSE, SSE, head_of, question
from tests.live.servers import Server

CALLERS = 32  # at a time
MARGIN = 2.0  # seconds after the lease: three looks in it, and a busy machine
SETTINGS = {
    "on_disconnect": "0.3",
    "first_token_timeout": "0.8",
    "idle_timeout": "0.6",
    "total_timeout": "1.5",
    "status_hold": "0.2",
    "max_retries": "0",
    "max_streams_per_user": "100",
    "tokens_per_day": "1000000000",
}

SCRIPTS: dict[str, Step] = {
    "whole": answer(["Hello", ", ", "world", "!"]),
    "slow": answer(["word "] * 10, pause=0.02),
    "long": answer(["word " * 200] * 50),
    "cut": [head(), text("Hel"), b'80\r\ndata: {"id":', Fin()],
    "reset": [head(), text("Hel"), Rst()],
    "early reset": Rst(),
    "no finish": [head(), text("Hel"), last_chunk()],
    "refused": error(400),
    "fails": error(500),
    "no headers": Hang(),
    "stall": [head(), text("Hel"), Hang()],
    "endless": [head(), Repeat([Pause(0.05), text("piece ")], 100), Hang()],
}


@dataclass(frozen=True)
class Trial:
    number: int
    script: str
    behaviour: str
    user: str
    place: int  # which server is asked
    events: int  # how many are read before the behaviour

    @property
    def message(self) -> str:
        return f"{self.number} {self.script}"


def trials_of(count: int, seed: int) -> list[Trial]:
    draw = random.Random(seed)
    return [
        Trial(
            number,
            draw.choice(list(SCRIPTS)),
            draw.choice(list(BEHAVIOURS)),
            draw.choice(list(TOKENS)),
            draw.randrange(2),
            draw.randrange(5),
        )
        for number in range(count)
    ]


# --- what callers do --------------------------------------------------------------------------------------


class Run:
    """Both servers under chaos; `killed` counts the workers that were."""

    def __init__(self, pair: Pair, seed: int) -> None:
        self.pair = pair
        self.killed = 0
        self.statuses: Counter[int | str] = Counter()
        self._draw = random.Random(seed)
        pair.model.fake.choose = script_of

    def place(self, trial: Trial, other: bool = False) -> Server:
        return (self.pair.first, self.pair.second)[trial.place ^ other]

    def end(self, trial: Trial) -> None:
        """One caller, from its request to its leaving. A worker may be killed under it at any moment."""
        try:
            status: int | str = BEHAVIOURS[trial.behaviour](self, trial)
        except (OSError, http.client.HTTPException):
            status = "no answer"
        self.statuses[status] += 1

    def kill(self) -> None:
        """A random worker; its master makes another one."""
        workers = [pid for server in (self.pair.first, self.pair.second) for pid in server.workers()]
        if workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._draw.choice(workers), signal.SIGKILL)
                self.killed += 1


def script_of(request: RecordedRequest) -> Step:
    return SCRIPTS[request.message.partition(" ")[2]]


def read_some(reading: Reading, events: int) -> bool:
    """Whether there may be more."""
    return reading.status == 200 and all(reading.next() is not None for _ in range(events))


def reads(run: Run, trial: Trial) -> int:
    with ask(run.place(trial), trial.message, trial.user) as caller:
        caller.rest()
        return caller.status


def leaves(run: Run, trial: Trial) -> int:
    with ask(run.place(trial), trial.message, trial.user) as caller:
        read_some(caller, trial.events)
        return caller.status


def resets(run: Run, trial: Trial) -> str:
    """At once, or some time into the answer; the bytes are nobody's."""
    extra = f"Authorization: Bearer {TOKENS[trial.user]}\r\nConnection: close\r\n"
    with socket.create_connection(("127.0.0.1", run.place(trial).port), timeout=20) as caller:
        caller.sendall(head_of(question(trial.message), SSE, extra=extra))
        time.sleep(trial.events * 0.03)
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    return "reset"


def comes_back(run: Run, trial: Trial) -> int:
    """Leaves, and reads on at the other server."""
    with ask(run.place(trial), trial.message, trial.user) as caller:
        more = read_some(caller, trial.events)
    if more:
        with resume(run.place(trial, other=True), caller.id, trial.events - 1, trial.user) as reader:
            reader.rest()
    return caller.status


def stops(run: Run, trial: Trial) -> int:
    """By the other server, and goes on to read."""
    with ask(run.place(trial), trial.message, trial.user) as caller:
        if read_some(caller, trial.events):
            with contextlib.suppress(AssertionError):  # the log may have been asked in the moment of a kill
                cancel(run.place(trial, other=True), caller.id, trial.user)
            caller.rest()
        return caller.status


def asks_twice(run: Run, trial: Trial) -> int:
    """With one key, at both servers."""
    with ask(run.place(trial), trial.message, trial.user, Idempotency_Key=str(trial.number)) as caller:
        more = read_some(caller, trial.events)
        with ask(run.place(trial, other=True), trial.message, trial.user, Idempotency_Key=str(trial.number)) as another:
            another.rest()
        if more:
            caller.rest()
        return caller.status


BEHAVIOURS: dict[str, Callable[[Run, Trial], int | str]] = {
    "reads": reads,
    "leaves": leaves,
    "resets": resets,
    "comes back": comes_back,
    "stops": stops,
    "asks twice": asks_twice,
}


# --- the whole --------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """`zero_after`: seconds after the last caller until all gauges were at zero; infinity if they never were."""

    endings: int
    kills: int
    seconds: float
    zero_after: float
    gauges: Mapping[str, int]
    admitted: int  # answers that the log keeps
    settled: int  # ledger rows
    completed: int
    most_asked: int  # upstream calls of one message
    twice: list[str] = field(default_factory=list)  # messages that were asked more often than they may
    statuses: Counter[int | str] = field(default_factory=Counter)

    @property
    def is_clean(self) -> bool:
        return self.zero_after <= LEASE + MARGIN and self.admitted == self.settled and not self.twice

    def lines(self) -> Iterator[str]:
        yield f"{self.endings} endings, {self.kills} kills in {self.seconds:.0f} s; callers saw {dict(self.statuses)}"
        yield f"all gauges at zero {self.zero_after:.2f} s after the last caller: {dict(self.gauges)}"
        yield f"{self.admitted} answers kept, {self.settled} in the ledger, {self.completed} of them completed"
        yield f"at most {self.most_asked} upstream calls for one message; too many for {self.twice}"
        yield "clean" if self.is_clean else "NOT CLEAN"


def are_zero(gauges: Mapping[str, int]) -> bool:
    return gauges["live"] == gauges["reserved"] == 0


def chaos(pair: Pair, endings: int, kills: int, seed: int) -> Outcome:
    run, began = Run(pair, seed), time.monotonic()
    chosen = trials_of(endings, seed)
    kill_at = {(place + 1) * endings // kills for place in range(kills)}  # the last under the last callers
    begun = itertools.count(1)
    lock = threading.Lock()

    def end(trial: Trial) -> None:
        with lock:
            if next(begun) in kill_at:
                run.kill()
        run.end(trial)

    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(end, chosen))
    ended = time.monotonic()
    zero_after = wait_for_zero(pair, ended)
    asked = Counter(request.message for request in pair.model.fake.requests)
    spent = pair.store.usage(0, "model")
    return Outcome(
        endings,
        run.killed,
        ended - began,
        zero_after,
        pair.store.gauges(),
        pair.store.gauges()["answers"],
        sum(each.answers for each in spent),
        sum(each.completed for each in spent),
        max(asked.values(), default=0),
        [message for message, times in asked.items() if times > 1],
        run.statuses,
    )


def wait_for_zero(pair: Pair, ended: float) -> float:
    """Seconds. Answers without a caller have their grace time and theirs first; then the lease of the dead."""
    until = ended + LEASE + MARGIN + 10
    while not are_zero(pair.store.gauges()):
        if time.monotonic() > until:
            return float("inf")
        time.sleep(0.02)
    return time.monotonic() - ended


@contextlib.contextmanager
def servers_over(kind: str, folder: Path) -> Iterator[Pair]:
    """Two servers of two workers each."""
    with pair_over(kind, folder, "-w", "2", users=True, **SETTINGS) as pair:
        yield pair


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.live.log_chaos", description=__doc__)
    parser.add_argument("--endings", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--store", choices=STORES, help="both without")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    given = parser.parse_args()
    for kind in (given.store,) if given.store else STORES:
        with tempfile.TemporaryDirectory() as folder, servers_over(kind, Path(folder)) as pair:
            print(f"{kind}, --seed {given.seed}", flush=True)
            for line in chaos(pair, given.endings, given.kills, given.seed).lines():
                print(f"  {line}", flush=True)
            for server in (pair.first, pair.second):
                for line in server.log.splitlines():
                    if "ERROR streamchat" in line or "Traceback" in line:
                        print(f"  {line}")


if __name__ == "__main__":
    main()
