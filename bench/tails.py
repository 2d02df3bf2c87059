"""`bench/run --tails`: what it costs to read, on one server, the running answers of another over one SQLite log.

Server A makes the answers: their callers leave once they have begun, and they run on. Server B has a reader of each.
"""

from __future__ import annotations

import math
import re
import socket
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field, replace

from .load import CONNECT_SECONDS, READ_BYTES, Call, Load, Question
from .measure import OVERDUE_SECONDS, QUICK, Figures, Incomplete, Sizes, Window, quantile, warm_up
from .peers import STORED, Peer, Server

Start = Callable[[Peer], AbstractContextManager[Server]]

PAUSE = 0.1  # seconds between two pieces of an answer
OPENINGS_A_SECOND = 40.0  # an answer that is begun with the log takes several ms of A, and its reader some of B
SETTLE_SECONDS = 3.0
TURNS = 3
RESUMED_EVENTS = 10_000
RESUMES = 5  # in one turn
LIVE_STREAMS, LIVE_PAUSE = 5, 0.01  # on B, while it is asked for a long answer
LIVE_SECONDS = 60.0  # more than all that is measured meanwhile
ALONE_SECONDS, REST_SECONDS = 2.0, 0.2

SHARED = STORED.environment | {"STREAMCHAT_STORE_URL": "sqlite:///{folder}/../shared.db"}
MAKER = replace(STORED, name="maker", environment=SHARED, anywhere=True)
# Its own pieces come at once: their delay then shows when its loop stood still.
READER = replace(STORED, name="reader", environment=SHARED | {"STREAMCHAT_COALESCE_MS": "0"})
ID = re.compile(rb"\r\nX-Response-Id: ([^\r]+)\r\n", re.IGNORECASE)
SEQ = re.compile(rb"^id: (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Reading:
    """Each reader asks for the next of these answers, from its beginning, as server-sent events."""

    port: int
    pieces: int
    pause: float
    ids: deque[str] = field(default_factory=deque)

    def request(self) -> bytes:
        path = f"/api/responses/{self.ids.popleft()}/stream"
        return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: text/event-stream\r\n\r\n".encode()


@dataclass
class Place:
    """Where one reader stands: the seq that must come next, and the part of an event that has come."""

    next: int = 0
    rest: bytes = b""


class Readers(Load):
    """Looks at the seq of every event: each must come once, in order."""

    def __init__(self, reading: Reading) -> None:
        super().__init__(reading)
        self.faulty: set[Call] = set()
        self._places: dict[Call, Place] = {}

    def _count(self, call: Call, data: bytes, now: float) -> None:
        super()._count(call, data, now)
        place = self._places.setdefault(call, Place())
        whole, separator, place.rest = (place.rest + data).rpartition(b"\n\n")
        for seq in SEQ.findall(whole + separator):
            if int(seq) != place.next:
                self.faulty.add(call)
            place.next = int(seq) + 1

    def check(self, answers: int) -> None:
        """Raises Incomplete where a reader has less than all: start, the pieces, finish."""
        right = (call for call in self._places if call not in self.faulty)
        ordered = sum(self._places[call].next == call.expected + 2 for call in right)
        if not self.tally.whole == ordered == answers:
            raise Incomplete(f"{self.tally.whole} of {answers} whole, {ordered} in order")


def measure(start: Start, sizes: Sizes, progress: Callable[[str], None]) -> str:
    """Lines with the medians over all turns."""
    turns = 1 if sizes is QUICK else TURNS
    tails, resumes = list[Figures](), list[Figures]()
    with ExitStack() as stack:
        maker, reader = (stack.enter_context(start(peer)) for peer in (MAKER, READER))
        for server in (maker, reader):
            warm_up(server, QUICK)
        for turn in range(turns):
            tails.append(_tails(maker, reader, sizes.tails, sizes.seconds))
            resumes.append(_resumes(maker, reader))
            told = ", ".join(f"{name} {value:.2f}" for name, value in (tails[-1] | resumes[-1]).items())
            progress(f"tails, turn {turn + 1} of {turns}: {told}")
    return _lines(sizes.tails, _medians(tails), _medians(resumes))


def _medians(found: Sequence[Figures]) -> Figures:
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def _lines(readers: int, tails: Figures, resumes: Figures) -> str:
    return (
        f"{readers:,} readers of as many running answers of another server, {tails['pieces']:,.0f} pieces a second: "
        f"{tails['cpu']:.0%} of a core; delay of a piece p50 {tails['p50']:.0f} ms, p99 {tails['p99']:.0f} ms\n"
        f"  the other server had {tails['maker_cpu']:.0%} of a core; of the time it waited {tails['maker_waited']:.0%} "
        f"for a core, the readers' server {tails['waited']:.0%}\n"
        f"an ended answer of {RESUMED_EVENTS:,} events is whole after {resumes['whole']:.0f} ms; longest delay of "
        f"other answers' pieces there {resumes['longest']:.0f} ms meanwhile, {resumes['alone']:.0f} ms without"
    )


def _tails(maker: Server, reader: Server, readers: int, seconds: float) -> Figures:
    ramp = readers / OPENINGS_A_SECOND
    pieces = math.ceil((ramp * 2 + SETTLE_SECONDS + seconds) / PAUSE)  # twice: a busy machine opens them later
    reading = Reading(reader.port, pieces, PAUSE)
    with closing(Readers(reading)) as load:
        _open(load, reading, maker, readers)
        load.run_for(SETTLE_SECONDS)
        load.tally.timing = True
        window, making = Window(reader, load), Window(maker, load)
        load.run(lambda: load.tally.whole > 0, seconds)
        for each in (window, making):
            each.end()
        load.tally.timing = False
        load.run(lambda: not load.open, 2 * (pieces * PAUSE + OVERDUE_SECONDS))
        load.check(readers)
    return {
        "cpu": window.cpu / window.seconds,
        "pieces": window.pieces / window.seconds,
        "p50": quantile(load.tally.delays, 50) * 1e3,
        "p99": quantile(load.tally.delays, 99) * 1e3,
        "waited": window.waited,
        "maker_cpu": making.cpu / making.seconds,
        "maker_waited": making.waited,
    }


def _open(load: Readers, reading: Reading, maker: Server, readers: int) -> None:
    """A reader of each answer as soon as it runs, at a steady pace."""
    question, begin = Question(maker.port, reading.pieces, reading.pause), time.monotonic()
    for number in range(1, readers + 1):
        reading.ids.append(_begin(question))
        load.plan(1, 0)
        load.run_for(max(0.001, begin + number / OPENINGS_A_SECOND - time.monotonic()))
    load.run(lambda: load.begun, OVERDUE_SECONDS)


def _begin(question: Question) -> str:
    """Asks, and leaves as soon as the answer has begun. Its id."""
    with socket.create_connection(("127.0.0.1", question.port), CONNECT_SECONDS) as sock:
        sock.sendall(question.request())
        head = b""
        while b"\r\n\r\n" not in head:
            data = sock.recv(READ_BYTES)
            if not data:
                raise Incomplete("an answer was refused")
            head += data
    found = ID.search(head)
    if found is None or b" 200 " not in head.partition(b"\r\n")[0]:
        raise Incomplete(head.decode(errors="replace"))
    return found[1].decode()


def _resumes(maker: Server, reader: Server) -> Figures:
    """A long answer that has ended, asked for again and again at B, which meanwhile makes answers of its own."""
    pieces = RESUMED_EVENTS - 2  # beside start and finish
    id = _begin(Question(maker.port, pieces))
    _read_whole(maker, pieces, id)  # to its end
    with closing(Load(Question(reader.port, math.ceil(LIVE_SECONDS / LIVE_PAUSE), LIVE_PAUSE))) as load:
        load.plan(LIVE_STREAMS, LIVE_PAUSE)
        load.run(lambda: load.begun, OVERDUE_SECONDS)
        load.tally.timing = True
        load.run_for(ALONE_SECONDS)
        alone, load.tally.delays = load.tally.delays, []
        seconds = [_read_beside(load, reader, pieces, id) for _ in range(RESUMES)]
        return {
            "whole": statistics.median(seconds) * 1e3,
            "longest": max(load.tally.delays) * 1e3,
            "alone": max(alone) * 1e3,
        }


def _read_beside(load: Load, reader: Server, pieces: int, id: str) -> float:
    with ProcessPoolExecutor(1) as pool:  # a thread of ours would be seen as delay
        reading = pool.submit(_read_whole, reader, pieces, id)
        load.run(reading.done, 2 * OVERDUE_SECONDS)
    load.run_for(REST_SECONDS)
    return reading.result()


def _read_whole(server: Server, pieces: int, id: str) -> float:
    """Seconds until one reader has all. Raises Incomplete."""
    begin = time.monotonic()
    with closing(Readers(Reading(server.port, pieces, 0, deque([id])))) as load:
        load.plan(1, 0)
        load.run(lambda: not load.open, OVERDUE_SECONDS)
        seconds = time.monotonic() - begin
        load.check(1)
    return seconds
