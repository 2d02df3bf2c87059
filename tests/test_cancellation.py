"""Cancelling: first reason wins, whoever reads is woken, nobody else's socket is touched."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from streamchat.cancellation import Cancellation, shut_down
from streamchat.errors import CallerGone, Draining, StreamChatError, UpstreamTimeout

pytestmark = pytest.mark.usefixtures("no_socket_left")

# Far more than any of these waits needs; a failure, not a pace.
SOON = 5.0


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    left.settimeout(SOON)
    right.settimeout(SOON)
    with left, right:
        yield left, right


def beside(task: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=task)
    thread.start()
    return thread


def is_alive(left: socket.socket, right: socket.socket) -> bool:
    left.send(b"x")
    return right.recv(1) == b"x"


def test_nothing_is_cancelled_until_somebody_does() -> None:
    cancellation = Cancellation()
    assert cancellation.error is None
    cancellation.check()
    cancellation.end_connection()
    cancellation.drop()
    assert cancellation.error is None


def test_the_first_reason_stays_for_ever() -> None:
    cancellation = Cancellation()
    first = CallerGone()
    assert cancellation.cancel(first) is True
    assert cancellation.cancel(Draining()) is False
    assert cancellation.error is first
    for _ in range(2):
        with pytest.raises(CallerGone) as caught:
            cancellation.check()
        assert caught.value is first


def test_of_many_threads_only_one_is_first() -> None:
    for _ in range(20):
        cancellation = Cancellation()
        gate = threading.Barrier(8)
        won: list[StreamChatError] = []

        def race(
            cancellation: Cancellation = cancellation,
            gate: threading.Barrier = gate,
            won: list[StreamChatError] = won,
        ) -> None:
            mine = Draining()
            gate.wait()
            if cancellation.cancel(mine):
                won.append(mine)

        for thread in [beside(race) for _ in range(8)]:
            thread.join()
        assert won == [cancellation.error]


def test_cancelling_shuts_the_held_connection_down_but_does_not_close_it(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    mine, peer = pair
    cancellation = Cancellation()
    cancellation.hold(mine.fileno())
    cancellation.cancel(CallerGone())
    assert peer.recv(1) == b""
    assert mine.recv(1) == b""
    assert mine.fileno() == os.dup2(mine.fileno(), mine.fileno())  # still open: its owner closes it


def test_cancelling_wakes_whoever_reads(pair: tuple[socket.socket, socket.socket]) -> None:
    mine, _ = pair
    cancellation = Cancellation()
    cancellation.hold(mine.fileno())
    heard: list[bytes] = []
    reader = beside(lambda: heard.append(mine.recv(1)))
    cancellation.cancel(CallerGone())
    reader.join(SOON)
    assert heard == [b""]


def test_a_connection_that_is_held_too_late_is_shut_down_at_once(pair: tuple[socket.socket, socket.socket]) -> None:
    cancellation = Cancellation()
    cancellation.cancel(CallerGone())
    cancellation.hold(pair[0].fileno())
    assert pair[1].recv(1) == b""


def test_a_duplicate_that_is_held_too_late_is_shut_down_at_once(pair: tuple[socket.socket, socket.socket]) -> None:
    cancellation = Cancellation()
    cancellation.cancel(CallerGone())
    cancellation.hold_duplicate(pair[0].fileno())
    assert pair[1].recv(1) == b""
    cancellation.drop()


@pytest.mark.parametrize("hold", [Cancellation.hold, Cancellation.hold_duplicate])
def test_a_dropped_connection_is_left_alone(
    hold: Callable[[Cancellation, int], None], pair: tuple[socket.socket, socket.socket]
) -> None:
    cancellation = Cancellation()
    hold(cancellation, pair[0].fileno())
    cancellation.drop()
    cancellation.cancel(CallerGone())
    cancellation.end_connection()
    assert is_alive(*pair)


def test_only_the_latest_connection_counts(pair: tuple[socket.socket, socket.socket]) -> None:
    other, peer = socket.socketpair()
    with other, peer:
        cancellation = Cancellation()
        cancellation.hold(pair[0].fileno())
        cancellation.drop()
        cancellation.hold(other.fileno())
        cancellation.cancel(CallerGone())
        assert peer.recv(1) == b""
        assert is_alive(*pair)


def test_a_duplicate_cannot_become_another_connection(pair: tuple[socket.socket, socket.socket]) -> None:
    library, peer = socket.socketpair()
    cancellation = Cancellation()
    number = library.fileno()
    cancellation.hold_duplicate(number)
    library.close()  # a library closes when it likes, and the number is used again
    assert os.dup2(pair[0].fileno(), number) == number
    try:
        cancellation.cancel(CallerGone())
        assert peer.recv(1) == b""
        assert is_alive(*pair)
    finally:
        os.close(number)
        peer.close()
        cancellation.drop()


def test_a_duplicate_is_closed_when_it_is_dropped(pair: tuple[socket.socket, socket.socket]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    cancellation = Cancellation()
    for _ in range(3):
        cancellation.hold_duplicate(pair[0].fileno())
        cancellation.drop()
        cancellation.drop()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_second_duplicate_replaces_the_first_without_a_leak(pair: tuple[socket.socket, socket.socket]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    cancellation = Cancellation()
    for _ in range(3):
        cancellation.hold_duplicate(pair[0].fileno())
    cancellation.drop()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_descriptor_that_is_not_ours_is_never_closed(pair: tuple[socket.socket, socket.socket]) -> None:
    cancellation = Cancellation()
    cancellation.hold_duplicate(pair[1].fileno())
    cancellation.hold(pair[0].fileno())
    cancellation.drop()
    assert is_alive(*pair)


def test_a_cancelled_duplicate_leaves_no_descriptor_behind(pair: tuple[socket.socket, socket.socket]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    cancellation = Cancellation()
    cancellation.hold_duplicate(pair[0].fileno())
    cancellation.cancel(CallerGone())
    cancellation.drop()
    assert len(os.listdir("/proc/self/fd")) == before


def test_ending_a_connection_gives_no_reason(pair: tuple[socket.socket, socket.socket]) -> None:
    cancellation = Cancellation()
    cancellation.hold(pair[0].fileno())
    cancellation.end_connection()
    assert pair[1].recv(1) == b""
    assert cancellation.error is None
    cancellation.check()


def test_cancelling_survives_a_peer_that_has_left_and_a_descriptor_that_is_gone(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    pair[1].close()
    cancellation = Cancellation()
    cancellation.hold(pair[0].fileno())
    assert cancellation.cancel(CallerGone())
    unconnected = socket.socket()
    number = unconnected.fileno()
    shut_down(number)
    unconnected.close()
    shut_down(number)
    late = Cancellation()
    late.hold(number)
    assert late.cancel(CallerGone())


def test_callbacks_run_once_on_cancelling_and_at_once_afterwards() -> None:
    cancellation = Cancellation()
    told: list[str] = []
    cancellation.then(lambda: told.append(f"a {type(cancellation.error).__name__}"))
    cancellation.then(lambda: told.append("b"))
    assert told == []
    cancellation.cancel(CallerGone())
    cancellation.cancel(Draining())
    assert sorted(told) == ["a CallerGone", "b"]
    cancellation.then(lambda: told.append("late"))
    assert told[-1] == "late" and len(told) == 3


def test_the_connection_ends_even_if_a_callback_asks_about_the_cancellation(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    # A callback under the lock of the cancellation would wait for itself.
    cancellation = Cancellation()
    cancellation.hold(pair[0].fileno())
    cancellation.then(lambda: cancellation.drop())
    cancellation.then(lambda: cancellation.then(lambda: None))
    done = beside(lambda: cancellation.cancel(CallerGone()))
    done.join(SOON)
    assert not done.is_alive()
    assert pair[1].recv(1) == b""


def test_a_sleep_that_nobody_ends_lasts_its_time() -> None:
    started = time.monotonic()
    Cancellation().sleep(0.02)
    assert 0.02 <= time.monotonic() - started < SOON


def test_a_sleep_ends_with_the_reason_as_soon_as_there_is_one() -> None:
    cancellation = Cancellation()
    reason = UpstreamTimeout()
    canceller = threading.Timer(0.02, cancellation.cancel, [reason])
    canceller.start()
    started = time.monotonic()
    with pytest.raises(UpstreamTimeout) as caught:
        cancellation.sleep(60)
    canceller.join()
    assert caught.value is reason
    assert time.monotonic() - started < SOON


@pytest.mark.parametrize("seconds", [60, 0, -1])
def test_a_sleep_after_cancelling_does_not_begin(seconds: float) -> None:
    cancellation = Cancellation()
    cancellation.cancel(CallerGone())
    with pytest.raises(CallerGone):
        cancellation.sleep(seconds)
