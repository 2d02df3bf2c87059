"""Counts the instructions that one relayed piece costs a worker, under valgrind: the same on every run of a machine.

    python -m tests.live.instructions

counts, and writes what it found into tests/live/test_instructions.py. Run it after a change that was meant to alter
the way of a piece, with each Python whose line stands there, and say in the commit why the figure moved.

One process holds all: the app as it is deployed with gunicorn's own reader and writer, both ends' sockets, and a loop
that sends one piece upstream and reads it as the caller, in turn. That loop takes some 6,700 of them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ops.environment import ensure

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ("text/plain", "text/event-stream")
WARM = 20  # pieces until caches are filled and the first three, which are eager, are over
FEW, MANY = 100, 300  # what 200 more pieces cost is counted: what is paid once falls out
TEST = Path(__file__).with_name("test_instructions.py")
TABLE = "RECORDED: dict[str, dict[str, int]] = {\n"
MISSING = "valgrind is missing: install Debian's package valgrind"

DELTA = {"choices": [{"index": 0, "delta": {"content": " piece"}, "logprobs": None, "finish_reason": None}]}
# As long as OpenAI's.
CHUNK = {
    "id": "chatcmpl-CZxYkWq3vT8nBd5sLr2mHfJ7aGp1e",
    "object": "chat.completion.chunk",
    "created": 1790000000,
    "model": "gpt-4.1-mini-2025-04-14",
    "service_tier": "default",
    "system_fingerprint": "fp_0123456789",
    **DELTA,
    "usage": None,
    "obfuscation": "x" * 12,
}
EVENT = b"data: %s\n\n" % json.dumps(CHUNK).encode()
PIECE = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
SETTINGS = {"OPENAI_API_KEY": "none", "STREAMCHAT_PUBLIC": "true", "STREAMCHAT_COALESCE_MS": "0"}
BODY = b'{"message": "hi"}'
REQUEST = (
    "POST /api/get-response HTTP/1.1\r\nHost: shop\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(BODY)}\r\nAccept: %s\r\n\r\n"
)


def count() -> dict[str, int]:
    """Instructions a piece, by format, on the versions that requirements.txt pins. Takes some 20 seconds."""
    valgrind = shutil.which("valgrind")
    assert valgrind and shutil.which("vgdb"), MISSING
    python = ensure(ROOT / ".venv", ROOT / "requirements.txt")
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    # The hash seed decides in which order sets and tables of strings are searched.
    environ = kept | {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    # Counting begins when it is told to: until then everything runs four times as fast.
    command = [valgrind, "--quiet", "--tool=callgrind", "--instr-atstart=no", "--callgrind-out-file=/dev/null"]
    done = subprocess.run(
        [*command, str(python), "-m", "tests.live.instructions", "relay"],
        cwd=ROOT, env=environ, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


def build() -> str:
    """The Python that counts: one that is compiled in another way takes other instructions for the same work."""
    optimized = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
    version = ".".join(platform.python_version_tuple()[:2])
    return f"{version} {platform.machine()} {'optimized' if optimized else 'plain'}"


# --- inside valgrind ------------------------------------------------------------------------------------


def told(*command: str) -> str:
    """Valgrind's answer to a command of its remote control. It hears us while we run, not while we wait."""
    reading, writing = os.pipe()
    arguments = ["vgdb", f"--pid={os.getpid()}", *command]
    pid = os.posix_spawnp(arguments[0], arguments, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, writing, 1)])
    os.close(writing)
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
    with os.fdopen(reading) as answer:
        return answer.read()


class Relay:
    """One answer that is being streamed: `relay` brings pieces through it, one at a time."""

    def __init__(self, app: Any, listener: socket.socket, accept: str) -> None:
        import gevent
        from gunicorn.config import Config
        from gunicorn.http import RequestParser, wsgi

        caller, server = socket.socketpair()
        caller.sendall((REQUEST % accept).encode() + BODY)
        config, address = Config(), ("127.0.0.1", 1)
        request = next(RequestParser(config, server, address))
        opening = gevent.spawn(_take, listener)
        self._response, environ = wsgi.create(request, server, address, address, config)
        self._body = iter(app(environ, self._response.start_response))
        self._model, self._caller = _plain(opening.get()), _plain(caller)
        self._sockets = (caller, server, opening.get(), self._model, self._caller)
        self._response.write(next(self._body))

    def relay(self, pieces: int) -> None:
        """Counts nothing by itself, and does as little as it can."""
        send, receive, body, write = self._model.send, self._caller.recv, self._body, self._response.write
        for _ in range(pieces):
            send(PIECE)
            write(next(body))
            assert b" piece" in receive(65536)

    def close(self) -> None:
        self._body.close()
        for sock in self._sockets:
            sock.close()


def _take(listener: socket.socket) -> socket.socket:
    """The model's side: a connection on which the head and the first piece have been sent."""
    connection, _ = listener.accept()
    asked = b""
    while not asked.endswith(b"}"):
        asked += connection.recv(65536)
    connection.sendall(HEAD + PIECE)
    return connection


def _plain(sock: socket.socket) -> socket.socket:
    """The same socket without gevent's part, for the loop that only measures."""
    from gevent import monkey

    sock.setblocking(True)
    plain: socket.socket = monkey.get_original("socket", "socket")(fileno=os.dup(sock.fileno()))
    plain.settimeout(None)
    os.set_blocking(plain.fileno(), True)
    return plain


def relay_all() -> None:
    from gevent import monkey

    monkey.patch_all()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    os.environ |= {"OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1"} | SETTINGS
    import gevent

    from wsgi import app

    # A greenlet each, as in a worker: Flask's contexts are its own.
    found = {accept: gevent.spawn(per_piece, app, listener, accept).get() for accept in FORMATS}
    print(json.dumps(found), flush=True)
    os._exit(0)


def per_piece(app: Any, listener: socket.socket, accept: str) -> int:
    answer = Relay(app, listener, accept)
    answer.relay(WARM)
    few, many = counted(lambda: answer.relay(FEW)), counted(lambda: answer.relay(MANY))
    answer.close()
    return (many - few) // (MANY - FEW)


def counted(task: Callable[[], None]) -> int:
    """What the task costs, and the remote control: its part is the same each time."""
    told("instrumentation", "on")
    told("zero")
    task()
    # Of the first thread; the others only look up names, and wait.
    executed = re.search(r"^events-1: (\d+)$", told("status", "internal"), re.MULTILINE)
    told("instrumentation", "off")
    assert executed
    return int(executed[1])


# --- the record -----------------------------------------------------------------------------------------


def write_down(found: dict[str, int]) -> None:
    """The line of this build in the test's table, in the place of the one that is there."""
    text, line = TEST.read_text(), f"    {json.dumps(build())}: {json.dumps(found)},\n"
    kept = re.sub(rf'^    "{re.escape(build())}": .*\n', "", text, flags=re.MULTILINE)
    TEST.write_text(kept.replace(TABLE, TABLE + line))
    print(line.strip())


if __name__ == "__main__":
    if sys.argv[1:] == ["relay"]:
        relay_all()
    else:
        write_down(count())
