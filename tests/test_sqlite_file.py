"""The file of a SQLite log: who may write it, how it grows older, and what becomes of every fault."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from streamchat import sqlite_schema
from streamchat.attempts import Next
from streamchat.errors import LeaseLost, SettingsError, StoreDown, StreamChatError
from streamchat.events import Text, Usage
from streamchat.letters import OFF
from streamchat.loop import ThreadLoop
from streamchat.sqlite_leases import Leases
from streamchat.sqlite_outbox import delivered, forget_letters
from streamchat.sqlite_schema import MIGRATIONS, VERSION_1, check_library, open_file
from streamchat.sqlite_store import SqliteStore
from streamchat.sqlite_upkeep import ORPHANS_A_STEP, find_orphans
from streamchat.store import Batch, Kept, Spent, Store, pack

from .sqlite_lock import locked
from .store_contract import EMPTY, HEARD_WITHIN, LEASE, NONE, NOW, Clock, ending, entry, texts, together, told

WITHIN = 2.3  # seconds: a store gives up within 2; the rest is the machine's
NOBODY = 65534
ROOT = Path(__file__).parents[1]


# What a store of version 1 wrote: `ann` has an answer that runs, `bob` one that has ended.
OF_VERSION_1 = (
    """INSERT INTO answers VALUES (1, 'resp_run', 'ann', 'c1', 'm', 1000.5, :owner, 'in_progress', 70, 0, NULL, 0, NULL,
    NULL, NULL, NULL, NULL)""",
    """INSERT INTO answers VALUES (2, 'resp_done', 'bob', 'c2', 'm', 1001.5, :owner, 'completed', 5, 0, 1002.5, 14,
    'stop', 7, 3, 0, NULL)""",
    """INSERT INTO pieces VALUES (1, 1, 0, 2, CAST('[["text","a"],["text","b"]]' AS BLOB)),
    (2, 2, 0, 1, CAST('[["text","c"]]' AS BLOB))""",
    "INSERT INTO readers VALUES (1, 0.0)",
    "INSERT INTO keys VALUES ('ann', 'k', 'f', 'resp_run', :now)",
    """INSERT INTO ledger VALUES ('resp_done', 'bob', 'm', 1001.5, 0.25, 1.0, 'completed', 'stop', 1, 7, 3, 0, 1, 200,
    NULL, NULL)""",
)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "log.db")


@pytest.fixture
def open_store() -> Iterator[Callable[[str], SqliteStore]]:
    stores: list[SqliteStore] = []

    def make(path: str) -> SqliteStore:
        stores.append(SqliteStore(path, LEASE, ThreadLoop().lane))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def store(path: str, open_store: Callable[[str], SqliteStore]) -> SqliteStore:
    return open_store(path)


def everything(store: Store, owner: str, id: str) -> list[Callable[[], Any]]:
    return [
        store.take_lease,
        lambda: store.renew(owner),
        lambda: store.give_up(owner),
        lambda: store.admit(entry(owner), NONE),
        lambda: store.claim(owner, "jobs", 1),
        lambda: store.begin(owner, id),
        lambda: store.write(owner, [texts(id, 0, 1)], []),
        lambda: store.find(id),
        lambda: store.latest("ann", "c1"),
        lambda: store.read(id, -1),
        lambda: store.listen(owner),
        lambda: store.cancel(id),
        lambda: store.attend([id]),
        lambda: store.unattended(id),
        store.reap,
        lambda: store.usage(0, "day"),
        lambda: store.prune(0, 1, 1),
        store.gauges,
        lambda: store.outbox.take(owner, "jobs", 0, 1),
        lambda: store.outbox.settle(owner, id, Next("delivered"), "204"),
        lambda: store.outbox.find(id),
        lambda: store.outbox.letters(None, 1),
        lambda: store.outbox.replay(id, 0),
    ]


def outcome(task: Callable[[], Any]) -> type:
    try:
        return type(task())
    except StreamChatError as error:
        return type(error)


# who may write it


@pytest.mark.parametrize("version", ["3.51.3", "3.54.1", "3.50.7", "3.50.9", "3.44.6", "4.0.0", "3.100.0"])
def test_a_sqlite_that_keeps_files_whole_is_taken(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_schema.apsw, "sqlite_lib_version", lambda: version)
    check_library()


@pytest.mark.parametrize("version", ["3.51.2", "3.51.0", "3.50.6", "3.49.9", "3.45.0", "3.44.5", "3.40.1", "3.7.17"])
def test_a_sqlite_that_can_corrupt_files_stops_the_start(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_schema.apsw, "sqlite_lib_version", lambda: version)
    with pytest.raises(SettingsError, match=f"SQLite {version} can corrupt"):
        SqliteStore("log.db", LEASE, ThreadLoop().lane)


def test_without_apsw_the_start_names_what_to_install(path: str) -> None:
    script = """
import sys
sys.modules["apsw"] = None
from streamchat.errors import SettingsError
from streamchat.events import Text, Usage
from streamchat.loop import ThreadLoop
from streamchat.sqlite_store import SqliteStore
try:
    SqliteStore(sys.argv[1], 15, ThreadLoop().lane)
except SettingsError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script, path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 'pip install "flask-streamchat[log]"' in done.stdout
    assert not Path(path).exists()


def test_nothing_is_opened_before_the_first_use(store: SqliteStore, path: str) -> None:
    assert not Path(path).exists()
    store.gauges()
    assert Path(path).exists()


def test_only_the_owner_may_read_the_files(store: SqliteStore, path: str) -> None:
    before = os.umask(0)
    try:
        owner = store.take_lease()
        store.admit(entry(owner), NONE)
    finally:
        os.umask(before)
    files = {file.name: stat.S_IMODE(file.stat().st_mode) for file in Path(path).parent.iterdir()}
    assert files == dict.fromkeys(["log.db", "log.db-wal", "log.db-shm", "log.db-leases"], 0o600)


# how it grows older


def test_a_restart_keeps_everything(path: str, open_store: Callable[[str], SqliteStore]) -> None:
    store = open_store(path)
    owner = store.take_lease()
    running, done = entry(owner, user="ann", key="k", fingerprint="f", reserve=10), entry(owner, user="ann", chat="c")
    for each in (running, done):
        store.admit(each, NONE)
        store.write(owner, [texts(each.id, 0, 3)], [])
    store.write(owner, [], [ending(done)])
    before = [store.find(running.id), store.find(done.id), store.gauges(), store.usage(0, "user")]
    store.close()
    again = open_store(path)
    assert [again.find(running.id), again.find(done.id), again.gauges(), again.usage(0, "user")] == before
    assert again.latest("ann", "c") == done.id
    again.renew(owner)
    again.write(owner, [texts(running.id, 3, 1)], [])
    assert [seq for seq, _ in told(again.read(running.id, -1))] == [0, 1, 2, 3]
    assert again.admit(entry(owner, user="ann", key="k", fingerprint="f"), NONE) == running.id


def test_a_closed_store_opens_again(store: SqliteStore) -> None:
    owner = store.take_lease()
    store.close()
    store.close()
    store.renew(owner)


def test_an_older_file_becomes_a_newer_one_and_keeps_what_it_holds(
    path: str, open_store: Callable[[str], SqliteStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(path)
    owner = store.take_lease()
    answer = entry(owner)
    store.admit(answer, NONE)
    store.write(owner, [texts(answer.id, 0, 3)], [])
    store.close()
    second = "ALTER TABLE answers ADD COLUMN job ANY; CREATE TABLE jobs (id TEXT NOT NULL) STRICT;"
    third = "CREATE INDEX answers_of_jobs ON answers (job) WHERE job IS NOT NULL;"
    monkeypatch.setattr(sqlite_schema, "MIGRATIONS", (*MIGRATIONS, second, third))
    assert len(told(store.read(answer.id, -1))) == 3
    store.close()
    connection = open_file(path)
    assert connection.execute("PRAGMA user_version").get == len(MIGRATIONS) + 2
    connection.execute("INSERT INTO jobs SELECT id FROM answers WHERE job IS NULL")
    assert connection.execute("SELECT id FROM jobs").get == answer.id
    connection.close()


def test_a_migration_that_fails_leaves_the_file_as_it_was(
    path: str, open_store: Callable[[str], SqliteStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(path)
    store.take_lease()
    store.close()
    with monkeypatch.context() as newer:
        newer.setattr(
            sqlite_schema, "MIGRATIONS", (*MIGRATIONS, "CREATE TABLE jobs (id TEXT); CREATE TABLE owners (x)")
        )
        with pytest.raises(StoreDown):
            store.gauges()
        store.close()
    assert store.gauges()["owners"] == 1
    connection = open_file(path)
    assert connection.execute("PRAGMA user_version").get == len(MIGRATIONS)
    assert connection.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'jobs'").get == 0
    connection.close()


def first_release(path: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes a file of version 1, in which an answer runs and another has ended. The owner of both, who lives."""
    with monkeypatch.context() as older:
        older.setattr(sqlite_schema, "MIGRATIONS", (VERSION_1,))
        connection = open_file(path)
    assert connection.execute("PRAGMA user_version").get == 1
    leases = Leases(path, LEASE, time.monotonic)
    owner = leases.take(connection)
    for statement in OF_VERSION_1:
        connection.execute(statement, {"owner": owner, "now": time.time()})
    connection.close()
    leases.close()
    return owner


def test_a_file_of_the_first_version_keeps_all_it_holds(
    path: str, open_store: Callable[[str], SqliteStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = first_release(path, monkeypatch)
    store = open_store(path)
    running = Kept("resp_run", "ann", "c1", "m", 1000.5, "in_progress", owner, 2)
    done = Kept("resp_done", "bob", "c2", "m", 1001.5, "completed", owner, 1, "stop", Usage(7, 3))
    assert [store.find("resp_run"), store.find("resp_done")] == [running, done]
    assert told(store.read("resp_run", -1)) == [(0, Text("a")), (1, Text("b"))]
    assert store.latest("bob", "c2") == "resp_done"
    assert store.usage(0, "user") == [Spent("bob", 1, 1, 7, 3, 0)]
    assert 0 <= store.unattended("resp_run") < float("inf")
    again = entry(owner, user="ann", key="k", fingerprint="f")
    assert store.admit(again, NONE) == "resp_run"
    size = len('[["text","a"],["text","b"]]')
    assert store.gauges() == EMPTY | {"live": 1, "reserved": 70, "owners": 1, "answers": 2, "bytes": size + 14}


def test_the_ledger_of_the_first_version_keeps_what_forgotten_answers_cost(
    path: str, open_store: Callable[[str], SqliteStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = first_release(path, monkeypatch)
    with monkeypatch.context() as older:
        older.setattr(sqlite_schema, "MIGRATIONS", (VERSION_1,))
        connection = open_file(path)
    for id, user in (("resp_old", "bob"), ("resp_older", None)):
        row = "INSERT INTO ledger VALUES (?, ?, 'm', 900.5, NULL, 1.0, 'failed', NULL, 1, 20, 1, 1, 1, 200, NULL, NULL)"
        connection.execute(row, (id, user))
    connection.close()
    store = open_store(path)
    assert store.usage(0, "user") == [Spent("", 1, 0, 20, 1, 1), Spent("bob", 2, 1, 27, 4, 1)]
    for _ in range(3):
        new = entry(owner, user="bob")
        store.admit(new, NONE)
        store.write(owner, [], [ending(new)])
    assert sum(spent.answers for spent in store.usage(0, "user")) == 6


def test_what_ran_in_a_file_of_the_first_version_goes_on(
    path: str, open_store: Callable[[str], SqliteStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = first_release(path, monkeypatch)
    store = open_store(path)
    assert store.claim(owner, "", 10) == []
    store.renew(owner)
    store.write(owner, [texts("resp_run", 2, 1)], [])
    store.give_up(owner)
    assert store.reap() == ["resp_run"]
    assert [seq for seq, _ in told(store.read("resp_run", -1))] == [0, 1, 2, 3]
    assert store.outbox.letters(None, 10) == []


def test_what_was_asked_is_kept_until_the_answer_has_ended(store: SqliteStore, path: str) -> None:
    owner = store.take_lease()
    ids = ["resp_ended", "resp_cancelled", "resp_lost", "resp_waiting"]
    for id in ids:
        store.admit(entry(owner, id=id, status="queued", queue="jobs", request="a secret"), NONE)
    for id in ("resp_ended", "resp_lost"):
        [claimed] = store.claim(owner, "jobs", 1, id=id)
        assert store.begin(owner, id)
        if id == "resp_ended":
            store.write(owner, [], [ending(claimed)])
    store.cancel("resp_cancelled")
    store.give_up(owner)
    assert store.reap() == ["resp_lost"]
    connection = open_file(path)
    kept = connection.execute("SELECT id, request FROM answers WHERE request <> ''").fetchall()
    connection.close()
    assert kept == [("resp_waiting", "a secret")]


def test_a_queued_answer_carries_any_text_unharmed(
    store: SqliteStore, open_store: Callable[[str], SqliteStore]
) -> None:
    owner = store.take_lease()
    texts_of_clients = {name: f"{name} \ud83d \0 \u00e9" for name in ("user", "chat", "queue", "request", "target")}
    answer = entry(owner, status="queued", model="m \udc00", **texts_of_clients)
    store.admit(answer, NONE)
    assert store.claim(owner, answer.queue, 1) == [answer]
    store.cancel(answer.id)
    [letter] = store.outbox.take(owner, answer.queue, NOW + 86_400, 1)
    assert (letter.queue, letter.target) == (answer.queue, answer.target)
    store.outbox.settle(owner, letter.id, Next("dead", switch_off=True), "410 \ud83d")
    other = entry(owner, status="queued", **texts_of_clients)
    store.admit(other, NONE)
    store.cancel(other.id)
    told_of = {each.answer: (each.state, each.told) for each in store.outbox.letters("dead", 9)}
    assert told_of == {answer.id: ("dead", "410 \ud83d"), other.id: ("dead", OFF)}


def test_more_orphans_than_fit_one_step_are_all_reaped(store: SqliteStore) -> None:
    owner, many = store.take_lease(), ORPHANS_A_STEP + 20
    entries = [entry(owner, status="queued", queue="jobs") for _ in range(many)]
    for each in entries:
        store.admit(each, NONE)
    assert len(store.claim(owner, "jobs", many)) == many
    begun = [each.id for each in entries[::10]]
    assert all(store.begin(owner, id) for id in begun)
    store.give_up(owner)
    assert store.reap() == begun
    assert store.reap() == []
    assert len(store.claim(store.take_lease(), "jobs", many)) == many - len(begun)


def test_a_letter_that_is_replayed_while_pruning_goes_on_is_kept(store: SqliteStore) -> None:
    owner = store.take_lease()
    answer = entry(owner, status="queued", queue="jobs", target="https://shop.example/hook")
    store.admit(answer, NONE)
    store.cancel(answer.id)
    [letter] = store.outbox.take(owner, "jobs", NOW + 86_400, 1)
    store.outbox.settle(owner, letter.id, Next("delivered"), "204")
    found = store._reader.run(lambda connection: delivered(connection, NOW + 86_400))
    assert found == [(1, len(letter.body))]
    assert store.outbox.replay(letter.id, NOW)
    store._writer.run(lambda connection: forget_letters(connection, [nr for nr, _ in found]))
    assert store.outbox.find(letter.id) is not None


def test_a_file_of_a_newer_release_is_left_alone_and_down(
    store: SqliteStore, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It was another one at the start: a release that is being rolled out has changed it."""
    store.gauges()
    connection = open_file(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    store.close()
    for _ in range(2):
        with pytest.raises(StoreDown):
            store.gauges()
    (told,) = (record.getMessage() for record in caplog.records if record.name == "streamchat")
    assert "version 99" in told and "upgrade flask-streamchat" in told


def test_a_database_of_somebody_else_is_left_alone_and_down(
    store: SqliteStore, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    connection = sqlite_schema.apsw.Connection(path)
    connection.execute("CREATE TABLE customers (name)")
    before = Path(path).read_bytes()
    with pytest.raises(StoreDown):
        store.take_lease()
    assert "a database of something else: name a file of its own" in caplog.text
    assert Path(path).read_bytes() == before
    connection.close()


def test_pruning_gives_pages_back_to_the_disk(store: SqliteStore, path: str) -> None:
    owner = store.take_lease()
    payload = pack([Text("word") for _ in range(30000)])
    for _ in range(30):
        answer = entry(owner, user="ann")
        store.admit(answer, NONE)
        store.write(owner, [Batch(answer.id, 0, 30000, payload)], [ending(answer)])
    store.close()
    before = Path(path).stat().st_size
    assert store.prune(3600, 1, 0) == 30
    store.close()
    assert before > 12 * 2**20
    assert Path(path).stat().st_size < before / 2


# who lives


def test_a_lease_of_another_boot_is_dead(
    path: str, open_store: Callable[[str], SqliteStore], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    owner = open_store(path).take_lease()
    other = tmp_path / "boot_id"
    other.write_text("another\n")
    monkeypatch.setattr("streamchat.sqlite_leases.BOOT_ID", other)
    with pytest.raises(LeaseLost):
        open_store(path).renew(owner)


def test_where_no_boot_is_told_a_lease_of_the_time_to_come_is_dead(
    path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("streamchat.sqlite_leases.BOOT_ID", tmp_path / "none")
    clock = Clock()
    store = SqliteStore(path, LEASE, ThreadLoop().lane, clock)
    owner = store.take_lease()
    store.renew(owner)
    clock.now = 5.0  # the machine was started again
    with pytest.raises(LeaseLost):
        store.renew(owner)
    store.close()


def test_a_lost_file_of_leases_makes_everybody_dead(store: SqliteStore, path: str) -> None:
    owner = store.take_lease()
    store.close()
    os.unlink(path + "-leases")
    with pytest.raises(LeaseLost):
        store.renew(owner)
    store.renew(store.take_lease())


def test_who_was_stalled_between_looking_and_renewing_stays_dead(path: str) -> None:
    clock = Clock()
    connection = open_file(path)
    leases = Leases(path, LEASE, clock)
    owner = leases.take(connection)
    clock.now += LEASE
    assert find_orphans(connection, leases) == []
    leases._extend(1)
    with pytest.raises(LeaseLost):
        leases.renew(connection, owner)
    leases.close()
    connection.close()


# what becomes of faults


def test_a_lock_of_two_seconds_loses_nothing(store: SqliteStore, path: str) -> None:
    owner = store.take_lease()
    answer = entry(owner)
    store.admit(answer, NONE)
    store.write(owner, [texts(answer.id, 0, 1)], [])
    refused: list[float] = []
    with locked(path):
        until = time.monotonic() + 2
        while (began := time.monotonic()) < until:
            with pytest.raises(StoreDown):
                store.write(owner, [texts(answer.id, 1, 3)], [ending(answer)])
            refused.append(time.monotonic() - began)
        found = store.find(answer.id)
        assert found is not None
        assert (found.status, found.next) == ("in_progress", 1)
    store.write(owner, [texts(answer.id, 1, 3)], [ending(answer)])
    assert [seq for seq, _ in told(store.read(answer.id, -1))] == [0, 1, 2, 3]
    assert sorted(refused)[len(refused) // 2] < 0.25


def test_all_who_wait_for_a_lock_give_up_within_two_seconds(store: SqliteStore, path: str) -> None:
    owner = store.take_lease()
    tasks = [lambda: store.admit(entry(owner), NONE), lambda: store.attend(["resp_1"]), store.take_lease]
    with locked(path):
        began = time.monotonic()
        assert {type(each) for each in together(tasks * 10)} == {StoreDown}
        assert 1.0 < time.monotonic() - began < WITHIN
    assert store.gauges()["answers"] == 0


def test_what_waits_for_a_short_lock_is_done_after_it(store: SqliteStore, path: str) -> None:
    owner = store.take_lease()
    answer = entry(owner)
    with locked(path):
        admitting = Thread(target=lambda: store.admit(answer, NONE))
        admitting.start()
        time.sleep(0.3)
        assert store.find(answer.id) is None
    admitting.join()
    assert store.find(answer.id) is not None


def test_leases_are_renewed_while_the_file_is_locked(store: SqliteStore, path: str) -> None:
    owner = store.take_lease()
    with locked(path):
        began = time.monotonic()
        store.renew(owner)
        assert store.gauges()["owners"] == 1
        assert time.monotonic() - began < 1


def test_a_full_file_takes_nothing_more_and_goes_on_when_there_is_room(store: SqliteStore) -> None:
    owner = store.take_lease()
    answer = entry(owner)
    store.admit(answer, NONE)
    store.write(owner, [texts(answer.id, 0, 10)], [])
    store._writer.run(lambda connection: connection.execute("PRAGMA max_page_count = 1").get)
    for _ in range(3):
        with pytest.raises(StoreDown):
            store.write(owner, [texts(answer.id, 10, 20000)], [ending(answer)])
    store.renew(owner)
    found = store.find(answer.id)
    assert found is not None
    assert (found.status, found.next) == ("in_progress", 10)
    store._writer.run(lambda connection: connection.execute("PRAGMA max_page_count = 1000000").get)
    store.write(owner, [texts(answer.id, 10, 20000)], [ending(answer)])
    assert len(told(store.read(answer.id, -1))) == 20010


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """No file of this process grows above `limit` bytes: writing fails with EFBIG."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_refuses_to_write_is_survived(store: SqliteStore, path: str) -> None:
    owner = store.take_lease()
    answer = entry(owner)
    store.admit(answer, NONE)
    store.write(owner, [texts(answer.id, 0, 10)], [])
    with file_size_limit(Path(path + "-wal").stat().st_size):
        for _ in range(3):
            with pytest.raises(StoreDown):
                store.write(owner, [texts(answer.id, 10, 20000)], [])
        store.renew(owner)
        assert len(told(store.read(answer.id, -1))) == 10
    store.write(owner, [texts(answer.id, 10, 20000)], [])
    assert len(told(store.read(answer.id, -1))) == 20010


@pytest.fixture
def closed_directory() -> Iterator[Path]:
    """One that nobody may write to, not even root, who becomes somebody else for it."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o555)
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    yield directory
    os.seteuid(before)
    shutil.rmtree(directory)


def test_a_directory_that_may_not_be_written_to_is_survived(
    closed_directory: Path, open_store: Callable[[str], SqliteStore]
) -> None:
    store = open_store(str(closed_directory / "log.db"))
    assert {outcome(task) for task in everything(store, "owner", "resp_1")} == {StoreDown}
    os.seteuid(os.getuid())
    closed_directory.chmod(0o755)
    store.renew(store.take_lease())


def test_a_directory_that_is_missing_is_survived(tmp_path: Path, open_store: Callable[[str], SqliteStore]) -> None:
    store = open_store(str(tmp_path / "later" / "log.db"))
    assert {outcome(task) for task in everything(store, "owner", "resp_1")} == {StoreDown}
    (tmp_path / "later").mkdir()
    store.renew(store.take_lease())


@pytest.mark.parametrize(
    ("is_open", "start", "noise"),
    [(False, 0, b"\0" * 100), (False, 100, b"\xff" * 100000), (True, 100, b"\xff" * 100000)],
    ids=["header", "pages", "pages-while-open"],
)
def test_a_corrupt_file_is_survived(store: SqliteStore, path: str, is_open: bool, start: int, noise: bytes) -> None:
    owner = store.take_lease()
    for _ in range(20):
        answer = entry(owner, user="ann", chat="c1")
        store.admit(answer, NONE)
        store.write(owner, [texts(answer.id, 0, 2000)], [ending(answer)])
    store.close()
    if is_open:
        store._reader.run(lambda connection: connection.execute("PRAGMA user_version").get)
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(noise)
    outcomes = {outcome(task) for task in everything(store, owner, answer.id)}
    assert outcomes == {StoreDown}
    store.close()
    for file_of_it in Path(path).parent.iterdir():
        file_of_it.unlink()
    store.renew(store.take_lease())


def test_a_fault_is_told_once_and_so_is_its_end(
    store: SqliteStore, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "streamchat")
    owner = store.take_lease()
    answer = entry(owner)
    store.admit(answer, NONE)
    assert caplog.messages == []
    with locked(path):
        for _ in range(3):
            with pytest.raises(StoreDown):
                store.write(owner, [texts(answer.id, 0, 1)], [])
    for _ in range(3):
        store.write(owner, [texts(answer.id, 0, 1)], [])
    assert caplog.messages == ["the response log does not answer: Busy", "the response log answers again"]


def test_a_listener_goes_on_after_the_file_was_opened_anew(
    path: str, store: SqliteStore, open_store: Callable[[str], SqliteStore]
) -> None:
    owner = store.take_lease()
    answer = entry(owner)
    store.admit(answer, NONE)
    other = open_store(path)
    listener = other.listen(owner)
    listener.add(answer.id)
    seqs: list[int] = []
    for seq in range(3):
        store.write(owner, [texts(answer.id, seq, 1)], [])
        other._reader._drop()
        deadline = time.monotonic() + HEARD_WITHIN
        while len(seqs) <= seq:
            assert time.monotonic() < deadline
            seqs += [each for each, _ in told(listener.wait(0.1)[0])]
    assert seqs == [0, 1, 2]
