"""The processes under a row: fake upstream, gunicorn as shipped, nginx as shipped, and the response log."""

from __future__ import annotations

import json
import shutil
import ssl
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import apsw

from tests.fake_upstream import FakeUpstream, tls_pair
from tests.live.servers import Server, free_port, gunicorn, nginx
from tests.redis_server import RedisServer

from .model import Model, Script

# Time limits are shortened so that a run takes minutes; the status hold and all that is not named are as shipped.
LIMITS = {
    "first_token_timeout": "4",
    "idle_timeout": "1",
    "write_timeout": "3",
    "heartbeat": "0.5",
    "grace": "8",
    "max_streams_per_user": "1",
    "gateway": "true",
}
CANARY = "sk-canary"  # as tests/live/servers.py makes the key begin


@dataclass(frozen=True)
class Plan:
    """`upstream`: fake, refused, dns, tls. `log`: sqlite, redis, or the options of a small disk for the file."""

    upstream: str = "fake"
    log: str = "sqlite"
    two: bool = False  # a second gunicorn over the same log
    settings: Mapping[str, str] = field(default_factory=dict)


KEPT = {"lease": "15", "on_disconnect": "finish"}  # answers survive, so that they may be resumed
PLANS = {
    "main": Plan(two=True, settings={"lease": "2"}),
    "refused": Plan("refused"),
    "dns": Plan("dns"),
    "tls": Plan("tls"),
    "tight": Plan(settings={"first_token_timeout": "1", "total_timeout": "3"}),
    "patient": Plan(settings={"idle_timeout": "60"}),
    "full": Plan(settings={"max_streams": "6"}),
    "redis": Plan(log="redis", two=True, settings=KEPT),
    "sqlite": Plan(settings=KEPT),
    "small disk": Plan(log="size=1m", settings=KEPT),
    "read-only disk": Plan(log="size=1m,ro", settings=KEPT),
}


@dataclass
class Chain:
    """`path` is the log's file as this process sees it; None where the log is not a file."""

    model: Model
    first: Server
    second: Server | None
    front: Server
    tokens: Mapping[str, str]
    path: Path | None
    redis: RedisServer | None
    folder: Path
    stack: ExitStack
    foreign: bool  # the file is on a disk that only the server has mounted

    def told(self, user: str) -> list[dict[str, str]]:
        """The log lines of a user's answers, on both servers."""
        servers = [self.first, *([self.second] if self.second else [])]
        return [record for server in servers for record in server.records() if record.get("user") == user]

    def kept(self, user: str) -> list[tuple[str, str]]:
        """Id and outcome of each of the user's rows in the log's ledger."""
        if self.redis is not None:
            return self._kept_in_redis(user)
        if self.path is None or not self.path.exists():
            return []
        if self.foreign:
            return self._kept_in_copy(user)
        return _rows(self.path, "SELECT id, outcome FROM ledger WHERE user = ?", user)

    def _kept_in_copy(self, user: str) -> list[tuple[str, str]]:
        """Of a file on the server's own disk: SQLite resolves links, and would look at our disk instead."""
        assert self.path is not None
        with tempfile.TemporaryDirectory(prefix="streamchat-faults-") as folder:
            for suffix in ("", "-wal"):
                with suppress(FileNotFoundError):
                    shutil.copyfile(f"{self.path}{suffix}", f"{folder}/log.db{suffix}")
            with suppress(apsw.Error):  # it was copied while it was written to: the next look will do
                return _rows(Path(folder) / "log.db", "SELECT id, outcome FROM ledger WHERE user = ?", user)
        return []

    def _kept_in_redis(self, user: str) -> list[tuple[str, str]]:
        assert self.redis is not None
        client: Any = self.redis.client  # its types know bytes only
        entries = [entry for key in client.keys("*ledger:*") for entry in client.xrange(key)]
        records = [json.loads(fields["r"]) for _, fields in entries]
        return [(record["id"], record["outcome"]) for record in records if record["user"] == user]

    def running(self, user: str) -> str:
        """The id of the user's answer that runs: what a caller of application/json is told only at its end."""
        assert self.path is not None
        ((id,),) = _rows(self.path, "SELECT id FROM answers WHERE user = ? AND ended_at IS NULL", user)
        return str(id)

    def restart_nginx(self) -> None:
        """Another nginx in the place of one that has ended."""
        self.front = self.stack.enter_context(nginx(self.first, self.folder))


@contextmanager
def open_chain(
    plan: Plan, users: Mapping[str, str], scripts: Mapping[str, tuple[Script, ...]], folder: Path
) -> Iterator[Chain]:
    """`users`: token by name. They end in the order in which nobody waits for another."""
    with ExitStack() as stack:
        fake = stack.enter_context(FakeUpstream(_tls(plan, folder)))
        inside, path, redis, url = _log(plan, folder, stack)
        settings = {**LIMITS, **plan.settings, "store_url": url, "tokens": json.dumps(dict(users))}

        def start() -> Server:
            given: dict[str, str] = dict(settings)
            running = gunicorn(_base_url(plan, fake), folder, inside=inside, **given)  # type: ignore[arg-type]
            return stack.enter_context(running)

        first = start()
        second = start() if plan.two else None
        if inside:
            path = Path(f"/proc/{first.process.pid}/root{path}")
        front = stack.enter_context(nginx(first, folder))
        for server in filter(None, (first, second)):
            stack.callback(server.terminate)  # both at once: each takes its time
        yield Chain(Model(fake, scripts), first, second, front, users, path, redis, folder, stack, bool(inside))


def _tls(plan: Plan, folder: Path) -> ssl.SSLContext | None:
    """A certificate of an authority that the server does not know."""
    return tls_pair(folder)[0] if plan.upstream == "tls" else None


def _base_url(plan: Plan, fake: FakeUpstream) -> str:
    others: dict[str, Callable[[], str]] = {
        "refused": lambda: f"http://127.0.0.1:{free_port()}/v1",
        "dns": lambda: "http://model.invalid/v1",  # a name that never resolves (RFC 6761)
    }
    return others.get(plan.upstream, lambda: fake.base_url)()


def _log(plan: Plan, folder: Path, stack: ExitStack) -> tuple[list[str], Path | None, RedisServer | None, str]:
    """Under which command the server runs, the log's file or Redis, and its URL."""
    if plan.log == "redis":
        redis = stack.enter_context(RedisServer(folder))
        return [], None, redis, redis.url
    if plan.log == "sqlite":
        return [], folder / "log.db", None, f"sqlite:///{folder}/log.db"
    assert shutil.which("unshare"), "unshare is missing: install Debian's package util-linux"
    disk = folder / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o {plan.log} none "$0" && exec "$@"'
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(disk)]
    return inside, disk / "log.db", None, f"sqlite:///{disk}/log.db"


def _rows(path: Path, asked: str, user: str) -> list[Any]:
    connection = apsw.Connection(str(path))
    try:
        connection.set_busy_timeout(2000)
        return list(connection.execute(asked, (user,)))
    finally:
        connection.close()
