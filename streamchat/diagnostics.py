"""Probes of the way from this worker to a caller: a signed request becomes paced pieces, a silence, a cut, a hang-up.

They take the way that answers take, and ask no model. No Flask in here.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from itsdangerous import BadData, URLSafeTimedSerializer

from .cancellation import Cancellation
from .departures import Departures
from .encoders import Encoder
from .errors import (
    CallerGone,
    CallerStalled,
    Interrupted,
    InvalidRequest,
    StreamChatError,
    TooManyStreams,
    Unauthorized,
)
from .events import Event, Failure, Finish, Start, Text
from .hangup import Caller
from .live import RETRY_AFTER, Live

SALT = "streamchat-diagnostics"
TOKEN_SECONDS = 300  # and as many before its time: the clocks of two machines differ
MOST_PROBES = 10  # of a worker at a time; the doctor runs six
LONGEST = 60.0  # seconds of a probe that is no silence
CUT_PIECES = 3
CUT_INTERVAL = 0.05
FLOOD_PIECES, FLOOD_PIECE = 384, 65_536  # 24 MB: with Linux's defaults, kernels on the way take up to 9 MB of it
FLOOD_NOTED = 8  # pieces after which it is noted how far the flood is
GAP_SPARE = 5.0  # seconds by which the silence is longer than the one between two heartbeats


def make_token(secret: str | bytes) -> str:
    return str(URLSafeTimedSerializer(secret, salt=SALT).dumps("stream"))


def check_token(header: str | None, secret: str | bytes | None) -> None:
    """Raises Unauthorized unless the Authorization header bears a token of this app that is a few minutes old."""
    scheme, _, token = (header or "").partition(" ")
    if not secret or scheme.lower() != "bearer":
        raise Unauthorized
    try:
        _, made = URLSafeTimedSerializer(secret, salt=SALT).loads(token.strip(), return_timestamp=True)
    except BadData:
        raise Unauthorized from None
    if abs(time.time() - made.timestamp()) > TOKEN_SECONDS:
        raise Unauthorized


@dataclass(frozen=True)
class Probe:
    """What is asked for. `seconds` is how long a silence lasts; `accel` asks for the header X-Accel-Buffering."""

    probe: str
    pieces: int = 20
    interval: float = 0.1
    seconds: float = 0.0
    accel: bool = True
    id: str = ""


def parse_probe(body: bytes, heartbeat: float, longest_silence: float) -> Probe:
    """Raises InvalidRequest, naming the field."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise InvalidRequest("The body must be a JSON object.") from None
    if not isinstance(given, dict):
        raise InvalidRequest("The body must be a JSON object.")
    known = {field.name: type(field.default) for field in fields(Probe)}
    for name in given:
        if name not in known:
            raise InvalidRequest("The body has a field that no probe has.")
    most = longest_silence if given.get("probe") == "silence" else LONGEST
    bounds = {"pieces": (1, 100), "interval": (0.01, 2.0), "seconds": (0.01, most)}
    for name, (low, high) in bounds.items():
        value = given.get(name, low)
        whole = name == "pieces"
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not low <= value <= high:
            raise InvalidRequest(f'"{name}" must be a {"whole " if whole else ""}number from {low:g} to {high:g}.')
    return _checked(Probe(**{"probe": "", "seconds": min(most, heartbeat + GAP_SPARE), **given}))


def _checked(probe: Probe) -> Probe:
    if probe.probe not in KINDS:
        raise InvalidRequest(f'"probe" must be one of: {", ".join(KINDS)}.')
    if not isinstance(probe.accel, bool):
        raise InvalidRequest('"accel" must be true or false.')
    needs_id = probe.probe in (*NOTED, "departed")
    hexadecimal = isinstance(probe.id, str) and len(probe.id) == 32 and set(probe.id) <= set("0123456789abcdef")
    if not hexadecimal if needs_id else probe.id != "":
        raise InvalidRequest('"id" must be 32 hexadecimal digits, and is for departure, departed and flood.')
    if probe.pieces * probe.interval > LONGEST:
        raise InvalidRequest(f'"pieces" times "interval" must not be more than {LONGEST:g} seconds.')
    return probe


class ProbeStream:
    """One probe as a running answer: it has a slot, its caller is watched, and it ends as answers do."""

    asks = False

    def __init__(
        self,
        probe: Probe,
        id: str,
        encoder: Encoder,
        caller: Caller,
        live: Live,
        places: threading.Semaphore,
        words: Callable[[StreamChatError], str],
        departures: Departures | None = None,
    ) -> None:
        self.caller = caller
        self.user: str | None = None
        self.cancellation = Cancellation()
        self.started = time.monotonic()
        self.writing_since = 0.0
        self._probe = probe
        self._id = id
        self._encoder = encoder
        self._live = live
        self._places = places
        self._words = words
        self._departures = departures or Departures()
        self._left_after: float | None = None
        self._caller_fd = caller.fileno()
        self._released = False
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Takes a place and a slot. Raises TooManyStreams, Draining or Overloaded."""
        if not self._places.acquire(blocking=False):
            raise TooManyStreams("Too many probes are running here.", retry_after=RETRY_AFTER)
        try:
            self._live.admit(self)
            if self._probe.probe in NOTED:
                self._departures.begin(self._probe.id)
            self._live.hangups.watch(self._caller_fd, self._caller_left)
        except FileExistsError:
            self.release()
            raise InvalidRequest('"id" was used before.') from None
        except BaseException:
            self.release()
            raise

    def _caller_left(self) -> None:
        self._left_after = self._left_after or time.monotonic() - self.started
        self.cancellation.cancel(CallerGone())

    def caller_stalled(self) -> None:
        self.cancellation.cancel(CallerStalled())
        self.caller.hang_up()

    def tick(self, now: float) -> None:
        """Nothing is due."""

    def stream(self) -> Iterator[bytes]:
        """The bytes; the first next() returns b"" and arms the cleanup, as that of an answer does."""
        try:
            yield b""
            self.caller.guard()
            yield from self._told()
        except GeneratorExit:
            self._caller_left()
            raise
        finally:
            self.release()
            if self._probe.probe in NOTED:
                self._departures.end(self._probe.id, self._left_after)

    def _told(self) -> Iterator[bytes]:
        seq = 0
        try:
            for event in self._events():
                self.writing_since = time.monotonic()
                yield self._encoder.encode(seq, event)
                self.writing_since = 0.0
                seq += 1
            self.caller.settle()
            return
        except StreamChatError as error:
            failure = error
        if isinstance(failure, CallerGone) or not self._encoder.in_band:
            self.caller.break_off()
        else:
            yield self._encoder.encode(seq, Failure(failure.code, self._words(failure), failure.retryable))
            self.caller.settle()

    def _events(self) -> Iterator[Event]:
        yield Start(self._id, "diagnostics", int(time.time()))
        flood = self._probe.probe == "flood"
        for number, pause in enumerate(STREAMS[self._probe.probe](self._probe)):
            self._wait(pause)
            at = time.monotonic() - self.started
            yield Text(f'{{"n":{number},"at":{at:.6f}{PADDING if flood else ""}}}\n')
            if flood and (number + 1) % FLOOD_NOTED == 0:
                self._departures.advance(self._probe.id, (number + 1) / FLOOD_PIECES)
        if self._probe.probe in CUTS:
            self._wait(CUT_INTERVAL)  # the last piece has left by then
            raise Interrupted
        if self._probe.probe in NOTED:
            self._wait(self._probe.seconds)
        yield Finish("stop")

    def _wait(self, seconds: float) -> None:
        if seconds:
            self.cancellation.sleep(seconds)
        self.cancellation.check()

    def release(self) -> None:
        """Gives back the watch, the slot and the place. Idempotent."""
        with self._lock:
            released, self._released = self._released, True
        if not released:
            self._live.hangups.unwatch(self._caller_fd)
            self._live.leave(self)
            self._places.release()

    def close(self, error: StreamChatError | None = None) -> None:
        self.cancellation.cancel(error or Interrupted())
        self.release()


def _paced(probe: Probe) -> Iterator[float]:
    """The pause before each piece."""
    yield 0.0
    yield from [probe.interval] * (probe.pieces - 1)


# The pauses before the pieces of each stream.
STREAMS: dict[str, Callable[[Probe], Iterator[float]]] = {
    "pieces": _paced,
    "silence": lambda probe: iter((0.0, probe.seconds)),
    # Broken off as an answer is; and as by a hop that knows nothing of answers, whose connection just ends.
    "cut": lambda _: iter([CUT_INTERVAL] * CUT_PIECES),
    "lapse": lambda _: iter([CUT_INTERVAL] * CUT_PIECES),
    # One piece, then silence: whether the caller is still there cannot be seen by writing.
    "departure": lambda _: iter((0.0,)),
    # As fast as they are taken, to a caller that does not read: who takes them?
    "flood": lambda _: iter([0.0] * FLOOD_PIECES),
}
PADDING = f',"pad":"{"x" * FLOOD_PIECE}"'
CUTS = ("cut", "lapse")
NOTED = ("departure", "flood")  # whoever asks for one of these may ask another worker how it went
KINDS: tuple[Any, ...] = ("report", *STREAMS, "departed")
