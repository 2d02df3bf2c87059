"""The store that STREAMCHAT_STORE_URL names, and what carries the ids of its queue.

Connects to nothing: a store does so at its first call.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from .errors import SettingsError
from .loop import Loop
from .memory_store import MemoryStore
from .redis_store import RedisStore
from .settings import Settings
from .sqlite_schema import check_file
from .sqlite_store import SqliteStore
from .store import Store

if TYPE_CHECKING:
    from .carrier import HueyCarrier


def file_of(settings: Settings) -> Path | None:
    """The log's file, where it is one: sqlite:///relative/path, sqlite:////absolute/path, as SQLAlchemy has them."""
    path = settings.store_url.removeprefix("sqlite:///")
    return Path(unquote(path)) if path != settings.store_url else None


def _sqlite(settings: Settings, loop: Loop) -> Store:
    return SqliteStore(str(file_of(settings)), settings.lease, loop.lane)


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


def open_carrier(settings: Settings, queue: str, loop: Loop) -> HueyCarrier | None:
    """None where workers look for the answers themselves: no Redis, or no huey."""
    if not settings.background or not settings.store_url.startswith(("redis://", "rediss://")):
        return None
    try:
        from .carrier import HueyCarrier
    except ModuleNotFoundError as missing:
        if missing.name != "huey":
            raise
        return None
    return HueyCarrier(settings.store_url, queue, loop)


def prune(store: Store, settings: Settings) -> int:
    """Forgets what the settings say is too old or too much; how many answers. Raises StoreDown."""
    return store.prune(settings.retention, settings.kept_bytes_per_user, settings.kept_bytes)


def check_store(settings: Settings, loop: Loop) -> None:
    """At the start. Raises SettingsError as open_store does, for a missing folder, and for what is no file of ours."""
    open_store(settings, loop)
    file = file_of(settings)
    if file is not None and not file.parent.is_dir():
        folder = file.parent.absolute()
        raise SettingsError(
            f"STREAMCHAT_STORE_URL names a file in {folder}, which is no folder: make it, or name another."
        )
    if file is not None and file.is_dir():
        raise SettingsError(f"STREAMCHAT_STORE_URL names {file.absolute()}, which is a folder: name a file in it.")
    if file is not None:
        check_file(str(file))
