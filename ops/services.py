"""Child processes: started apart from the terminal's Ctrl-C, waited for until they answer, stopped for certain."""

import contextlib
import http.client
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

# Longer than the STREAMCHAT_GRACE that ./serve sets, in which gunicorn ends its streams itself.
STOP = 15.0
# A cold disk and two busy cores; on an idle machine gunicorn needs about one second.
START = 60.0


class ServiceFailure(Exception):
    """Says in one sentence which process failed and how."""


@dataclass(frozen=True)
class Service:
    name: str
    process: subprocess.Popen[bytes]

    def check(self) -> None:
        status = self.process.poll()
        if status is not None:
            raise ServiceFailure(f"{self.name} ended by itself ({_ending(status)}); its own lines are above.")

    def first_line(self) -> str:
        """Of its stdout, from which nothing more is read."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode().strip()
        if not line:
            self.process.wait()
            self.check()
        return line

    def stop(self) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP)
        self.kill()
        self.process.wait()

    def kill(self) -> None:
        """The whole group: a master that was killed has left its workers behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Services:
    """What has been started, in order. Leaving the block stops all of it, the last one first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: list[Service] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        on_stop_signals(self._kill_all)
        for service in reversed(self.running):
            service.stop()

    def _kill_all(self, *_: object) -> None:
        for service in self.running:
            service.kill()

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], *, piped: bool = False
    ) -> Service:
        """In a session of its own: Ctrl-C in the terminal reaches us alone, and we stop them in order."""
        stdin, stdout = (subprocess.PIPE, subprocess.PIPE) if piped else (subprocess.DEVNULL, None)
        process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdin=stdin, stdout=stdout, start_new_session=True
        )
        service = Service(name, process)
        self.running.append(service)
        return service

    def wait_until_healthy(self, name: str, port: int) -> None:
        deadline = time.monotonic() + START
        while not _healthy(port):
            self.check()
            if time.monotonic() > deadline:
                raise ServiceFailure(f"{name} did not answer on port {port} within {START:.0f} seconds.")
            time.sleep(0.05)

    def watch(self) -> None:
        """Returns never; raises when one of them ends."""
        while True:
            self.check()
            time.sleep(0.2)

    def check(self) -> None:
        for service in self.running:
            service.check()


def on_stop_signals(action: Callable[..., object]) -> None:
    """Also Ctrl-C that a script had us ignore by starting us in the background; what nohup ignores stays ignored."""
    signal.signal(signal.SIGINT, action)
    signal.signal(signal.SIGTERM, action)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, action)


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/api/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _ending(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
