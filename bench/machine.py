"""What the operating system says of processes: CPU time, memory, cores. Linux only."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import time
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
MODEL = re.compile(r"^model name\s*: (.*)$", re.MULTILINE)

PSS = re.compile(r"^Pss: +(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class Cores:
    """Where the server runs, and where the upstream and the callers do."""

    server: frozenset[int]
    load: frozenset[int]

    @property
    def apart(self) -> bool:
        return not self.server & self.load

    def __str__(self) -> str:
        if not self.apart:
            return "server, upstream and callers share the only core"
        return f"server on core {_numbers(self.server)}, upstream and callers on {_numbers(self.load)}"


def choose_cores() -> Cores:
    """The last core for the server, the others for the load; one core for both where there is no other."""
    cores = frozenset(os.sched_getaffinity(0))
    if len(cores) == 1:
        return Cores(cores, cores)
    server = frozenset({max(cores)})
    return Cores(server, cores - server)


def tree(pid: int) -> list[int]:
    """The process and its living descendants: gunicorn's master and worker are one server."""
    with contextlib.suppress(OSError):
        threads = (PROC / str(pid) / "task").iterdir()
        children = " ".join((thread / "children").read_text() for thread in threads)
        return [pid, *(each for child in children.split() for each in tree(int(child)))]
    return []


def cpu_seconds(pid: int) -> float:
    """User and system time of the tree since its start, from each process's CPU clock (clock_getcpuclockid(3))."""
    total = 0.0
    for each in tree(pid):
        with contextlib.suppress(OSError):  # it has just ended
            total += time.clock_gettime(~each << 3 | 2)
    return total


def waited_seconds(pid: int) -> float:
    """How long the tree's main threads were ready to run and did not get their core (scheduler statistics)."""
    return sum(int(text.split()[1]) for text in _read_all(pid, "schedstat")) / 1e9


def memory_bytes(pid: int) -> int:
    """Proportional set size of the tree: pages that master and worker share count once."""
    return sum(int(size) * 1024 for text in _read_all(pid, "smaps_rollup") for size in PSS.findall(text))


def _read_all(pid: int, file: str) -> list[str]:
    texts = []
    for each in tree(pid):
        with contextlib.suppress(OSError):  # it has just ended
            texts.append((PROC / str(each) / file).read_text())
    return texts


def raise_file_limit() -> int:
    """As far as it goes without being root; servers inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def describe() -> str:
    cpu = MODEL.search((PROC / "cpuinfo").read_text())
    name = cpu[1] if cpu else platform.processor()
    return f"{os.cpu_count()} x {name}, Linux {platform.release().split('-')[0]}"


def _numbers(cores: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(cores)))
