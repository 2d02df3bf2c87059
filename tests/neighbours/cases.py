"""A case: neighbours, a server, and a caller who sends what the neighbours want to see."""

from __future__ import annotations

import http.client
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tests.fake_upstream import FakeUpstream
from tests.live.readers import PATH, TEXT, Seen, finish_reading, question
from tests.live.servers import Server, environment, free_port, gunicorn, running, wait_for
from tests.neighbours.mounts import NEIGHBOURS

APP = "tests.neighbours.shop:create_app()"
THREADS = 64  # a thread for each of 50 streams
PATIENCE = 15.0  # seconds: who holds pieces back fails a test by it
HOST = "shop.example"
ADDRESS = "203.0.113.7"
# As conf/nginx.conf sends them.
FORWARDED = {
    "Host": HOST,
    "X-Forwarded-For": ADDRESS,
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": HOST,
    "Referer": f"https://{HOST}/",
}

Start = Callable[[str, Path, bool, dict[str, str]], AbstractContextManager[Server]]


def by_gevent(base_url: str, folder: Path, debug: bool, extra: dict[str, str]) -> AbstractContextManager[Server]:
    return gunicorn(base_url, folder, app=APP, extra=extra)


@contextmanager
def by_gthread(base_url: str, folder: Path, debug: bool, extra: dict[str, str]) -> Iterator[Server]:
    """Real threads, and nothing of conf/: its first line makes them greenlets."""
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "-k", "gthread", "--threads", str(THREADS), "-w", "1"]
    command += ["-b", f"127.0.0.1:{port}", "--graceful-timeout", "2", APP]
    with running(command, port, folder, environment(base_url) | extra, "gthread") as server:
        yield server


@contextmanager
def by_flask_run(base_url: str, folder: Path, debug: bool, extra: dict[str, str]) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "flask", "--app", APP, *(["--debug"] if debug else [])]
    command += ["run", "--no-reload", "-p", str(port)]
    with running(command, port, folder, environment(base_url) | extra, "flask") as server:
        yield server


SERVERS: dict[str, Start] = {"gevent": by_gevent, "gthread": by_gthread, "flask run": by_flask_run}
ALL = "all"


@dataclass(frozen=True)
class Case:
    name: str  # of a neighbour, or ALL
    server: str

    @property
    def neighbours(self) -> list[str]:
        return list(NEIGHBOURS) if self.name == ALL else [self.name]

    @property
    def long(self) -> bool:
        """The plain ./check has each alone under gevent, and all together under each server."""
        return self.name != ALL and self.server != "gevent"

    def __str__(self) -> str:
        return f"{self.name} under {self.server}"


CASES = [Case(name, server) for server in SERVERS for name in [*NEIGHBOURS, ALL]]


def under(*neighbours: str) -> pytest.MarkDecorator:
    """Runs the test in all cases that have these neighbours."""
    chosen = [case for case in CASES if set(neighbours) <= set(case.neighbours)]
    long = [pytest.mark.long]
    params = [pytest.param(case, id=str(case), marks=long if case.long else []) for case in chosen]
    return pytest.mark.parametrize("shop", params, indirect=True, scope="session")


class Reading:
    """A response that is read bit by bit."""

    def __init__(self, port: int, method: str, path: str, body: bytes | None, headers: Mapping[str, str]) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        self._connection.request(method, path, body, dict(headers))
        self._response: http.client.HTTPResponse | None = None

    @property
    def response(self) -> http.client.HTTPResponse:
        if self._response is None:
            self._response = self._connection.getresponse()
        return self._response

    def until(self, wanted: bytes) -> bytes:
        read = b""
        while wanted not in read:
            piece = self.response.read1(65536)
            assert piece, f"the answer ended without {wanted!r}: {read!r}"
            read += piece
        return read

    def rest(self) -> Seen:
        return finish_reading(self.response)

    def leave(self) -> None:
        if self._response is not None:
            self._response.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.leave()


@dataclass
class Shop:
    """A running case, and one of its users."""

    case: Case
    server: Server
    upstream: FakeUpstream
    cookies: dict[str, str] = field(default_factory=dict)
    is_user: bool = True  # logs in where there is a login
    has_token: bool = True  # asks for the token where one is wanted

    def has(self, neighbour: str) -> bool:
        return neighbour in self.case.neighbours

    def open(self, path: str, method: str = "GET", body: bytes | None = None, /, **headers: str) -> Reading:
        """`headers`: an underscore for each dash."""
        cookies = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        given = FORWARDED | ({"Cookie": cookies} if cookies else {})
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        return Reading(self.server.port, method, path, body, given)

    def get(self, path: str, **headers: str) -> Seen:
        return self._whole(self.open(path, **headers))

    def seen(self) -> dict[str, Any]:
        return self.get("/seen").document

    @property
    def records(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.seen()["records"]
        return found

    def _whole(self, reading: Reading) -> Seen:
        with reading:
            seen = reading.rest()
            for cookie in reading.response.headers.get_all("Set-Cookie", []):
                name, _, value = cookie.partition(";")[0].partition("=")
                self.cookies[name] = value
        return seen

    @cached_property
    def credentials(self) -> dict[str, str]:
        """What a question must carry besides the cookies."""
        wanted = self.has_token and self.has("Flask-WTF CSRFProtect")
        token = {"X_CSRFToken": json.loads(self.get("/token").body)} if wanted else {}
        if self.is_user and self.has("Flask-Login"):
            entered = self._whole(self.open("/login", "POST", b"", X_User="user-7", **token))
            assert entered.status == 200, entered
        return token

    def ask(self, message: str = "hi", accept: str = TEXT, **headers: str) -> Reading:
        given = {**self.credentials, "Accept": accept, "Content_Type": "application/json", **headers}
        return self.open(PATH, "POST", question(message), **given)

    def told(self, message: str = "hi", accept: str = TEXT, **headers: str) -> Seen:
        return self._whole(self.ask(message, accept, **headers))

    def somebody(self, *, is_user: bool, has_token: bool) -> Shop:
        """Somebody else at the same shop."""
        return replace(self, cookies={}, is_user=is_user, has_token=has_token)

    def last_record(self) -> dict[str, Any]:
        """The record of the last question that reached the model."""
        wait_for(lambda: len(self.records) == len(self.upstream.requests), what=f"a record each in {self.case}")
        return self.records[-1]


@contextmanager
def opened(case: Case, folder: Path) -> Iterator[Shop]:
    with FakeUpstream() as upstream:
        extra = {"SHOP_NEIGHBOURS": json.dumps(case.neighbours), "SHOP_FOLDER": str(folder)}
        debug = "Flask-DebugToolbar" in case.neighbours
        with SERVERS[case.server](upstream.base_url, folder, debug, extra) as server:
            yield Shop(case, server, upstream)
            server.process.send_signal(signal.SIGINT)  # nothing is left to be waited for
