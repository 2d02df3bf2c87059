"""A worker for each named queue, each to be killed at the point of its queue's name. Forks: the imports are made once.

    python -m gevent.monkey --module tests.live.killed_workers QUEUE...

Prints "QUEUE PID" for each that it starts, then "QUEUE -SIGNAL" or "QUEUE STATUS" for each that was stopped or ended.
"""

from __future__ import annotations

import os
import sys

from gevent import monkey

from streamchat.worker import main
from tests.live.killed_app import APP

# gevent's own would make a hub before the children have theirs, and close what is to be closed in its time.
FORK, WAIT, CLOSE = monkey.get_original("os", ["fork", "waitpid", "close"])


def start(name: str, gate: tuple[int, int]) -> int:
    pid: int = FORK()
    if pid == 0:
        readable, writable = gate
        CLOSE(writable)
        os.read(readable, 1)  # until it is known who is who
        os.environ["KILL_AT"] = name
        main(["--app", APP, "--mount", name])
        os._exit(0)
    return pid


def run(names: list[str]) -> None:
    gate = os.pipe()
    running = {start(name, gate): name for name in names}
    for pid, name in running.items():
        print(name, pid, flush=True)
    CLOSE(gate[1])
    while running:
        pid, status = WAIT(-1, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            print(running[pid], -os.WSTOPSIG(status), flush=True)
        else:
            print(running.pop(pid), os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    run(sys.argv[1:])
