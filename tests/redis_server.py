"""A real Redis for tests: a process of its own on a free port, with its data in a folder of the test's."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import redis

START_SECONDS = 10.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RedisServer:
    """Every write is on disk before it is answered: what a killed server knew, the next one knows."""

    def __init__(self, folder: Path, *options: str, password: str = "") -> None:
        self._folder = folder
        self._options = options
        self._password = password
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.client = redis.Redis(port=self.port, password=password or None, decode_responses=True)

    @property
    def url(self) -> str:
        return f"redis://{f':{self._password}@' if self._password else ''}127.0.0.1:{self.port}"

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self.kill()

    def start(self) -> None:
        program = shutil.which("redis-server")
        assert program, "There is no redis-server on this machine: install Debian's package redis-server."
        command = [program, "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self._folder)]
        command += ["--appendonly", "yes", "--appendfsync", "always", "--save", "", "--loglevel", "warning"]
        command += ["--logfile", str(self._folder / "redis.log"), *self._options]
        command += ["--requirepass", self._password] if self._password else []
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.client.ping()
                return
            except redis.ConnectionError:
                assert self._process is not None and self._process.poll() is None, self._log()
                assert time.monotonic() < deadline, self._log()
                time.sleep(0.01)

    def _log(self) -> str:
        log = self._folder / "redis.log"
        return log.read_text()[-2000:] if log.exists() else "redis-server said nothing"

    def kill(self) -> None:
        """kill -9, also where it is stopped."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def stop(self) -> None:
        """It keeps its connections and answers nobody, as a machine that hangs."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

    def pause(self, seconds: float) -> None:
        self.client.client_pause(round(seconds * 1000))

    def fill(self) -> None:
        """What needs memory is refused from now on."""
        self.client.config_set("maxmemory", 1)

    def unfill(self) -> None:
        self.client.config_set("maxmemory", 0)

    def connections(self) -> list[dict[str, Any]]:
        """Those of others than this object."""
        own = self.client.client_id()
        return [client for client in self.client.client_list() if int(client["id"]) != own]
