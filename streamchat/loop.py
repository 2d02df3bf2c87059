"""How this worker waits: on gevent's loop if it is in use, or in threads.

A wait ends at its time without disturbing what it waits for; no wait under gevent makes a timer of its own.
"""

from __future__ import annotations

import sys

from .thread_loop import ThreadLoop
from .waits import NEVER, Bell, Lane, Loop, Waiter

__all__ = ["NEVER", "Bell", "Lane", "Loop", "ThreadLoop", "Waiter", "choose_loop", "late_modules"]


def late_modules() -> list[str]:
    """The modules that were imported before gevent's patch and keep what it replaced; none where it is not used."""
    if "gevent" in sys.modules:
        from .gevent_loop import holders_of_originals, is_patched

        if is_patched():
            return holders_of_originals(dict(sys.modules))
    return []


def choose_loop() -> Loop:
    """gevent's loop where the socket module is patched, threads elsewhere."""
    if "gevent" in sys.modules:
        from .gevent_loop import GeventLoop, is_patched

        if is_patched():
            return GeventLoop()
    return ThreadLoop()
