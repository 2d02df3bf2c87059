"""Has the log forget old answers, now and then: beside the lease, whose beats a large log must not hold up."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

from .errors import StoreDown
from .loop import Loop

logger = logging.getLogger("streamchat")

AFTER = 5.0  # seconds after the first answer, which has other things to do
EVERY = 60.0  # seconds from the end of one to the next


class Pruning:
    """`keep` runs until `stop`."""

    def __init__(self, loop: Loop, prune: Callable[[], object]) -> None:
        self._prune = prune
        self._stop = loop.bell()
        self._stopped = False

    def keep(self) -> None:
        self._stop.wait(time.monotonic() + AFTER)
        while not self._stopped:
            try:
                with contextlib.suppress(StoreDown):  # the next time is early enough
                    self._prune()
            except Exception:  # a bug in a store: others still are to be forgotten
                logger.exception("the response log failed")
            self._stop.wait(time.monotonic() + EVERY)

    def stop(self) -> None:
        self._stopped = True
        self._stop.ring()
