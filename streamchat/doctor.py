"""Examines a deployed chain from its caller's side: asks POST <prefix>/diagnostics/stream, and times what comes.

Judges nothing: findings.py does.
"""

from __future__ import annotations

import json
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import httpx2

from .measurements import Departure, Flood, Measured, Stream

FORMATS = ("text/event-stream", "text/plain", "application/x-ndjson")
SSE, TEXT, NDJSON = FORMATS
PIECES, INTERVAL = 20, 0.1
AT_A_TIME = 6  # the endpoint allows a few more
PATIENCE = 5.0  # seconds in which the server should have noticed that a caller left
TRIPS = 3
FIRST_PIECE = 2.0  # seconds after which the doctor hangs up also on a stream that shows nothing
ASK_AGAIN = 0.1
UNREAD, UNREAD_MOST = 1.0, 8.0  # seconds in which a flood does not go on, or is not read at all
LISTEN = 0.3  # seconds of a stream that the doctor then hangs up on
ANY_ENCODING = "gzip, deflate, br, zstd"  # what browsers take
READABLE = "gzip, deflate"  # what this client can undo piece by piece


class CouldNotTest(Exception):
    """There is no verdict; the text says what to do."""


ONE_AT_A_TIME = "Its workers are gunicorn's sync ones, with one answer at a time: start it with conf/gunicorn.conf.py."
PROBLEM = "application/problem+json"  # what the app refuses with
REASONS = {
    400: "The probe was refused: --gap must not be longer than STREAMCHAT_TOTAL_TIMEOUT there.",
    401: "The token was refused: SECRET_KEY must be the same here and there, and the clocks within five minutes.",
    403: "The address is closed to this machine: conf/nginx.conf opens it to the machine of nginx alone.",
    404: "There is nothing: is it the blueprint's address with its prefix, and is STREAMCHAT_DIAGNOSTICS on there?",
    429: "Too many requests or probes at a time: try again.",
    503: "The server is full or stopping: try again.",
}


class Doctor:
    """One examination. `url` is the blueprint's address with its prefix."""

    def __init__(self, url: str, token: str, timeout: float, interval: float = INTERVAL) -> None:
        self._url = url
        self._address = url.rstrip("/") + "/diagnostics/stream"
        self._timeout = timeout
        self._interval = interval
        self._headers = {"Authorization": f"Bearer {token}", "User-Agent": "streamchat-doctor"}

    def examine(self, gap: float | None = None) -> Measured:
        """Raises CouldNotTest. `gap` is how long the silence lasts; by itself the heartbeat and 5 s."""
        try:
            with httpx2.Client(headers=self._headers) as self._client:
                report, round_trip = self._report()
                if report.get("worker") == "sync":
                    raise CouldNotTest(ONE_AT_A_TIME)
                return self._measured(report, round_trip, gap or report["settings"]["heartbeat"] + 5.0)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise CouldNotTest(f"{type(error).__name__}: {error}") from None

    def _measured(self, report: dict[str, Any], round_trip: float, gap: float) -> Measured:
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            silence = pool.submit(self._stream, SSE, {"probe": "silence", "seconds": gap}, gap, strict=False)
            departure = pool.submit(self._departure)
            paced: dict[str, Future[Stream]] = {kind: pool.submit(self._paced, kind) for kind in FORMATS}
            wait(paced.values())  # a flood keeps the server busy
            flood, unasked = (pool.submit(self._flood, accel) for accel in (True, False))
            cut, lapse = (pool.submit(self._stream, TEXT, {"probe": name}) for name in ("cut", "lapse"))
            encodings = {kind: pool.submit(self._encoding, kind) for kind in FORMATS}
            return Measured(
                url=self._url,
                report=report,
                round_trip=round_trip,
                interval=self._interval,
                pieces=PIECES,
                gap=gap,
                patience=PATIENCE,
                paced={kind: stream.result() for kind, stream in paced.items()},
                flood=flood.result(),
                flood_unasked=unasked.result(),
                encodings={kind: encoding.result() for kind, encoding in encodings.items()},
                silence=silence.result(),
                cut=cut.result(),
                lapse=lapse.result(),
                departure=departure.result(),
                http2=_offers_http2(self._url, self._timeout),
            )

    def _report(self) -> tuple[dict[str, Any], float]:
        """What the worker says of itself, and what a small request takes: the fastest of a few."""
        report = self._ask({"probe": "report"})
        if not isinstance(report.get("settings"), dict):
            raise CouldNotTest(REASONS[404])
        trips = []
        for _ in range(TRIPS):
            clock = Clock()
            self._ask({"probe": "departed", "id": secrets.token_hex(16)}, clock)
            trips.append(time.monotonic() - clock.sent)
        return report, min(trips)

    def _ask(self, probe: dict[str, Any], clock: Clock | None = None, **headers: str) -> dict[str, Any]:
        extensions = {"trace": clock or Clock()}
        response = self._client.post(
            self._address, json=probe, timeout=self._timeout, headers=headers, extensions=extensions
        )
        _check(response.status_code, response.headers)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise CouldNotTest(REASONS[404])
        return answer

    @contextmanager
    def _opened(
        self, accept: str, probe: dict[str, Any], longest: float, encodings: str = READABLE
    ) -> Iterator[tuple[httpx2.Response, Clock]]:
        clock = Clock()
        headers = {"Accept": accept, "Accept-Encoding": encodings}
        timeout = httpx2.Timeout(self._timeout, read=longest)
        extensions = {"trace": clock}
        with self._client.stream(
            "POST", self._address, json=probe, headers=headers, timeout=timeout, extensions=extensions
        ) as response:
            yield response, clock

    def _stream(self, accept: str, probe: dict[str, Any], longer: float = 0.0, strict: bool = True) -> Stream:
        """Reads one to its end. Raises CouldNotTest if it is refused; a hop's own status only if `strict`."""
        chunks: list[tuple[float, bytes]] = []
        status, http, fields, fault = 0, "", {}, ""
        clock = Clock()
        try:
            with self._opened(accept, probe, self._timeout + longer) as (response, clock):
                status, http = response.status_code, response.http_version
                fields = {name.lower(): value for name, value in response.headers.items()}
                if strict or fields.get("content-type") == PROBLEM:
                    _check(status, response.headers)
                sent = clock.sent
                chunks.extend((time.monotonic() - sent, chunk) for chunk in response.iter_bytes())
        except httpx2.HTTPError as error:
            fault = type(error).__name__
        ended = time.monotonic() - clock.sent
        made, came = _pieces(READ_LINE[accept], chunks)
        return Stream(status, http, fields, made, came, ended, not fault, fault)

    def _paced(self, accept: str) -> Stream:
        probe = {"probe": "pieces", "pieces": PIECES, "interval": self._interval}
        return self._stream(accept, probe, PIECES * self._interval)

    def _encoding(self, accept: str) -> str:
        """Only the headers count: what br and zstd hold needs no undoing."""
        with self._opened(accept, {"probe": "pieces", "pieces": 1}, self._timeout, ANY_ENCODING) as (response, _):
            _check(response.status_code, response.headers)
            return str(response.headers.get("Content-Encoding", ""))

    def _departure(self) -> Departure:
        id = secrets.token_hex(16)
        probe = {"probe": "departure", "id": id, "seconds": PATIENCE + FIRST_PIECE + LISTEN + 1}
        clock = Clock()
        try:
            with self._opened(SSE, probe, FIRST_PIECE) as (response, clock):
                _check(response.status_code, response.headers)
                next(response.iter_raw(), b"")
                time.sleep(LISTEN)
        except httpx2.ReadTimeout:
            """A hop shows nothing: leaving now is as good."""
        return self._noticed(id, clock, time.monotonic() - clock.sent)

    def _flood(self, accel: bool) -> Flood:
        """A hop that buffers takes all, or goes on taking; others stop once the kernels on the way are full."""
        id = secrets.token_hex(16)
        probe = {"probe": "flood", "id": id, "accel": accel, "seconds": UNREAD_MOST}
        with self._opened(TEXT, probe, self._timeout, "identity") as (response, _):
            _check(response.status_code, response.headers)
            return self._taken(id)

    def _taken(self, id: str) -> Flood:
        part, since, begun = 0.0, time.monotonic(), time.monotonic()
        while True:
            told = self._ask({"probe": "departed", "id": id}, None, Connection="close")
            now = time.monotonic()
            if float(told.get("part") or 0) > part:
                part, since = float(told.get("part") or 0), now
            if part == 1 or now - begun > UNREAD_MOST:
                return Flood(part, False)
            if now - since > UNREAD:
                return Flood(part, True if told.get("state") == "running" else None)
            time.sleep(ASK_AGAIN)

    def _noticed(self, id: str, clock: Clock, left: float) -> Departure:
        until = time.monotonic() + PATIENCE
        while True:
            # A new connection each time: among several machines one of them leads to the one that knows.
            told = self._ask({"probe": "departed", "id": id}, None, Connection="close")
            state, after = str(told.get("state")), told.get("after")
            if state == "left" and isinstance(after, float):
                return Departure(state, max(0.0, after - left))
            if state == "stayed" or time.monotonic() > until:
                return Departure(state)
            time.sleep(ASK_AGAIN)


class Clock:
    """When a request left; httpx2 calls it at each step of an exchange."""

    def __init__(self) -> None:
        self.sent = time.monotonic()

    def __call__(self, step: str, _: object) -> None:
        if step.endswith("send_request_headers.started"):
            self.sent = time.monotonic()


def _check(status: int, headers: Any) -> None:
    if 300 <= status < 400:
        raise CouldNotTest(f"The address leads on to {headers.get('Location')}: give that one.")
    if status != 200:
        raise CouldNotTest(f"{REASONS.get(status, 'That is no answer of this endpoint.')} (status {status})")


def _in_text(line: str) -> Any:
    return json.loads(line)


def _in_event(line: str) -> Any:
    event = json.loads(line)
    return json.loads(event["text"]) if event.get("type") == "text" else {}


# What a line of each format says of the piece that it brings.
READ_LINE: dict[str, Callable[[str], Any]] = {
    SSE: lambda line: _in_event(line[6:]) if line.startswith("data: ") else {},
    TEXT: _in_text,
    NDJSON: _in_event,
}


def _pieces(
    read: Callable[[str], Any], chunks: list[tuple[float, bytes]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """When each piece was made, and when it had come. A line that is none of ours ends the reading."""
    made, came, rest = [], [], b""
    for at, chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in filter(None, lines):
            try:
                piece = read(line.decode())
                if "at" in piece:
                    made.append(float(piece["at"]))
                    came.append(at)
            except (ValueError, TypeError, KeyError, AttributeError):
                return tuple(made), tuple(came)
    return tuple(made), tuple(came)


def _offers_http2(url: str, timeout: float) -> bool | None:
    """Whether browsers would get HTTP/2; None where it is not asked, or cannot be told."""
    parts = httpx2.URL(url)
    if parts.scheme != "https":
        return None
    context = ssl.create_default_context()
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        with socket.create_connection((parts.host, parts.port or 443), timeout) as plain:
            with context.wrap_socket(plain, server_hostname=parts.host) as tls:
                return tls.selected_alpn_protocol() == "h2"
    except OSError:
        return None
