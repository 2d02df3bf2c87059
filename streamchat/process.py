"""What one process holds for a mount: clients, watchers, the log. Made at the first answer, after the fork."""

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
from .stores import open_store, prune
from .upstream import Upstream


class Process:
    """What one process holds for a mount."""

    def __init__(self, settings: Settings, hooks: Hooks, figures: Figures | None = None) -> None:
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
        )
        store = open_store(settings, self.loop)
        self.log = Log(store, self.loop, settings.lease, partial(prune, store, settings)) if store is not None else None
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
        if self.log is not None:
            self.log.close()
        self.live.close()
        self.upstream.close()
        if self._figures is not None:
            self._figures.drop(self)
