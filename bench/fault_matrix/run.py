"""A row becomes six cells: six callers at once, one a format, each with a user of its own."""

from __future__ import annotations

import hashlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from tests.live.pace import hiccups
from tests.live.servers import Server, wait_for

from .callers import Caller
from .cells import JSON, NAMES, TEXT, Cell
from .chain import CANARY, PLANS, Chain, open_chain
from .formats import FORMATS, Format, Told, Wire, understood
from .model import FIRST, message_of, user_of
from .rows import Row
from .server_rows import silent

HANGS = Told("hangs")
SECRETS = (CANARY, "fake upstream", "Traceback")  # nobody outside reads these words
PROBE_SECONDS = 20.0
SETTLE_SECONDS = 10.0  # in which the books must be closed where the promise has no longer time
LATE_ATTEMPT = 1.0  # seconds after which a call that nobody waits for any more would have been made
HOLDERS = tuple(f"holder {number}" for number in range(6))


def token_of(user: str) -> str:
    return hashlib.sha256(user.encode()).hexdigest()


class Call:
    """One cell being measured."""

    def __init__(self, row: Row, format: Format, chain: Chain) -> None:
        self.row, self.format, self.chain = row, format, chain
        self.message = message_of(row.name, format.name)
        self.user = user_of(self.message)
        self.ready = threading.Event()  # the moment of the deed has come
        self.deed_at = 0.0
        self._knew = 0.0
        self._probes: set[str] = set()

    def run(self) -> Cell:
        promise = self.row.promises[self.format.name]
        try:
            told, wire, seconds = self._ask()
            freed = self._free_after()
        except Exception as error:  # the cell has failed, not the run
            return Cell(self.row.name, self.format.name, promise, f"not measured: {error!r:.200}")
        finally:
            self.ready.set()
        notes = _notes(wire, told)
        leaked = tuple(word for word in SECRETS if word.encode() in wire.body)
        cell = Cell(self.row.name, self.format.name, promise, told.saw, told.text, notes=notes, leaked=leaked)
        return replace(cell, seconds=seconds if promise.within is not None else None, freed=freed)

    def _ask(self) -> tuple[Told, Wire, float]:
        key = {"Idempotency-Key": self.message} if self.row.keyed else {}
        token, port = self.chain.tokens[self.user], self.chain.front.port
        with Caller(port, self.format, self.message, token, key, slow=self.row.stalls) as caller:
            if self.row.deed or self.row.leave:
                self._wait(caller)
            self.ready.set()
            if self.row.leave is not None:
                return self._leave(caller, self.row.leave)
            if self.row.stalls:
                return self._stall(caller)
            wire = caller.rest()
            self._knew = caller.ended
            began = self.deed_at or self.chain.model.marked(self.message) or caller.asked
            return HANGS if caller.hangs else understood(self.format, wire), wire, self._knew - began

    def _wait(self, caller: Caller) -> None:
        """Until the moment of the row has come for this caller."""
        model = self.chain.model
        model.fake.wait_for(lambda: bool(model.posts(self.message)), 10)
        (request,) = model.posts(self.message)
        if self.row.at == "refused":
            request.wait_finished(5)
            time.sleep(0.1)  # well before the second attempt, which comes after 0.375 s or more
        elif self.row.at == "piece":
            request.wait_sent(1)
            if self.format.name != JSON:
                caller.wait_for(FIRST)
            wait_for(lambda: request.sent > 200, what="the first piece")  # its head has fewer bytes

    def _leave(self, caller: Caller, leave: Callable[[Caller], None]) -> tuple[Told, Wire, float]:
        """The seconds are those until the model's side was let go."""
        self._knew = time.monotonic()
        leave(caller)
        (request, *_) = self.chain.model.posts(self.message)
        closed = request.wait_left(10) if request.finished is None else self._recorded_at()
        if leave is Caller.half_close:
            wire = caller.rest()
            return understood(self.format, wire), wire, closed - self._knew
        return Told("left"), Wire(), closed - self._knew

    def _recorded_at(self) -> float:
        """Of a caller that left while no request ran: when its answer ended."""
        wait_for(lambda: bool(self._told()), what="the record")
        (record,) = self._told()
        return float(record["started"]) + float(record["duration"]) - time.time() + time.monotonic()

    def _stall(self, caller: Caller) -> tuple[Told, Wire, float]:
        wait_for(lambda: bool(self._told()), 20, "the record")
        (request,) = self.chain.model.posts(self.message)
        closed = request.left or request.finished or 0.0
        wire = caller.rest()
        self._knew = time.monotonic()
        began = self.chain.model.marked(self.message) or caller.asked
        return understood(self.format, wire), wire, closed - began

    def _free_after(self) -> float | None:
        """Seconds after the end in which the user is admitted again; None where it never is."""
        while time.monotonic() < self._knew + PROBE_SECONDS:
            server = self.chain.second if self.row.elsewhere and self.chain.second else self.chain.front
            began = time.monotonic()
            if self._probed(server):
                return max(0.0, began - self._knew)
            time.sleep(0.02)
        return None

    def _probed(self, server: Server) -> bool:
        try:
            with Caller(server.port, FORMATS[TEXT], "probe | 0", self.chain.tokens[self.user]) as probe:
                wire = probe.rest()
        except ConnectionError:  # the server is being restarted
            return False
        self._probes.add(wire.headers.get("x-response-id", ""))
        return _admitted(wire)

    def _told(self) -> list[dict[str, str]]:
        return [record for record in self.chain.told(self.user) if record["id"] not in self._probes]

    def counted(self, cell: Cell) -> Cell:
        """The cell with what the books and the model say now."""
        told = tuple(record["outcome"] for record in self._told())
        kept = tuple(outcome for id, outcome in self.chain.kept(self.user) if id not in self._probes)
        return replace(cell, posts=len(self.chain.model.posts(self.message)), told=told, kept=kept)

    def settled(self, cell: Cell, until: float) -> Cell:
        """The same once the books are closed as promised, or their time is over."""
        while (cell.told, cell.kept) != (cell.promise.told, cell.promise.kept) and time.monotonic() < until:
            time.sleep(0.05)
            cell = self.counted(cell)
        return cell


def _admitted(wire: Wire) -> bool:
    """Whether the question got its slot, whatever the model said then."""
    saw = understood(FORMATS[TEXT], wire).saw
    return saw == "whole" or " upstream_" in saw


def _notes(wire: Wire, told: Told) -> frozenset[str]:
    found = {
        "Retry-After": "retry-after" in wire.headers,
        "resumable": wire.headers.get("x-stream-resumable") == "?1",
        "warning": told.warned,
    }
    return frozenset(name for name, is_there in found.items() if is_there)


# --- rows and their servers -----------------------------------------------------------------------------------


def run_row(row: Row, chain: Chain) -> list[tuple[Call, Cell]]:
    calls = [Call(row, FORMATS[name], chain) for name in NAMES]
    with row.around(chain), hiccups() as machine, ThreadPoolExecutor(len(calls)) as pool:
        running = [pool.submit(call.run) for call in calls]
        if row.deed is not None:
            _do(row.deed, chain, calls)
        cells = [each.result() for each in running]
    until = time.monotonic() + SETTLE_SECONDS
    settled = [call.settled(cell, until) for call, cell in zip(calls, cells, strict=True)]
    return [(call, replace(cell, late=machine.longest)) for call, cell in zip(calls, settled, strict=True)]


def _do(deed: Callable[[Chain], None], chain: Chain, calls: Sequence[Call]) -> None:
    for call in calls:
        call.ready.wait(15)
    now = time.monotonic()
    for call in calls:
        call.deed_at = now
    deed(chain)


def groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows that follow one another on the same servers."""
    for _, group in groupby(enumerate(rows), lambda each: (each[1].plan, each[0] if each[1].own else -1)):
        yield [row for _, row in group]


def run_group(rows: Sequence[Row], progress: Callable[[str], None]) -> list[Cell]:
    """All rows of a group; what the model was asked is counted once more when all of them are over."""
    users = [user_of(message_of(row.name, name)) for row in rows for name in NAMES]
    tokens = {user: token_of(user) for user in (*users, *HOLDERS)}
    scripts = {row.name: row.scripts for row in rows} | {"worker full, held": (silent,)}
    found: list[tuple[Call, Cell]] = []
    with tempfile.TemporaryDirectory(prefix="streamchat-faults-") as folder:
        with open_chain(PLANS[rows[0].plan], tokens, scripts, Path(folder)) as chain:
            for row in rows:
                began = time.monotonic()
                found += run_row(row, chain)
                bad = sum(bool(cell.faults(row.whole)) for _, cell in found[-len(NAMES) :])
                verdict = f"{bad} cells NOT as promised" if bad else "as promised"
                progress(f"{row.name}: {verdict}, {time.monotonic() - began:.1f} s")
            if any(row.leave for row in rows):
                time.sleep(LATE_ATTEMPT)
            return [call.counted(cell) if not cell.saw.startswith("not measured") else cell for call, cell in found]
