"""What happens to the response log while answers run, and when they begin: nobody's stream may wait for it."""

from __future__ import annotations

from .cells import NDJSON, SSE, STREAMED, Promises, before, changed, finished
from .deeds import (
    fill_disk,
    fill_redis,
    hang_redis,
    lock_file,
    pause_redis,
    restart_redis,
    with_locked_file,
    without_redis,
)
from .model import lasting, words
from .rows import Row

LONG = 3.0  # seconds that an answer takes: longer than a short trouble
LONGER = 8.0  # longer than one that is given up
ADMISSION = 2.0  # seconds in which a question that needs the log is refused (docs/resume.md)

RESUMABLE = frozenset({"resumable"})
WARNED = frozenset({"resumable", "warning"})


def kept() -> Promises:
    """Whole and in the log. application/json cannot be resumed, since nobody has its id before its end."""
    return changed(finished(), STREAMED, notes=RESUMABLE)


LOST = changed(kept(), [SSE, NDJSON], notes=WARNED)
NOT_KEPT = changed(finished(), kept=())
REFUSED = changed(before(503, "overloaded", posts=0, within=ADMISSION), told=(), kept=(), notes=frozenset())
SHORT_TEXT, LONG_TEXT = "".join(words(LONG)), "".join(words(LONGER))


def trouble(name: str, done: str, deed: object, plan: str) -> Row:
    return Row(name, done, kept(), (lasting(LONG),), plan, deed=deed, whole=SHORT_TEXT)  # type: ignore[arg-type]


ROWS = (
    trouble("Redis restarted", "kill -9 of Redis after the first piece; it is back after 1 s.", restart_redis, "redis"),
    trouble("Redis paused", "Redis answers nobody for 2.5 s.", pause_redis, "redis"),
    trouble("Redis full", "Redis has no memory for writes, for 1.5 s.", fill_redis, "redis"),
    Row(
        "Redis hangs",
        "Redis stands still for 7.5 s, longer than an answer waits for it.",
        LOST,
        (lasting(LONGER),),
        "redis",
        deed=hang_redis,
        whole=LONG_TEXT,
    ),
    Row("Redis away at the question", "There is no Redis.", NOT_KEPT, plan="redis", around=without_redis),
    Row(
        "the same, with an Idempotency-Key",
        "There is no Redis, and the question must be answered once.",
        REFUSED,
        plan="redis",
        around=without_redis,
        keyed=True,
    ),
    trouble("SQLite locked", "Another process holds the write lock for 2 s.", lock_file, "sqlite"),
    Row(
        "SQLite locked at the question",
        "Another process holds the write lock all the time.",
        NOT_KEPT,
        plan="sqlite",
        around=with_locked_file,
    ),
    Row(
        "locked, with an Idempotency-Key",
        "The same, and the question must be answered once.",
        REFUSED,
        plan="sqlite",
        around=with_locked_file,
        keyed=True,
    ),
    Row(
        "disk full",
        "The log's disk is full for 6.5 s, longer than an answer waits for it.",
        LOST,
        (lasting(LONGER),),
        "small disk",
        deed=fill_disk,
        whole=LONG_TEXT,
    ),
    Row("disk read-only", "The log's disk cannot be written to.", NOT_KEPT, plan="read-only disk"),
    Row(
        "read-only, with an Idempotency-Key",
        "The same, and the question must be answered once.",
        REFUSED,
        plan="read-only disk",
        keyed=True,
    ),
)
