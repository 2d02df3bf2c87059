"""The store in a SQLite file keeps the contract."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from streamchat.loop import ThreadLoop
from streamchat.sqlite_store import SqliteStore

from .queue_contract import QueueContract
from .store_contract import LEASE, Clock, ClockContract, StoreContract


class TestSqliteStore(QueueContract, ClockContract, StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path, clock: Clock) -> Iterator[SqliteStore]:
        store = SqliteStore(str(tmp_path / "log.db"), LEASE, ThreadLoop().lane, clock)
        yield store
        store.close()

    @pytest.fixture
    def another(self, tmp_path: Path, clock: Clock) -> Iterator[SqliteStore]:
        store = SqliteStore(str(tmp_path / "log.db"), LEASE, ThreadLoop().lane, clock)
        yield store
        store.close()
