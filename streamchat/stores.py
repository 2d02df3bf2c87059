"""The store that STREAMCHAT_STORE_URL names. Connects to nothing: a store does so at its first call."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import unquote

from .loop import Loop
from .memory_store import MemoryStore
from .redis_store import RedisStore
from .settings import Settings
from .sqlite_store import SqliteStore
from .store import Store


def _sqlite(settings: Settings, loop: Loop) -> Store:
    """sqlite:///relative/path, sqlite:////absolute/path, as SQLAlchemy has them."""
    path = unquote(settings.store_url.removeprefix("sqlite:///"))
    return SqliteStore(path, settings.lease, loop.lane)


def _redis(settings: Settings, loop: Loop) -> Store:
    return RedisStore(settings.store_url, settings.lease, keep=settings.retention)


def _memory(settings: Settings, loop: Loop) -> Store:
    return MemoryStore(settings.lease)


STORES: dict[str, Callable[[Settings, Loop], Store]] = {
    "memory": _memory,
    "redis": _redis,
    "rediss": _redis,
    "sqlite": _sqlite,
}


def open_store(settings: Settings, loop: Loop) -> Store | None:
    """None where none is named. Raises SettingsError where its library is missing, or too old."""
    scheme = settings.store_url.partition("://")[0]
    return STORES[scheme](settings, loop) if scheme else None
