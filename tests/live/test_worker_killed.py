"""kill -9 of the worker at each named point, then another worker: every answer ends, is told, and is asked for once.

Each point has a blueprint, a log and a worker of its own; one web server has all blueprints, and so has the worker that
comes after.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

from streamchat.events import Event, Failure, Finish
from streamchat.store import Store, unpack
from tests.fake_upstream import (
    FakeUpstream,
    Gate,
    Hang,
    RecordedRequest,
    Step,
    done,
    finish,
    head,
    last_chunk,
    text,
    usage_chunk,
)
from tests.live.killed_app import APP, POINTS
from tests.live.pair import LEASE, STORES, TOKENS, looking, words
from tests.live.servers import ROOT, Server, environment, gunicorn, wait_for
from tests.live.worker_process import Delivery, Receiver, started
from tests.redis_server import RedisServer

pytestmark = pytest.mark.live

JOBS = 3  # of each point
PIECES = 3
DIE_WITHIN = 60.0  # seconds, imports included: all points at once share the machine
END_WITHIN = 60.0
ANN = {"Authorization": f"Bearer {TOKENS['ann']}"}


# What one of a point's answers was at least, when its worker was dead: the point was met.
AT_DEATH = dict.fromkeys(POINTS, "completed") | {
    "before-the-claim": "queued",
    "after-the-claim": "queued",
    "before-it-is-begun": "queued",
    "after-it-is-begun": "in_progress",
    "before-the-headers": "in_progress",
    "before-pieces-are-kept": "in_progress",
    "after-pieces-are-kept": "in_progress",
    "before-the-final-state": "in_progress",
}
MIDWAY = ("before-pieces-are-kept", "after-pieces-are-kept")  # these answers do not end before their worker does
TOLD_TWICE = ("before-the-2xx", "after-the-2xx")  # the outbox could not know of the first time


@dataclass
class Job:
    point: str
    number: int
    id: str = ""
    at_death: str = ""  # its status, when its first worker was dead

    @property
    def message(self) -> str:
        return f"{self.point} {self.number}"


@dataclass
class Trial:
    """`killed`: the points whose workers died by another hand than their own. `gates`: of those that die midway."""

    fake: FakeUpstream
    receiver: Receiver
    web: Server
    stores: dict[str, Store]
    queues: str
    settings: dict[str, Any]
    told: Path
    by: int = signal.SIGKILL
    gates: dict[str, Gate] = field(default_factory=lambda: {point: Gate() for point in MIDWAY})
    killed: set[str] = field(default_factory=set)
    jobs: list[Job] = field(default_factory=list)

    @property
    def environ(self) -> dict[str, str]:
        return environment(self.fake.base_url, **self.settings) | {"QUEUES": self.queues, "KILL_BY": str(int(self.by))}

    def note_death(self, point: str) -> None:
        for job in self.jobs:
            if job.point == point:
                kept = self.stores[point].find(job.id)
                assert kept is not None
                job.at_death = kept.status
        if point in self.gates:
            self.gates[point].open()

    def asked(self, job: Job) -> int:
        return sum(request.message == job.message for request in list(self.fake.requests))

    def lines(self) -> list[list[str]]:
        """What is told of the first workers: the ids of all, then how each ended."""
        whole, _, _ = self.told.read_text().rpartition("\n")
        return [line.split() for line in whole.splitlines()]

    def pids(self) -> dict[str, int]:
        return {point: int(pid) for point, pid in self.lines()[: len(POINTS)]}

    def kill(self, point: str) -> bool:
        """Once. Whether it was now."""
        if point in self.killed:
            return False
        self.killed.add(point)
        os.kill(self.pids()[point], self.by)
        return True

    def script(self, request: RecordedRequest) -> Step:
        if request.message.startswith("before-the-headers ") and self.kill("before-the-headers"):
            return Hang()
        gate = self.gates.get(request.message.partition(" ")[0], ())
        return [head(), *map(text, words(0, PIECES)), gate, finish(), usage_chunk(19, PIECES), done(), last_chunk()]

    def before_reply(self, delivery: Delivery) -> None:
        if delivery.path == "/before-the-2xx":
            self.kill("before-the-2xx")

    def accept(self, job: Job) -> None:
        body = {"message": job.message, "background": True}
        response = requests.post(f"{self.web.url}/{job.point}/get-response", json=body, headers=ANN, timeout=20)
        assert response.status_code == 202, response.text
        job.id = response.json()["id"]
        self.jobs.append(job)

    def look(self, job: Job) -> dict[str, Any]:
        response = requests.get(f"{self.web.url}/{job.point}/responses/{job.id}", headers=ANN, timeout=20)
        assert response.status_code == 200, response.text
        document = response.json()
        assert isinstance(document, dict)
        return document

    def events(self, job: Job) -> list[Event]:
        """All that is kept; nothing of it twice, and nothing missing."""
        batches = self.stores[job.point].read(job.id, -1)
        assert [batch.first for batch in batches] == [0, *(batch.last + 1 for batch in batches[:-1])], batches
        return [event for batch in batches for event in unpack(batch.payload)]

    def is_quiet(self) -> bool:
        return not any(any(waiting_in(store)) for store in self.stores.values())


def waiting_in(store: Store) -> list[int]:
    gauges = store.gauges()
    return [gauges[name] for name in ("live", "queued", "reserved", "waiting")]


@contextmanager
def logs_of(kind: str, folder: Path) -> Iterator[dict[str, str]]:
    """A log for each point."""
    if kind == "sqlite":
        yield {point: f"sqlite:///{folder}/{point}.db" for point in POINTS}
        return
    with RedisServer(folder) as redis:
        yield {point: f"{redis.url}/{number}" for number, point in enumerate(POINTS)}


@contextmanager
def trial_over(kind: str, folder: Path) -> Iterator[Trial]:
    with ExitStack() as stack:
        urls = stack.enter_context(logs_of(kind, folder))
        fake, receiver = stack.enter_context(FakeUpstream()), stack.enter_context(Receiver())
        queues = {point: {"store_url": url, "webhook_url": receiver.url(f"/{point}")} for point, url in urls.items()}
        told = json.dumps(queues)
        settings = settings_of(receiver, next(iter(urls.values())))
        web = stack.enter_context(gunicorn(fake.base_url, folder, app=APP, extra={"QUEUES": told}, **settings))
        stores = {point: stack.enter_context(looking(url)) for point, url in urls.items()}
        trial = Trial(fake, receiver, web, stores, told, settings, folder / "killed.txt")
        fake.choose, receiver.before_reply = trial.script, trial.before_reply
        yield trial


def settings_of(receiver: Receiver, store_url: str) -> dict[str, str]:
    return receiver.settings() | {
        "store_url": store_url,
        "background": "true",
        "lease": str(LEASE),
        "tokens": json.dumps(TOKENS),
        "tokens_per_day": "1000000000",
        "max_retries": "0",
    }


@contextmanager
def killed_workers(trial: Trial) -> Iterator[None]:
    """A worker for each point."""
    command = [sys.executable, "-m", "gevent.monkey", "--module", "tests.live.killed_workers", *POINTS]
    log = trial.told.with_suffix(".log")
    with trial.told.open("wb") as out, log.open("wb") as err:
        process = subprocess.Popen(command, cwd=ROOT, env=trial.environ, stdout=out, stderr=err, start_new_session=True)
    try:
        yield
    except BaseException:
        print(log.read_text()[-5000:])
        raise
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_deaths(trial: Trial) -> None:
    """Returns when each point has killed its worker."""
    ended: dict[str, int] = {}

    def all_ended() -> bool:
        for point, status in trial.lines()[len(POINTS) + len(ended) :]:
            ended[point] = int(status)
            trial.note_death(point)
        return len(ended) == len(POINTS)

    try:
        wait_for(all_ended, DIE_WITHIN, "the death of every worker")
    finally:
        assert ended == dict.fromkeys(POINTS, -trial.by)


def begin(trial: Trial) -> None:
    for job in [Job(point, number) for point in POINTS for number in range(JOBS)]:
        trial.accept(job)


def end_by_another(trial: Trial, folder: Path) -> None:
    """A worker for all points, until nothing is left to do."""
    extra = {"QUEUES": trial.queues}
    with started(trial.fake.base_url, folder, app=APP, extra=extra, **trial.settings) as worker:
        wait_for(trial.is_quiet, END_WITHIN, "the end of all answers and webhooks")
        worker.terminate()
        assert worker.wait_ended() == 0, worker.log


def assert_all_told_once(trial: Trial, jobs: int) -> None:
    for job in trial.jobs:
        assert_told_once(trial, job)
    for point, store in trial.stores.items():
        (spent,) = store.usage(0, "user")
        assert (spent.name, spent.answers) == ("ann", jobs), point
        assert not any(waiting_in(store)), point
        assert store.gauges()["dead"] == 0
    for point, status in AT_DEATH.items():
        assert status in {job.at_death for job in at(trial, point)}, point
    for point in TOLD_TWICE:
        assert any(len(trial.receiver.of(job.id)) > 1 for job in at(trial, point)), point


def run_round(kind: str, folder: Path) -> None:
    with trial_over(kind, folder) as trial:
        begin(trial)
        with killed_workers(trial):
            wait_for_deaths(trial)
        end_by_another(trial, folder)
        assert_all_told_once(trial, JOBS)


def at(trial: Trial, point: str) -> list[Job]:
    return [job for job in trial.jobs if job.point == point]


def assert_told_once(trial: Trial, job: Job) -> None:
    """Its state when the worker died says what must have become of it."""
    document, deliveries, asked = trial.look(job), trial.receiver.of(job.id), trial.asked(job)
    status, code = document["status"], (document["error"] or {}).get("code")
    seen = f"{job}: {document}, asked {asked} times, told {len(deliveries)} times"
    last = trial.events(job)[-1]
    if job.at_death in ("queued", "completed"):
        assert (status, code, asked) == ("completed", None, 1), seen
        assert document["text"] == "".join(words(0, PIECES)), seen
        assert isinstance(last, Finish), seen
    else:
        assert (status, code) == ("failed", "interrupted") and asked <= 1, seen
        assert isinstance(last, Failure) and last.code == "interrupted", seen
    assert deliveries, seen
    assert len({(delivery.id, delivery.body) for delivery in deliveries}) == 1, seen
    event = deliveries[0].event
    assert (event["type"], event["data"]["status"]) == (f"response.{status}", status), seen


def test_whenever_a_worker_is_killed_every_answer_ends_is_told_and_is_asked_for_once(tmp_path: Path) -> None:
    run_round("sqlite", tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("kind", STORES)
def test_the_same_five_times_over_each_store(kind: str, number: int, tmp_path: Path) -> None:
    run_round(kind, tmp_path)


@pytest.mark.long
def test_a_worker_that_stood_still_finds_its_work_done_and_goes_on_with_what_is_new(
    tmp_path: Path,
) -> None:
    """Not over SQLite: whoever is stopped in a transaction holds the file's lock."""
    with trial_over("redis", tmp_path) as trial:
        trial.by = signal.SIGSTOP
        begin(trial)
        with killed_workers(trial):
            wait_for_deaths(trial)
            end_by_another(trial, tmp_path)
            for pid in trial.pids().values():
                os.kill(pid, signal.SIGCONT)
            for point in POINTS:
                trial.accept(Job(point, JOBS, at_death="queued"))
            wait_for(trial.is_quiet, END_WITHIN, "the end of what came later")
            for pid in trial.pids().values():
                os.kill(pid, signal.SIGTERM)
            wait_for(lambda: len(trial.lines()) == 3 * len(POINTS), END_WITHIN, "the end of every worker")
            assert dict(trial.lines()[2 * len(POINTS) :]) == dict.fromkeys(POINTS, "0")
        assert_all_told_once(trial, JOBS + 1)
        assert " ERROR " not in trial.told.with_suffix(".log").read_text()
