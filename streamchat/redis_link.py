"""A command becomes Redis's reply, or StoreDown within two seconds. The only user of the redis package.

Nothing connects before the first command. No error and no log line holds a value or the URL.
"""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import redis
from redis.connection import AbstractConnection, parse_url

from .errors import SettingsError, StoreDown
from .redis_lua import Script

logger = logging.getLogger("streamchat.store")

CONNECTIONS = 8
PATIENCE = 1.7  # seconds for a command with all that it waits for; the rest of the contract's 2 s is for a busy machine
# Together 1.55 s: a free connection, then connecting, AUTH and SELECT, each of which waits for the socket.
POOL_WAIT = 0.5
SOCKET_WAIT = 0.35
LEAST_WAIT = 0.05
# Questions to the resolver at a time: one without an answer goes on for many seconds, and under gevent in its pool of
# ten threads, where the models' names are resolved too.
RESOLVING = 2
TELL_AGAIN = 60.0  # seconds
# The URL's query cannot overrule these. Nothing is retried: whoever calls knows better whether to.
CONNECTION: dict[str, Any] = {
    "protocol": 2,  # no HELLO: one round trip less
    "driver_info": None,  # no CLIENT SETINFO: two less
    "socket_connect_timeout": SOCKET_WAIT,
    "socket_timeout": SOCKET_WAIT,
    "socket_keepalive": True,
    "retry": None,
    "retry_on_error": [],
    "retry_on_timeout": False,
    "health_check_interval": 0,
    "decode_responses": False,
    "encoding": "utf-8",
    "encoding_errors": "surrogatepass",  # ids of users and chats are strangers' text
}
CODE = re.compile(r"[A-Z]{2,20}\b")


class OutcomeUnknown(StoreDown):
    """The command was sent and its reply did not come: it may have been done."""


def limited(make: type[AbstractConnection]) -> type[AbstractConnection]:
    """The kind of connection that connects within `socket_connect_timeout` in all.

    redis-py gives that time to each address of a host, then to TLS, and to the resolver any time.
    """
    places = threading.BoundedSemaphore(RESOLVING)

    def _connect(self: Any) -> socket.socket:
        made: Future[socket.socket] = Future()

        def work() -> None:
            _fill(made, lambda: _connected(make, self, places))

        try:
            threading.Thread(target=work, daemon=True).start()
            return made.result(self.socket_connect_timeout)
        except RuntimeError as error:  # no thread can be started
            raise OSError(str(error)) from None
        except BaseException:
            made.add_done_callback(_drop)  # nobody waits for it any more
            raise

    return type(f"Limited{make.__name__}", (make,), {"_connect": _connect})


def _connected(make: Any, connection: Any, places: threading.BoundedSemaphore) -> socket.socket:
    """Once a resolver has answered: redis-py asks it again, at once."""
    if host := getattr(connection, "host", ""):  # a socket's file has none
        if not places.acquire(timeout=connection.socket_connect_timeout):
            raise TimeoutError
        try:
            socket.getaddrinfo(host, connection.port, type=socket.SOCK_STREAM)
        finally:
            places.release()
    connected: socket.socket = make._connect(connection)
    return connected


def _fill(made: Future[socket.socket], connect: Callable[[], socket.socket]) -> None:
    try:
        connected = connect()
    except BaseException as error:
        made.set_exception(error)
    else:
        made.set_result(connected)


def _drop(made: Future[socket.socket]) -> None:
    if made.exception() is None:
        made.result().close()


def connection_of(url: str) -> tuple[type[AbstractConnection], dict[str, Any]]:
    """What makes a connection, and its options. Raises SettingsError."""
    try:
        options = {**parse_url(url), **CONNECTION}
        options.pop("max_connections", None)
        options.pop("timeout", None)
        make = options.pop("connection_class", redis.Connection)
        make(**options)
    except (ValueError, TypeError, redis.RedisError):
        raise SettingsError(
            "STREAMCHAT_STORE_URL cannot be used: write redis://[user:password@]host[:port][/number], "
            "or rediss:// for TLS; what stands behind a '?' must be an option of redis-py's connection."
        ) from None
    return limited(make), options


def pool_of(url: str, most: int, seconds: float) -> redis.BlockingConnectionPool:
    """So many connections beside those of a Link; each wait on them, for the reply too, ends after so many seconds."""
    make, options = connection_of(url)
    return _pool(make, options | {"socket_connect_timeout": seconds, "socket_timeout": seconds}, most, seconds)


def _pool(
    make: type[AbstractConnection], options: dict[str, Any], most: int, seconds: float
) -> redis.BlockingConnectionPool:
    return redis.BlockingConnectionPool(max_connections=most, timeout=seconds, connection_class=make, **options)


class Link:
    """A handful of connections, shared by all greenlets or threads of a process."""

    def __init__(self, url: str) -> None:
        self._make, self._options = connection_of(url)
        self._pool = _pool(self._make, self._options, CONNECTIONS, POOL_WAIT)
        self._told: dict[str, float] = {}  # when, monotonic
        self._lock = threading.Lock()

    def script(self, script: Script, *values: Any) -> Any:
        """The script's reply. Redis forgets scripts when it restarts: it is then told again."""
        until = time.monotonic() + PATIENCE
        try:
            return self._call(("EVALSHA", script.sha, 1, *values), until)
        except redis.exceptions.NoScriptError:
            return self._call(("EVAL", script.text, 1, *values), until)

    def call(self, *command: Any, until: float | None = None) -> Any:
        """The reply; `until` is a monotonic time before the usual one."""
        return self._call(command, until or time.monotonic() + PATIENCE)

    def _call(self, command: Sequence[Any], until: float) -> Any:
        connection = self._connection()
        try:
            connection.send_command(*command)
            reply = connection.read_response(timeout=max(LEAST_WAIT, until - time.monotonic()))
        except redis.exceptions.NoScriptError:
            raise
        except redis.ResponseError as error:  # out of memory, read-only, no permission: it did nothing
            raise self._down(error) from None
        except (redis.RedisError, OSError) as error:
            self._down(error)
            raise OutcomeUnknown from None
        finally:
            self._pool.release(connection)
        return reply

    def _connection(self) -> Any:
        try:
            return self._pool.get_connection()
        except (redis.RedisError, OSError) as error:
            raise self._down(error) from None

    def dedicated(self) -> tuple[AbstractConnection, socket.socket]:
        """A connection outside the pool, whose owner ends it by `disconnect`, and what it reads and writes."""
        connection: AbstractConnection = self._make(**self._options)
        try:
            connection.connect()
        except (redis.RedisError, OSError) as error:
            raise self._down(error) from None
        connected = connection._get_socket()
        if connected is None:
            raise StoreDown
        return connection, connected

    def close(self) -> None:
        self._pool.disconnect()

    def _down(self, error: Exception) -> StoreDown:
        """Logged once a minute for each kind of trouble: a dead store is asked many times a second."""
        found = CODE.match(str(error)) if isinstance(error, redis.ResponseError) else None
        trouble = found.group() if found else type(error).__name__
        now = time.monotonic()
        with self._lock:
            is_told = now < self._told.get(trouble, -TELL_AGAIN) + TELL_AGAIN
            if not is_told:
                self._told[trouble] = now
        if not is_told:
            logger.warning("Redis does not do what it is asked: %s", trouble)
        return StoreDown()
