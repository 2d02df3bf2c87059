"""A fake OpenAI-compatible server on a real socket: a script of bytes and pauses -> bytes on the wire.

It runs in one thread of the test's own process and records each request, with the moment its client left.
It imports nothing of streamchat: what judges the product may not share its code.

    with FakeUpstream() as upstream:
        gate = Gate()
        upstream.script = [head(), text("Hel"), gate, text("lo"), finish(), done(), last_chunk()]
        ...                                  # call upstream.base_url, read "Hel"
        gate.open()                          # the second piece is made now
        upstream.requests[0].wait_left(1)    # time.monotonic() at which the server saw its client leave

A script is a step; a step is one of
    bytes               sent as they are, in one send (64 KiB at a time), until the kernel took them
    Pause(seconds)      silence
    a Gate              silence until the test opens it
    Hang()              silence until the client leaves
    Fin(), Rst()        close right here: with FIN (and TLS close_notify), or with a reset
    an iterable         its steps, one after the other; use Repeat(step, times) for big answers
    a function          called at its turn with the RecordedRequest; what it returns is the step
A script that ends without Fin or Rst leaves the connection open for the next request.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import signal
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self, TypeAlias, cast
from weakref import WeakSet

MODEL = "fake-model"
COMPLETION_ID = "chatcmpl-fake"
CREATED = 1790000000
SLICE = 65536
# SO_LINGER on, 0 seconds: close() drops what is unsent and sends RST.
LINGER_RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Pause:
    seconds: float


@dataclass(frozen=True)
class Hang:
    pass


@dataclass(frozen=True)
class Fin:
    """Closes with FIN. With close_notify=False a TLS stream ends as if it had been cut."""

    close_notify: bool = True


@dataclass(frozen=True)
class Rst:
    pass


class Gate:
    """A step that waits until the test calls open(). With wait_reached() the test waits for scripts."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._opened = False
        self._reached = 0
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def open(self) -> None:
        with self._changed:
            self._opened = True
            waiting, self._waiting = self._waiting, []
        for loop, event in waiting:
            # The server may have stopped meanwhile.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(event.set)

    def wait_reached(self, count: int = 1, timeout: float = 5) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._reached >= count, timeout):
                raise AssertionError(f"{self._reached} of {count} scripts reached the gate in {timeout} s")

    async def passed(self) -> None:
        event = asyncio.Event()
        with self._changed:
            self._reached += 1
            self._changed.notify_all()
            if self._opened:
                return
            self._waiting.append((asyncio.get_running_loop(), event))
        await event.wait()


@dataclass(frozen=True)
class Repeat:
    """The same step many times, made while it is sent."""

    step: Step
    times: int

    def __iter__(self) -> Iterator[Step]:
        return itertools.repeat(self.step, self.times)


@dataclass(eq=False)
class RecordedRequest:
    """One request as it arrived, and what became of its answer. Times are time.monotonic()."""

    method: str
    path: str
    headers: dict[str, str]  # names in lower case
    raw_body: bytes
    connection: int  # 1 for the first connection of the server
    arrived: float
    changed: threading.Condition = field(repr=False)
    body: Any = None  # the parsed JSON, None if it is not JSON
    left: float | None = None  # the client left while the script was running
    finished: float | None = None  # the script ran to its end
    sent: int = 0  # bytes that the kernel took

    @property
    def message(self) -> str:
        """The text of the last message: what `choose` mostly wants to know."""
        return str(self.body["messages"][-1]["content"])

    def wait_left(self, timeout: float = 5) -> float:
        self._wait(lambda: self.left is not None, timeout, "its client has not left")
        return cast(float, self.left)

    def wait_finished(self, timeout: float = 5) -> float:
        self._wait(lambda: self.finished is not None, timeout, "its script has not ended")
        return cast(float, self.finished)

    def wait_sent(self, count: int, timeout: float = 5) -> None:
        self._wait(lambda: self.sent >= count, timeout, f"fewer than {count} bytes were sent")

    def _wait(self, condition: Callable[[], bool], timeout: float, complaint: str) -> None:
        with self.changed:
            if not self.changed.wait_for(condition, timeout):
                raise AssertionError(f"{complaint} after {timeout} s: {self!r}")


Step: TypeAlias = "bytes | Pause | Gate | Hang | Fin | Rst | Iterable[Step] | Callable[[RecordedRequest], Step]"


# --- bytes of an answer ---------------------------------------------------------------------------------


def head(
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    *,
    content_type: str = "text/event-stream; charset=utf-8",
    chunked: bool = True,
) -> bytes:
    """A response head. `headers` adds to and replaces the usual ones."""
    fields = {"Content-Type": content_type, "x-request-id": "req_fake"}
    if chunked:
        fields["Transfer-Encoding"] = "chunked"
    lines = [f"{name}: {value}\r\n" for name, value in (fields | dict(headers or {})).items()]
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{''.join(lines)}\r\n".encode("latin-1")


def http_chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def last_chunk() -> bytes:
    return b"0\r\n\r\n"


def sse(data: object) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def event(delta: Mapping[str, Any], finish_reason: str | None = None, **extra: Any) -> bytes:
    """One chat.completion.chunk as an SSE event, without HTTP chunk. `extra`: more top-level fields."""
    choice = {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": finish_reason}
    return sse(_completion("chat.completion.chunk", [choice]) | extra)


def usage_event(input_tokens: int, output_tokens: int) -> bytes:
    usage = {
        "prompt_tokens": input_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": input_tokens + output_tokens,
    }
    return sse(_completion("chat.completion.chunk", []) | {"usage": usage})


def _completion(kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": COMPLETION_ID, "object": kind, "created": CREATED, "model": MODEL, "choices": choices}


def chunk(delta: Mapping[str, Any], finish_reason: str | None = None, **extra: Any) -> bytes:
    """`event` in one HTTP chunk."""
    return http_chunk(event(delta, finish_reason, **extra))


def text(piece: str) -> bytes:
    return chunk({"content": piece})


def text_chunks(pieces: Iterable[str]) -> list[bytes]:
    return [text(piece) for piece in pieces]


def finish(reason: str = "stop") -> bytes:
    return chunk({}, reason)


def usage_chunk(input_tokens: int, output_tokens: int) -> bytes:
    return http_chunk(usage_event(input_tokens, output_tokens))


def done() -> bytes:
    return http_chunk(b"data: [DONE]\n\n")


# --- whole scripts --------------------------------------------------------------------------------------


def answer(
    pieces: Iterable[str],
    *,
    usage: tuple[int, int] | None = (19, 10),
    finish_reason: str = "stop",
    pause: float = 0,
    framing: str = "chunked",
) -> list[Step]:
    """A whole good answer, `pause` seconds before each piece.

    `framing`: "chunked", "length" (Content-Length) or "close" (the body ends with the connection).
    """
    texts = [event({"content": piece}) for piece in pieces]
    tail = [event({}, finish_reason), *([usage_event(*usage)] if usage else []), b"data: [DONE]\n\n"]
    events = [event({"role": "assistant", "content": "", "refusal": None}), *texts, *tail]
    opening, wrap, closing = _FRAMINGS[framing](events)
    paused = range(1, 1 + len(texts)) if pause else range(0)
    body: list[Step] = [[Pause(pause), wrap(data)] if n in paused else wrap(data) for n, data in enumerate(events)]
    return [opening, *body, *closing]


_Framing: TypeAlias = "tuple[bytes, Callable[[bytes], bytes], list[Step]]"
_FRAMINGS: dict[str, Callable[[Sequence[bytes]], _Framing]] = {
    "chunked": lambda events: (head(), http_chunk, [last_chunk()]),
    "length": lambda events: (head(headers=_length(b"".join(events)), chunked=False), bytes, []),
    "close": lambda events: (head(headers={"Connection": "close"}, chunked=False), bytes, [Fin()]),
}


def stamped(pieces: int, pause: float) -> list[Step]:
    """A whole answer whose pieces are the server's time.monotonic() at their sending, a blank after each."""

    def stamp(_: RecordedRequest) -> bytes:
        return text(f"{time.monotonic():.6f} ")

    return [
        head(),
        Repeat([Pause(pause), stamp], pieces),
        finish(),
        usage_chunk(19, pieces),
        done(),
        last_chunk(),
    ]


def error(
    status: int,
    code: str | None = None,
    message: str = "The fake upstream says no.",
    *,
    kind: str = "invalid_request_error",
    headers: Mapping[str, str] | None = None,
) -> list[Step]:
    """An error as OpenAI sends it. `headers` is the place of Retry-After."""
    problem = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    body = json.dumps(problem).encode()
    fields = _length(body) | dict(headers or {})
    return [head(status, fields, content_type="application/json", chunked=False) + body]


def key_echoing_401(request: RecordedRequest) -> list[Step]:
    """A 401 that repeats the caller's key, as such servers do: a canary that must not get further."""
    key = request.headers.get("authorization", "").removeprefix("Bearer ")
    return error(401, "invalid_api_key", f"Incorrect API key provided: {key}.")


def _length(body: bytes) -> dict[str, str]:
    return {"Content-Length": str(len(body))}


# --- the server -----------------------------------------------------------------------------------------


class FakeUpstream:
    """Serves scripts on 127.0.0.1 while its `with` block runs, and raises there what a script raised.

    For each request: the next of `scripts`, else what `choose(request)` returns, else `script`.
    tls: an ssl.SSLContext for servers (see tls_pair).
    idle_close: seconds after which a connection without a request is closed.
    send_buffer: SO_SNDBUF of its connections, to make writes block early.
    """

    def __init__(
        self,
        tls: ssl.SSLContext | None = None,
        *,
        port: int = 0,
        idle_close: float | None = None,
        send_buffer: int | None = None,
    ) -> None:
        self.tls = tls
        self._made: WeakSet[Any] = WeakSet()
        self.idle_close = idle_close
        self.send_buffer = send_buffer
        self.script: Step = answer(["Hello", ", ", "world", "!"])
        self.scripts: deque[Step] = deque()
        self.choose: Callable[[RecordedRequest], Step] | None = None
        self.requests: list[RecordedRequest] = []
        self.connections = 0
        self.faults: list[BaseException] = []
        self.changed = threading.Condition()
        self._live: set[_Connection] = set()
        self._wanted_port = port
        self._stopping = asyncio.Event()

    @property
    def base_url(self) -> str:
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.port}/v1"

    @property
    def open_connections(self) -> int:
        return len(self._live)

    def __enter__(self) -> Self:
        # 4096 is Linux's own limit of the queue: thousands may connect at once.
        self._listener = socket.create_server(("127.0.0.1", self._wanted_port), backlog=4096)
        self.port: int = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._loop_fault)
        self._thread = threading.Thread(target=self._run, name="fake-upstream", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10)
        if self._thread.is_alive():
            raise AssertionError("the fake upstream does not stop")
        self._close_what_asyncio_forgot()
        if self.faults and kind is None:
            raise self.faults[0]

    def _record_transports(self) -> None:
        """asyncio tells nobody of a transport whose client broke off at once: each one is noted where it is made."""
        make = self._loop._make_socket_transport  # type: ignore[attr-defined]

        def noted(*arguments: Any, **named: Any) -> Any:
            transport = make(*arguments, **named)
            self._made.add(transport)
            return transport

        self._loop._make_socket_transport = noted  # type: ignore[attr-defined]

    def _close_what_asyncio_forgot(self) -> None:
        for transport in list(self._made):
            if transport._sock is not None:
                transport._sock.close()
                transport._sock = None  # its __del__ asks for it

    def wait_for(self, condition: Callable[[], bool], timeout: float = 5) -> None:
        """Waits until the condition, a question about this server or its requests, is true."""
        with self.changed:
            if not self.changed.wait_for(condition, timeout):
                raise AssertionError(
                    f"not true after {timeout} s; {len(self.requests)} requests: {self.requests!r:.2000}"
                )

    def wait_for_requests(self, count: int, timeout: float = 5) -> list[RecordedRequest]:
        self.wait_for(lambda: len(self.requests) >= count, timeout)
        return self.requests[:count]

    def close_idle(self, *, reset: bool = False) -> None:
        """Closes the kept-alive connections that have no request now (see RecordedRequest.wait_finished)."""

        def close_all() -> None:
            for connection in list(self._live):
                connection.close_idle(reset)

        self._loop.call_soon_threadsafe(close_all)

    def script_of(self, request: RecordedRequest) -> Step:
        if self.scripts:
            return self.scripts.popleft()
        if self.choose:
            return self.choose(request)
        if isinstance(self.script, Iterator):
            raise TypeError("`script` is used for many requests: an iterator would be empty at the second")
        return self.script

    def opened(self, connection: _Connection) -> int:
        with self.changed:
            self._live.add(connection)
            self.connections += 1
            self.changed.notify_all()
        return self.connections

    def closed(self, connection: _Connection) -> None:
        with self.changed:
            self._live.discard(connection)
            self.changed.notify_all()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._record_transports()
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        server = await self._loop.create_server(lambda: _Connection(self), sock=self._listener, backlog=4096)
        await self._stopping.wait()
        # First: what is accepted while its server closes is forgotten with its socket open.
        self._loop.remove_reader(self._listener)
        me = asyncio.current_task()
        while self._live or asyncio.all_tasks() - {me}:  # a connection that was being accepted comes yet
            for connection in list(self._live):
                connection.stop()
            await asyncio.sleep(0)
        server.close()
        # A handshake that broke off may leave its transport with nobody. asyncio keeps all of them, privately.
        for transport in list(getattr(self._loop, "_transports", {}).values()):
            transport.abort()
        for _ in range(3):  # they close their sockets in a turn after abort()
            await asyncio.sleep(0)

    def _loop_fault(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.faults.append(context.get("exception") or RuntimeError(context["message"]))


class _Connection(asyncio.Protocol):
    """One accepted connection. Its reading is never paused: so a leaving client is seen in every state."""

    def __init__(self, upstream: FakeUpstream) -> None:
        self._upstream = upstream
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._writable = asyncio.Event()
        self._writable.set()
        self._request: RecordedRequest | None = None
        self._task: asyncio.Task[None] | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._secured = upstream.tls is None
        self._ended = False

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = self._transport = cast(asyncio.Transport, transport)
        self._socket: socket.socket = transport.get_extra_info("socket")
        # asyncio sets it by itself only where the listener's protocol number is not 0.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._upstream.send_buffer:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._upstream.send_buffer)
        self._number = self._upstream.opened(self)
        if self._upstream.tls:
            self._raw.pause_reading()
            self._task = self._loop.create_task(self._secure(self._upstream.tls))
        else:
            self._begin()

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._next_request()

    def eof_received(self) -> None:
        self._client_left()

    def connection_lost(self, _: Exception | None) -> None:
        self._client_left()
        self._upstream.closed(self)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # What the server calls.

    def close_idle(self, reset: bool) -> None:
        if self._request is None and self._secured:
            self._reset() if reset else self._fin()

    def stop(self) -> None:
        if self._task:
            self._task.cancel()
        self._request = None
        self._transport.abort()
        self._raw.abort()

    async def _secure(self, tls: ssl.SSLContext) -> None:
        """The handshake. One that fails is the client's matter: it only ends the connection."""
        try:
            secured = await self._loop.start_tls(self._raw, self, tls, server_side=True, ssl_shutdown_timeout=5)
        except (OSError, asyncio.CancelledError):
            secured = None
        if secured is None:
            self._raw.abort()
            self._upstream.closed(self)
            return
        self._transport, self._secured = secured, True
        self._begin()
        self._next_request()

    def _begin(self) -> None:
        # A write is done when nothing of it is left in this process. Not high=0: TLS would never resume then.
        self._transport.set_write_buffer_limits(high=1, low=0)
        self._wait_idle()

    def _next_request(self) -> None:
        if self._request or self._ended or not self._secured:
            return
        try:
            request = self._take_request()
        except ValueError as fault:
            self._fail(fault)
            return
        if request:
            self._start(request)

    def _take_request(self) -> RecordedRequest | None:
        """Takes a request off the received bytes once it is there to its last byte."""
        lines, blank, rest = bytes(self._received).partition(b"\r\n\r\n")
        if not blank:
            return None
        request_line, *fields = lines.decode("latin-1").split("\r\n")
        method, path, _ = request_line.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in fields)}
        if "transfer-encoding" in headers:
            raise ValueError("the fake upstream reads no chunked request")
        length = int(headers.get("content-length", "0"))
        if len(rest) < length:
            return None
        body = rest[:length]
        self._received = bytearray(rest[length:])
        changed = self._upstream.changed
        now = time.monotonic()
        return RecordedRequest(method, path, headers, body, self._number, now, changed, _json_or_none(body))

    def _start(self, request: RecordedRequest) -> None:
        if self._idle_timer:
            self._idle_timer.cancel()
        self._request = request
        with self._upstream.changed:
            self._upstream.requests.append(request)
            self._upstream.changed.notify_all()
        self._task = self._loop.create_task(self._answer(request))

    async def _answer(self, request: RecordedRequest) -> None:
        try:
            await self._play(self._upstream.script_of(request), request)
        except Exception as fault:  # whatever a script raises is raised again in the test
            self._fail(fault)
            return
        self._request = None
        with request.changed:
            request.finished = time.monotonic()
            request.changed.notify_all()
        if self._ended:
            return
        if request.headers.get("connection", "").lower() == "close":
            self._fin()
        else:
            self._wait_idle()
            self._next_request()

    async def _play(self, step: Step, request: RecordedRequest) -> None:
        match step:
            case bytes():
                await self._send(step, request)
            case Pause(seconds):
                await asyncio.sleep(seconds)
            case Gate():
                await step.passed()
            case Hang():
                await self._loop.create_future()
            case Fin(close_notify):
                self._fin(close_notify)
            case Rst():
                self._reset()
            case Iterable():
                await self._play_all(step, request)
            case _:
                await self._play(step(request), request)

    async def _play_all(self, steps: Iterable[Step], request: RecordedRequest) -> None:
        for step in steps:
            # A client that reads fast may not keep the loop from seeing another one leave. Before the step,
            # not after it: who has read the last byte finds the request finished, and a stamp is fresh.
            await asyncio.sleep(0)
            await self._play(step, request)
            if self._ended:
                return

    async def _send(self, data: bytes, request: RecordedRequest) -> None:
        for start in range(0, len(data), SLICE):
            if start:
                await asyncio.sleep(0)
            part = data[start : start + SLICE]
            self._transport.write(part)
            if self._raw.is_closing():
                # The write met the client's reset before the reader did.
                self._client_left()
                raise asyncio.CancelledError
            await self._writable.wait()
            with request.changed:
                request.sent += len(part)
                request.changed.notify_all()

    def _client_left(self) -> None:
        request, self._request, self._ended = self._request, None, True
        if request:
            with request.changed:
                request.left = time.monotonic()
                request.changed.notify_all()
            if self._task:
                self._task.cancel()
        if self._idle_timer:
            self._idle_timer.cancel()
        self._transport.abort()
        self._raw.abort()

    def _wait_idle(self) -> None:
        if self._upstream.idle_close is not None:
            self._idle_timer = self._loop.call_later(self._upstream.idle_close, self._fin)

    def _fin(self, close_notify: bool = True) -> None:
        self._ended = True
        if self._transport is self._raw:
            self._transport.close()
            return
        if close_notify:
            self._transport.close()
        # asyncio sends FIN only after the client's own close_notify, and can send none without ours.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def _reset(self) -> None:
        self._ended = True
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        self._transport.abort()
        self._raw.abort()

    def _fail(self, fault: Exception) -> None:
        self._upstream.faults.append(fault)
        self._request = None
        self._reset()


def _json_or_none(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


# --- TLS and the command line ---------------------------------------------------------------------------


def tls_pair(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """A server context for 127.0.0.1 and localhost, and the file of the authority for its clients."""
    # Imported here: the command line works without it.
    import trustme

    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    pem = folder / "authority.pem"
    authority.cert_pem.write_to_path(str(pem))
    return context, pem


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fake_upstream", description="A fake model to try with curl.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--pieces", type=int, default=20)
    parser.add_argument("--pause", type=float, default=0.05, help="seconds before each piece")
    parser.add_argument("--tls-cert", help="PEM file of certificate chain and, without --tls-key, of the key")
    parser.add_argument("--tls-key")
    chosen = parser.parse_args(arguments)
    tls = None
    if chosen.tls_cert:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(chosen.tls_cert, chosen.tls_key)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), FakeUpstream(tls, port=chosen.port) as upstream:
        upstream.script = answer([f"piece {n} " for n in range(chosen.pieces)], pause=chosen.pause)
        print(upstream.base_url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
