"""A small shop that mounts streamchat, and what tests ask of it: its records, its slots, a real server around it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from flask import Flask
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.test import TestResponse

from streamchat import Record, StreamChat, answer_finished
from streamchat.mount import Mount

KEY = "sk-canary-1f2e3d4c5b6a"
ORGANISATION = "org-canary-778899"
PROMPT = "canary system prompt: the cook is a spy"
URL = "/api/get-response"
TEXT, SSE, NDJSON, WHOLE = "text/plain", "text/event-stream", "application/x-ndjson", "application/json"
FORMATS = (TEXT, SSE, NDJSON, WHOLE)
STREAMS = (TEXT, SSE, NDJSON)


class Shop:
    """An app with streamchat in it. `records` holds what was told of its answers, in their order."""

    def __init__(self, app: Flask) -> None:
        self.app = app
        self.records: list[Record] = []
        self._changed = threading.Condition()
        answer_finished.connect(self._keep, app)

    def _keep(self, app: Flask, record: Record) -> None:
        with self._changed:
            self.records.append(record)
            self._changed.notify_all()

    @property
    def mounts(self) -> list[Mount]:
        return list(self.app.extensions.get("streamchat", {}).values())

    def ask(self, message: Any = "hi", accept: str | None = None, url: str = URL, **options: Any) -> TestResponse:
        """The response, read to its end."""
        headers = {"Accept": accept} if accept else {}
        options.setdefault("json", {"message": message})
        headers |= options.pop("headers", {})
        return self.app.test_client().post(url, headers=headers, buffered=True, **options)

    def wait_records(self, count: int = 1, timeout: float = 5) -> list[Record]:
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.records) >= count, timeout):
                raise AssertionError(f"{len(self.records)} of {count} records after {timeout} s")
        return self.records

    def the_record(self) -> Record:
        """The one record; and nothing of its answer may be held any more."""
        (record,) = self.wait_records()
        self.expect_nothing_held()
        return record

    def expect_nothing_held(self) -> None:
        lives = [mount.process.live for mount in self.mounts]
        wait_until(lambda: not any(len(live) or live.hangups._watched for live in lives), "a slot or a watch is held")

    def close(self) -> None:
        answer_finished.disconnect(self._keep, self.app)
        for mount in self.mounts:
            mount.close()


@contextlib.contextmanager
def open_shop(build: Callable[[Flask], object] | None = None, **options: Any) -> Iterator[Shop]:
    """A shop with one mount under /api, that anybody may ask; `build` mounts something else instead."""
    app = Flask("shop")
    if build is not None:
        build(app)
    else:
        http = os.environ.get("STREAMCHAT_HTTP", "auto")  # set by the fixture of this name
        given: dict[str, Any] = {"status_hold": 0.3, "max_retries": 0, "http": http} | options
        given.setdefault("public", "authorize" not in options and "tokens" not in options)
        StreamChat(app, **given)
    shop = Shop(app)
    try:
        yield shop
    finally:
        shop.close()


def wait_until(condition: Callable[[], object], complaint: str, timeout: float = 5) -> None:
    """Asks until it is true. For what tells nobody when it changes."""
    due = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > due:
            raise AssertionError(f"{complaint} after {timeout} s")
        time.sleep(0.005)


def sse_events(body: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in body.decode("ascii").split("\n") if line.startswith("data: ")]


def ndjson_events(body: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in body.decode("ascii").splitlines()]


def events_of(accept: str, body: bytes) -> list[dict[str, Any]]:
    """The events of a stream, without its heartbeats."""
    events = sse_events(body) if accept == SSE else ndjson_events(body)
    return [event for event in events if event["type"] != "heartbeat"]


class _Quiet(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serve(app: Any) -> Iterator[int]:
    """Werkzeug's threaded server around a WSGI app; its port."""
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=_Quiet)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="shop")
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join(5)
        server.server_close()


def post_bytes(body: bytes = b'{"message": "hi"}', accept: str = TEXT, extra: str = "", url: str = URL) -> bytes:
    """A request as it goes over the wire."""
    head = f"POST {url} HTTP/1.1\r\nHost: shop\r\nContent-Type: application/json\r\nAccept: {accept}\r\n{extra}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def call(port: int, request: bytes) -> socket.socket:
    """A connection on which a request has been sent."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=10)
    sock.sendall(request)
    return sock


def read_until(sock: socket.socket, end: bytes) -> bytes:
    """What comes until these bytes have come. Fails where the connection ends before."""
    data = b""
    while end not in data:
        piece = sock.recv(65536)
        if not piece:
            raise AssertionError(f"the connection ended before {end!r}: {data!r}")
        data += piece
    return data


def read_all(sock: socket.socket) -> bytes:
    """What comes until the connection ends, by FIN or by a reset."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            data += piece
    return data
