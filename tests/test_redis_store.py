"""The response log in Redis: what it promises where Redis is slow, full, killed, paused or not there."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme
from hypothesis import given
from hypothesis import strategies as st

from streamchat.attempts import Next
from streamchat.errors import LeaseLost, SettingsError, StoreDown, TooManyStreams
from streamchat.events import Event, Finish, Start, Text, Usage
from streamchat.ledger import Record
from streamchat.redis_listener import RedisListener, frames
from streamchat.redis_store import RedisStore
from streamchat.store import Batch, Ending, Entry, Limits, pack

from .asking import Background
from .queue_contract import QueueContract
from .redis_server import RedisServer, free_port
from .store_contract import EMPTY, StoreContract

LEASE = 30.0
DOWN_WITHIN = 2.0
HEARD_WITHIN = 5.0


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One server for all of the contract; a test that makes its server sick has its own."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


class TestRedisStore(QueueContract, StoreContract):
    @pytest.fixture
    def store(self, kept: RedisServer) -> Iterator[RedisStore]:
        kept.client.flushall()
        store = RedisStore(kept.url, LEASE)
        yield store
        store.close()

    @pytest.fixture
    def another(self, kept: RedisServer, store: RedisStore) -> Iterator[RedisStore]:
        another = RedisStore(kept.url, LEASE)
        yield another
        another.close()

    @pytest.fixture
    def expire(self, kept: RedisServer) -> Callable[[], None]:
        def expire() -> None:
            for key in kept.client.keys("streamchat:owner:*"):
                kept.client.pexpire(key, 1)
            assert eventually(lambda: not kept.client.keys("streamchat:owner:*"))

        return expire


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture
def store(server: RedisServer) -> Iterator[RedisStore]:
    store = RedisStore(server.url, LEASE)
    yield store
    store.close()


@pytest.fixture
def owner(store: RedisStore) -> str:
    return store.take_lease()


def entry(owner: str, id: str = "resp_1", **more: Any) -> Entry:
    return Entry(id=id, owner=owner, user="anna", model="m", created_at=time.time(), **more)


def batch(first: int, *events: Event, id: str = "resp_1") -> Batch:
    events = events or (Text(f"piece {first}"),)
    return Batch(id, first, len(events), pack(events))


def ending(id: str = "resp_1", tokens: int = 5) -> Ending:
    usage = Usage(tokens, tokens, False)
    record = Record(
        id=id,
        user="anna",
        model="m",
        started=time.time(),
        first_piece=0.1,
        duration=1.0,
        outcome="completed",
        finish_reason="stop",
        pieces=1,
        input_tokens=tokens,
        output_tokens=tokens,
        estimated=False,
        attempts=1,
        upstream_status=200,
        upstream_request_id=None,
        upstream_code=None,
    )
    return Ending(id, "completed", record, finish_reason="stop", usage=usage)


def hear(listener: RedisListener, count: int) -> list[Batch]:
    """As many batches, also over a connection that was lost."""
    heard: list[Batch] = []
    deadline = time.monotonic() + HEARD_WITHIN
    while len(heard) < count and time.monotonic() < deadline:
        try:
            heard += listener.wait(0.2)[0]
        except StoreDown:
            continue
    return heard


def hear_cancel(listener: RedisListener) -> list[str]:
    deadline = time.monotonic() + HEARD_WITHIN
    while time.monotonic() < deadline:
        try:
            if cancelled := listener.wait(0.2)[1]:
                return cancelled
        except StoreDown:
            continue
    return []


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + HEARD_WITHIN
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held


def teach_scripts(server: RedisServer) -> None:
    """Redis knows a script from its first use on: a hanging one does then what it was sent once it goes on."""
    store = RedisStore(server.url, LEASE, prefix="other:")
    store.admit(entry(store.take_lease()), Limits())
    store.close()


# Every method of the contract, with arguments that are never refused for what they are.
CALLS: dict[str, Callable[[RedisStore, RedisListener, str], object]] = {
    "take_lease": lambda store, _, owner: store.take_lease(),
    "renew": lambda store, _, owner: store.renew(owner),
    "give_up": lambda store, _, owner: store.give_up("nobody"),
    "admit": lambda store, _, owner: store.admit(entry(owner), Limits(9, 9, 900)),
    "claim": lambda store, _, owner: store.claim(owner, "jobs", 9),
    "begin": lambda store, _, owner: store.begin(owner, "resp_1"),
    "write": lambda store, _, owner: store.write(owner, [batch(0)], []),
    "find": lambda store, _, owner: store.find("resp_1"),
    "latest": lambda store, _, owner: store.latest("anna", "chat"),
    "read": lambda store, _, owner: store.read("resp_1", -1),
    "add": lambda store, listener, owner: listener.add("resp_1"),
    "wait": lambda store, listener, owner: listener.wait(30.0),
    "listen": lambda store, _, owner: listen_once(store, owner),
    "cancel": lambda store, _, owner: store.cancel("resp_1"),
    "attend": lambda store, _, owner: store.attend(["resp_1"]),
    "unattended": lambda store, _, owner: store.unattended("resp_1"),
    "reap": lambda store, _, owner: store.reap(),
    "usage": lambda store, _, owner: store.usage(0.0, "user"),
    "prune": lambda store, _, owner: store.prune(3600.0, 10, 10),
    "gauges": lambda store, _, owner: store.gauges(),
    "take": lambda store, _, owner: store.outbox.take(owner, "jobs", time.time(), 9),
    "settle": lambda store, _, owner: store.outbox.settle(owner, "msg_1", Next("dead", switch_off=True), "410"),
    "find a letter": lambda store, _, owner: store.outbox.find("msg_1"),
    "letters": lambda store, _, owner: store.outbox.letters(None, 9),
    "replay": lambda store, _, owner: store.outbox.replay("msg_1", time.time()),
}
WITHOUT_WAIT = {name: call for name, call in CALLS.items() if name != "wait"}


def listen_once(store: RedisStore, owner: str) -> None:
    listener = store.listen(owner)
    try:
        listener.wait(0.0)
    finally:
        listener.close()


@dataclass
class Handle:
    """A store of its own for each method: none of them waits for another one's connections."""

    store: RedisStore
    listener: RedisListener
    owner: str


@pytest.fixture
def handles(server: RedisServer) -> Iterator[dict[str, Handle]]:
    made = {}
    for name in CALLS:
        store = RedisStore(server.url, LEASE)
        owner = store.take_lease()
        made[name] = Handle(store, store.listen(owner), owner)
        made[name].listener.add("resp_0")
    yield made
    for handle in made.values():
        handle.listener.close()
        handle.store.close()


def outcomes(handles: dict[str, Handle]) -> dict[str, tuple[str, float]]:
    """All calls at once: what each raises, and after how many seconds."""
    barrier = threading.Barrier(len(handles))

    def outcome(name: str) -> tuple[str, float]:
        handle = handles[name]
        barrier.wait()
        begin = time.monotonic()
        try:
            CALLS[name](handle.store, handle.listener, handle.owner)
            raised = "nothing"
        except Exception as error:
            raised = type(error).__name__ if not isinstance(error, StoreDown) else "StoreDown"
        return raised, time.monotonic() - begin

    with ThreadPoolExecutor(len(handles)) as pool:
        return dict(zip(handles, pool.map(outcome, handles), strict=True))


def assert_down_in_time(found: dict[str, tuple[str, float]]) -> None:
    assert {name: raised for name, (raised, _) in found.items()} == dict.fromkeys(found, "StoreDown")
    assert {name: seconds for name, (_, seconds) in found.items() if seconds > DOWN_WITHIN} == {}


def test_nothing_connects_before_the_first_call(server: RedisServer) -> None:
    store = RedisStore(server.url, LEASE)
    listener = store.listen("owner")
    assert server.connections() == []
    store.find("resp_1")
    assert len(server.connections()) == 1
    listener.close()
    store.close()


def test_without_the_redis_package_the_start_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.delitem(sys.modules, "streamchat.redis_link", raising=False)
    with pytest.raises(SettingsError, match=r'pip install "flask-streamchat\[redis\]"'):
        RedisStore("redis://127.0.0.1", LEASE)


@pytest.mark.parametrize(
    "url",
    ["http://h:1", "redis://:s3cret@h:s3cret", "redis://:s3cret@h?s3cret=1", "redis://:s3cret@h?ssl_s3cret=1"],
)
def test_a_url_that_cannot_be_used_stops_the_start_and_is_not_repeated(url: str) -> None:
    with pytest.raises(SettingsError, match="STREAMCHAT_STORE_URL") as raised:
        RedisStore(url, LEASE)
    assert "s3cret" not in "".join(traceback.format_exception(raised.value))


def test_the_url_cannot_make_calls_wait_longer(server: RedisServer) -> None:
    store = RedisStore(f"{server.url}/1?socket_timeout=60&max_connections=99&timeout=60", LEASE)
    store.take_lease()
    server.stop()
    begin = time.monotonic()
    with pytest.raises(StoreDown):
        store.take_lease()
    assert time.monotonic() - begin < DOWN_WITHIN
    store.close()


@pytest.mark.parametrize("name", CALLS)
def test_a_redis_that_is_not_there_is_down_at_once(name: str) -> None:
    store = RedisStore("redis://127.0.0.1:1", LEASE)
    listener = store.listen("owner")
    begin = time.monotonic()
    with pytest.raises(StoreDown):
        CALLS[name](store, listener, "owner")
    assert time.monotonic() - begin < DOWN_WITHIN
    listener.close()
    store.close()


class SilentResolver:
    """In place of getaddrinfo: says nothing until it is told to, then what the system's own says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._own = socket.getaddrinfo
        self._speak = threading.Event()
        self.asked: list[object] = []
        monkeypatch.setattr("socket.getaddrinfo", self._resolve)

    def _resolve(self, *of: Any, **more: Any) -> Any:
        self.asked.append(of[0])
        self._speak.wait()
        return self._own(*of, **more)

    def speak(self) -> None:
        self._speak.set()


@pytest.mark.parametrize("name", CALLS)
def test_a_resolver_that_says_nothing_is_down_within_two_seconds(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    resolver = SilentResolver(monkeypatch)
    store = RedisStore(server.url, LEASE)
    listener = store.listen("owner")
    try:
        begin = time.monotonic()
        with pytest.raises(StoreDown):
            CALLS[name](store, listener, "owner")
        assert time.monotonic() - begin < DOWN_WITHIN
        assert resolver.asked
    finally:
        resolver.speak()
        listener.close()
        store.close()
    assert eventually(lambda: server.connections() == [])  # what came too late was closed


def test_a_silent_resolver_is_asked_twice_at_a_time_and_redis_is_back_with_it(
    server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver = SilentResolver(monkeypatch)
    store = RedisStore(server.url, LEASE)
    with ThreadPoolExecutor(20) as pool:
        begin = time.monotonic()
        found = [pool.submit(store.find, "resp_1") for _ in range(20)]
        assert {type(each.exception()) for each in found} == {StoreDown}
        assert time.monotonic() - begin < DOWN_WITHIN
    assert len(resolver.asked) == 2
    resolver.speak()
    assert eventually(lambda: server.connections() == [])
    assert store.find("resp_1") is None
    store.close()


def test_where_no_thread_can_be_started_redis_is_down_and_back_with_the_next(
    server: RedisServer, store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refuse)
        for _ in range(3):
            with pytest.raises(StoreDown):
                store.find("resp_1")
    assert store.find("resp_1") is None


def test_all_connect_at_once_over_a_slow_line(
    server: RedisServer, store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    barrier = threading.Barrier(8, timeout=DOWN_WITHIN)
    real: Callable[[redis.Connection], Any] = redis.Connection._connect

    def slow(connection: redis.Connection) -> Any:
        barrier.wait()  # each takes as long as all of them together
        return real(connection)

    monkeypatch.setattr(redis.Connection, "_connect", slow)
    monkeypatch.setitem(store._link._pool.connection_kwargs, "socket_connect_timeout", DOWN_WITHIN)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: store.find("resp_1"), range(8))) == [None] * 8


def test_a_paused_redis_is_down_within_two_seconds_for_every_method_and_all_works_afterwards(
    server: RedisServer, handles: dict[str, Handle]
) -> None:
    server.pause(3.0)
    assert_down_in_time(outcomes(handles))
    assert server.client.ping()  # it answers when the pause is over
    again = outcomes({name: handle for name, handle in handles.items() if name != "wait"})
    assert {name: raised for name, (raised, _) in again.items()} == dict.fromkeys(WITHOUT_WAIT, "nothing")
    waiting = handles["wait"]
    waiting.store.admit(entry(waiting.owner, "resp_0"), Limits())
    waiting.listener.wait(0.0)
    waiting.store.write(waiting.owner, [batch(0, id="resp_0")], [])
    assert hear(waiting.listener, 1) == [batch(0, id="resp_0")]


def test_a_redis_that_hangs_is_down_within_two_seconds_for_every_method(
    server: RedisServer, handles: dict[str, Handle]
) -> None:
    server.stop()
    try:
        assert_down_in_time(outcomes(handles))
        assert_down_in_time(outcomes(handles))  # with connections that are to be made
    finally:
        server.go_on()


def test_an_admission_whose_outcome_was_never_known_is_taken_back_where_it_is_retracted(
    server: RedisServer, store: RedisStore, owner: str
) -> None:
    asked = entry(owner, reserve=7, key="k", fingerprint="f", chat="c")
    teach_scripts(server)
    server.stop()
    with pytest.raises(StoreDown):
        store.admit(asked, Limits(1, 1, 10))
    server.go_on()
    assert eventually(lambda: store.gauges()["live"] == 1)  # Redis did it, and nobody knows
    store.renew(owner)
    assert store.gauges()["live"] == 1  # it may go on without the log, and is to have its end there
    store.write(owner, [], [replace(ending(), retracted=True)])
    assert store.gauges() == EMPTY | {"owners": 1}
    assert store.latest("anna", "c") is None
    assert store.admit(entry(owner, "resp_2", reserve=7, key="k", fingerprint="f"), Limits(1, 1, 10)) == "resp_2"


def test_a_retracted_admission_that_redis_does_late_is_taken_back_with_the_lease(
    store: RedisStore, owner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Redis that hung does what it was sent in any order."""
    asked = entry(owner, reserve=7, key="k", fingerprint="f")
    store.write(owner, [], [replace(ending(), retracted=True)])
    for _ in range(2):
        store.admit(asked, Limits(1, 1, 10))
        store.renew(owner)
        assert store.gauges() == EMPTY | {"owners": 1}
    monkeypatch.setattr("streamchat.redis_store.NAMED_FOR", -1.0)
    store.renew(owner)
    store.admit(asked, Limits(1, 1, 10))
    store.renew(owner)
    assert store.gauges()["live"] == 1


def test_what_a_killed_redis_knew_the_next_one_knows(server: RedisServer, store: RedisStore, owner: str) -> None:
    listener = store.listen(owner)
    store.admit(entry(owner), Limits())
    listener.add("resp_1")
    store.write(owner, [batch(0)], [])
    assert hear(listener, 1) == [batch(0)]
    server.kill()
    for call in (lambda: store.write(owner, [batch(1)], []), lambda: listener.wait(1.0)):
        with pytest.raises(StoreDown):
            call()
    server.start()
    listener.wait(0.0)  # it has subscribed again
    store.renew(owner)
    store.write(owner, [batch(0), batch(1)], [])
    assert hear(listener, 1) == [batch(1)]
    store.write(owner, [batch(2, Finish("stop", None))], [ending()])
    assert store.read("resp_1", -1) == [batch(0), batch(1), batch(2, Finish("stop", None))]
    kept = store.find("resp_1")
    assert kept is not None and kept.status == "completed" and kept.next == 3
    listener.close()


def test_a_full_redis_renews_and_reads_and_what_it_refused_can_be_repeated(
    server: RedisServer, store: RedisStore, owner: str
) -> None:
    listener = store.listen(owner)
    store.admit(entry(owner), Limits())
    listener.add("resp_1")
    store.write(owner, [batch(0)], [])
    server.fill()
    store.renew(owner)
    assert store.read("resp_1", -1) == [batch(0)]
    assert store.find("resp_1") is not None and store.gauges()["live"] == 1
    last: tuple[list[Batch], list[Ending]] = [batch(1, Finish("stop", None))], [ending()]
    for call in (
        lambda: store.write(owner, *last),
        lambda: store.write(owner, [], [ending()]),
        lambda: store.admit(entry(owner, "resp_2"), Limits()),
        store.take_lease,
    ):
        with pytest.raises(StoreDown):
            call()
    store.cancel("resp_1")
    assert hear_cancel(listener) in (["resp_1"], [])  # the batch may come first
    kept = store.find("resp_1")
    assert kept is not None and kept.status == "in_progress" and kept.next == 1
    server.unfill()
    store.write(owner, *last)
    assert store.read("resp_1", -1) == [batch(0), *last[0]]
    assert store.gauges() == {**store.gauges(), "live": 0, "answers": 1, "owners": 1}
    assert [spent.answers for spent in store.usage(0.0, "user")] == [1]
    listener.close()


def test_a_cancel_is_heard_although_memory_is_full(server: RedisServer, store: RedisStore, owner: str) -> None:
    listener = store.listen(owner)
    store.admit(entry(owner), Limits())
    listener.wait(0.0)
    server.fill()
    store.cancel("resp_1")
    assert hear_cancel(listener) == ["resp_1"]
    listener.close()


def test_a_cancel_while_the_listener_had_no_connection_is_heard(store: RedisStore, owner: str) -> None:
    store.admit(entry(owner), Limits())
    store.cancel("resp_1")
    listener = store.listen(owner)
    assert hear_cancel(listener) == ["resp_1"]
    store.cancel("resp_1")
    assert listener.wait(0.1) == ([], [])
    store.write(owner, [], [ending()])
    listener.close()
    assert store.listen(owner).wait(0.1) == ([], [])


def test_two_hundred_callers_share_eight_connections(server: RedisServer, store: RedisStore, owner: str) -> None:
    listener = store.listen(owner)
    listener.add("resp_0")
    seen: list[int] = []
    done = threading.Event()

    def count() -> None:
        while not done.is_set():
            seen.append(len(server.connections()))

    def call(number: int) -> str:
        id = f"resp_{number}"
        store.admit(entry(owner, id), Limits())
        store.write(owner, [batch(0, id=id)], [])
        return store.read(id, -1)[0].id

    with ThreadPoolExecutor(201) as pool:
        counting = pool.submit(count)
        try:
            told = list(pool.map(call, range(200)))
        finally:
            done.set()
        counting.result()
    assert told == [f"resp_{number}" for number in range(200)]
    assert 2 <= max(seen) <= 8 + 1
    listener.close()


def test_no_race_admits_one_too_many(server: RedisServer, store: RedisStore, owner: str) -> None:
    other = RedisStore(server.url, LEASE)

    def admit(number: int) -> bool:
        try:
            (store, other)[number % 2].admit(entry(owner, f"resp_{number}"), Limits(streams_per_user=10))
        except TooManyStreams:
            return False
        return True

    with ThreadPoolExecutor(40) as pool:
        assert sum(pool.map(admit, range(120))) == 10
    assert store.gauges()["live"] == 10
    other.close()


def test_a_password_opens_and_is_never_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with RedisServer(tmp_path, password="s3cret-right") as server:
        right = RedisStore(server.url, LEASE)
        right.take_lease()
        wrong = RedisStore(server.url.replace("right", "wrong"), LEASE)
        listener = wrong.listen("owner")
        for call in (wrong.take_lease, lambda: listener.add("resp_1"), lambda: listener.wait(0.0)):
            with pytest.raises(StoreDown) as raised:
                call()
            assert "s3cret" not in "".join(traceback.format_exception(raised.value))
        server.kill()
        with pytest.raises(StoreDown) as raised:
            right.take_lease()
        assert "s3cret" not in "".join(traceback.format_exception(raised.value)) + repr(right) + repr(vars(right))
        right.close()
        wrong.close()
    assert "Redis does not do what it is asked: AuthenticationError" in caplog.messages
    assert "s3cret" not in caplog.text and "s3cret" not in repr([vars(record) for record in caplog.records])


def test_trouble_of_one_kind_is_logged_once_a_minute(
    server: RedisServer, store: RedisStore, owner: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.fill()
    for _ in range(3):
        with pytest.raises(StoreDown):
            store.take_lease()
        store.renew(owner)
    server.kill()
    for _ in range(3):
        with pytest.raises(StoreDown):
            store.renew(owner)
    told = [message.removeprefix("Redis does not do what it is asked: ") for message in caplog.messages]
    assert told == ["OutOfMemoryError", "ConnectionError"]


def test_a_redis_that_forgot_the_scripts_is_told_again(server: RedisServer, store: RedisStore, owner: str) -> None:
    server.client.script_flush()
    store.renew(owner)
    store.admit(entry(owner), Limits())
    assert store.gauges()["live"] == 1


def test_a_lease_ends_by_the_clock_of_redis_and_never_lives_again(server: RedisServer) -> None:
    store = RedisStore(server.url, 0.2)
    owner = store.take_lease()
    store.admit(entry(owner), Limits())
    assert eventually(lambda: store.gauges()["owners"] == 0)
    for call in (
        lambda: store.renew(owner),
        lambda: store.write(owner, [batch(0)], [ending()]),
        lambda: store.admit(entry(owner, "resp_2"), Limits()),
    ):
        with pytest.raises(LeaseLost):
            call()
    assert store.read("resp_1", -1) == []
    assert store.reap() == ["resp_1"] and store.reap() == []
    store.close()


def test_many_reapers_end_an_answer_once(server: RedisServer, store: RedisStore, owner: str) -> None:
    for number in range(30):
        store.admit(entry(owner, f"resp_{number}", reserve=3), Limits())
    store.give_up(owner)
    with ThreadPoolExecutor(6) as pool:
        reaped = [id for ids in pool.map(lambda _: store.reap(), range(6)) for id in ids]
    assert sorted(reaped) == sorted(f"resp_{number}" for number in range(30))
    assert sum(spent.answers for spent in store.usage(0.0, "model")) == 30
    assert len(store.read("resp_7", -1)) == 1


def test_an_ended_answer_goes_by_itself_after_its_time(server: RedisServer) -> None:
    store = RedisStore(server.url, LEASE, keep=0.3)
    owner = store.take_lease()
    store.admit(entry(owner, chat="c"), Limits())
    store.write(owner, [batch(0)], [ending()])
    assert store.find("resp_1") is not None
    assert eventually(lambda: store.find("resp_1") is None)
    assert store.read("resp_1", -1) == [] and store.latest("anna", "c") is None
    assert [spent.answers for spent in store.usage(0.0, "user")] == [1]
    assert store.prune(0.0, 0, 0) == 1
    assert store.gauges()["bytes"] == 0
    store.close()


def test_what_went_by_itself_is_struck_off_when_others_end(server: RedisServer) -> None:
    store = RedisStore(server.url, LEASE, keep=0.1)
    owner = store.take_lease()
    for number in range(3):
        store.admit(entry(owner, f"resp_{number}"), Limits())
    store.write(owner, [batch(0, id="resp_0")], [ending("resp_0")])
    server.client.zadd("streamchat:ended", {"resp_0": 1.0})  # as if it had ended long ago
    store.write(owner, [], [ending("resp_1")])
    assert server.client.zrange("streamchat:ended", 0, -1) == ["resp_1"]
    assert store.gauges() == EMPTY | {"live": 1, "owners": 1, "answers": 2}
    store.close()


def test_a_running_answer_has_no_time_limit_of_redis(server: RedisServer) -> None:
    store = RedisStore(server.url, LEASE, keep=0.3)
    owner = store.take_lease()
    store.admit(entry(owner), Limits())
    store.write(owner, [batch(0)], [])
    assert {server.client.ttl(key) for key in server.client.keys("*:resp_1")} == {-1}
    store.close()


def test_two_prefixes_do_not_see_each_other(server: RedisServer, store: RedisStore, owner: str) -> None:
    other = RedisStore(server.url, LEASE, prefix="other shop:")
    store.admit(entry(owner, chat="c"), Limits())
    assert other.find("resp_1") is None and other.latest("anna", "c") is None
    assert set(other.gauges().values()) == {0}
    assert {str(key).partition(":")[0] for key in server.client.keys("*")} == {"streamchat"}
    other.close()


def test_names_of_strangers_may_be_any_text(store: RedisStore, owner: str) -> None:
    odd = replace(entry(owner, chat="c\ud800:\r\n", key="\0 \udfff", fingerprint="f"), user="ü \ud83d'\"")
    assert store.admit(odd, Limits(1, 1, 100)) == "resp_1"
    assert store.admit(replace(odd, id="resp_2"), Limits(1, 1, 100)) == "resp_1"
    kept = store.find("resp_1")
    assert kept is not None and (kept.user, kept.chat) == (odd.user, odd.chat)
    assert store.latest("ü \ud83d'\"", "c\ud800:\r\n") == "resp_1"
    store.give_up(owner)
    assert store.reap() == ["resp_1"]
    assert [spent.name for spent in store.usage(0.0, "user")] == [odd.user]


def test_events_that_are_kept_are_cut_from_a_batch_that_is_repeated_with_more(store: RedisStore, owner: str) -> None:
    store.admit(entry(owner), Limits())
    listener = store.listen(owner)
    listener.add("resp_1")
    store.write(owner, [batch(0, Start("resp_1", "m", 1), Text("a"))], [])
    joined = batch(0, Start("resp_1", "m", 1), Text("a"), Text("b"), Finish("stop", None))
    store.write(owner, [joined], [ending()])
    wanted = [batch(0, Start("resp_1", "m", 1), Text("a")), batch(2, Text("b"), Finish("stop", None))]
    assert store.read("resp_1", -1) == wanted
    assert hear(listener, 2) == wanted
    listener.close()


def test_an_add_is_confirmed_while_another_thread_waits(store: RedisStore, owner: str) -> None:
    listener = store.listen(owner)
    heard: list[Batch] = []
    stop = threading.Event()

    def wait() -> None:
        while not stop.is_set():
            heard.extend(listener.wait(0.5)[0])

    thread = threading.Thread(target=wait)
    thread.start()
    for number in range(50):
        store.admit(entry(owner, f"resp_{number}"), Limits())
        listener.add(f"resp_{number}")
        store.write(owner, [batch(0, id=f"resp_{number}")], [])
    assert eventually(lambda: len(heard) == 50)
    stop.set()
    thread.join()
    assert [each.id for each in heard] == [f"resp_{number}" for number in range(50)]
    listener.close()


def test_a_wait_of_no_time_gives_what_has_come(store: RedisStore, owner: str) -> None:
    listener = store.listen(owner)
    store.admit(entry(owner), Limits())
    listener.add("resp_1")
    store.write(owner, [batch(0)], [])
    assert eventually(lambda: listener.wait(0.0) == ([batch(0)], []))
    listener.close()


def test_a_listener_that_is_closed_while_it_connects_leaves_no_connection(
    server: RedisServer, store: RedisStore
) -> None:
    listener = store.listen("owner")
    server.stop()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(listener.wait, 30.0)
        listener.close()
        server.go_on()
        assert isinstance(waiting.exception(timeout=HEARD_WITHIN), StoreDown | None)
    store.close()
    assert eventually(lambda: server.connections() == [])


def test_what_is_dropped_is_not_heard(store: RedisStore, owner: str) -> None:
    listener = store.listen(owner)
    for id in ("resp_1", "resp_2"):
        store.admit(entry(owner, id), Limits())
        listener.add(id)
    listener.drop("resp_1")
    store.write(owner, [batch(0), batch(0, id="resp_2")], [])
    assert hear(listener, 1) == [batch(0, id="resp_2")]
    listener.add("resp_1")
    store.write(owner, [batch(1)], [])
    assert hear(listener, 1) == [batch(1)]
    listener.close()


def test_a_closed_listener_leaves_its_waiter_and_its_connection(server: RedisServer, store: RedisStore) -> None:
    listener = store.listen("owner")
    listener.wait(0.0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(listener.wait, 30.0)
        listener.close()
        assert waiting.result(timeout=HEARD_WITHIN) == ([], [])
    store.close()
    assert eventually(lambda: server.connections() == [])


def test_under_gevent_waiting_holds_up_no_other_greenlet(server: RedisServer) -> None:
    program = f"""
        from gevent import monkey
        monkey.patch_all()
        import time, gevent
        from streamchat.redis_store import RedisStore
        from streamchat.store import Batch, Entry, Limits
        store = RedisStore({server.url!r}, 30)
        owner = store.take_lease()
        listener = store.listen(owner)
        ticks = []
        def tick():
            while True:
                ticks.append(time.monotonic())
                gevent.sleep(0.01)
        ticking = gevent.spawn(tick)
        waiting = gevent.spawn(listener.wait, 10)
        gevent.sleep(0.3)
        def answer(number):
            id = f"resp_{{number}}"
            store.admit(Entry(id, owner, "anna", "m", time.time()), Limits())
            listener.add(id)
            store.write(owner, [Batch(id, 0, 1, b"[]")], [])
        jobs = [gevent.spawn(answer, number) for number in range(50)]
        gevent.joinall(jobs, raise_error=True)
        batches, _ = waiting.get()
        while len(batches) < 50:
            batches += listener.wait(1)[0]
        ticking.kill()
        assert len(batches) == 50, len(batches)
        assert len(ticks) > 20, len(ticks)
        listener.close()
        store.close()
        print("well")
    """
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.stdout, run.returncode) == ("well\n", 0), run.stderr[-2000:]


def test_it_all_works_over_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate = authority.issue_cert("localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    port = free_port()
    files = ("--tls-cert-file", "server.pem", "--tls-key-file", "server.pem", "--tls-ca-cert-file", "ca.pem")
    with RedisServer(tmp_path, "--tls-port", str(port), *files, "--tls-auth-clients", "no"):
        store = RedisStore(f"rediss://localhost:{port}?ssl_ca_certs={tmp_path / 'ca.pem'}", LEASE)
        owner = store.take_lease()
        listener = store.listen(owner)
        store.admit(entry(owner), Limits())
        listener.add("resp_1")
        large = batch(0, Text("x" * 300_000))
        store.write(owner, [large], [])
        assert hear(listener, 1) == store.read("resp_1", -1) == [large]
        stranger = RedisStore(f"rediss://localhost:{port}", LEASE)
        with pytest.raises(StoreDown):
            stranger.take_lease()
        for each in (listener, store, stranger):
            each.close()


@given(st.lists(st.lists(st.binary(max_size=20), min_size=1, max_size=4), max_size=5), st.data())
def test_messages_are_the_same_however_their_bytes_are_split(messages: list[list[bytes]], data: st.DataObject) -> None:
    whole = b"".join(
        b"*%d\r\n" % len(items) + b"".join(b"$%d\r\n%b\r\n" % (len(item), item) for item in items) for items in messages
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    found, rest = [], b""
    for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        some, rest = frames(rest + whole[begin:end])
        found += some
    assert (found, rest) == (messages, b"")


def test_a_reader_that_fails_to_come_takes_nothing_from_those_who_read(
    server: RedisServer, store: RedisStore, owner: str
) -> None:
    store.admit(entry(owner), Limits())
    listener = store.listen("reader")
    listener.add("resp_1")
    server.stop()
    try:
        with pytest.raises(StoreDown):
            listener.add("resp_1")
    finally:
        server.go_on()
    with pytest.raises(StoreDown):  # the line was lost; from then on it has a new one
        listener.wait(0.0)
    listener.wait(0.0)
    store.write(owner, [batch(0)], [])
    assert hear(listener, 1) == [batch(0)]
    listener.close()


class Killed(BaseException):
    """As gevent's GreenletExit."""


def test_a_reader_that_is_killed_while_it_comes_takes_nothing_from_one_who_came_meanwhile(
    store: RedisStore, owner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.admit(entry(owner), Limits())
    listener = store.listen("reader")
    listener.wait(0.0)
    line = listener._line
    assert line is not None
    came, kill = threading.Event(), threading.Event()

    def hang(_: object) -> int:
        monkeypatch.undo()
        came.set()
        assert kill.wait(HEARD_WITHIN)
        raise Killed

    monkeypatch.setattr(line, "subscribe", hang)
    first = Background(lambda: listener.add("resp_1"))
    assert came.wait(HEARD_WITHIN)
    listener.add("resp_1")
    kill.set()
    first.join()
    assert isinstance(first.error, Killed)
    store.write(owner, [batch(0)], [])
    assert hear(listener, 1) == [batch(0)]
    listener.close()


def test_readers_that_all_failed_to_come_leave_nothing_behind(server: RedisServer, store: RedisStore) -> None:
    listener = store.listen("reader")
    listener.wait(0.0)
    server.stop()
    try:
        calls = [Background(lambda: listener.add("resp_1")) for _ in range(3)]
        for call in calls:
            call.join()
    finally:
        server.go_on()
    assert {type(call.error) for call in calls} == {StoreDown}
    assert (listener._wanted, listener._asked) == ({}, {})
    listener.close()


class InterruptedSocket:
    """Runs something when half of what is sent is on its way, as the collector may in a `sendall`."""

    def __init__(self, real: socket.socket, interrupt: Callable[[], object]) -> None:
        self._real = real
        self._interrupt = interrupt

    def sendall(self, data: bytes) -> None:
        self._real.sendall(data[: len(data) // 2])
        self._interrupt()
        self._real.sendall(data[len(data) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_a_reader_that_the_collector_ends_while_another_one_comes_disturbs_nobody(
    server: RedisServer, store: RedisStore, owner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = store.listen(owner)
    for id in ("resp_1", "resp_2"):
        store.admit(entry(owner, id), Limits())
    listener.add("resp_1")
    line = listener._line
    assert line is not None
    monkeypatch.setattr(line, "_socket", InterruptedSocket(line._socket, lambda: listener.drop("resp_1")))
    adding = Background(lambda: listener.add("resp_2"))
    adding.join()
    assert adding.error is None
    store.write(owner, [batch(0), batch(0, id="resp_2")], [])
    assert hear(listener, 1) == [batch(0, id="resp_2")]
    assert listener._line is line
    assert eventually(lambda: numsub(server) == {"resp_1": 0, "resp_2": 1})
    listener.close()


def test_what_is_dropped_is_unsubscribed_by_who_waits(server: RedisServer, store: RedisStore) -> None:
    listener = store.listen("reader")
    listener.add("resp_1")
    assert numsub(server) == {"resp_1": 1, "resp_2": 0}
    listener.drop("resp_1")
    listener.wait(0.0)
    assert eventually(lambda: numsub(server) == {"resp_1": 0, "resp_2": 0})
    listener.close()


def numsub(server: RedisServer) -> dict[str, int]:
    """How many connections hear each answer."""
    ids = ("resp_1", "resp_2")
    found = server.client.pubsub_numsub(*(f"streamchat:events:{id}" for id in ids))
    return {id: many for id, (_, many) in zip(ids, found, strict=True)}
