"""A command becomes Redis's reply, or StoreDown within two seconds. The only user of the redis package.

Nothing connects before the first command. No error and no log line holds a value or the URL.
"""

from __future__ import annotations

import logging
import re
import socket
import threading
import time
from collections.abc import Sequence
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


class Link:
    """A handful of connections, shared by all greenlets or threads of a process."""

    def __init__(self, url: str) -> None:
        try:
            self._options = {**parse_url(url), **CONNECTION}
            self._options.pop("max_connections", None)
            self._options.pop("timeout", None)
            make = self._options.pop("connection_class", redis.Connection)
            make(**self._options)
        except (ValueError, TypeError, redis.RedisError):
            raise SettingsError(
                "STREAMCHAT_STORE_URL cannot be used: write redis://[user:password@]host[:port][/number], "
                "or rediss:// for TLS; what stands behind a '?' must be an option of redis-py's connection."
            ) from None
        self._make = make
        self._pool = redis.BlockingConnectionPool(
            max_connections=CONNECTIONS, timeout=POOL_WAIT, connection_class=make, **self._options
        )
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
