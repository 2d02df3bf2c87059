"""Many background answers on one worker beside as many live ones whose callers have left: memory and CPU time of each.

    python -m tests.live.worker_load --answers 500

Both kinds are logged in SQLite and made in one process. CPU time is the process's own, of a window in which all run.
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from bench.machine import cpu_seconds, memory_bytes
from streamchat.store import Store
from tests.fake_upstream import (
    FakeUpstream,
    Pause,
    RecordedRequest,
    Repeat,
    Step,
    done,
    finish,
    head,
    last_chunk,
    text,
    usage_chunk,
)
from tests.live.killed_app import APP
from tests.live.pair import looking
from tests.live.readers import SSE, head_of, question
from tests.live.servers import Server, gunicorn, wait_for
from tests.live.worker_process import Receiver, WorkerProcess, started

PAUSE = 0.1  # seconds between two pieces of an answer
PIECES = 250
WINDOW = 8.0  # seconds
CALLERS = 16  # that ask at a time
SECONDS = 180.0  # a busy machine takes its time
QUEUES = ("live", "jobs")


@dataclass(frozen=True)
class Load:
    """What one kind took: each answer's share of the memory, each piece's of the CPU time. `failed`: not completed."""

    kind: str
    answers: int
    kib: float
    microseconds: float
    rate: float  # pieces a second
    failed: int
    told: int = 0  # answers of which a webhook came
    told_within: float = 0.0  # seconds from the last answer's end to the last webhook

    def line(self) -> str:
        return (
            f"{self.kind:5} {self.answers} answers: {self.kib:.0f} KiB each, {self.microseconds:.0f} us CPU a piece at "
            f"{self.rate:.0f} pieces/s, {self.failed} failed, {self.told} told, the last {self.told_within:.1f} s late"
        )


class Model:
    """Counts the pieces that it sends."""

    def __init__(self, fake: FakeUpstream) -> None:
        self._fake = fake
        self.pieces = 0
        fake.choose = self._script

    def _script(self, request: RecordedRequest) -> Step:
        pieces = PIECES if request.message != "warm up" else 3
        return [head(), Repeat([Pause(PAUSE), self._piece], pieces), finish(), usage_chunk(19, 1), done(), last_chunk()]

    def _piece(self, _: RecordedRequest) -> bytes:
        self.pieces += 1
        return text("piece ")

    def running(self, since: int) -> int:
        return sum(bool(request.sent) and request.finished is None for request in list(self._fake.requests[since:]))

    @property
    def asked(self) -> int:
        return len(self._fake.requests)


@dataclass
class Bench:
    model: Model
    receiver: Receiver
    web: Server
    worker: WorkerProcess
    stores: dict[str, Store]

    def measure(self, kind: str, pid: int, ask: Callable[[str], object], answers: int) -> Load:
        store, before = self.stores[kind], self.stores[kind].gauges()["answers"]
        ask("warm up")
        wait_for(lambda: store.gauges()["answers"] == before + 1 and not store.gauges()["live"], SECONDS, "an answer")
        asked, memory, completed = self.model.asked, memory_bytes(pid), completed_in(store)
        with ThreadPoolExecutor(CALLERS) as pool:
            list(pool.map(ask, ["load"] * answers))
        wait_for(lambda: self.model.running(asked) == answers, SECONDS, "all answers at once")
        cpu, pieces, began = cpu_seconds(pid), self.model.pieces, time.monotonic()
        time.sleep(WINDOW)
        cpu, pieces, seconds = cpu_seconds(pid) - cpu, self.model.pieces - pieces, time.monotonic() - began
        assert self.model.running(asked) == answers, "the answers ended in the window"
        memory = memory_bytes(pid) - memory
        wait_for(lambda: not store.gauges()["live"], SECONDS, "the end of all answers")
        ended = time.monotonic()
        wait_for(lambda: not store.gauges()["waiting"], SECONDS, "all webhooks")
        return Load(
            kind,
            answers,
            memory / answers / 1024,
            cpu / pieces * 1e6,
            pieces / seconds,
            answers - (completed_in(store) - completed),
            len({delivery.answer for delivery in self.receiver.deliveries}),
            time.monotonic() - ended,
        )

    def leave(self, message: str) -> None:
        """Asks for a live answer and leaves when it has begun."""
        with socket.create_connection(("127.0.0.1", self.web.port), timeout=SECONDS) as caller:
            caller.sendall(head_of(question(message), SSE, "/live/get-response"))
            assert caller.recv(4096).startswith(b"HTTP/1.1 200")

    def accept(self, message: str) -> None:
        body = {"message": message, "background": True}
        url = f"{self.web.url}/jobs/get-response"
        assert requests.post(url, json=body, timeout=SECONDS).status_code == 202


def completed_in(store: Store) -> int:
    return sum(each.completed for each in store.usage(0, "model"))


@contextmanager
def bench_in(folder: Path) -> Iterator[Bench]:
    with ExitStack() as stack:
        fake, receiver = stack.enter_context(FakeUpstream()), stack.enter_context(Receiver())
        urls = {queue: f"sqlite:///{folder}/{queue}.db" for queue in QUEUES}
        own = {"store_url": urls["jobs"], "background": "true", "on_disconnect": "finish"}
        settings: dict[str, Any] = receiver.settings() | own
        url = fake.base_url
        extra = {"QUEUES": json.dumps({queue: {"store_url": each} for queue, each in urls.items()})}
        web = stack.enter_context(gunicorn(url, folder, app=APP, extra=extra, **settings))
        worker = stack.enter_context(started(url, folder, "jobs", app=APP, extra=extra, **settings))
        worker.wait_ready()
        stores = {queue: stack.enter_context(looking(each)) for queue, each in urls.items()}
        yield Bench(Model(fake), receiver, web, worker, stores)


def compare(folder: Path, answers: int) -> dict[str, Load]:
    with bench_in(folder) as bench:
        (web,) = bench.web.workers()
        live = bench.measure("live", web, bench.leave, answers)
        jobs = bench.measure("jobs", bench.worker.process.pid, bench.accept, answers)
    return {"live": live, "jobs": jobs}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.live.worker_load", description=__doc__)
    parser.add_argument("--answers", type=int, default=500)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        loads = compare(Path(folder), given.answers)
    for load in loads.values():
        print(load.line())
    live, jobs = loads["live"], loads["jobs"]
    print(
        f"memory {jobs.kib / live.kib:.2f}, CPU time {jobs.microseconds / live.microseconds:.2f} times a live answer's"
    )


if __name__ == "__main__":
    main()
