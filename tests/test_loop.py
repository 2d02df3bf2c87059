"""What both ways of waiting promise. The tests below run as they are in threads, and once more under gevent.

gevent patches a process for good, so its turn is a process of its own that patches first and runs this file.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streamchat.loop import NEVER, Loop, ThreadLoop, choose_loop

pytestmark = pytest.mark.usefixtures("no_socket_left")

# Far more than any of these waits needs; a failure, not a pace.
SOON = 5.0
# How late a wait may end: a tick of gevent's loop, and a busy machine.
LATE = 1.0

PATCHED = "from gevent import monkey; monkey.patch_all(); import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def loop() -> Loop:
    return choose_loop()


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def soon() -> float:
    return time.monotonic() + SOON


def later(task: Callable[[], object]) -> threading.Timer:
    """Does it when the caller is surely waiting; a timer that comes too early proves less, but is no failure."""
    timer = threading.Timer(0.03, task)
    timer.start()
    return timer


# The process


def test_the_loop_is_gevents_only_where_the_process_is_patched() -> None:
    gevent = sys.modules.get("gevent.monkey")
    patched = gevent is not None and gevent.is_module_patched("socket")
    assert type(choose_loop()).__name__ == ("GeventLoop" if patched else "ThreadLoop")


def test_gevent_is_not_imported_and_one_that_is_only_imported_changes_nothing_in_this_process() -> None:
    script = (
        "import sys, streamchat; streamchat.create_blueprint; print('gevent' in sys.modules);"
        "import gevent.monkey, streamchat.loop as loop; print(type(loop.choose_loop()).__name__)"
    )
    assert run([sys.executable, "-c", script]).split() == ["False", "ThreadLoop"]


def test_all_of_this_holds_under_gevent_that_is_not_in_this_process() -> None:
    told = run(
        [
            sys.executable,
            "-c",
            PATCHED,
            __file__,
            "-q",
            "-k",
            "not in_this_process",
            "-W",
            "error",
            "-p",
            "no:cacheprovider",
        ]
    )
    assert " passed" in told and "failed" not in told and "skipped" not in told


def run(command: list[str]) -> str:
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_threads_have_nothing_that_kills_from_outside_in_this_process() -> None:
    assert ThreadLoop().killed == ()


def test_what_kills_from_outside_can_be_caught(loop: Loop) -> None:
    assert all(issubclass(kind, BaseException) and not issubclass(kind, Exception) for kind in loop.killed)


# Waiting


def test_what_can_be_read_already_is_not_waited_for(loop: Loop, pair: Pair) -> None:
    pair[1].send(b"x")
    waiter = loop.waiter(pair[0].fileno())
    assert waiter.readable(soon()) is True
    assert waiter.readable(NEVER) is True
    assert pair[0].recv(1) == b"x"
    waiter.close()


@pytest.mark.parametrize("until", [soon, lambda: NEVER])
def test_a_wait_ends_when_there_is_something_to_read(loop: Loop, pair: Pair, until: Callable[[], float]) -> None:
    waiter = loop.waiter(pair[0].fileno())
    timer = later(lambda: pair[1].send(b"x"))
    assert waiter.readable(until()) is True
    timer.join()
    waiter.close()


def test_a_wait_ends_at_the_end_of_the_stream(loop: Loop, pair: Pair) -> None:
    waiter = loop.waiter(pair[0].fileno())
    timer = later(lambda: pair[1].shutdown(socket.SHUT_RDWR))
    assert waiter.readable(soon()) is True
    assert pair[0].recv(1) == b""
    timer.join()
    waiter.close()


def test_a_wait_ends_when_its_own_side_is_shut_down(loop: Loop, pair: Pair) -> None:
    waiter = loop.waiter(pair[0].fileno())
    timer = later(lambda: pair[0].shutdown(socket.SHUT_RDWR))
    assert waiter.readable(soon()) is True
    timer.join()
    waiter.close()


def test_a_wait_ends_at_its_time_and_does_not_disturb_what_it_waits_for(loop: Loop, pair: Pair) -> None:
    waiter = loop.waiter(pair[0].fileno())
    for _ in range(3):
        started = time.monotonic()
        assert waiter.readable(started + 0.05) is False
        assert 0.045 <= time.monotonic() - started < 0.05 + LATE
    pair[1].send(b"x")
    assert waiter.readable(soon()) is True
    assert pair[0].recv(1) == b"x"
    waiter.close()


@pytest.mark.parametrize("seconds", [0.0, -5.0])
def test_a_time_that_has_passed_only_asks(loop: Loop, pair: Pair, seconds: float) -> None:
    waiter = loop.waiter(pair[0].fileno())
    started = time.monotonic()
    assert waiter.readable(started + seconds) is False
    assert time.monotonic() - started < LATE
    pair[1].send(b"x")
    assert waiter.readable(started + seconds) is True
    waiter.close()


def test_waiting_to_write_ends_when_there_is_room(loop: Loop, pair: Pair) -> None:
    waiter = loop.waiter(pair[0].fileno())
    assert waiter.writable(soon()) is True
    pair[0].setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while pair[0].send(b"x" * 65536):
            pass
    assert waiter.writable(time.monotonic() + 0.02) is False

    def read_all() -> None:
        pair[1].settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            while pair[1].recv(1 << 20):
                pass

    timer = later(read_all)
    assert waiter.writable(soon()) is True
    timer.join()
    waiter.close()


def test_reading_and_writing_take_turns_on_one_waiter(loop: Loop, pair: Pair) -> None:
    waiter = loop.waiter(pair[0].fileno())
    for _ in range(3):
        assert waiter.writable(soon()) is True
        assert waiter.readable(time.monotonic() + 0.01) is False
        pair[1].send(b"x")
        assert waiter.readable(soon()) is True
        assert pair[0].recv(1) == b"x"
    waiter.close()


def test_two_waits_do_not_see_each_others_bytes_or_times(loop: Loop, pair: Pair) -> None:
    other, peer = socket.socketpair()
    with other, peer:
        ended: list[tuple[str, bool]] = []

        def wait(name: str, fd: int, until: float) -> threading.Thread:
            waiter = loop.waiter(fd)

            def task() -> None:
                ended.append((name, waiter.readable(until)))
                waiter.close()

            thread = threading.Thread(target=task)
            thread.start()
            return thread

        started = time.monotonic()
        long = wait("long", pair[0].fileno(), started + SOON)
        short = wait("short", other.fileno(), started + 0.05)
        short.join()
        assert ended == [("short", False)]
        pair[1].send(b"x")
        long.join()
        assert ended == [("short", False), ("long", True)]


def test_a_waiter_may_be_closed_twice_and_its_number_used_again(loop: Loop) -> None:
    for _ in range(50):
        left, right = socket.socketpair()
        with left, right:
            waiter = loop.waiter(left.fileno())
            right.send(b"x")
            assert waiter.readable(soon()) is True
            waiter.close()
            waiter.close()


def test_asking_once_neither_waits_nor_takes(loop: Loop, pair: Pair) -> None:
    assert loop.is_readable(pair[0].fileno()) is False
    pair[1].send(b"x")
    assert loop.is_readable(pair[0].fileno()) is True
    assert pair[0].recv(1) == b"x"
    assert loop.is_readable(pair[0].fileno()) is False
    pair[1].close()
    assert loop.is_readable(pair[0].fileno()) is True


def test_an_epoll_is_a_new_one_each_time(loop: Loop, pair: Pair) -> None:
    first, second = loop.epoll(), loop.epoll()
    assert first is not None and first.fileno() != second.fileno()
    first.register(pair[0].fileno(), 1)
    pair[1].send(b"x")
    assert [fd for fd, _ in first.poll(0)] == [pair[0].fileno()]
    assert second.poll(0) == []
    first.close()
    second.close()


# Beside


def test_a_task_runs_beside_its_caller(loop: Loop) -> None:
    mine, done = threading.get_ident(), threading.Event()
    ran: list[int] = []

    def task() -> None:
        ran.append(threading.get_ident())
        done.set()

    loop.spawn(task)
    assert done.wait(SOON)
    assert ran and ran[0] != mine


def test_a_task_may_wait_while_its_caller_goes_on(loop: Loop, pair: Pair) -> None:
    done = threading.Event()

    def task() -> None:
        waiter = loop.waiter(pair[0].fileno())
        if waiter.readable(soon()):
            done.set()
        waiter.close()

    loop.spawn(task)
    pair[1].send(b"x")
    assert done.wait(SOON)


# Attending


def nothing() -> None:
    pass


def test_ready_is_called_when_the_descriptor_can_be_read(loop: Loop, pair: Pair) -> None:
    ready = threading.Event()

    def read() -> None:
        pair[0].setblocking(False)
        assert pair[0].recv(16)
        ready.set()

    stop = loop.attend(pair[0].fileno(), read, nothing)
    for _ in range(3):
        ready.clear()
        pair[1].send(b"x")
        assert ready.wait(SOON)
    stop()


def test_the_tick_comes_once_a_second(loop: Loop, pair: Pair) -> None:
    ticked = threading.Semaphore(0)
    times: list[float] = []

    def tick() -> None:
        times.append(time.monotonic())
        ticked.release()

    started = time.monotonic()
    stop = loop.attend(pair[0].fileno(), nothing, tick)
    for _ in range(2):
        assert ticked.acquire(timeout=SOON)
    stop()
    assert 0.8 <= times[0] - started < 1 + LATE
    assert 0.8 <= times[1] - times[0] < 1 + LATE


def test_the_tick_comes_also_while_there_is_always_something_to_read(loop: Loop, pair: Pair) -> None:
    ticked = threading.Event()

    def read() -> None:
        pair[0].setblocking(False)
        pair[0].recv(1)
        pair[1].send(b"x")

    stop = loop.attend(pair[0].fileno(), read, ticked.set)
    pair[1].send(b"x")
    assert ticked.wait(SOON)
    stop()


def test_after_the_stop_nothing_is_called(loop: Loop, pair: Pair) -> None:
    called = threading.Event()
    for _ in range(20):
        stop = loop.attend(pair[0].fileno(), called.set, called.set)
        stop()
        pair[1].send(b"x")
        assert not called.wait(0.002)
        assert pair[0].recv(1) == b"x"


def test_attending_leaves_no_descriptor_and_no_thread_behind(loop: Loop, pair: Pair) -> None:
    loop.attend(pair[0].fileno(), nothing, nothing)()  # what is made once and kept is made now
    assert_ends(lambda: not attendants())
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        loop.attend(pair[0].fileno(), nothing, nothing)()
    assert_ends(lambda: len(os.listdir("/proc/self/fd")) == before)
    assert_ends(lambda: not attendants())


def attendants() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "streamchat-attendant"]


def assert_ends(reached: Callable[[], bool]) -> None:
    deadline = soon()
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# A bell


def test_a_ring_wakes_who_waits(loop: Loop) -> None:
    bell = loop.bell()
    ringing = later(bell.ring)
    assert bell.wait(soon())
    ringing.join()


def test_a_ring_that_nobody_waits_for_is_kept_and_counts_once(loop: Loop) -> None:
    bell = loop.bell()
    bell.ring()
    bell.ring()
    assert bell.wait(soon())
    assert not bell.wait(time.monotonic())


@pytest.fixture
def others() -> Iterator[None]:
    """gevent takes a wait that nobody can end for a mistake, and counts no ticker; a worker always listens."""
    timer = threading.Timer(SOON, lambda: None)
    timer.start()
    yield
    timer.cancel()
    timer.join()


@pytest.mark.usefixtures("others")
def test_a_wait_for_a_bell_ends_at_its_time(loop: Loop) -> None:
    begin = time.monotonic()
    assert not loop.bell().wait(begin + 0.05)
    assert 0.05 <= time.monotonic() - begin < LATE


@pytest.mark.usefixtures("others")
def test_a_ring_of_one_bell_does_not_end_a_wait_for_another(loop: Loop) -> None:
    """A ring and the end of its wait at the same moment must not reach what the same greenlet waits for next."""
    first, second = loop.bell(), loop.bell()
    for _ in range(20):
        ringing = threading.Timer(0.02, first.ring)
        ringing.start()
        first.wait(time.monotonic() + 0.02)
        assert not second.wait(time.monotonic() + 0.03)
        ringing.join()


def interrupted(task: Callable[[], object], each: Callable[[], object]) -> object:
    """What the task returns; something is done at each call and return in it, as by the collector.

    In a thread of its own: what waits for itself fails, and does not hang.
    """
    returned: list[object] = []

    def run() -> None:
        sys.setprofile(lambda *_: each())
        try:
            ended = task()
        finally:
            sys.setprofile(None)
        returned.append(ended)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SOON)
    assert returned, "it hangs"
    return returned[0]


def test_a_bell_may_be_rung_at_any_moment_of_a_ring(loop: Loop) -> None:
    bell = loop.bell()
    interrupted(bell.ring, bell.ring)
    assert bell.wait(soon())
    assert not bell.wait(time.monotonic())


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("moment", range(16))
def test_a_ring_at_any_moment_of_a_wait_ends_it_or_is_kept(loop: Loop, moment: int) -> None:
    """Also in the very thread that waits. There are fewer moments than these."""
    bell, left = loop.bell(), [moment]

    def ring() -> None:
        left[0] -= 1
        if left[0] == -1:
            bell.ring()

    ended = interrupted(lambda: bell.wait(time.monotonic() + 0.05), ring)
    assert left[0] >= 0 or ended or bell.wait(time.monotonic())


# A lane


def test_a_lane_returns_what_its_task_returns_and_raises_what_it_raises(loop: Loop) -> None:
    lane = loop.lane()
    try:
        assert lane.run(lambda: 7) == 7
        with pytest.raises(KeyError, match="gone"):
            lane.run(lambda: dict[str, int]()["gone"])
    finally:
        lane.close()
        lane.close()


def test_the_tasks_of_a_lane_run_one_after_the_other(loop: Loop) -> None:
    lane, running, most = loop.lane(), [0], [0]

    def task() -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        os.sched_yield()
        running[0] -= 1

    threads = [threading.Thread(target=lambda: lane.run(task)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lane.close()
    assert most == [1]


def test_others_run_while_a_task_is_in_its_lane(loop: Loop) -> None:
    """A native wait, which gevent cannot interrupt: only a thread of its own lets the others run."""
    lane, gate = loop.lane(), os.pipe()
    try:
        later(lambda: os.write(gate[1], b"x"))
        assert lane.run(lambda: native_read(gate[0])) == b"x"
    finally:
        lane.close()
        os.close(gate[0])
        os.close(gate[1])


def test_a_lane_takes_the_core_from_nobody() -> None:
    """Woken while others hold the interpreter's lock, its thread could only wait for that."""
    script = (
        "import os; from gevent import monkey; monkey.patch_all(); from streamchat.loop import choose_loop;"
        "lane = choose_loop().lane(); print(lane.run(lambda: os.sched_getscheduler(0)) == os.SCHED_BATCH,"
        "os.sched_getscheduler(0) == os.SCHED_OTHER); lane.close()"
    )
    assert run([sys.executable, "-c", script]).split() == ["True", "True"]


def test_a_lane_serves_others_and_closes_when_a_caller_was_killed() -> None:
    """Threads cannot be killed from outside: the lane is gevent's."""
    script = (
        "from gevent import monkey; monkey.patch_all(); import gevent, os; from streamchat.loop import choose_loop;"
        "lane, (out, into) = choose_loop().lane(), os.pipe(); native = monkey.get_original('os', 'read');"
        "asking = gevent.spawn(lane.run, lambda: native(out, 1)); gevent.sleep(0.01); asking.kill();"
        "os.write(into, b'x'); print(asking.dead, lane.run(lambda: 7));"
        "late = gevent.spawn(lane.run, lambda: 8); gevent.sleep(0); late.kill(); lane.close(); lane.close();"
        "gevent.get_hub().join(5); print('over')"
    )
    assert run([sys.executable, "-c", script]).split() == ["True", "7", "over"]


def native_read(fd: int) -> bytes:
    return os.read(fd, 1)  # gevent does not patch it
