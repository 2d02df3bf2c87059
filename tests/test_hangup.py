"""The caller's socket: who leaves is seen, whoever is told so; an answer that is broken off looks broken."""

from __future__ import annotations

import errno
import gc
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from streamchat.answer import Answer
from streamchat.hangup import Caller, Hangups
from streamchat.loop import choose_loop
from tests.fake_upstream import FakeUpstream, Gate, Hang, Rst, Step, error, head, text
from tests.shop import SSE, STREAMS, TEXT, call, open_shop, post_bytes, read_all, read_until, serve, wait_until

SEEN_WITHIN = 0.3  # seconds; the live trials measure it, here it is only "at once"


@pytest.fixture
def upstream(http: str, upstream: FakeUpstream) -> FakeUpstream:
    return upstream


@pytest.fixture
def hangups() -> Iterator[Hangups]:
    made = Hangups(choose_loop(), lambda: None)
    yield made
    made.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Ours and the caller's end of one TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        caller = socket.create_connection(listener.getsockname(), timeout=5)
        ours, _ = listener.accept()
    ours.settimeout(5)
    with ours, caller:
        yield ours, caller


def leave_by_fin(sock: socket.socket) -> None:
    sock.close()


def leave_by_reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def leave_by_half_close(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


def leave_after_a_stray_line(sock: socket.socket) -> None:
    sock.sendall(b"\r\n")
    time.sleep(0.05)  # the line must be there first, alone
    sock.close()


def leave_after_a_pipelined_request(sock: socket.socket) -> None:
    sock.sendall(post_bytes())
    time.sleep(0.05)
    sock.close()


Leave = Callable[[socket.socket], None]
LEAVINGS: list[Leave] = [
    leave_by_fin,
    leave_by_reset,
    leave_by_half_close,
    leave_after_a_stray_line,
    leave_after_a_pipelined_request,
]


@pytest.mark.parametrize("leave", LEAVINGS)
def test_who_leaves_is_seen_once(leave: Leave, hangups: Hangups, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, caller = pair
    seen = threading.Semaphore(0)

    def left() -> None:
        seen.release()

    hangups.watch(ours.fileno(), left)
    leave(caller)
    assert seen.acquire(timeout=SEEN_WITHIN)
    assert not seen.acquire(timeout=0.1)  # a second call would come at once


def test_data_from_a_caller_is_not_its_end(hangups: Hangups, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, caller = pair
    gone = threading.Event()
    hangups.watch(ours.fileno(), gone.set)
    caller.sendall(b"\r\nGET / HTTP/1.1\r\n\r\n")
    assert not gone.wait(0.15)
    caller.close()
    assert gone.wait(SEEN_WITHIN)
    assert ours.recv(100) == b"\r\nGET / HTTP/1.1\r\n\r\n"  # and nothing of it was read


def test_data_that_waits_keeps_no_processor_busy(hangups: Hangups, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, caller = pair
    hangups.watch(ours.fileno(), lambda: None)
    caller.sendall(b"x")
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.15


def test_who_leaves_unwatched_is_nobodys_business(hangups: Hangups, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, caller = pair
    gone = threading.Event()
    hangups.watch(ours.fileno(), gone.set)
    hangups.unwatch(ours.fileno())
    hangups.unwatch(ours.fileno())
    caller.close()
    assert not gone.wait(0.15)


def test_a_caller_who_had_left_before_the_watch_is_seen(
    hangups: Hangups, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, caller = pair
    caller.close()
    time.sleep(0.02)
    gone = threading.Event()
    hangups.watch(ours.fileno(), gone.set)
    assert gone.wait(SEEN_WITHIN)


def test_a_server_that_shows_no_socket_is_not_watched(hangups: Hangups) -> None:
    hangups.watch(-1, lambda: None)
    hangups.unwatch(-1)
    assert hangups._watched == {}


def test_a_watch_that_fails_leaves_the_other_one_alone(
    hangups: Hangups, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, caller = pair
    gone = threading.Event()
    hangups.watch(ours.fileno(), gone.set)
    with pytest.raises(FileExistsError):
        hangups.watch(ours.fileno(), lambda: None)
    caller.close()
    assert gone.wait(SEEN_WITHIN)


def test_the_tick_comes_once_a_second_and_ends_with_the_close() -> None:
    ticks: list[float] = []
    made = Hangups(choose_loop(), lambda: ticks.append(time.monotonic()))
    wait_until(lambda: len(ticks) == 2, "no second tick", 4)
    assert 0.8 < ticks[1] - ticks[0] < 1.2
    made.close()


def test_closing_while_callers_leave_raises_nowhere() -> None:
    for _ in range(30):
        made = Hangups(choose_loop(), lambda: None)
        left, right = socket.socketpair()
        made.watch(left.fileno(), lambda: None)
        right.close()
        made.close()
        left.close()
    gc.collect()


# --- the caller -----------------------------------------------------------------------------------------


def test_the_callers_buffer_is_bounded(pair: tuple[socket.socket, socket.socket]) -> None:
    Caller(pair[0])
    assert pair[0].getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * 32768  # Linux doubles what it is told


@pytest.mark.parametrize("name", ["gunicorn.socket", "gunicorn.sock", "werkzeug.socket"])
def test_the_socket_is_found_where_servers_put_it(name: str, pair: tuple[socket.socket, socket.socket]) -> None:
    assert Caller.from_environ({name: pair[0]}).fileno() == pair[0].fileno()


def test_without_a_socket_nothing_is_done_but_the_raise() -> None:
    caller = Caller.from_environ({})
    assert caller.fileno() == -1
    caller.hang_up()
    with pytest.raises(ConnectionResetError):
        caller.break_off()


def test_a_closed_socket_is_none(pair: tuple[socket.socket, socket.socket]) -> None:
    caller = Caller(pair[0])
    pair[0].close()
    assert caller.fileno() == -1
    caller.hang_up()


def test_hanging_up_wakes_who_is_writing(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = pair
    caller = Caller(ours)
    failed: list[OSError] = []

    def write() -> None:
        try:
            ours.sendall(bytes(50_000_000))
        except OSError as broken:
            failed.append(broken)

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.1)  # it must be blocked
    assert writer.is_alive()
    caller.hang_up()
    writer.join(5)
    assert len(failed) == 1 and not isinstance(failed[0], TimeoutError)


def test_a_connection_of_several_answers_is_left_by_a_reset_that_gunicorn_does_not_log(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    caller = Caller.from_environ({"gunicorn.socket": pair[0], "SERVER_PROTOCOL": "HTTP/2"})
    with pytest.raises(ConnectionResetError) as caught:
        caller.break_off()
    assert caught.value.errno == errno.ECONNRESET
    pair[0].sendall(b"of another answer")
    assert pair[1].recv(20) == b"of another answer"


def test_an_answer_by_http_10_is_reset(pair: tuple[socket.socket, socket.socket]) -> None:
    caller = Caller.from_environ({"gunicorn.socket": pair[0], "SERVER_PROTOCOL": "HTTP/1.0"})
    pair[0].sendall(b"one")
    assert pair[1].recv(3) == b"one"
    caller.break_off()
    pair[0].close()
    with pytest.raises(ConnectionResetError):
        pair[1].recv(1)


@pytest.mark.parametrize("name", ["gunicorn.socket", "gunicorn.sock", "werkzeug.socket"])
def test_a_server_is_left_by_a_normal_end_on_a_dead_socket(
    name: str, pair: tuple[socket.socket, socket.socket]
) -> None:
    caller = Caller.from_environ({name: pair[0], "SERVER_PROTOCOL": "HTTP/1.1"})
    caller.break_off()
    with pytest.raises(BrokenPipeError):
        pair[0].sendall(b"0\r\n\r\n")
    assert pair[1].recv(10) == b""


# --- through a server -----------------------------------------------------------------------------------


STATES: dict[str, tuple[list[Step], bytes]] = {
    "before the head": ([Hang()], b""),
    "before the first piece": ([head(), Hang()], b""),
    "between pieces": ([head(), text("one"), Hang()], b"one"),
}


@pytest.mark.parametrize("leave", [leave_by_fin, leave_by_reset, leave_by_half_close, leave_after_a_stray_line])
@pytest.mark.parametrize(("script", "read"), STATES.values(), ids=STATES)
@pytest.mark.parametrize("accept", [TEXT, SSE])
def test_whoever_leaves_whenever_pays_for_one_call_that_ends_at_once(
    accept: str, script: list[Step], read: bytes, leave: Leave, upstream: FakeUpstream
) -> None:
    upstream.script = script
    options: dict[str, Any] = {"status_hold": 0.02, "max_retries": 2}
    with open_shop(**options) as shop, serve(shop.app) as port, call(port, post_bytes(accept=accept)) as sock:
        (asked,) = upstream.wait_for_requests(1)
        if read:
            read_until(sock, read)
        leave(sock)
        left = time.monotonic()
        assert asked.wait_left() - left < SEEN_WITHIN
        assert shop.the_record().outcome == "caller_left"
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("leave", [leave_by_fin, leave_by_reset, leave_by_half_close])
def test_who_leaves_in_the_wait_before_a_retry_pays_for_no_second_call(leave: Leave, upstream: FakeUpstream) -> None:
    upstream.script = error(500, headers={"Retry-After": "3"})
    with open_shop(max_retries=2) as shop, serve(shop.app) as port:
        with call(port, post_bytes()) as sock:
            upstream.wait_for_requests(1)
            (running,) = shop.mounts[0].process.live._running
            assert isinstance(running, Answer)
            wait_until(lambda: running.tally.trail.status == 500, "the first attempt has not failed")
            leave(sock)
            left = time.monotonic()
            shop.wait_records()
            assert time.monotonic() - left < SEEN_WITHIN
        record = shop.the_record()
        assert (record.outcome, record.attempts, record.upstream_status) == ("caller_left", 1, 500)
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("accept", STREAMS)
def test_who_only_half_closed_sees_no_clean_end(accept: str, upstream: FakeUpstream) -> None:
    upstream.script = [head(), text("one"), Hang()]
    with open_shop() as shop, serve(shop.app) as port:
        with call(port, post_bytes(accept=accept)) as sock:
            read_until(sock, b"one")
            sock.shutdown(socket.SHUT_WR)
            rest = read_all(sock)
        assert b"0\r\n\r\n" not in rest and b"finish" not in rest
        assert shop.the_record().outcome == "caller_left"


def test_a_broken_answer_logs_no_traceback(upstream: FakeUpstream, capfd: pytest.CaptureFixture[str]) -> None:
    gate = Gate()
    upstream.script = [head(), text("one"), gate, Rst()]
    with open_shop() as shop, serve(shop.app) as port:
        with call(port, post_bytes()) as sock:
            read_until(sock, b"one")
            gate.open()
            assert b"0\r\n\r\n" not in read_all(sock)
        shop.the_record()
    said: Any = capfd.readouterr()
    assert "Traceback" not in said.err + said.out
