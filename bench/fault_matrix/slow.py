"""Slow attacks by Debian's slowhttptest on the shipped nginx.conf with its limits, while honest callers stream."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.fake_upstream import FakeUpstream
from tests.live.servers import gunicorn, nginx

from .callers import Caller
from .cells import JSON, NAMES
from .chain import LIMITS
from .formats import FORMATS, understood
from .model import Model, lasting, words

CONNECTIONS, RATE, SECONDS = 1000, 200, 15
HONEST = "127.0.0.2"  # the attack comes from 127.0.0.1, and the limits are an address's
LONG, SHORT = SECONDS, 1.0  # seconds of an honest answer
ALLOWED = 2.0  # seconds that an honest caller may wait for its first piece under attack
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Attack:
    name: str
    done: str
    options: tuple[str, ...]
    path: str


ATTACKS = (
    Attack("slow headers", "a header line each 5 s", ("-H", "-i", "5"), "/api/get-response"),
    Attack("slow body", "some bytes of a body each 5 s", ("-B", "-i", "5", "-s", "8192"), "/api/get-response"),
    Attack(
        "slow read",
        "32 bytes each 5 s of a file, asked for ten times at once",
        ("-X", "-k", "10", "-n", "5", "-w", "10", "-y", "20", "-z", "32"),
        "/api/assets/streamchat.js",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """`ends`: what each honest caller saw that is no whole answer. `first`: the longest wait for a first piece."""

    attack: Attack
    honest: int
    ends: tuple[str, ...]
    first: float
    available: bool
    held: int  # connections of the attack that were open at its end

    @property
    def name(self) -> str:
        return self.attack.name

    def faults(self) -> list[str]:
        found = [f"an honest caller saw: {end}" for end in self.ends]
        if self.first > ALLOWED:
            found.append(f"an honest caller waited {self.first:.1f} s for its first piece")
        return found if self.available else [*found, "slowhttptest found the server unavailable"]


def run() -> list[Outcome]:
    program = shutil.which("slowhttptest")
    assert program, "slowhttptest is missing: install Debian's package slowhttptest"
    with tempfile.TemporaryDirectory(prefix="streamchat-slow-") as name, ExitStack() as stack:
        folder = Path(name)
        fake = stack.enter_context(FakeUpstream())
        Model(fake, {"long": (lasting(LONG),), "short": (lasting(SHORT),)})
        server = stack.enter_context(gunicorn(fake.base_url, folder, gateway=LIMITS["gateway"]))
        front = stack.enter_context(nginx(server, folder, limits=True))
        return [_attack(program, attack, front.port) for attack in ATTACKS]


def _attack(program: str, attack: Attack, port: int) -> Outcome:
    command = [program, *attack.options, "-c", str(CONNECTIONS), "-r", str(RATE), "-l", str(SECONDS), "-p", "3"]
    ended = threading.Event()
    with ThreadPoolExecutor(64) as pool:
        asked = [pool.submit(_honest, port, name, "long", LONG) for name in NAMES]
        attacking = subprocess.Popen(
            [*command, "-u", f"http://127.0.0.1:{port}{attack.path}"], stdout=subprocess.PIPE, text=True
        )
        keeping = pool.submit(_keep_asking, pool, port, ended)
        said, _ = attacking.communicate(timeout=4 * SECONDS)
        ended.set()
        found = [each.result() for each in (*asked, *keeping.result())]
    plain = COLOURS.sub("", said)
    available = not re.search(r"service available:\s+NO", plain)
    held = re.findall(r"^connected:\s+(\d+)", plain, re.MULTILINE)
    ends = tuple(saw for saw, _ in found if saw)
    first = max(waited for _, waited in found)
    return Outcome(attack, len(found), ends, first, available, int(held[-1]))


def _keep_asking(pool: ThreadPoolExecutor, port: int, ended: threading.Event) -> Sequence[Future[tuple[str, float]]]:
    """New callers all the time: six each second."""
    asked: list[Future[tuple[str, float]]] = []
    while not ended.wait(1):
        asked += [pool.submit(_honest, port, name, "short", SHORT) for name in NAMES]
    return asked


def _honest(port: int, name: str, script: str, seconds: float) -> tuple[str, float]:
    """What an honest caller saw, "" for its whole answer; how long it waited for the first byte."""
    began = time.monotonic()
    try:
        with Caller(port, FORMATS[name], f"{script} | {name}", "", source=HONEST) as caller:
            caller.wait_for("HTTP/1.1")
            waited = 0.0 if name == JSON else time.monotonic() - began  # which has no byte before its end
            told = understood(FORMATS[name], caller.rest())
    except OSError as error:
        return repr(error), time.monotonic() - began
    whole = told.saw in ("whole", "finish stop") and told.text == "".join(words(seconds))
    return "" if whole else f"{name}: {told.saw}", waited
