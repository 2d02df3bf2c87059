"""What the beginning and the end of an answer cost does not grow with the number of answers that are running."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from types import FrameType
from typing import Any

import pytest

from streamchat.cancellation import Cancellation
from streamchat.connection import Connection
from streamchat.hangup import Caller, Hangups
from streamchat.live import Live
from streamchat.loop import ThreadLoop
from streamchat.transport import FastTransport, Route

FEW, MANY = 10, 1000
KEY = Route("http", "model", 80)


def steps(task: Callable[[], object]) -> int:
    """The lines of Python that the task runs, in this thread."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        task()
    finally:
        sys.settrace(before)
    return count


class Running:
    """What the sweep needs of an answer."""

    asks = True

    def __init__(self) -> None:
        self.cancellation, self.caller = Cancellation(), Caller()
        self.user: str | None = None
        self.started, self.writing_since = time.monotonic(), 0.0

    def caller_stalled(self) -> None:
        """It reads all."""

    def tick(self, now: float) -> None:
        """Nothing is due."""

    def release(self) -> None:
        """Nothing is held."""


@contextmanager
def slots(running: int) -> Iterator[Callable[[], object]]:
    live = Live(ThreadLoop(), most=MANY + 1, write_timeout=30, total_timeout=60, tidy=lambda: None)
    for _ in range(running):
        live.admit(Running())

    def one_more() -> None:
        answer = Running()
        live.admit(answer)
        live.leave(answer)
        assert len(live) == running

    with closing(live):
        yield one_more


@contextmanager
def watches(running: int) -> Iterator[Callable[[], object]]:
    ours, theirs = socket.socketpair()
    with ours, theirs, ExitStack() as stack:
        hangups = stack.enter_context(closing(Hangups(ThreadLoop(), tick=lambda: None)))
        # A third of them: where 1,024 descriptors are allowed, others need some too.
        for _ in range(running // 3):
            stack.callback(os.close, fd := os.dup(ours.fileno()))
            hangups.watch(fd, lambda: None)

        def one_more() -> None:
            hangups.watch(ours.fileno(), lambda: None)
            hangups.unwatch(ours.fileno())
            assert len(hangups._watched) == running // 3

        yield one_more


@contextmanager
def connections(running: int) -> Iterator[Callable[[], object]]:
    """So many in use, and as many idle."""
    loop = ThreadLoop()
    ours, theirs = socket.socketpair()
    transport = FastTransport(loop, MANY + 1)
    with theirs, closing(transport):
        for _ in range(running):
            transport._enter()
        connection = Connection(loop, ours, Cancellation())
        connection.rest()
        connection.idle_since = time.monotonic()
        transport._idle[KEY] = [connection] * running

        def one_more() -> None:
            transport._enter()
            taken = transport._take(KEY)
            assert taken is connection
            taken.serve(Cancellation())
            transport.give_back(KEY, taken, kept=True)
            assert (transport._live, len(transport._idle[KEY])) == (running, running)

        yield one_more


@pytest.mark.parametrize("books", [slots, watches, connections])
def test_a_beginning_and_an_end_cost_the_same_however_many_run(books: Any) -> None:
    costs = []
    for running in (FEW, MANY):
        with books(running) as one_more:
            one_more()
            costs.append(steps(one_more))
    assert costs[0] == costs[1] > 0
