"""What follows from one attempt to deliver a webhook: done, again at a time, given up, or the target is switched off.

Pure: the clock and chance come as arguments. Nothing is kept here; the outbox keeps the count and the due time.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Literal

# Seconds before each attempt, counted from the one before: Standard Webhooks 1.0.0, 75.6 hours in all.
PAUSES = (0, 5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
JITTER = 0.2  # of a pause, only added: receivers that were down are not met by all at once, nor sooner than told
LONGEST_RETRY_AFTER = 3600.0  # what a receiver may ask for; the later pauses are longer anyway
BUSY = (429, 502, 503, 504)  # the specification: slow down
BUSY_PAUSE = 60.0
GONE = 410  # the specification: the receiver wants no more of them

Fault = Literal["target", "address", "dns", "connection", "tls", "timeout", "protocol"]
FINAL: tuple[Fault, ...] = ("target",)  # no later attempt would be allowed either


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one attempt: a status, or the fault that prevented it. Nothing else of what the receiver said."""

    status: int | None = None
    fault: Fault | None = None
    retry_after: float | None = None  # seconds

    @property
    def delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


@dataclass(frozen=True, slots=True)
class Next:
    """`dead` letters are kept for a replay by hand. `switch_off` is for all webhooks to that target."""

    state: Literal["delivered", "waiting", "dead"]
    due: float | None = None  # Unix time of the next attempt, where one is waiting
    switch_off: bool = False


def first_due(now: float) -> float:
    return now + PAUSES[0]


def after(reply: Reply, attempts: int, now: float, chance: Callable[[], float] = random.random) -> Next:
    """`attempts` counts those that were made, this one too. Only a 2xx is a delivery: a redirect is none."""
    if reply.delivered:
        return Next("delivered")
    if reply.status == GONE:
        return Next("dead", switch_off=True)
    if reply.fault in FINAL or attempts >= len(PAUSES):
        return Next("dead")
    return Next("waiting", due=now + _pause(reply, attempts, chance))


def _pause(reply: Reply, attempts: int, chance: Callable[[], float]) -> float:
    """The schedule's, or a longer one that the receiver asks for."""
    asked = min(reply.retry_after or 0.0, LONGEST_RETRY_AFTER)
    if reply.status in BUSY:
        asked = max(asked, BUSY_PAUSE)
    return max(PAUSES[attempts], asked) * (1 + JITTER * chance())


def seconds_of(retry_after: str | None, now: float) -> float | None:
    """Retry-After, a number or a date (RFC 9110 10.2.3), as seconds from the Unix time `now`; None where it is neither.

    A number may be larger than any wait: what is honoured is for `after` to say.
    """
    text = (retry_after or "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:12])
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    return None
