"""A SQLite log that several processes write, as gunicorn's workers do; and the event loop of one while it is locked."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from streamchat.envelopes import letter_id
from streamchat.events import Failure
from streamchat.loop import ThreadLoop
from streamchat.sqlite_schema import open_file
from streamchat.sqlite_store import SqliteStore

from .queue_contract import queued
from .sqlite_lock import HOLDER
from .store_contract import NONE, told

ROOT = Path(__file__).parents[1]
LEASE = 2.0
ANSWERS = 8
ROUNDS = 15
QUEUED = 120
REAPED_WITHIN = 20.0

# Writes its answers round by round, ends every second one, and holds the others open.
WORKER = """
import sys, threading, time
from streamchat.errors import StoreDown
from streamchat.loop import ThreadLoop
from streamchat.sqlite_store import SqliteStore
from streamchat.store import Limits
from tests.store_contract import ending, entry, texts

path, lease, name, answers, rounds = sys.argv[1], float(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])

def patiently(task, *values):
    while True:
        try:
            return task(*values)
        except StoreDown:
            pass

store = SqliteStore(path, lease, ThreadLoop().lane)
owner = patiently(store.take_lease)

def renew():
    while True:
        time.sleep(lease / 5)
        patiently(store.renew, owner)

threading.Thread(target=renew, daemon=True).start()
entries = [entry(owner, id=f"resp_{name}_{number}", user=name) for number in range(answers)]
for each in entries:
    patiently(store.admit, each, Limits())
print("admitted", flush=True)
for number in range(rounds):
    patiently(store.write, owner, [texts(each.id, number * 3, 3) for each in entries], [])
patiently(store.write, owner, [], [ending(each) for each in entries[::2]])
print("written", flush=True)
sys.stdin.read()
"""

# Claims from one queue until nothing waits, ends what it got, then takes letters until none is due; each at a word.
CLAIMER = """
import json, sys
from streamchat.errors import StoreDown
from streamchat.loop import ThreadLoop
from streamchat.sqlite_store import SqliteStore
from tests.queue_contract import LATER, ended
from tests.store_contract import texts

store = SqliteStore(sys.argv[1], 60, ThreadLoop().lane)

def patiently(task, *values):
    while True:
        try:
            return task(*values)
        except StoreDown:
            pass

owner = patiently(store.take_lease)

def at_a_word(take, use):
    print("ready", flush=True)
    sys.stdin.readline()
    got = []
    while found := patiently(take):
        for each in found:
            use(each)
        got += [each.id for each in found]
    print(json.dumps(got), flush=True)

def make(answer):
    assert patiently(store.begin, owner, answer.id)
    patiently(store.write, owner, [texts(answer.id, 0, 3)], [ended(answer)])

at_a_word(lambda: store.claim(owner, "jobs", 3), make)
at_a_word(lambda: store.outbox.take(owner, "jobs", LATER, 3), lambda letter: None)
store.close()
"""

# Ticks every 5 ms while another process holds the lock for two seconds, and everything is tried meanwhile.
EVENT_LOOP = """
from gevent import monkey; monkey.patch_all()
import json, subprocess, sys, time
import gevent
from streamchat.errors import LeaseLost, StoreDown
from streamchat.loop import choose_loop
from streamchat.sqlite_store import SqliteStore
from tests.store_contract import NONE, ending, entry, texts, told

path, holder = sys.argv[1:]
store = SqliteStore(path, 15, choose_loop().lane)
owner = store.take_lease()
try:
    store.renew("nobody")
except LeaseLost:
    pass  # an error of ours crosses from the native thread without a word on stderr
answers = [entry(owner, user="ann") for _ in range(20)]
for each in answers:
    store.admit(each, NONE)
listener = store.listen(owner)
for each in answers:
    listener.add(each.id)
gaps, outcomes, heard = [], [], []
lock = subprocess.Popen([sys.executable, "-c", holder, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
lock.stdout.readline()

def tick():
    last = time.perf_counter()
    while True:
        time.sleep(0.005)
        now = time.perf_counter()
        gaps.append(now - last)
        last = now

def write(first):
    while True:
        try:
            return store.write(owner, [texts(each.id, first, 3) for each in answers], [])
        except StoreDown:
            time.sleep(0.02)

def attempt(task):
    try:
        task()
        outcomes.append("done")
    except StoreDown:
        outcomes.append("down")

def listen():
    while True:
        heard.extend(listener.wait(0.2)[0])

began = time.perf_counter()
ticker, listening = gevent.spawn(tick), gevent.spawn(listen)
late = [gevent.spawn(attempt, lambda: store.admit(entry(owner), NONE)) for _ in range(20)]
others = [gevent.spawn(attempt, task) for task in (lambda: store.renew(owner), store.gauges, lambda: store.find("x"))]
writing = gevent.spawn(write, 0)
gevent.joinall(others)
quick = time.perf_counter() - began
time.sleep(2)
held = writing.ready()
longest = max(gaps)
lock.communicate()
gevent.joinall([writing, *late])
store.write(owner, [], [ending(each) for each in answers])
deadline = time.monotonic() + 5
while len(heard) < len(answers) and time.monotonic() < deadline:
    time.sleep(0.01)
gevent.killall([ticker, listening])
whole = sum([seq for seq, _ in told(store.read(each.id, -1))] == [0, 1, 2] for each in answers)
store.close()
print(json.dumps({"longest": longest, "outcomes": outcomes, "quick": quick, "whole": whole, "heard": len(heard),
    "written_under_lock": held}))
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "log.db")


@pytest.fixture
def store(path: str) -> Iterator[SqliteStore]:
    store = SqliteStore(path, LEASE, ThreadLoop().lane)
    yield store
    store.close()


@contextmanager
def worker(path: str, name: str, rounds: int = ROUNDS) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", WORKER, path, str(LEASE), name, str(ANSWERS), str(rounds)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def says(process: subprocess.Popen[bytes], word: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().decode().strip() == word


def answers(name: str) -> list[str]:
    return [f"resp_{name}_{number}" for number in range(ANSWERS)]


def seqs(store: SqliteStore, id: str) -> list[int]:
    return [seq for seq, _ in told(store.read(id, -1))]


def reaped(store: SqliteStore, many: int) -> list[str]:
    found: list[str] = []
    deadline = time.monotonic() + REAPED_WITHIN
    while len(found) < many and time.monotonic() < deadline:
        found += store.reap()
        time.sleep(0.05)
    return sorted(found)


def test_processes_write_one_file_at_once_and_a_listener_misses_nothing(store: SqliteStore, path: str) -> None:
    names = ["a", "b", "c"]
    listener = store.listen("nobody")
    for name in names:
        for id in answers(name):
            listener.add(id)
    heard: dict[str, list[int]] = {id: [] for name in names for id in answers(name)}
    with ExitStack() as stack:
        processes = [stack.enter_context(worker(path, name)) for name in names]
        deadline = time.monotonic() + 30
        while sum(map(len, heard.values())) < len(heard) * ROUNDS * 3 and time.monotonic() < deadline:
            for batch in listener.wait(1)[0]:
                heard[batch.id] += range(batch.first, batch.last + 1)
        for process in processes:
            says(process, "admitted")
            says(process, "written")
        assert set(map(tuple, heard.values())) == {tuple(range(ROUNDS * 3))}
        assert all(seqs(store, id) == list(range(ROUNDS * 3)) for id in heard)
        gauges = store.gauges()
        assert (gauges["owners"], gauges["answers"], gauges["live"]) == (3, 24, 12)
        assert store.reap() == []
    assert [(each.name, each.answers) for each in store.usage(0, "user")] == [("a", 4), ("b", 4), ("c", 4)]


def test_a_killed_process_loses_its_answers_and_no_other_does(store: SqliteStore, path: str) -> None:
    with worker(path, "a") as killed, worker(path, "b") as alive:
        for process in (killed, alive):
            says(process, "admitted")
            says(process, "written")
        killed.kill()
        assert reaped(store, ANSWERS // 2) == answers("a")[1::2]
        for id in answers("a")[1::2]:
            assert isinstance(told(store.read(id, -1))[-1][1], Failure)
            assert seqs(store, id) == list(range(ROUNDS * 3 + 1))
        gauges = store.gauges()
        assert (gauges["owners"], gauges["live"]) == (1, ANSWERS // 2)


@contextmanager
def claimer(path: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", CLAIMER, path]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def taken(processes: list[subprocess.Popen[bytes]]) -> list[list[str]]:
    """What each took, when all began at once."""
    for process in processes:
        says(process, "ready")
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    return [json.loads(process.stdout.readline()) for process in processes if process.stdout is not None]


def test_processes_that_claim_from_one_file_at_once_get_each_answer_and_each_letter_once(
    store: SqliteStore, path: str
) -> None:
    owner = store.take_lease()
    waiting = [queued(owner, user="ann") for _ in range(QUEUED)]
    for each in waiting:
        store.admit(each, NONE)
    with ExitStack() as stack:
        processes = [stack.enter_context(claimer(path)) for _ in range(2)]
        first, second = taken(processes)
        assert first
        assert second
        assert sorted(first + second) == [each.id for each in waiting]
        letters = [id for got in taken(processes) for id in got]
        assert sorted(letters) == sorted(letter_id(each.id) for each in waiting)
    assert all(seqs(store, each.id) == [0, 1, 2] for each in waiting)
    assert [(each.name, each.answers, each.completed) for each in store.usage(0, "user")] == [("ann", QUEUED, QUEUED)]
    gauges = store.gauges()
    assert (gauges["queued"], gauges["live"], gauges["waiting"]) == (0, 0, QUEUED)


def test_processes_that_are_killed_while_they_write_leave_a_whole_file(store: SqliteStore, path: str) -> None:
    names = [f"w{number}" for number in range(6)]
    for number, name in enumerate(names):
        with worker(path, name, rounds=100000) as process:
            says(process, "admitted")
            deadline = time.monotonic() + 10
            while len(seqs(store, answers(name)[-1])) < 3 * (number + 1) and time.monotonic() < deadline:
                time.sleep(0.001)
            process.kill()
    assert reaped(store, len(names) * ANSWERS) == sorted(id for name in names for id in answers(name))
    for name in names:
        kept = [seqs(store, id) for id in answers(name)]
        assert kept[0] == list(range(len(kept[0])))
        assert all(each == kept[0] for each in kept), "a write of several answers is one transaction"
        assert len(kept[0]) % 3 == 1
    gauges = store.gauges()
    assert (gauges["owners"], gauges["live"], gauges["reserved"]) == (0, 0, 0)
    connection = open_file(path)
    assert connection.execute("PRAGMA integrity_check").get == "ok"
    connection.close()


def test_a_locked_file_does_not_stop_the_event_loop(tmp_path: Path) -> None:
    gaps: list[float] = []
    while len(gaps) < 3 and min(gaps, default=1.0) > 0.05:  # a busy machine stops it, too: a lock would each time
        command = [sys.executable, "-c", EVENT_LOOP, str(tmp_path / f"log{len(gaps)}.db"), HOLDER]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "Traceback" not in done.stderr
        found = json.loads(done.stdout)
        gaps.append(found["longest"])
        assert found["quick"] < 1.0
        assert found["outcomes"].count("down") == 20
        assert found["outcomes"].count("done") == 3
        assert (found["written_under_lock"], found["whole"], found["heard"]) == (False, 20, 20)
    assert min(gaps) < 0.05, gaps
