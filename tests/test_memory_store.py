"""The store in memory keeps the contract."""

from __future__ import annotations

import pytest

from streamchat.memory_store import MemoryStore

from .queue_contract import QueueContract
from .store_contract import LEASE, Clock, ClockContract, StoreContract


class TestMemoryStore(QueueContract, ClockContract, StoreContract):
    @pytest.fixture
    def store(self, clock: Clock) -> MemoryStore:
        return MemoryStore(LEASE, clock)

    @pytest.fixture
    def another(self, store: MemoryStore) -> MemoryStore:
        return store
