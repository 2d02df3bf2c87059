"""The servers that are measured: how each is started with one worker, and what is missing where one cannot be."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ops.nginx_conf import command as nginx_command

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
START_SECONDS = 30.0
STOP_SECONDS = 5.0
# Of streams that are open at once: streamchat and gunicorn take fewer as shipped, the largest load is 2,000.
MOST_STREAMS = 2500


@dataclass(frozen=True)
class Place:
    """Where a server listens, whom it asks, and where its files go."""

    port: int
    upstream: str
    folder: Path


@dataclass(frozen=True)
class Peer:
    """`missing` says why it cannot run here, or None. `anywhere`: it is not what is measured, and has all cores."""

    name: str
    title: str
    command: Callable[[Place], Sequence[str]]
    environment: Mapping[str, str]
    missing: Callable[[], str | None]
    anywhere: bool = False


class PeerFailure(Exception):
    """Says which server failed, with the end of what it wrote."""


@dataclass(frozen=True)
class Server:
    """A peer that runs. `pid` is the root of its process tree."""

    peer: Peer
    pid: int
    port: int


def gunicorn(place: Place, *arguments: str) -> list[str]:
    connections = ["--worker-connections", str(MOST_STREAMS + 100)]
    return [sys.executable, "-m", "gunicorn", "-w", "1", "-b", f"127.0.0.1:{place.port}", *connections, *arguments]


def _streamchat(place: Place) -> list[str]:
    return gunicorn(place, "-c", "conf/gunicorn.conf.py", "wsgi:app")


def _plain_flask(place: Place) -> list[str]:
    return gunicorn(place, "-k", "gevent", "--no-control-socket", "--keep-alive", "75", "bench.servers.plain_flask:app")


def _fastapi(place: Place) -> list[str]:
    options = ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
    options += ["--backlog", "4096", "--timeout-keep-alive", "75", "--port", str(place.port)]
    return [sys.executable, "-m", "uvicorn", *options, "bench.servers.fastapi_app:app"]


def _express(place: Place) -> list[str]:
    node = shutil.which("node")
    assert node is not None
    return [node, str(BENCH / "express" / "server.js")]


def _nginx(place: Place) -> list[str]:
    scheme, _, rest = place.upstream.partition("://")
    values = {
        "folder": place.folder,
        # Only root may choose the account of the worker, and nobody else needs to.
        "account": "user root;" if os.geteuid() == 0 else "",
        "scheme": scheme,
        "upstream": rest.partition("/")[0],
        "port": place.port,
    }
    template = string.Template((BENCH / "servers" / "nginx.conf.template").read_text())
    copy = place.folder / "nginx.conf"
    copy.write_text(template.substitute(values))
    return nginx_command(str(find_nginx()), copy)


def _gevent_relay(place: Place) -> list[str]:
    return [sys.executable, str(BENCH / "servers" / "gevent_relay.py"), str(place.port), place.upstream]


def find_nginx() -> str | None:
    # Debian keeps it where only root's PATH leads.
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def _nothing_missing() -> None:
    return None


def _missing_nginx() -> str | None:
    return None if find_nginx() else "nginx is not installed"


@cache
def _missing_express() -> str | None:
    """Installs the pinned npm packages, if that is still to be done."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        return "node and npm are not installed"
    folder = BENCH / "express"
    made, lock = folder / "node_modules" / ".package-lock.json", folder / "package-lock.json"
    if made.exists() and made.stat().st_mtime >= lock.stat().st_mtime:
        return None
    print("Installing the npm packages of bench/express ...", file=sys.stderr)
    run = subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=folder, capture_output=True, text=True)
    return f"npm ci failed: {run.stderr.strip().splitlines()[-1]}" if run.returncode else None


SHIPPED = {"STREAMCHAT_PUBLIC": "true", "STREAMCHAT_MAX_STREAMS": str(MOST_STREAMS)}
PEERS = {
    peer.name: peer
    for peer in (
        Peer("streamchat", "streamchat as shipped", _streamchat, SHIPPED, _nothing_missing),
        Peer(
            "streamchat-0",
            "streamchat, coalescing off",
            _streamchat,
            SHIPPED | {"STREAMCHAT_COALESCE_MS": "0"},
            _nothing_missing,
        ),
        Peer("express", "Node, Express, openai-node", _express, {"NODE_ENV": "production"}, _missing_express),
        Peer("flask", "Flask, SDK objects, gunicorn gevent", _plain_flask, {}, _nothing_missing),
        Peer("fastapi", "FastAPI, AsyncOpenAI, uvloop", _fastapi, {}, _nothing_missing),
        Peer("gevent", "bare gevent sockets (a limit)", _gevent_relay, {}, _nothing_missing),
        Peer("nginx", "nginx alone, undecoded (a limit)", _nginx, {}, _missing_nginx),
    )
}

# The same with the response log on; bench/run --store holds it against streamchat as shipped. {folder} is the run's.
STORED = Peer(
    "streamchat-sqlite",
    "streamchat with a log in SQLite",
    _streamchat,
    SHIPPED | {"STREAMCHAT_STORE_URL": "sqlite:///{folder}/streamchat.db", "STREAMCHAT_ON_DISCONNECT": "finish"},
    _nothing_missing,
)


@contextlib.contextmanager
def running(peer: Peer, upstream: str, folder: Path, cores: frozenset[int], authority: Path | None) -> Iterator[Server]:
    """The peer on a free port, bound to these cores, until the block ends. Raises PeerFailure if it does not start."""
    place = Place(_free_port(), upstream, folder)
    environment = _environment(peer, place, authority)
    log = folder / f"{peer.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            peer.command(place),
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    try:
        _wait_until_listening(process, place.port, peer, log)
        yield Server(peer, process.pid, place.port)
    finally:
        _stop(process)


def _environment(peer: Peer, place: Place, authority: Path | None) -> dict[str, str]:
    """Nothing of the shell's own STREAMCHAT_..., OPENAI_... or proxies reaches a server."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("STREAMCHAT_", "OPENAI_")) and not name.lower().endswith("_proxy")
    }
    own = {"OPENAI_BASE_URL": place.upstream, "OPENAI_API_KEY": "none", "PORT": str(place.port)}
    trust = {name: str(authority) for name in ("SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS")} if authority else {}
    return kept | own | trust | {name: value.format(folder=place.folder) for name, value in peer.environment.items()}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_listening(process: subprocess.Popen[bytes], port: int, peer: Peer, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise PeerFailure(f"{peer.name} did not start:\n{log.read_text(errors='replace')[-2000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the session that we started it in
    process.wait()
