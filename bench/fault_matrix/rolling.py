"""Restarts under load: every answer has an ending that its caller can see, and how many of each kind there were."""

from __future__ import annotations

import http.client
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tests.fake_upstream import FakeUpstream
from tests.live.servers import Server, environment, free_port, nginx, running, wait_for

from .callers import Caller
from .cells import NAMES
from .chain import LIMITS
from .formats import CUT_SHORT, FORMATS, understood
from .model import Model, lasting, words

CALLERS = 24
LONG = 1.0  # seconds of an answer
BEFORE = 1.5  # seconds of load before the first restart, and after the last
HELD_FOR_DEAD = 10.5  # seconds that nginx holds a server for dead that refused it (fail_timeout), and a bit
SETTINGS = {"grace": "8", "gateway": LIMITS["gateway"]}


@dataclass(frozen=True)
class Outcome:
    """`ends` counts what callers saw; `lost` are answers without an ending."""

    name: str
    done: str
    ends: Counter[str]
    lost: int

    def faults(self) -> list[str]:
        return [f"{self.lost} answers without an ending"] if self.lost else []


class Load:
    """Callers that ask again and again, in every format in turn, until they are told to stop."""

    def __init__(self, port: int) -> None:
        self.ends: Counter[str] = Counter()
        self.lost = 0
        self._port = port
        self._over = threading.Event()
        self._lock = threading.Lock()

    @contextmanager
    def going(self) -> Iterator[None]:
        with ThreadPoolExecutor(CALLERS) as pool:
            callers = [pool.submit(self._ask_on, number) for number in range(CALLERS)]
            time.sleep(BEFORE)
            try:
                yield
                time.sleep(BEFORE)
            finally:
                self._over.set()
        for caller in callers:
            caller.result()

    def _ask_on(self, first: int) -> None:
        for number in count(first):
            if self._over.is_set():
                return
            kind, lost = self._ask(NAMES[number % len(NAMES)])
            with self._lock:
                self.ends[kind] += 1
                self.lost += lost
            if not kind.startswith("finish"):
                time.sleep(0.1)  # as a client that tries again

    def _ask(self, name: str) -> tuple[str, bool]:
        """The kind of ending, and whether there was none."""
        try:
            with Caller(self._port, FORMATS[name], f"load | {name}", "") as caller:
                told = understood(FORMATS[name], caller.rest())
                hangs = caller.hangs
        except ConnectionError:
            return "refused connection", False
        if told.saw in ("whole", "finish stop"):
            whole = told.text == "".join(words(LONG))
            return ("finish" if whole else "finish, but not whole"), not whole
        return ("hangs" if hangs else told.saw), hangs or told.saw == CUT_SHORT


# --- the two restarts -----------------------------------------------------------------------------------------


@contextmanager
def instance(base_url: str, folder: Path, port: int, workers: int) -> Iterator[Server]:
    """gunicorn on this port, as the one before it."""
    command = ["-c", "conf/gunicorn.conf.py", "-b", f"127.0.0.1:{port}", "-w", str(workers), "wsgi:app"]
    environ = environment(base_url, **SETTINGS)
    folder.mkdir()
    with running([sys.executable, "-m", "gunicorn", *command], port, folder, environ, "gunicorn") as server:
        wait_for(lambda: len(server.workers()) >= workers, what="the workers")
        wait_for(lambda: _healthy(port), 30, "an answer of the server")
        yield server


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/api/healthz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def reload_one() -> Outcome:
    """SIGHUP twice to one gunicorn of two workers."""
    with _upstream() as (fake, folder), instance(fake.base_url, folder / "a", free_port(), 2) as server:
        with nginx(server, folder) as front:
            load = Load(front.port)
            with load.going():
                for _ in range(2):
                    _replace_workers(server)
    return Outcome("gunicorn reloaded", "SIGHUP to gunicorn, twice; two workers", load.ends, load.lost)


def _replace_workers(server: Server) -> None:
    old = set(server.workers())
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: len(set(server.workers()) - old) == 2 and not old & set(server.workers()), 30, "new workers")


def restart_two() -> Outcome:
    """Two instances behind one nginx, each stopped and started again, one after the other."""
    with _upstream() as (fake, folder), ExitStack() as stack:
        ports, numbers = [free_port(), free_port()], count()

        def start(port: int) -> tuple[ExitStack, Server]:
            own = ExitStack()
            running = own.enter_context(instance(fake.base_url, folder / str(next(numbers)), port, 1))
            stack.push(own)
            return own, running

        instances = [start(port) for port in ports]
        front = stack.enter_context(nginx(instances[0][1], folder, change=_beside(ports)))
        load = Load(front.port)
        with load.going():
            for port, (own, server) in zip(ports, instances, strict=True):
                server.terminate()
                server.process.wait(15)
                own.close()
                start(port)
                time.sleep(HELD_FOR_DEAD)
    return Outcome(
        "rolling restart", "two gunicorns behind one nginx, stopped and started in turn", load.ends, load.lost
    )


def _beside(ports: list[int]) -> Callable[[str], str]:
    """The shipped upstream block with a second server."""
    line = f"server 127.0.0.1:{ports[0]};"

    def change(text: str) -> str:
        assert text.count(line) == 1
        return text.replace(line, f"{line}\n        server 127.0.0.1:{ports[1]};")

    return change


@contextmanager
def _upstream() -> Iterator[tuple[FakeUpstream, Path]]:
    with tempfile.TemporaryDirectory(prefix="streamchat-rolling-") as name, FakeUpstream() as fake:
        Model(fake, {"load": (lasting(LONG),)})
        yield fake, Path(name)


def run() -> list[Outcome]:
    return [reload_one(), restart_two()]
