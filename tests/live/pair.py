"""Two gunicorns over one response log and one fake upstream, and callers that read event by event.

What a server does with an answer is the script that `Model` has for its message.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from streamchat.loop import choose_loop
from streamchat.settings import Settings
from streamchat.store import Store
from streamchat.stores import open_store
from tests.fake_upstream import FakeUpstream, Gate, RecordedRequest, Step, done, finish, head, last_chunk, text
from tests.fake_upstream import usage_chunk as usage
from tests.live.readers import JSON, PATH, SECONDS, SSE, Seen, finish_reading
from tests.live.servers import Server, gunicorn, wait_for
from tests.redis_server import RedisServer

LEASE = 1.0  # seconds
ENDS = ("finish", "error")
TOKENS = {"ann": "token-of-ann", "bob": "token-of-bob"}
STORES = ("redis", "sqlite")


# --- the model --------------------------------------------------------------------------------------------


class Model:
    """A fake upstream whose scripts are named by the messages that ask for them."""

    def __init__(self, fake: FakeUpstream) -> None:
        self.fake = fake
        self.scripts: dict[str, Step] = {}
        fake.choose = lambda request: self.scripts[request.message]

    def asked(self, message: str) -> list[RecordedRequest]:
        return [request for request in self.fake.requests if request.message == message]

    def say(self, message: str, *parts: Iterable[str] | Gate) -> str:
        """A whole answer: pieces, and gates between them. The message that asks for it."""
        steps = [step for part in parts for step in ([part] if isinstance(part, Gate) else map(text, part))]
        self.scripts[message] = [head(), *steps, finish(), usage(19, 10), done(), last_chunk()]
        return message


def words(first: int, last: int) -> list[str]:
    """Pieces that name their own place."""
    return [f"w{number} " for number in range(first, last)]


# --- callers ----------------------------------------------------------------------------------------------


class Reading:
    """One open SSE response; `next` waits for an event. Heartbeats are left out, and so is what follows a cut."""

    def __init__(self, port: int, path: str, body: bytes | None, fields: Mapping[str, str]) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        own = {"Accept": SSE, "Connection": "close"} | ({} if body is None else {"Content-Type": JSON})
        self._connection.request("GET" if body is None else "POST", path, body, own | dict(fields))
        self._response = self._connection.getresponse()
        self.status = self._response.status
        self.headers = dict(self._response.headers.items())
        self.id = self.headers["X-Response-Id"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def next(self) -> dict[str, Any] | None:
        """The next event; None where there will be none."""
        try:
            while line := self._response.readline():
                if line.startswith(b"data: "):
                    event: dict[str, Any] = json.loads(line[6:])
                    return event
        except (http.client.IncompleteRead, ConnectionError):
            pass
        return None

    def until(self, seq: int) -> list[dict[str, Any]]:
        """Up to the event of this seq."""
        events = []
        while event := self.next():
            events.append(event)
            if event.get("seq") == seq:
                return events
        raise AssertionError(f"the answer ended before event {seq}: {events}")

    def rest(self) -> list[dict[str, Any]]:
        events = []
        while event := self.next():
            events.append(event)
        return events

    def whole(self) -> Seen:
        """All that comes, for other formats than SSE, and for answers that are none."""
        return finish_reading(self._response)

    def close(self) -> None:
        self._response.close()
        self._connection.close()


def token_of(user: str | None) -> dict[str, str]:
    return {} if user is None else {"Authorization": f"Bearer {TOKENS[user]}"}


def ask(server: Server, message: str, user: str | None = None, **fields: str) -> Reading:
    """`fields`: further headers, an underscore for each dash."""
    more = {name.replace("_", "-"): value for name, value in fields.items()}
    return Reading(server.port, PATH, json.dumps({"message": message}).encode(), token_of(user) | more)


def resume(server: Server, id: str, after: int = -1, user: str | None = None, accept: str = SSE) -> Reading:
    path = f"/api/responses/{id}/stream?after={after}"
    return Reading(server.port, path, None, token_of(user) | {"Accept": accept})


def look(server: Server, id: str, user: str | None = None) -> dict[str, Any]:
    """The answer's object."""
    with Reading(server.port, f"/api/responses/{id}", None, token_of(user) | {"Accept": JSON}) as reading:
        return _document(reading)


def cancel(server: Server, id: str, user: str | None = None) -> dict[str, Any]:
    path = f"/api/responses/{id}/cancel"
    with Reading(server.port, path, b"", token_of(user) | {"Accept": JSON}) as reading:
        return _document(reading)


def _document(reading: Reading) -> dict[str, Any]:
    seen = reading.whole()
    assert seen.status == 200 and seen.whole, seen
    return seen.document


def text_of(events: Iterable[Mapping[str, Any]]) -> str:
    return "".join(event["text"] for event in events if event["type"] == "text")


def seqs(events: Iterable[Mapping[str, Any]]) -> list[int]:
    return [event["seq"] for event in events]


# --- the servers ------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """`redis` where the log is one."""

    model: Model
    first: Server
    second: Server
    store: Store
    redis: RedisServer | None = None

    def live(self) -> int:
        return self.store.gauges()["live"]

    def wait_for_none(self, seconds: float = 5.0) -> None:
        wait_for(lambda: self.live() == 0, seconds, "the end of all answers")


@contextmanager
def log_of(kind: str, folder: Path) -> Iterator[tuple[str, RedisServer | None]]:
    """The URL of a new log."""
    if kind == "sqlite":
        yield f"sqlite:///{folder}/log.db", None
        return
    with RedisServer(folder) as redis:
        yield redis.url, redis


@contextmanager
def looking(url: str, lease: float = LEASE) -> Iterator[Store]:
    """The log as this process sees it."""
    store = open_store(Settings(public=True, store_url=url, lease=lease), choose_loop())
    assert store is not None
    try:
        yield store
    finally:
        store.close()


@contextmanager
def pair_over(kind: str, folder: Path, *arguments: str, users: bool = False, **settings: str) -> Iterator[Pair]:
    """`arguments` are gunicorn's, `settings` both servers'."""
    with ExitStack() as stack:
        url, redis = stack.enter_context(log_of(kind, folder))
        given = {"store_url": url, "lease": str(LEASE)} | ({"tokens": json.dumps(TOKENS)} if users else {}) | settings
        model = Model(stack.enter_context(FakeUpstream()))
        url_of_model = model.fake.base_url

        def start(_: int) -> Server:
            running = gunicorn(url_of_model, folder, *arguments, **given)  # type: ignore[arg-type]
            return stack.enter_context(running)

        with ThreadPoolExecutor(2) as pool:  # both at once, and both end at once: each takes its time
            first, second = pool.map(start, range(2))
        for server in (first, second):
            stack.callback(server.terminate)
        yield Pair(model, first, second, stack.enter_context(looking(url)), redis)


def seconds_since(began: float) -> float:
    return time.monotonic() - began
