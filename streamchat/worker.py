"""`flask streamchat worker`: a process of its own that makes background answers and delivers webhooks, until a signal.

Runs in a fresh interpreter that gevent patched before anything else was imported: see `command`.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

from flask import Flask
from flask.cli import NoAppException, ScriptInfo

from .background import EXTENSION, Worker
from .errors import SettingsError
from .mount import Mount

logger = logging.getLogger("streamchat")

MARGIN = 5.0  # seconds of the grace in which what did not end by itself is told its end
AWAKE = 60.0  # seconds of one wait: without a timer that counts gevent would take a worker with nothing to do for stuck
STEP = 0.1  # seconds between two looks whether all has ended
LOG_FORMAT = "%(asctime)s [%(process)d] %(levelname)s %(name)s: %(message)s"  # as in conf/gunicorn.conf.py


PATCHED = "from gevent import monkey; monkey.patch_all(); from streamchat.worker import main; main()"


def command(app_path: str | None, mounts: Sequence[str]) -> list[str]:
    """What is to be executed: an interpreter that patches before it imports anything of ours."""
    patched = [sys.executable, "-c", PATCHED]
    app = [] if app_path is None else ["--app", app_path]
    return patched + app + [word for name in mounts for word in ("--mount", name)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="flask streamchat worker")
    parser.add_argument("--app")
    parser.add_argument("--mount", action="append", default=[])
    options = parser.parse_args(arguments)
    logging.basicConfig(format=LOG_FORMAT, level=logging.WARNING)
    logger.setLevel(logging.INFO)
    try:
        app = ScriptInfo(app_import_path=options.app).load_app()
        workers = workers_of(app, options.mount)
    except (NoAppException, SettingsError) as error:
        sys.exit(f"streamchat's worker cannot start: {error}")
    Shift(workers).work()


def workers_of(app: Flask, names: Sequence[str]) -> dict[Mount, Worker]:
    """One for each mount that takes background answers, or for the named ones. Raises SettingsError for none."""
    mounts: dict[str, Mount] = app.extensions.get(EXTENSION, {})
    chosen = {name: mount for name, mount in mounts.items() if (name in names if names else mount.settings.background)}
    if missing := set(names) - set(chosen):
        raise SettingsError(f"There is no blueprint {sorted(missing)[0]}; there is: {', '.join(mounts) or 'none'}.")
    if idle := [name for name, mount in chosen.items() if not mount.settings.background]:
        raise SettingsError(f"The blueprint {idle[0]} takes no background answers: set STREAMCHAT_BACKGROUND to true.")
    if not chosen:
        raise SettingsError("No blueprint takes background answers: set STREAMCHAT_BACKGROUND to true.")
    return {mount: Worker(mount) for mount in chosen.values()}


class Shift:
    """The workers of one process, from its start to the signal that ends it; a second signal does not wait."""

    def __init__(self, workers: dict[Mount, Worker]) -> None:
        self._workers = workers
        self._grace = max(mount.settings.grace for mount in workers)
        self._told = threading.Event()
        self._signals = 0

    def work(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._stop)
        for mount, worker in self._workers.items():
            mount.process.loop.spawn(worker.run)
        logger.info("worker ready for %s", ", ".join(mount.name for mount in self._workers))
        while not self._told.wait(AWAKE):
            pass
        self._drain(time.monotonic() + max(0.0, self._grace - MARGIN))
        for mount in self._workers:
            mount.close()
        logger.info("worker stopped")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        for worker in self._workers.values():
            worker.stop()
        self._told.set()

    def _drain(self, until: float) -> None:
        """Waits for what runs; ends the rest as interrupted, and waits until that is written."""
        while self._busy and self._signals < 2 and time.monotonic() < until:
            time.sleep(STEP)
        for worker in self._workers.values():
            worker.end()
        last = time.monotonic() + MARGIN / 2
        while self._busy and time.monotonic() < last:
            time.sleep(STEP)

    @property
    def _busy(self) -> bool:
        return any(worker.busy for worker in self._workers.values())
