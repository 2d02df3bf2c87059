"""One POST of a webhook: to a checked address, without proxies and redirects, over within its time whatever happens.

A helper thread (under gevent a greenlet) works; whoever asked waits for it no longer than that, then ends its socket.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from http.client import HTTPException
from typing import Any

import requests
from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3.exceptions import HTTPError

from .addresses import Target, parse_target
from .attempts import Fault, Reply, seconds_of
from .cancellation import Cancellation
from .errors import Interrupted
from .pinned_connection import REPLY_BYTES, Adapter, Failed, Line

SECONDS = 10.0  # of one attempt in all: resolving, connecting, TLS, the reply
ADDRESSES = 8  # that are tried; a name may have any number
LOOKUPS = 6  # at a time: one that nobody answers goes on for long, and gevent's resolver has ten threads
HEADERS = {
    "Content-Type": "application/json",
    "User-Agent": "streamchat-webhooks",
    "Accept": "*/*",
    "Accept-Encoding": "identity",
    "Connection": "close",
}

Resolve = Callable[[str, int], list[str]]


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, as the system knows them. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(_numeric(address[4]) for address in found))


def _numeric(address: Any) -> str:
    """An IPv6 address with its scope, if it has one: that of a public address has none."""
    scope = address[3] if len(address) == 4 else 0
    return f"{address[0]}%{scope}" if scope and "%" not in address[0] else str(address[0])


class Courier:
    """Posts webhooks, from any number of greenlets or threads. Keeps no connection."""

    def __init__(
        self, *, loopback: bool = False, seconds: float = SECONDS, resolve: Resolve = resolve, ca: str | None = None
    ) -> None:
        """`ca` is a file of authorities in place of the usual ones."""
        self._loopback = loopback
        self._seconds = seconds
        self._resolve = resolve
        self._tls = ssl.create_default_context(cafile=ca or DEFAULT_CA_BUNDLE_PATH)  # once: it takes milliseconds
        self._lookups = threading.BoundedSemaphore(LOOKUPS)

    def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Reply:
        """What came of it; a failure is a Reply too. Waits at most `seconds`."""
        try:
            target = parse_target(url, loopback=self._loopback)
        except ValueError:
            return Reply(fault="target")
        errand = Errand(target, HEADERS | dict(headers), body, self._looked_up, time.monotonic() + self._seconds)
        worker = threading.Thread(target=errand.run, args=(self._tls,), name="streamchat-webhook", daemon=True)
        worker.start()
        try:
            errand.over.wait(self._seconds)
        finally:  # also where the waiting greenlet is killed
            errand.end()
        if errand.failure is not None:
            raise errand.failure
        return errand.reply

    def _looked_up(self, target: Target, until: float) -> list[str]:
        """The target's addresses. One that may not be connected to closes the whole target: a resolver that mixes
        public and private answers waits for us to take the wrong one.
        """
        if not self._lookups.acquire(timeout=max(0.0, until - time.monotonic())):
            raise Failed("timeout")
        try:
            found = self._resolve(target.host, target.port)
        except (OSError, UnicodeError):
            raise Failed("dns") from None
        finally:
            self._lookups.release()
        if not found:
            raise Failed("dns")
        if not all(target.admits(address) for address in found):
            raise Failed("address")
        return found[:ADDRESSES]


class Errand:
    """One POST on its way. `reply` is what is known so far: a status counts from when the head is whole."""

    def __init__(
        self,
        target: Target,
        headers: dict[str, str],
        body: bytes,
        look_up: Callable[[Target, float], list[str]],
        until: float,
    ) -> None:
        self.reply = Reply(fault="timeout")
        self.failure: Exception | None = None  # a bug of ours, for whoever waits
        self.over = threading.Event()
        self._target = target
        self._request = requests.Request("POST", target.url, headers=headers, data=body).prepare()
        self._look_up = look_up
        self._until = until
        self._cancellation = Cancellation()

    def end(self) -> None:
        """Ends the connection, whatever it is doing."""
        self._cancellation.cancel(Interrupted())

    def run(self, tls: ssl.SSLContext) -> None:
        try:
            self._post(tls)
        except Exception as error:
            self._failed(error)
        finally:
            self._cancellation.drop()
            self.over.set()

    def _failed(self, error: Exception) -> None:
        if self._cancellation.error is not None or self.reply.status is not None:
            return  # our own end of the connection, or what comes after the verdict
        fault = _fault_of(error)
        if fault is None:
            self.failure = error
        else:
            self.reply = Reply(fault=fault)

    def _post(self, tls: ssl.SSLContext) -> None:
        line = Line(self._look_up(self._target, self._until), self._target.port, self._until, self._cancellation)
        with contextlib.closing(Adapter(line, tls)) as adapter:
            # Not by a Session: that reads the environment, .netrc among it, and the whole body of a redirect.
            response = adapter.send(self._request, stream=True, timeout=line.left())
            with contextlib.closing(response):
                if self._cancellation.error is None:
                    retry_after = seconds_of(response.headers.get("Retry-After"), time.time())
                    self.reply = Reply(status=response.status_code, retry_after=retry_after)
                # Read to its end where that is near: to close before would reset what the receiver still sends.
                with contextlib.suppress(Exception):
                    response.raw.read(REPLY_BYTES, decode_content=False)


FAULTS: tuple[tuple[tuple[type[BaseException], ...], Fault], ...] = (
    ((requests.exceptions.SSLError,), "tls"),
    ((requests.exceptions.Timeout, TimeoutError), "timeout"),
    ((requests.exceptions.ConnectionError, OSError, Interrupted), "connection"),
    ((HTTPError, HTTPException), "protocol"),
)


def _fault_of(error: Exception) -> Fault | None:
    """requests wraps urllib3's errors, and those the first cause. None for what is none of theirs."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Failed):
            return cause.fault
        if isinstance(cause, HTTPException) and not isinstance(cause, ConnectionError):
            return "protocol"
        cause = cause.__context__
    return next((fault for kinds, fault in FAULTS if isinstance(error, kinds)), None)
