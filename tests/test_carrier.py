"""Ids over huey: each comes to one worker, and whatever becomes of Redis or a message, callers do not wait for it."""

from __future__ import annotations

import logging
import pickle
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from streamchat import background, stores
from streamchat import carrier as carriers
from streamchat.background import SWEEP_AFTER
from streamchat.carrier import PREFIX, HueyCarrier, Plain
from streamchat.errors import LeaseLost, SettingsError, StoreDown
from streamchat.loop import ThreadLoop
from streamchat.settings import Settings
from streamchat.stores import open_carrier
from tests.fake_upstream import FakeUpstream, Gate, answer, finish, head, last_chunk, text
from tests.keeping import FaultyStore
from tests.redis_server import RedisServer, free_port
from tests.shop import Shop, wait_until
from tests.test_background import asked, id_of, shop_of, state, wait_for, working

from .test_background import store, upstream  # noqa: F401

WITHIN = 5.0  # seconds


@pytest.fixture(scope="module")
def redis_of_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis(redis_of_all: RedisServer) -> RedisServer:
    redis_of_all.client.flushall()
    return redis_of_all


@pytest.fixture(autouse=True)
def short_pops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pop that waits ends with the test's carrier: as it is where that is what the test measures."""
    if "hangs" not in request.node.name and "stops" not in request.node.name:
        monkeypatch.setattr(carriers, "POP_SECONDS", 0.1)


class Taker:
    """A worker's `take` and whether it has room; keeps what it was handed."""

    def __init__(self, *raised: Exception) -> None:
        self.taken: list[str] = []
        self.room = True
        self._raised = list(raised)

    def take(self, id: str) -> None:
        self.taken.append(id)
        if self._raised:
            raise self._raised.pop(0)

    def ready(self) -> bool:
        return self.room

    def wait(self, *ids: str) -> None:
        wait_until(lambda: sorted(self.taken) == sorted(ids), f"{ids} are not what came", WITHIN)


@contextmanager
def carrying(redis: RedisServer, taker: Taker | None = None, queue: str = "streamchat") -> Iterator[HueyCarrier]:
    """One that is started where there is a taker."""
    carrier = HueyCarrier(redis.url, queue, ThreadLoop())
    if taker is not None:
        carrier.start(taker.take, taker.ready)
    try:
        yield carrier
    finally:
        carrier.stop()


def waiting(redis: RedisServer, queue: str = "streamchat") -> int:
    return int(redis.client.llen(PREFIX + queue))


def popping(redis: RedisServer) -> int:
    return sum(client["cmd"] == "brpop" for client in redis.connections())


def pushed(carrier: HueyCarrier, id: str) -> bool:
    carrier.enqueue(id)
    return True


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "streamchat"]


# messages


@pytest.mark.parametrize("id", ["resp_1", "", "ä ☃ \ud800", '"quoted"', "a" * 10_000])
def test_a_message_is_the_id_as_json(id: str, redis: RedisServer) -> None:
    taker = Taker()
    with carrying(redis) as carrier:
        carrier.enqueue(id)
        [message] = redis.client.lrange(PREFIX + "streamchat", 0, -1)
        assert message.isascii() and (message[0], message[-1]) == ('"', '"')
        with carrying(redis, taker):
            taker.wait(id)


FOREIGN = [
    b"",
    b"\x80\x04",
    b"{}",
    b"[1]",
    b"null",
    b"5",
    b'"cut',
    b"\xff\xfe",
    b"[" * 100_000,
    pickle.dumps("resp_1"),
    b"cposix\nsystem\n(S'false'\ntR.",
]


@pytest.mark.parametrize("data", FOREIGN, ids=range(len(FOREIGN)))
def test_what_is_no_id_as_json_is_no_message(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        Plain().deserialize(data)


def test_messages_of_strangers_are_left_out_and_told(redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    taker = Taker()
    for data in FOREIGN:
        redis.client.lpush(PREFIX + "streamchat", data)
    with carrying(redis, taker) as carrier, caplog.at_level(logging.WARNING):
        carrier.enqueue("resp_1")
        taker.wait("resp_1")
        wait_until(lambda: len(warnings_of(caplog)) == len(FOREIGN), "not each was told")


# from one process to another


def test_each_id_comes_to_one_worker(redis: RedisServer) -> None:
    first, second = Taker(), Taker()
    ids = [f"resp_{number}" for number in range(100)]
    with carrying(redis, first), carrying(redis, second), carrying(redis) as accepting:
        for id in ids:
            accepting.enqueue(id)
        wait_until(lambda: len(first.taken) + len(second.taken) == 100, "some are missing")
    assert sorted(first.taken + second.taken) == sorted(ids)
    assert first.taken and second.taken


def test_each_mount_has_a_list_of_its_own(redis: RedisServer) -> None:
    """huey itself leaves dots out of names."""
    dotted, plain = Taker(), Taker()
    with carrying(redis, dotted, "shop.chat") as one, carrying(redis, plain, "shopchat") as other:
        one.enqueue("of the dotted")
        other.enqueue("of the plain")
        dotted.wait("of the dotted")
        plain.wait("of the plain")


def test_what_was_pushed_while_no_worker_ran_comes_oldest_first(redis: RedisServer) -> None:
    ids = ["a", "b", "c"]
    with carrying(redis) as carrier:
        for id in ids:
            carrier.enqueue(id)
    with carrying(redis) as later:
        assert [later._out.pop() for _ in ids] == ids


@pytest.mark.parametrize("error", [StoreDown(), LeaseLost(), RuntimeError("a bug"), SettingsError("odd")])
def test_what_taking_raises_ends_no_consumer(redis: RedisServer, error: Exception) -> None:
    taker = Taker(*[error] * (2 * carriers.POPPERS))
    ids = [f"resp_{number}" for number in range(3 * carriers.POPPERS)]
    with carrying(redis, taker) as carrier:
        for id in ids:
            carrier.enqueue(id)
        taker.wait(*ids)


def test_a_worker_without_room_leaves_the_ids_to_others(redis: RedisServer) -> None:
    full, free = Taker(), Taker()
    full.room = False
    with carrying(redis, full) as carrier:
        carrier.enqueue("resp_1")
        with carrying(redis, free):
            free.wait("resp_1")
    assert full.taken == []


def test_an_id_for_which_the_room_went_meanwhile_goes_back(redis: RedisServer) -> None:
    full, free = Taker(), Taker()
    with carrying(redis, full) as carrier:
        wait_until(lambda: popping(redis) == carriers.POPPERS, "nobody waits")
        full.room = False
        carrier.enqueue("resp_1")
        with carrying(redis, free):
            free.wait("resp_1")
    assert full.taken == []


# what Redis is spared


def test_two_workers_keep_four_connections_and_an_accepting_process_at_most_two(redis: RedisServer) -> None:
    first, second = Taker(), Taker()
    with carrying(redis, first), carrying(redis, second):
        wait_until(lambda: popping(redis) == 2 * carriers.POPPERS, "not all wait")
        with carrying(redis) as accepting:
            threads = [threading.Thread(target=accepting.enqueue, args=(f"resp_{n}",)) for n in range(50)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            wait_until(lambda: len(first.taken) + len(second.taken) == 50, "some are missing")
            assert len(redis.connections()) <= 2 * carriers.POPPERS + carriers.PUSHERS
    wait_until(lambda: not redis.connections(), "a connection is left")


def test_a_list_that_nobody_pops_is_bounded_and_goes(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carriers, "MOST_CARRIED", 3)
    with carrying(redis) as carrier:
        for number in range(5):
            carrier.enqueue(f"resp_{number}")
    assert redis.client.lrange(PREFIX + "streamchat", 0, -1) == ['"resp_4"', '"resp_3"', '"resp_2"']
    assert carriers.KEPT - 60 < redis.client.ttl(PREFIX + "streamchat") <= carriers.KEPT


def test_nothing_but_the_list_is_kept(redis: RedisServer) -> None:
    taker = Taker()
    with carrying(redis, taker) as carrier:
        carrier.enqueue("resp_1")
        taker.wait("resp_1")
    assert redis.client.keys() == []


# where Redis is not there


def expect_quick(carrier: HueyCarrier) -> None:
    began = time.monotonic()
    carrier.enqueue("resp_1")
    assert time.monotonic() - began < 1


def test_where_nobody_listens_an_id_is_dropped_at_once_and_that_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    carrier = HueyCarrier(f"redis://:secret@127.0.0.1:{free_port()}/3", "streamchat", ThreadLoop())
    with caplog.at_level(logging.DEBUG):
        expect_quick(carrier)
        carrier._rests_until = 0
        expect_quick(carrier)
    assert warnings_of(caplog) == ["background answers are not carried (ConnectionError): workers find them later"]
    assert "secret" not in caplog.text


def test_a_redis_that_hangs_costs_a_caller_less_than_a_second_and_the_next_ones_nothing(tmp_path: Path) -> None:
    with RedisServer(tmp_path, password="secret") as redis, carrying(redis) as carrier:
        carrier.enqueue("resp_0")
        redis.stop()
        expect_quick(carrier)  # on the connection that it has
        began = time.monotonic()
        for _ in range(100):
            carrier.enqueue("resp_1")
        assert time.monotonic() - began < 0.2
        carrier._rests_until = 0
        expect_quick(carrier)  # on a new one
        redis.go_on()
        wait_until(lambda: pushed(carrier, "resp_2") and waiting(redis) >= 2, "it is not used again")


def test_a_redis_that_was_started_again_is_used_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    taker = Taker()
    with RedisServer(tmp_path) as redis, carrying(redis, taker) as carrier:
        carrier.enqueue("before")
        taker.wait("before")
        with caplog.at_level(logging.WARNING):
            redis.kill()
            carrier.enqueue("lost")
            wait_until(lambda: warnings_of(caplog), "nothing is told")
            redis.start()
            wait_until(lambda: pushed(carrier, "after") and "after" in taker.taken, "nothing comes")
    assert len(warnings_of(caplog)) == 1
    assert "lost" not in taker.taken


def test_a_list_that_is_something_else_is_told_and_waited_for(
    redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    taker = Taker()
    redis.client.set(PREFIX + "streamchat", "no list")
    with carrying(redis, taker) as carrier, caplog.at_level(logging.WARNING):
        wait_until(lambda: warnings_of(caplog), "nothing is told")
        redis.client.delete(PREFIX + "streamchat")
        carrier.enqueue("resp_1")
        taker.wait("resp_1")
    assert len(warnings_of(caplog)) == 1


# its end


def test_it_stops_within_two_seconds_and_hands_nothing_over_then(redis: RedisServer) -> None:
    taker = Taker()
    with carrying(redis, taker) as carrier, carrying(redis) as other:
        wait_until(lambda: popping(redis) == carriers.POPPERS, "nobody waits")
        began = time.monotonic()
        carrier.stop()
        assert time.monotonic() - began < 2
        other.enqueue("resp_1")
        assert waiting(redis) == 1
        assert taker.taken == []
        carrier.enqueue("resp_2")
        assert waiting(redis) == 1


def test_it_stops_within_two_seconds_under_a_redis_that_hangs(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as redis, carrying(redis, Taker()) as carrier:
        wait_until(lambda: popping(redis) == carriers.POPPERS, "nobody waits")
        redis.stop()
        began = time.monotonic()
        carrier.stop()
        assert time.monotonic() - began < 2
        redis.go_on()


def test_one_that_was_not_started_stops_at_once() -> None:
    carrier = HueyCarrier(f"redis://127.0.0.1:{free_port()}", "streamchat", ThreadLoop())
    began = time.monotonic()
    carrier.stop()
    assert time.monotonic() - began < 0.1


# which mount has one


def settings(url: str, **given: Any) -> Settings:
    return Settings(public=True, store_url=url, **given)


@pytest.mark.parametrize("url", ["redis://127.0.0.1:9", "rediss://u:p@redis.example/3"])
def test_a_mount_with_background_answers_over_redis_has_one(url: str) -> None:
    assert isinstance(open_carrier(settings(url, background=True), "streamchat", ThreadLoop()), HueyCarrier)


@pytest.mark.parametrize(
    ("url", "background"), [("redis://127.0.0.1:9", False), ("sqlite:///log.db", True), ("memory://", False)]
)
def test_other_mounts_have_none(url: str, background: bool) -> None:
    assert open_carrier(settings(url, background=background), "streamchat", ThreadLoop()) is None


class Missing:
    """Finds one package nowhere."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == self._package:
            raise ModuleNotFoundError(name=name)


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in list(sys.modules):
        if name == "streamchat.carrier" or name == package or name.startswith(f"{package}."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(package), *sys.meta_path])


def test_without_huey_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "huey")
    assert open_carrier(settings("redis://127.0.0.1:9", background=True), "streamchat", ThreadLoop()) is None


def test_what_else_is_missing_is_no_missing_huey(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "streamchat.redis_link")
    with pytest.raises(ModuleNotFoundError):
        open_carrier(settings("redis://127.0.0.1:9", background=True), "streamchat", ThreadLoop())


# a worker with one


@pytest.fixture
def frequent_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real ones are in tests/live/test_carrier.py."""
    monkeypatch.setattr(background, "BEAT", 0.1)
    monkeypatch.setattr(background, "SWEEP_AFTER", 0.2)


@contextmanager
def carried_shop(
    monkeypatch: pytest.MonkeyPatch,
    store: FaultyStore,  # noqa: F811
    folder: Path,
    redis: RedisServer,
    **options: Any,
) -> Iterator[Shop]:
    """Its carrier is real, its log in memory."""
    monkeypatch.setitem(stores.STORES, "redis", lambda settings, loop: store.store)
    with shop_of(monkeypatch, store, folder, store_url=redis.url, **options) as shop:
        yield shop


@pytest.fixture
def shop(
    monkeypatch: pytest.MonkeyPatch,
    store: FaultyStore,  # noqa: F811
    upstream: FakeUpstream,  # noqa: F811
    tmp_path: Path,
    redis: RedisServer,
) -> Iterator[Shop]:
    with carried_shop(monkeypatch, store, tmp_path, redis) as made:
        yield made


def test_an_answer_that_was_carried_is_begun_before_a_look_would_find_it(shop: Shop, upstream: FakeUpstream) -> None:  # noqa: F811
    with working(shop):
        began = time.monotonic()
        ids = [id_of(asked(shop)) for _ in range(5)]
        for id in ids:
            wait_for(shop, id, "completed")
        assert time.monotonic() - began < SWEEP_AFTER
    assert len(upstream.requests) == 5


@pytest.mark.parametrize("hook", [None, lambda id: None], ids=["huey", "a hook"])
def test_a_look_leaves_what_may_still_be_carried(
    hook: Any,
    monkeypatch: pytest.MonkeyPatch,
    store: FaultyStore,  # noqa: F811
    upstream: FakeUpstream,  # noqa: F811
    tmp_path: Path,
    redis: RedisServer,
) -> None:
    with carried_shop(monkeypatch, store, tmp_path, redis, enqueue=hook) as shop:
        worker = background.Worker(shop.mounts[0])
        id = id_of(asked(shop))
        worker.look()
        assert (state(shop, id)["status"], store.memory.gauges()["queued"]) == ("queued", 1)
        assert not worker.busy
        worker.take(id)
        wait_for(shop, id, "completed")
        wait_until(lambda: not worker.busy, "the worker still works")


def test_an_answer_whose_message_is_lost_is_found_by_a_look(
    frequent_looks: None,
    shop: Shop,
    redis: RedisServer,
    upstream: FakeUpstream,  # noqa: F811
) -> None:
    id = id_of(asked(shop))
    redis.client.delete(PREFIX + "streamchat")
    with working(shop):
        wait_for(shop, id, "completed")
    assert len(upstream.requests) == 1


def test_an_id_that_comes_twice_or_of_nothing_is_made_once(
    shop: Shop,
    redis: RedisServer,
    upstream: FakeUpstream,  # noqa: F811
) -> None:
    id = id_of(asked(shop))
    for message in ('"resp_of_nobody"', f'"{id}"', f'"{id}"'):
        redis.client.lpush(PREFIX + "streamchat", message)
    with working(shop):
        wait_for(shop, id, "completed")
        wait_until(lambda: waiting(redis) == 0, "the messages are not taken")
    assert len(upstream.requests) == 1


def test_a_worker_with_little_room_begins_no_more_than_it_has(
    frequent_looks: None,
    monkeypatch: pytest.MonkeyPatch,
    store: FaultyStore,  # noqa: F811
    upstream: FakeUpstream,  # noqa: F811
    tmp_path: Path,
    redis: RedisServer,
) -> None:
    """Two consumers and a look claim side by side; one too many would be refused, and told as failed."""
    gate = Gate()
    upstream.choose = lambda request: [head(), text("Hi"), gate, finish(), last_chunk()]
    store.before["claim"] = lambda: time.sleep(0.1)
    with carried_shop(monkeypatch, store, tmp_path, redis, max_streams=1) as shop:
        ids = [id_of(asked(shop)) for _ in range(5)]
        with working(shop):
            gate.wait_reached()
            wait_until(lambda: waiting(redis) >= 2, "it takes what it has no room for")
            assert len(upstream.requests) == 1
            gate.open()
            wait_until(lambda: {state(shop, id)["status"] for id in ids} == {"completed"}, "not all are made", 10)


def test_a_shops_own_carrier_wins(
    monkeypatch: pytest.MonkeyPatch,
    store: FaultyStore,  # noqa: F811
    upstream: FakeUpstream,  # noqa: F811
    tmp_path: Path,
    redis: RedisServer,
) -> None:
    told: list[str] = []
    with carried_shop(monkeypatch, store, tmp_path, redis, enqueue=told.append) as shop:
        id = id_of(asked(shop))
        assert shop.mounts[0].process.carrier is None
    assert (told, redis.client.keys()) == ([id], [])


def test_an_answer_is_accepted_quickly_where_the_carriers_redis_is_gone(
    frequent_looks: None,
    monkeypatch: pytest.MonkeyPatch,
    store: FaultyStore,  # noqa: F811
    upstream: FakeUpstream,  # noqa: F811
    tmp_path: Path,
) -> None:
    upstream.script = answer(["Hi"])
    with RedisServer(tmp_path) as redis, carried_shop(monkeypatch, store, tmp_path, redis) as shop:
        redis.kill()
        began = time.monotonic()
        id = id_of(asked(shop))
        assert time.monotonic() - began < 1
        with working(shop):
            wait_for(shop, id, "completed")
