"""Real servers for tests: gunicorn with conf/gunicorn.conf.py, flask run, nginx with conf/nginx.conf.

Each listens on a free port of 127.0.0.1, is ready when its `with` block begins, and is ended by its process id.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ops.nginx_conf import command as nginx_command
from ops.nginx_conf import write_copy

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], seconds: float = 10.0, what: str = "the condition") -> None:
    """Polls until the condition is true; fails after so many seconds."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what} did not come within {seconds} s"
        time.sleep(0.005)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclass
class Server:
    """A running server; `log` holds all that it wrote to stdout and stderr."""

    process: subprocess.Popen[bytes]
    port: int
    log_file: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def workers(self) -> list[int]:
        """Process ids of the children: gunicorn's workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def records(self) -> list[dict[str, str]]:
        """The answers' log lines, each as its fields."""
        lines = re.findall(r"streamchat: answer (\{.*\})$", self.log, re.MULTILINE)
        return [{name: str(value) for name, value in json.loads(line).items()} for line in lines]

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@contextmanager
def running(command: Sequence[str], port: int, folder: Path, environ: Mapping[str, str], name: str) -> Iterator[Server]:
    log_file = folder / f"{name}-{port}.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=dict(environ), stdout=log, stderr=subprocess.STDOUT)
    server = Server(process, port, log_file)
    try:
        until = time.monotonic() + START_SECONDS
        while not listens(port):
            assert process.poll() is None and time.monotonic() < until, f"{name} did not start:\n{server.log}"
            time.sleep(0.02)
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()


def environment(base_url: str, **settings: str) -> dict[str, str]:
    """The environment of a server that asks the upstream at base_url; `settings` are STREAMCHAT_... without prefix."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("STREAMCHAT_", "OPENAI_"))}
    own = {"OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": "sk-canary-0123456789", "STREAMCHAT_PUBLIC": "true"}
    return kept | own | {f"STREAMCHAT_{name.upper()}": value for name, value in settings.items()}


@contextmanager
def gunicorn(
    base_url: str,
    folder: Path,
    *arguments: str,
    app: str = "wsgi:app",
    extra: Mapping[str, str] | None = None,
    files: str = "",
    inside: Sequence[str] = (),
    **settings: str,
) -> Iterator[Server]:
    """One worker, unless `arguments` say otherwise: `gunicorn(url, tmp_path, "-k", "gthread", "--threads", "20")`.

    `files`: the soft and the hard limit of open files under which it starts, "256 4096". `inside`: a command that
    becomes the one behind it.
    """
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "-c", "conf/gunicorn.conf.py", "-b", f"127.0.0.1:{port}", "-w", "1"]
    if files:
        limited = 'ulimit -Sn "$0" && ulimit -Hn "$1" && shift && exec "$@"'
        command = ["sh", "-c", limited, *files.split(), *command]
    environ = environment(base_url, **settings) | dict(extra or {})
    with running([*inside, *command, *arguments, app], port, folder, environ, "gunicorn") as server:
        wait_for(lambda: bool(server.workers()), what="a worker")
        yield server


@contextmanager
def flask_run(base_url: str, folder: Path, *arguments: str, app: str = "wsgi:app", **settings: str) -> Iterator[Server]:
    """Werkzeug's development server: `flask run`, and with "--debug" its debugger."""
    port = free_port()
    command = [sys.executable, "-m", "flask", "--app", app, *arguments, "run", "--no-reload", "-p", str(port)]
    with running(command, port, folder, environment(base_url, **settings), "flask") as server:
        yield server


@contextmanager
def nginx(
    upstream: Server, folder: Path, change: Callable[[str], str] | None = None, limits: bool = False
) -> Iterator[Server]:
    """conf/nginx.conf in front of a server, on another port; `change` edits its text, `limits` keeps an address's."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    assert program, "nginx is missing: install Debian's package nginx-light"
    port = free_port()
    home = folder / f"nginx-{port}"
    copy = write_copy(home, listen=f"127.0.0.1:{port}", upstream=f"127.0.0.1:{upstream.port}", limits=limits)
    if change is not None:
        copy.write_text(change(copy.read_text()))
    with running(nginx_command(program, copy), port, folder, os.environ, "nginx") as server:
        yield server
