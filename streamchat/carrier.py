"""Ids of queued answers on a list in Redis, over huey: whoever accepts one pushes, a worker pops.

It carries at most once, and that is enough: the answer's row is what counts, and a look finds what was not carried.
The only user of huey. Nothing connects before the first push, or `start`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any

from huey.api import Huey
from huey.registry import Message
from huey.storage import RedisStorage

from .errors import LeaseLost, StoreDown
from .loop import Loop
from .redis_link import pool_of

logger = logging.getLogger("streamchat")

PREFIX = "streamchat:huey:"  # of the lists; the store's own keys have other second words
POPPERS = 2  # one hands over while the other waits: each has a connection, and no answer has one
PUSHERS = 2  # connections of a process that accepts
PUSH_WAIT = 0.3  # seconds for each of: a free connection, connecting, the reply
REST = 0.5  # seconds after a failure in which nothing is tried: not every caller is to wait for a Redis that hangs
POP_SECONDS = 1  # that Redis keeps a pop waiting; whole, since Redis 5 takes no others
POP_WAIT = 1.6  # a pop that the client gave up may take an id with it: Redis is to answer first
STOP_WITHIN = 1.8  # seconds
AGAIN = 0.1  # seconds between two looks whether there is room, or nothing is popped any more
# Where nobody pops, since the workers have no huey, the list must not grow for ever.
MOST_CARRIED = 10_000
KEPT = 3600  # seconds without a push


class _List(RedisStorage):  # type: ignore[misc]
    """huey's own, by another name and with bounds."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(name, **options)
        self.queue_key = PREFIX + name  # huey leaves out what is no letter: two mounts might share one list

    def enqueue(self, data: bytes, priority: float | None = None) -> None:
        pushing = self.conn.pipeline(transaction=False)
        pushing.lpush(self.queue_key, data).ltrim(self.queue_key, 0, MOST_CARRIED - 1)
        pushing.expire(self.queue_key, KEPT).execute()


def carried(id: str) -> None:
    """The task of the messages. It is never executed: what pops them hands the id over."""


class Plain:
    """A message is an id as JSON. huey pickles: whoever writes to Redis, and knows the key, would run code in a worker.

    Nothing is signed: a stranger's id is claimed in the store, which has no such row in the queue.
    """

    def serialize(self, message: Any) -> bytes:
        return json.dumps(message.args[0]).encode()

    def deserialize(self, data: bytes) -> Any:
        """Raises ValueError for what is no message of ours."""
        try:
            id = json.loads(data)
        except RecursionError as error:
            raise ValueError from error
        if not isinstance(id, str):
            raise ValueError
        return Message(None, f"{carried.__module__}.{carried.__name__}", args=(id,), kwargs={})


class _End:
    """One end of the list, with connections of its own."""

    def __init__(self, url: str, queue: str, connections: int, seconds: float) -> None:
        self._pool = pool_of(url, connections, seconds)
        # No consumer of huey's: that has a scheduler, handles signals, and asks Redis thrice for each task.
        self._huey = Huey(
            queue,
            results=False,
            serializer=Plain(),
            storage_class=_List,
            connection_pool=self._pool,
            read_timeout=POP_SECONDS,
        )
        self._task = self._huey.task()(carried)

    def push(self, id: str) -> None:
        self._task(id)

    def pop(self) -> str | None:
        """Waits. Raises ValueError for a message that is none."""
        task = self._huey.dequeue()
        return None if task is None else task.args[0]

    def close(self) -> None:
        self._pool.disconnect()


class HueyCarrier:
    """One for each mount and process: most only `enqueue`, a worker's is started."""

    def __init__(self, url: str, queue: str, loop: Loop) -> None:
        self._loop = loop
        self._into = _End(url, queue, PUSHERS, PUSH_WAIT)
        self._out = _End(url, queue, POPPERS, POP_WAIT)
        self._popping: set[int] = set()
        self._stopping = False
        self._fails = False
        self._rests_until = 0.0  # monotonic

    def enqueue(self, id: str) -> None:
        """Within a second, and whatever Redis does: a look finds what is not carried."""
        if not self._stopping and time.monotonic() >= self._rests_until:
            self._push(id)

    def _push(self, id: str) -> None:
        try:
            self._into.push(id)
        except Exception as error:  # any of redis-py's
            self._rests_until = time.monotonic() + REST
            self._failed(error)
        else:
            self._fails = False

    def start(self, take: Callable[[str], None], ready: Callable[[], bool]) -> None:
        """Hands over what comes, as long as there is room for it: `take` may raise."""
        for number in range(POPPERS):
            self._popping.add(number)
            self._loop.spawn(lambda number=number: self._pop_all(number, take, ready))  # type: ignore[misc]

    def _pop_all(self, number: int, take: Callable[[str], None], ready: Callable[[], bool]) -> None:
        try:
            while not self._stopping:
                if not ready():
                    self._loop.pause(time.monotonic() + AGAIN)
                elif (id := self._popped()) is not None:
                    self._hand_over(id, take, ready)
        finally:
            self._popping.discard(number)

    def _popped(self) -> str | None:
        try:
            id = self._out.pop()
        except ValueError:
            logger.warning("a message that is no id of an answer came from the carrier: it is left out")
            return None
        except Exception as error:  # any of redis-py's
            self._failed(error)
            self._loop.pause(time.monotonic() + REST)
            return None
        self._fails = False
        return id

    def _hand_over(self, id: str, take: Callable[[str], None], ready: Callable[[], bool]) -> None:
        """One for which the room went while it was waited for goes to another worker."""
        if not ready():
            self._push(id)
            return
        try:
            take(id)
        except (StoreDown, LeaseLost):
            pass  # told by the lease
        except Exception:  # a bug: the next one may be taken
            logger.exception("the worker failed")

    def stop(self) -> None:
        """Waits until nothing is handed over any more, two seconds at most. Idempotent."""
        self._stopping = True
        until = time.monotonic() + STOP_WITHIN
        while self._popping and time.monotonic() < until:
            self._loop.pause(time.monotonic() + AGAIN)
        self._into.close()
        self._out.close()

    def _failed(self, error: Exception) -> None:
        """Told once until it goes well again. The error's text may hold an address."""
        if not self._fails:
            self._fails = True
            logger.warning("background answers are not carried (%s): workers find them later", type(error).__name__)
