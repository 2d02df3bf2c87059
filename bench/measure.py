"""One load on one running server becomes figures. CPU is counted in a window between the openings and the endings."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from .load import Load, Question
from .machine import cpu_seconds, memory_bytes, waited_seconds
from .peers import Server

OPENINGS_A_SECOND = 100.0  # a server that needs 5 ms for each is half busy
SETTLE_SECONDS = 0.25
OVERDUE_SECONDS = 30.0  # a server that is too slow gets so much longer than its load lasts, and as long again

Figures = dict[str, float]


class Incomplete(Exception):
    """Says how many answers were not whole: then no figure counts."""


@dataclass(frozen=True)
class Sizes:
    """How much of each load. `repeats` of small loads, `big_repeats` of those with many streams.

    The loads of one of the `groups` run on one server, one after the other; memory is measured on a young one.
    """

    seconds: float
    big_seconds: float
    streams: int
    full_streams: int
    full_pieces: int
    single_seconds: float
    single_timed: int
    many: int
    warm_seconds: float
    repeats: int
    big_repeats: int
    groups: tuple[tuple[str, ...], ...]
    tails: int  # readers of answers of another server


SMALL, BIG = ("piece50", "piece10", "full", "single"), ("open", "silent")
FULL = Sizes(6.0, 60.0, 50, 20, 3000, 3.0, 100, 2000, 2.0, 3, 1, (SMALL, BIG), 1000)
QUICK = Sizes(0.8, 1.5, 50, 20, 1000, 0.5, 20, 60, 0.3, 1, 1, (BIG + SMALL,), 100)


class Window:
    """CPU time, waiting for the core, pieces and whole answers between its making and its end."""

    def __init__(self, server: Server, load: Load) -> None:
        self._server = server
        self._load = load
        self._begin = self._now()
        self.cpu = self.waiting = self.pieces = self.whole = self.seconds = 0.0

    def _now(self) -> tuple[float, ...]:
        pid, tally = self._server.pid, self._load.tally
        return cpu_seconds(pid), waited_seconds(pid), tally.pieces, tally.whole, time.monotonic()

    def end(self) -> None:
        self.cpu, self.waiting, self.pieces, self.whole, self.seconds = (
            after - before for before, after in zip(self._begin, self._now(), strict=True)
        )

    def cpu_for_each(self, count: float) -> float:
        """NaN where there was nothing to count: a server so slow that its answers began when they were over."""
        return self.cpu / count if count else math.nan

    @property
    def waited(self) -> float:
        """The part of the time in which somebody else had the server's core."""
        return self.waiting / self.seconds


def warm_up(server: Server, sizes: Sizes) -> None:
    """Pieces and requests that nobody counts: compilers, pools and caches are as they will be."""
    paced(server, 20, 0.01, sizes.warm_seconds)
    single(server, sizes.warm_seconds, 1)


def paced(server: Server, streams: int, pause: float, seconds: float) -> Figures:
    """Pieces at a steady pace on streams that stay open: CPU and delay of a piece, memory of a stream."""
    ramp = streams / OPENINGS_A_SECOND
    pieces = math.ceil((ramp * 1.2 + 2 * SETTLE_SECONDS + seconds) / pause)
    before = memory_bytes(server.pid)
    with closing(Load(Question(server.port, pieces, pause))) as load:
        load.plan(streams, ramp)
        load.run(lambda: load.begun, ramp + OVERDUE_SECONDS)
        load.run_for(SETTLE_SECONDS)
        load.tally.timing = True
        window = Window(server, load)
        load.run(lambda: load.tally.pieces > streams * pieces * 0.95, seconds)
        window.end()
        load.tally.timing = False
        memory = memory_bytes(server.pid) - before
        _finish(load, streams, pieces * pause)
        return {
            "us": window.cpu_for_each(window.pieces) * 1e6,
            "p50": quantile(load.tally.delays, 50) * 1e3,
            "p99": quantile(load.tally.delays, 99) * 1e3,
            "kb": memory / streams / 1e3,
            "waited": window.waited,
        }


def full_speed(server: Server, streams: int, pieces: int) -> Figures:
    """The middle of answers that the upstream sends as fast as they are taken."""
    total = streams * pieces
    with closing(Load(Question(server.port, pieces))) as load:
        load.plan(streams, 0.02)
        load.run(lambda: load.tally.pieces > total * 0.1, OVERDUE_SECONDS)
        window = Window(server, load)
        load.run(lambda: load.tally.pieces > total * 0.9 or not load.open, OVERDUE_SECONDS)
        window.end()
        _finish(load, streams, 0)
        return {"us": window.cpu_for_each(window.pieces) * 1e6, "waited": window.waited}


def single(server: Server, seconds: float, timed: int) -> Figures:
    """Answers of one piece, one after the other: on four kept connections for the CPU, on one for the time."""
    with closing(Load(Question(server.port, 1), again=True)) as load:
        load.plan(4, 0)
        load.run(lambda: load.tally.whole >= 4, OVERDUE_SECONDS)
        window = Window(server, load)
        load.run_for(seconds)
        window.end()
        load.again = False
        _finish(load, load.tally.asked, 0)
    with closing(Load(Question(server.port, 1), again=True)) as load:
        load.plan(1, 0)
        load.tally.timing = True
        load.run(lambda: load.tally.whole >= timed or not load.open, OVERDUE_SECONDS)
        load.again = False
        _finish(load, load.tally.asked, 0)
        first = quantile(load.tally.first, 50) * 1e3
    each = window.cpu_for_each(window.whole)
    return {"ms": each * 1e3, "per_cpu_second": 1 / each, "first": first, "waited": window.waited}


def silent(server: Server, streams: int, seconds: float) -> Figures:
    """Streams that have their first piece and wait for the next."""
    ramp = streams / OPENINGS_A_SECOND
    hold = ramp * 1.2 + 2 * SETTLE_SECONDS + seconds
    with closing(Load(Question(server.port, 1, hold=hold))) as load:
        load.plan(streams, ramp)
        load.run(lambda: load.begun, ramp + OVERDUE_SECONDS)
        load.run_for(SETTLE_SECONDS)
        window = Window(server, load)
        load.run(lambda: load.open < streams, seconds)
        window.end()
        _finish(load, streams, hold)
        return {"percent": window.cpu_for_each(window.seconds) * 100, "waited": window.waited}


LOADS: dict[str, Callable[[Server, Sizes], Figures]] = {
    "piece50": lambda server, sizes: paced(server, sizes.streams, 0.05, sizes.seconds),
    "piece10": lambda server, sizes: paced(server, sizes.streams, 0.01, sizes.seconds),
    "full": lambda server, sizes: full_speed(server, sizes.full_streams, sizes.full_pieces),
    "single": lambda server, sizes: single(server, sizes.single_seconds, sizes.single_timed),
    "open": lambda server, sizes: paced(server, sizes.many, 1.0, sizes.big_seconds),
    "silent": lambda server, sizes: silent(server, sizes.many, min(10.0, sizes.big_seconds)),
}


def repeats(load: str, sizes: Sizes) -> int:
    return sizes.big_repeats if load in BIG else sizes.repeats


def _finish(load: Load, answers: int, lasting: float) -> None:
    """Waits for every answer's end. Raises Incomplete where one is not whole."""
    load.run(lambda: not load.open, 2 * (lasting + OVERDUE_SECONDS))
    if load.tally.whole != answers:
        raise Incomplete(f"{load.tally.whole} of {answers} whole")


def quantile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1] if len(values) > 1 else math.nan
