"""The log is slow, locked, full, read-only, hung or gone: the caller's own stream keeps its pace in every case.

Short troubles lose nothing; a long one turns resuming off for the answer, and a `warning` says so.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fake_upstream import FakeUpstream
from tests.live.pace import COALESCED, LATE, Listening, hiccups, paced
from tests.live.pair import Model, ask, look, resume, seqs, text_of, words
from tests.live.servers import Server, gunicorn, wait_for
from tests.redis_server import RedisServer
from tests.sqlite_lock import locked

pytestmark = [pytest.mark.live, pytest.mark.long]

CALLERS = 4
BEFORE = 0.4  # seconds of a stream before the trouble begins
AFTER = 0.6  # and when it is over
GIVEN_UP = 7.5  # seconds after which a log that takes nothing is given up: 5, and what one attempt may take
FULL = 5.8  # the same where it says no at once


@dataclass
class Chain:
    """One server and its log."""

    model: Model
    server: Server
    folder: Path
    redis: RedisServer | None = None


@contextmanager
def chain(folder: Path, url: str, inside: Sequence[str] = (), lease: float = 15) -> Iterator[Chain]:
    with ExitStack() as stack:
        model = Model(stack.enter_context(FakeUpstream()))
        given = {"store_url": url, "on_disconnect": "finish", "lease": str(lease)}
        running = gunicorn(model.fake.base_url, folder, inside=inside, **given)  # type: ignore[arg-type]
        server = stack.enter_context(running)
        yield Chain(model, server, folder)


@pytest.fixture(scope="module")
def over_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    folder = tmp_path_factory.mktemp("redis")
    with RedisServer(folder) as redis, chain(folder, redis.url) as made:
        made.redis = redis
        yield made


@pytest.fixture(scope="module")
def over_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    folder = tmp_path_factory.mktemp("sqlite")
    with chain(folder, f"sqlite:///{folder}/log.db") as made:
        yield made


def under(trouble: Callable[[], None], servers: Chain, seconds: float, name: str) -> list[Listening]:
    """Streams that run before, in and after the trouble; each piece in time, none missing."""
    servers.model.scripts[name] = paced(seconds)
    with hiccups() as machine:
        callers = [Listening(servers.server, name) for _ in range(CALLERS)]
        for caller in callers:
            assert caller.began.wait(10)
        time.sleep(BEFORE)
        trouble()
        for caller in callers:
            events = [event for event in caller.join() if event["type"] != "warning"]
            assert events[-1]["type"] == "finish", events[-1]
            assert seqs(events) == list(range(len(events)))
    latest = max(caller.latest for caller in callers)
    print(f"{name}: latest piece {latest * 1000:.0f} ms, the machine's own hiccup {machine.longest * 1000:.0f} ms")
    assert latest <= COALESCED + LATE + machine.longest
    return callers


def lost_nothing(servers: Chain, callers: Sequence[Listening]) -> None:
    for caller in callers:
        assert caller.warnings == []
        assert look(servers.server, caller.id)["status"] == "completed"
        with resume(servers.server, caller.id) as reader:
            assert reader.rest() == caller.events


def is_resumable_again(servers: Chain) -> bool:
    message = servers.model.say("afterwards", words(0, 2))
    with ask(servers.server, message) as caller:
        told = caller.rest()
        if "X-Stream-Resumable" not in caller.headers:
            return False
    with resume(servers.server, caller.id) as reader:
        return reader.rest() == told


def loses_nothing_under(fault: Callable[[], None], servers: Chain, seconds: float, name: str) -> None:
    lost_nothing(servers, under(fault, servers, BEFORE + seconds + AFTER, name))
    wait_for(lambda: is_resumable_again(servers), 3, "a log that is used again")


def test_a_redis_that_answers_nobody_for_two_and_a_half_seconds_loses_nothing(over_redis: Chain) -> None:
    assert over_redis.redis is not None

    def pause() -> None:
        assert over_redis.redis is not None
        over_redis.redis.pause(2.5)

    loses_nothing_under(pause, over_redis, 2.5, "paused")


def test_a_redis_that_is_killed_and_started_again_loses_nothing(over_redis: Chain) -> None:
    redis = over_redis.redis
    assert redis is not None

    def restart() -> None:
        redis.kill()
        time.sleep(1)
        redis.start()

    loses_nothing_under(restart, over_redis, 1, "restarted")


def test_a_redis_without_memory_for_a_while_loses_nothing(over_redis: Chain) -> None:
    redis = over_redis.redis
    assert redis is not None

    def fill() -> None:
        redis.fill()
        time.sleep(1.5)
        redis.unfill()

    loses_nothing_under(fill, over_redis, 1.5, "full")


def test_a_file_that_another_process_locks_for_two_seconds_loses_nothing(over_sqlite: Chain) -> None:
    def lock() -> None:
        with locked(f"{over_sqlite.folder}/log.db"):
            time.sleep(2)

    loses_nothing_under(lock, over_sqlite, 2, "locked")


def test_a_redis_that_hangs_for_long_costs_resuming_and_a_warning_says_so(over_redis: Chain) -> None:
    redis = over_redis.redis
    assert redis is not None
    meanwhile: list[Listening] = []

    def hang() -> None:
        redis.stop()
        over_redis.model.scripts["meanwhile"] = paced(1)
        meanwhile.extend(Listening(over_redis.server, "meanwhile") for _ in range(CALLERS))
        time.sleep(GIVEN_UP)
        redis.go_on()

    callers = under(hang, over_redis, BEFORE + GIVEN_UP + AFTER, "hung")
    assert [caller.warnings for caller in callers] == [["not_resumable"]] * CALLERS
    cannot_be_resumed(over_redis, callers)
    for caller in meanwhile:  # begun while it hung: without the log
        assert caller.join()[-1]["type"] == "finish"
        assert "X-Stream-Resumable" not in caller.headers
        assert caller.waited <= 2.5
    wait_for(lambda: is_resumable_again(over_redis), 5, "a log that is used again")


def cannot_be_resumed(servers: Chain, callers: Sequence[Listening]) -> None:
    """What the log has is told, and that the rest is missing: nothing is told as if it were whole."""
    for caller in callers:
        wait_for(lambda id=caller.id: look(servers.server, id)["status"] == "completed", 5, "the end")  # type: ignore[misc]
        assert look(servers.server, caller.id)["text"] is None
        with resume(servers.server, caller.id) as reader:
            told = reader.rest()
        assert told[-1]["code"] == "gap", told[-1]
        assert told[:-1] == caller.events[: len(told) - 1]


# --- an outage longer than the lease ----------------------------------------------------------------------


def test_a_stream_outlives_the_lease_that_its_server_lost_while_the_log_was_gone(tmp_path: Path) -> None:
    """The log's trouble is not the caller's: only resuming is lost, and what is begun later is kept again."""
    with RedisServer(tmp_path) as redis, chain(tmp_path, redis.url, lease=1) as servers:

        def lose() -> None:
            redis.kill()
            time.sleep(1.2)
            redis.start()

        callers = under(lose, servers, BEFORE + 1.2 + AFTER, "lease lost")
        assert [caller.warnings for caller in callers] == [["not_resumable"]] * CALLERS
        wait_for(lambda: is_resumable_again(servers), 3, "a log that is used again")


def test_a_server_that_starts_while_the_log_is_gone_uses_it_when_it_is_there(tmp_path: Path) -> None:
    redis = RedisServer(tmp_path)
    with chain(tmp_path, redis.url, lease=1) as servers:
        with ask(servers.server, servers.model.say("without", words(0, 2))) as caller:
            assert "X-Stream-Resumable" not in caller.headers
            assert text_of(caller.rest()) == "".join(words(0, 2))
        with redis:
            wait_for(lambda: is_resumable_again(servers), 3, "a log that is used")


# --- disks ------------------------------------------------------------------------------------------------


@contextmanager
def on_a_disk_of(size: str, folder: Path, options: str = "") -> Iterator[tuple[Chain, Path]]:
    """A server whose log is on a small file system of its own; where that is seen from here."""
    assert shutil.which("unshare"), "unshare is missing: install Debian's package util-linux"
    disk = folder / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size={size}{options} none "$0" && exec "$@"'
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, str(disk)]
    with chain(folder, f"sqlite:///{disk}/log.db", inside) as servers:
        yield servers, Path(f"/proc/{servers.server.process.pid}/root{disk}")


def test_a_full_disk_costs_resuming_and_a_warning_says_so(tmp_path: Path) -> None:
    with on_a_disk_of("1m", tmp_path) as (servers, disk):
        filler = disk / "filler"

        def fill() -> None:
            with pytest.raises(OSError, match="No space"):
                filler.write_bytes(bytes(2 << 20))
            time.sleep(FULL)
            filler.unlink()

        callers = under(fill, servers, BEFORE + FULL + AFTER, "disk full")
        assert [caller.warnings for caller in callers] == [["not_resumable"]] * CALLERS
        cannot_be_resumed(servers, callers)
        wait_for(lambda: is_resumable_again(servers), 3, "a log that is used again")


def test_a_read_only_disk_keeps_nobody_from_an_answer(tmp_path: Path) -> None:
    with on_a_disk_of("1m", tmp_path, ",ro") as (servers, _):
        callers = under(lambda: None, servers, BEFORE, "read-only")
        assert ["X-Stream-Resumable" in caller.headers for caller in callers] == [False] * CALLERS
        with ask(servers.server, "read-only", Idempotency_Key="once") as refused:
            assert refused.status == 503
        assert len(servers.model.asked("read-only")) == CALLERS
