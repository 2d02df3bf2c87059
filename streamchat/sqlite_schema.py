"""The file of a SQLite response log: what stands in it, and how older files become newer ones.

The only module that imports apsw, which brings a SQLite of its own: Python's may be one that corrupts such files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Protocol, cast

from .errors import SettingsError

try:
    import apsw as apsw
except ImportError:  # the extra is not installed: told when a store is made, not when the package is imported
    apsw = None  # type: ignore[assignment]

# Before these, a reset of the WAL could race a writer, and the file was corrupt (sqlite.org/wal.html, section 11).
FIXED = ((3, 51, 3), (3, 50, 7), (3, 44, 6))
MODE = 0o600  # it holds what people asked; SQLite gives -wal and -shm the same
APPLICATION = 0x73636C67  # "sclg", in the header: whose file this is
WAL_BYTES = 16 * 2**20  # to which the WAL is cut after a burst

# What is appended is never changed. `pieces.nr` is the order of commits: there is one writer at a time, and no number
# is used again (AUTOINCREMENT), so what is new to a reader stands above the last number that it saw.
# Text that a client may choose is ANY: what is no UTF-8 (lone surrogates) is kept as bytes.
# `live` and `cancelled` hold only what still runs, so their size does not grow with the log.
VERSION_1 = """
CREATE TABLE owners (slot INTEGER PRIMARY KEY, owner TEXT NOT NULL UNIQUE, boot TEXT NOT NULL) STRICT;
CREATE TABLE answers (
    nr INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    user ANY,
    chat ANY,
    model ANY NOT NULL,
    created_at REAL NOT NULL,
    owner TEXT NOT NULL,
    status TEXT NOT NULL,
    reserve INTEGER NOT NULL,
    cancelled INTEGER NOT NULL DEFAULT 0,
    ended_at REAL,
    bytes INTEGER NOT NULL DEFAULT 0,
    finish_reason ANY,
    input_tokens INTEGER,
    output_tokens INTEGER,
    estimated INTEGER,
    error ANY
) STRICT;
CREATE INDEX live ON answers (owner, user, reserve) WHERE ended_at IS NULL;
CREATE INDEX cancelled ON answers (owner) WHERE cancelled = 1 AND ended_at IS NULL;
CREATE INDEX ended ON answers (ended_at, user, bytes) WHERE ended_at IS NOT NULL;
CREATE INDEX chats ON answers (user, chat) WHERE chat IS NOT NULL;
CREATE TABLE pieces (
    nr INTEGER PRIMARY KEY AUTOINCREMENT,
    answer INTEGER NOT NULL,
    first INTEGER NOT NULL,
    count INTEGER NOT NULL,
    payload BLOB NOT NULL
) STRICT;
CREATE INDEX pieces_of_answer ON pieces (answer, first);
CREATE TABLE readers (answer INTEGER PRIMARY KEY, at REAL NOT NULL) STRICT;
CREATE TABLE keys (
    scope ANY NOT NULL,
    key ANY NOT NULL,
    fingerprint ANY,
    id TEXT NOT NULL,
    created_at REAL NOT NULL,
    PRIMARY KEY (scope, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX key_ages ON keys (created_at);
CREATE TABLE ledger (
    id TEXT NOT NULL UNIQUE,
    user ANY,
    model ANY NOT NULL,
    started REAL NOT NULL,
    first_piece REAL,
    duration REAL NOT NULL,
    outcome TEXT NOT NULL,
    finish_reason ANY,
    pieces INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    estimated INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    upstream_status INTEGER,
    upstream_request_id ANY,
    upstream_code ANY
) STRICT;
CREATE INDEX ledger_of_user ON ledger (user, started, input_tokens, output_tokens);
CREATE INDEX ledger_ages ON ledger (started);
"""
# Answers that wait in a queue, and letters. `waiting` holds what nobody has claimed; `due` and `due_to` what is still
# to be delivered: their size does not grow with the log. What was written before has no queue, and tells nobody.
# What may be long stands last in its row: SQLite walks through it to what stands behind.
VERSION_2 = """
ALTER TABLE answers ADD COLUMN queue ANY NOT NULL DEFAULT '';
ALTER TABLE answers ADD COLUMN target ANY NOT NULL DEFAULT '';
ALTER TABLE answers ADD COLUMN claims INTEGER NOT NULL DEFAULT 0;
ALTER TABLE answers ADD COLUMN request ANY NOT NULL DEFAULT '';
CREATE INDEX waiting ON answers (queue, created_at) WHERE status = 'queued' AND owner = '';
CREATE TABLE letters (
    nr INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    answer TEXT NOT NULL,
    queue ANY NOT NULL,
    target ANY NOT NULL,
    created_at REAL NOT NULL,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    due REAL NOT NULL,
    told ANY NOT NULL,
    holder TEXT NOT NULL DEFAULT '',
    body BLOB NOT NULL
) STRICT;
CREATE INDEX due ON letters (queue, due) WHERE state = 'waiting';
CREATE INDEX due_to ON letters (target) WHERE state = 'waiting';
CREATE INDEX letter_states ON letters (state, created_at);
CREATE INDEX letter_ages ON letters (created_at);
CREATE TABLE targets_off (target ANY NOT NULL PRIMARY KEY) STRICT, WITHOUT ROWID;
"""
# Each index is a page more that an answer's end writes. A record has the number of its answer, which no other ever has
# (older ones whose answer is forgotten: one below 0), and days are only counted of users. A report reads all of it.
VERSION_3 = """
ALTER TABLE ledger RENAME TO older;
CREATE TABLE ledger (
    nr INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    user ANY,
    model ANY NOT NULL,
    started REAL NOT NULL,
    first_piece REAL,
    duration REAL NOT NULL,
    outcome TEXT NOT NULL,
    finish_reason ANY,
    pieces INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    estimated INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    upstream_status INTEGER,
    upstream_request_id ANY,
    upstream_code ANY
) STRICT;
INSERT INTO ledger SELECT ifnull((SELECT nr FROM answers WHERE id = older.id), -rowid), * FROM older;
DROP TABLE older;
CREATE INDEX ledger_of_user ON ledger (user, started, input_tokens, output_tokens) WHERE user IS NOT NULL;
"""
# Each makes the next version of the one before; released ones never change.
MIGRATIONS: tuple[str, ...] = (VERSION_1, VERSION_2, VERSION_3)


class Rows(Protocol):
    """What a statement gave."""

    @property
    def get(self) -> Any:
        """The one value, or None where there is no row."""

    def fetchall(self) -> list[Any]: ...

    def fetchone(self) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    """What is used of apsw's."""

    @property
    def in_transaction(self) -> bool: ...

    def execute(self, statement: str, values: object = None) -> Rows: ...

    def executemany(self, statement: str, rows: object) -> Rows: ...

    def changes(self) -> int: ...

    def last_insert_rowid(self) -> int: ...

    def set_busy_timeout(self, milliseconds: int) -> None: ...

    def close(self, force: bool = False) -> None: ...


def check_library() -> None:
    """Raises SettingsError where there is no SQLite that may write such a file."""
    if apsw is None:
        raise SettingsError('STREAMCHAT_STORE_URL names a SQLite file: run pip install "flask-streamchat[log]".')
    version = apsw.sqlite_lib_version()
    if not _is_fixed(version):
        raise SettingsError(
            f"STREAMCHAT_STORE_URL names a SQLite file, but SQLite {version} can corrupt one that several workers "
            "write: run pip install --upgrade apsw."
        )


def _is_fixed(version: str) -> bool:
    found = tuple(int(part) for part in version.split(".")[:3])
    return found >= FIXED[0] or any(found[:2] == fixed[:2] and found >= fixed for fixed in FIXED[1:])


def check_file(path: str) -> None:
    """Raises SettingsError for a file that is not ours to write. Makes none, and waits for nobody."""
    try:
        connection = cast("Connection", apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY))
        try:
            _check_version(connection)
        finally:
            connection.close()
    except apsw.NotADBError:
        raise SettingsError("STREAMCHAT_STORE_URL names a file that is no database: name a file of its own.") from None
    except apsw.Error:
        return  # it is not there yet, or busy: the first use will tell


def open_file(path: str) -> Connection:
    """A connection to the file, which is made or brought to this version where needed.

    Raises SettingsError for a file that is not ours to write, apsw.Error or OSError for all else.
    """
    with contextlib.suppress(FileExistsError):
        # Never opened where it exists: closing any descriptor of a file drops all of the process's locks on it.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, MODE))
    connection = cast("Connection", apsw.Connection(path))
    try:
        _prepare(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: Connection) -> None:
    connection.set_busy_timeout(0)
    _check_version(connection)
    if connection.execute("PRAGMA page_count").get == 0:  # later it would be a write for nothing
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    if connection.execute("PRAGMA journal_mode = WAL").get != "wal":
        raise SettingsError("STREAMCHAT_STORE_URL names a file on a disk where SQLite cannot share memory.")
    connection.execute(
        "PRAGMA synchronous = NORMAL"
    )  # a crash of a process loses nothing, of the machine the last moments
    connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
    connection.execute("PRAGMA temp_store = MEMORY")
    if _version(connection) < len(MIGRATIONS):
        _migrate(connection)


def _version(connection: Connection) -> int:
    version: int = connection.execute("PRAGMA user_version").get
    return version


def _check_version(connection: Connection) -> None:
    version = _version(connection)
    if version > len(MIGRATIONS):
        raise SettingsError(
            f"STREAMCHAT_STORE_URL names a file of version {version}, newer than the {len(MIGRATIONS)} that this "
            "release writes: upgrade flask-streamchat, or name another file."
        )
    owned = connection.execute("PRAGMA application_id").get == APPLICATION
    if not owned and (version or connection.execute("SELECT count(*) FROM sqlite_schema").get):
        raise SettingsError("STREAMCHAT_STORE_URL names a database of something else: name a file of its own.")


def _migrate(connection: Connection) -> None:
    """Another process may do the same: whoever comes second finds it done."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        for script in MIGRATIONS[_version(connection) :]:
            connection.execute(script)
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
