"""An app with a blueprint for each queue of QUEUES, whose worker kills itself at the point that KILL_AT names.

QUEUES is JSON: {name: the blueprint's settings}. The product knows nothing of this: its methods are wrapped here.
KILL_BY is the signal, SIGKILL without it; one that stops the process does so once.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

from flask import Flask

from streamchat import create_blueprint
from streamchat.delivery import Courier
from streamchat.settings import read_environ
from streamchat.store import Batch, Ending

APP = "tests.live.killed_app:create_app()"


def always(*_: object) -> bool:
    return True


def is_something(_: Sequence[Any], result: object) -> bool:
    return bool(result)


def has_pieces(given: Sequence[Any], _: object) -> bool:
    """The first event of an answer is no piece."""
    batches: Sequence[Batch] = given[2]
    endings: Sequence[Ending] = given[3]
    return not endings and any(batch.last > 0 for batch in batches)


def has_endings(given: Sequence[Any], _: object) -> bool:
    return bool(given[3])


@dataclass(frozen=True)
class Point:
    """A call of `owner`.`method` at which the process dies, or the moment after it, where `fits` says so."""

    owner: str
    method: str
    after: bool = False
    fits: Callable[[Sequence[Any], object], bool] = always


POINTS: dict[str, Point | None] = {
    "before-the-claim": Point("store", "claim"),
    "after-the-claim": Point("store", "claim", True, is_something),
    "before-it-is-begun": Point("store", "begin"),
    "after-it-is-begun": Point("store", "begin", True, is_something),
    "before-the-headers": None,  # the upstream kills the worker that asks it
    "before-pieces-are-kept": Point("store", "write", False, has_pieces),
    "after-pieces-are-kept": Point("store", "write", True, has_pieces),
    "before-the-final-state": Point("store", "write", False, has_endings),
    "after-the-final-state": Point("store", "write", True, has_endings),
    "before-the-delivery": Point("outbox", "take", True, is_something),
    "before-the-2xx": None,  # the receiver kills the worker that tells it
    "after-the-2xx": Point("courier", "post", True),
    "after-its-record": Point("outbox", "settle", True),
}


def owners_of(owner: str, store_url: str) -> type:
    if owner == "courier":
        return Courier
    if store_url.startswith("sqlite:"):
        from streamchat.sqlite_outbox import SqliteOutbox
        from streamchat.sqlite_store import SqliteStore

        return SqliteStore if owner == "store" else SqliteOutbox
    from streamchat.redis_outbox import RedisOutbox
    from streamchat.redis_store import RedisStore

    return RedisStore if owner == "store" else RedisOutbox


def die_at(point: Point, owner: type, by: int) -> None:
    original: Callable[..., Any] = getattr(owner, point.method)
    met: list[bool] = []

    def meet() -> None:
        if not met:
            met.append(True)
            os.kill(os.getpid(), by)

    @wraps(original)
    def call(*given: Any) -> Any:
        if not point.after and point.fits(given, None):
            meet()
        result = original(*given)
        if point.after and point.fits(given, result):
            meet()
        return result

    setattr(owner, point.method, call)


def create_app() -> Flask:
    app = Flask(__name__)
    app.config.update(read_environ(os.environ))
    queues: dict[str, dict[str, Any]] = json.loads(os.environ["QUEUES"])
    for name, settings in queues.items():
        app.register_blueprint(create_blueprint(name, **settings), url_prefix=f"/{name}")
    name = os.environ.get("KILL_AT", "")
    point = POINTS[name] if name else None
    if point is not None:
        by = int(os.environ.get("KILL_BY", signal.SIGKILL))
        die_at(point, owners_of(point.owner, queues[name]["store_url"]), by)
    return app
