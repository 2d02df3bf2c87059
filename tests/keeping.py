"""A store into which tests put faults, and shops that keep their answers in it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from flask import Request
from werkzeug.test import TestResponse

from streamchat import stores
from streamchat.errors import StoreDown
from streamchat.memory_store import MemoryStore
from streamchat.store import Store
from tests.shop import Shop, open_shop, wait_until

Fault = Callable[[], object]
WAITING = (
    *("write", "admit", "renew", "take_lease", "find", "read", "reap", "attend", "latest", "cancel", "unattended"),
    *("claim", "begin", "take", "settle"),
)


def down() -> None:
    raise StoreDown


class FaultyStore:
    """A MemoryStore; `before` and `after` hold what happens around the calls of a method. `calls` counts them."""

    def __init__(self, lease: float = 15) -> None:
        self.memory = MemoryStore(lease)
        self.calls: list[str] = []
        self.before: dict[str, Fault] = {}
        self.after: dict[str, Fault] = {}

    def __getattr__(self, name: str) -> Any:
        return self._faulty(getattr(self.memory, name), name)

    @property
    def outbox(self) -> Any:
        outbox = self.memory.outbox
        return SimpleNamespace(
            **{name: self._faulty(getattr(outbox, name), name) for name in ("take", "settle", "letters", "replay")},
            find=outbox.find,
        )

    def _faulty(self, method: Callable[..., Any], name: str) -> Any:
        def called(*arguments: Any) -> Any:
            self.calls.append(name)
            self.before.get(name, lambda: None)()
            result = method(*arguments)
            self.after.get(name, lambda: None)()
            return result

        return called

    @property
    def store(self) -> Store:
        return cast(Store, self)

    def fall(self, *names: str) -> None:
        """From now on these methods, or all, raise StoreDown."""
        self.before.update(dict.fromkeys(names or WAITING, down))

    def rise(self) -> None:
        self.before.clear()
        self.after.clear()

    def lose_leases(self) -> None:
        for owner in list(self.memory._owners):
            self.memory.give_up(owner)


class Block:
    """A call that does not return until `open`."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.gate = threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        assert self.gate.wait(20)

    def open(self) -> None:
        self.gate.set()


def user_of(request: Request) -> str | None:
    return request.headers.get("X-User")


@contextlib.contextmanager
def keeping_shop(monkeypatch: pytest.MonkeyPatch, store: FaultyStore, **options: Any) -> Iterator[Shop]:
    """A process of its own with a handle on the store. Users say who they are by X-User."""
    monkeypatch.setitem(stores.STORES, "memory", lambda settings, loop: store.store)
    given: dict[str, Any] = {"store_url": "memory://", "authorize": user_of, "coalesce_ms": 0} | options
    if given.get("public"):
        del given["authorize"]
    with open_shop(**given) as shop:
        yield shop


def get(shop: Shop, path: str, user: str = "ann", **headers: str) -> TestResponse:
    return shop.app.test_client().get(f"/api{path}", headers={"X-User": user, **headers}, buffered=True)


def post(shop: Shop, path: str, user: str = "ann") -> TestResponse:
    return shop.app.test_client().post(f"/api{path}", headers={"X-User": user}, buffered=True)


def ask(shop: Shop, message: Any = "hi", accept: str | None = None, user: str = "ann", **headers: str) -> TestResponse:
    return shop.ask(message, accept, headers={"X-User": user, **{k.replace("_", "-"): v for k, v in headers.items()}})


def get_bytes(path: str, accept: str, user: str = "ann") -> bytes:
    return f"GET /api{path} HTTP/1.1\r\nHost: shop\r\nAccept: {accept}\r\nX-User: {user}\r\n\r\n".encode()


def expect_settled(store: FaultyStore) -> None:
    """No slot and no token is held."""

    def gauges() -> tuple[int, int]:
        told = store.memory.gauges()
        return told["live"], told["reserved"]

    wait_until(lambda: gauges() == (0, 0), "the store still holds a slot")
