"""How this worker waits: on gevent's loop if it is in use, or in threads.

A wait ends at its time without disturbing what it waits for; no wait under gevent makes a timer of its own.
"""

from __future__ import annotations

import sys

from .thread_loop import ThreadLoop
from .waits import NEVER, Bell, Lane, Loop, Waiter

__all__ = ["NEVER", "Bell", "Lane", "Loop", "ThreadLoop", "Waiter", "choose_loop"]


def choose_loop() -> Loop:
    """gevent's loop where the socket module is patched, threads elsewhere."""
    if "gevent" in sys.modules:
        from .gevent_loop import GeventLoop, is_patched

        if is_patched():
            return GeventLoop()
    return ThreadLoop()
