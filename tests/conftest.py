"""Hypothesis profiles, and a detector of threads and sockets that a test leaves behind."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import settings

# No deadline: a noisy machine is no bug. The same examples every time where a red run must be repeatable.
settings.register_profile("here", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "here")

# Threads that were told to end may need a moment for it.
LEAVE_WITHIN = 2.0

Thing = TypeVar("Thing")

# Classes of tests that others subclass: their assertions tell values, too.
pytest.register_assert_rewrite("tests.store_contract", "tests.queue_contract")


def surplus(now: Callable[[], set[Thing]], before: set[Thing]) -> set[Thing]:
    """What is there now and was not before, once it had its time to go."""
    deadline = time.monotonic() + LEAVE_WITHIN
    while (left := now() - before) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    return left


def threads() -> set[threading.Thread]:
    """Daemon threads belong to whoever keeps an application open, and end with it."""
    return {thread for thread in threading.enumerate() if not thread.daemon}


def sockets() -> set[str]:
    """The open sockets of this process, by inode: a number that is not used twice."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except FileNotFoundError:  # the descriptor of this very listing
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found


@pytest.fixture(params=["auto", "sdk"])
def http(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to the upstream: our own transport, and the SDK's own HTTP. Shops that are opened take this one."""
    monkeypatch.setenv("STREAMCHAT_HTTP", request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = threads()
    yield
    assert not surplus(threads, before), "the test left threads behind"


@pytest.fixture
def no_socket_left() -> Iterator[None]:
    """For tests that keep no application open: its pool may hold on to upstream connections."""
    before = sockets()
    yield
    assert not surplus(sockets, before), "the test left sockets open"
