"""What the doctor saw of a chain, as plain values, and the arithmetic on them. No network, no verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LUMP = 0.25  # of an interval: what comes sooner after the piece before it came together with it


@dataclass(frozen=True)
class Stream:
    """One probe as it came. Times are seconds: `made` since the server began, `came` since the request had left."""

    status: int = 200
    http: str = "HTTP/1.1"
    headers: Mapping[str, str] = field(default_factory=dict)  # names in lower case
    made: tuple[float, ...] = ()
    came: tuple[float, ...] = ()
    ended: float = 0.0
    whole: bool = True  # by the reader's own library
    fault: str = ""  # what ended it, where it is not whole

    def delays(self, round_trip: float) -> list[float]:
        """How long each piece was on its way beyond what a request takes by itself."""
        return [max(0.0, came - made - round_trip) for made, came in zip(self.made, self.came, strict=False)]

    def lumped(self, interval: float) -> int:
        """How many pieces came together with the one before, though they were made an interval apart."""
        pairs = zip(self.came, self.came[1:], strict=False)
        return sum(later - earlier < interval * LUMP for earlier, later in pairs)


@dataclass(frozen=True)
class Departure:
    """The doctor hung up: what the server knows of it. `after` are the seconds until it had noticed."""

    state: str  # left, running, stayed, unknown
    after: float | None = None


@dataclass(frozen=True)
class Flood:
    """What a way took of 24 MB while nobody read: `part` of 1, and whether it then `stopped`. None: nobody knows."""

    part: float
    stopped: bool | None


@dataclass(frozen=True)
class Measured:
    """All that one examination saw. Streams by their content type."""

    url: str
    report: Mapping[str, Any]
    round_trip: float
    interval: float
    pieces: int
    gap: float
    patience: float  # how long the doctor waited for its own leaving to be noticed
    paced: Mapping[str, Stream]
    flood: Flood
    flood_unasked: Flood  # without the header that tells nginx not to buffer
    encodings: Mapping[str, str]  # content type -> Content-Encoding, where a caller takes any
    silence: Stream
    cut: Stream
    lapse: Stream
    departure: Departure
    http2: bool | None = None  # offered by TLS; None where there is no TLS


def quantile(values: Sequence[float], part: float) -> float:
    """The nearest-rank quantile; 0 of nothing."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(part * len(ranked)) - 1)] if ranked else 0.0
