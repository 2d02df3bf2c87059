"""`bench/run --soak SECONDS`: 50 streams for so long on one worker of streamchat; its memory, minute by minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing

from .load import Load, Question
from .machine import memory_bytes
from .measure import QUICK, warm_up
from .peers import PEERS, Peer, Server

STREAMS = 50
PAUSE = 0.01
PIECES = 6000  # a minute of each answer; then its caller asks again
LOOK_SECONDS = 60.0


def soak(start: Callable[[Peer], AbstractContextManager[Server]], seconds: float) -> list[float]:
    """Megabytes (PSS, over what the idle worker had) when all streams run, and at each look after that."""
    with start(PEERS["streamchat"]) as server:
        warm_up(server, QUICK)
        idle = memory_bytes(server.pid)
        with closing(Load(Question(server.port, PIECES, PAUSE), again=True)) as load:
            load.plan(STREAMS, 30.0)  # so that they do not end in step
            load.run(lambda: load.begun, 60.0)
            found, end = [], time.monotonic() + seconds
            while True:
                found.append((memory_bytes(server.pid) - idle) / 1e6)
                if time.monotonic() >= end:
                    break
                load.run_for(min(LOOK_SECONDS, max(0.0, end - time.monotonic())))
            load.again = False
            if load.tally.cut:
                raise RuntimeError(f"{load.tally.cut} answers were cut")
            return found
