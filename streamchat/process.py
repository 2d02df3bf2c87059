"""What one process holds for a mount: its loop, the way to the model, the running answers, the log."""

from __future__ import annotations

import os
import threading
from functools import partial

from .diagnostics import MOST_PROBES
from .hooks import Hooks
from .live import Live
from .log import Log
from .loop import Loop, choose_loop
from .metrics import Figures
from .settings import Settings
from .stores import open_carrier, open_store, prune
from .upstream import Upstream


class Process:
    """What one process holds for a mount."""

    def __init__(self, settings: Settings, hooks: Hooks, queue: str, figures: Figures | None = None) -> None:
        self.pid = os.getpid()
        self.loop: Loop = choose_loop()
        self.upstream = Upstream(settings, self.loop, hooks.client_factory)
        self.live = Live(
            self.loop,
            settings.max_streams,
            settings.write_timeout,
            settings.total_timeout,
            self._tidy,
            settings.max_streams_per_user,
            settings.max_streams_in_all,
        )
        store = open_store(settings, self.loop)
        self.log = Log(store, self.loop, settings.lease, partial(prune, store, settings)) if store is not None else None
        self.carrier = open_carrier(settings, queue, self.loop) if hooks.enqueue is None else None
        self.probes = threading.BoundedSemaphore(MOST_PROBES)
        self.connections: int | None = None  # what the worker takes at a time, where its server says so
        self._figures = figures
        if figures is not None:
            figures.add(self)

    def _tidy(self) -> None:
        self.upstream.reap()
        if self._figures is not None:
            self._figures.beat()

    def close(self) -> None:
        if self.carrier is not None:
            self.carrier.stop()
        if self.log is not None:
            self.log.close()
        self.live.close()
        self.upstream.close()
        if self._figures is not None:
            self._figures.drop(self)
