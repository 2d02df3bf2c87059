"""Measurements become verdicts, a line each: fine, advice, or something that breaks streaming. Knows no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .measurements import Measured, Stream, quantile
from .remedies import seen_proxies

OK, ADVICE, BROKEN = "ok", "advice", "broken"

LUMPED_PART = 0.25  # of the pieces: more than that is no noise of the machine
HELD_PART = 0.5  # of an interval: half of the pieces are later than the promptest by that, which the end has flushed
SLOW_SECONDS = 0.15  # all of them: a slow opening, or a hop that waits for more
FLOOD_MB = 24
FILES_A_STREAM, OTHER_FILES = 2, 256  # as in conf/gunicorn.conf.py


@dataclass(frozen=True)
class Verdict:
    """`finding` is a key of the remedies, where there is something to change."""

    check: str
    level: str
    words: str
    finding: str = ""


def judge(seen: Measured) -> list[Verdict]:
    """In the order in which they are shown."""
    return [verdict for check in CHECKS for verdict in check(seen)]


def exit_status(verdicts: list[Verdict]) -> int:
    return int(any(verdict.level == BROKEN for verdict in verdicts))


def _delivery(seen: Measured) -> Iterator[Verdict]:
    for kind, stream in seen.paced.items():
        yield _delivered(f"pieces, {kind}", stream, seen)


def _delivered(check: str, stream: Stream, seen: Measured) -> Verdict:
    if not stream.whole or len(stream.came) < seen.pieces:
        fault = f" ({stream.fault})" if stream.fault else ""
        words = f"{len(stream.came)} of {seen.pieces} came, then the answer ended{fault} after {stream.ended:.1f} s"
        return Verdict(check, BROKEN, words, "silence" if stream.fault else "swallowed")
    level, words = _timing(stream, seen)
    words += _buffering(stream) if level == BROKEN else ""
    return Verdict(check, level, words, "" if level == OK else "buffered")


def _buffering(stream: Stream) -> str:
    if "x-accel-buffering" not in stream.headers:
        return "; X-Accel-Buffering was lost on the way: an nginx behind another keeps it from that one"
    return "; X-Accel-Buffering: no came through: a hop ignores it, or knows it not"


def _timing(stream: Stream, seen: Measured) -> tuple[str, str]:
    delays, lumped = stream.delays(seen.round_trip), stream.lumped(seen.interval)
    middle = quantile(delays, 0.5)
    numbers = f"p50 {_ms(middle)}, p99 {_ms(quantile(delays, 0.99))}, {lumped} of {len(stream.came)} lumped"
    if lumped > LUMPED_PART * len(stream.came):
        return BROKEN, f"held back and delivered together: {numbers}"
    if middle - min(delays) > HELD_PART * seen.interval:
        return BROKEN, f"each held back: {numbers}"
    return (ADVICE, f"late: {numbers}") if middle > SLOW_SECONDS else (OK, f"as they were made: {numbers}")


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds >= 0.001 else "under 1 ms"


def _backpressure(seen: Measured) -> Iterator[Verdict]:
    check, flood = "a caller that stops reading", seen.flood
    if flood.stopped is None:
        words = "not known: the machine that served the stream could not be asked"
        yield Verdict(check, ADVICE, words)
    elif not flood.stopped:
        words = "a hop buffers: it takes the answer all the same, the app sees nothing, and the model goes on"
        yield Verdict(check, BROKEN, words + _buffering(_first(seen)), "buffered")
    elif seen.flood_unasked.stopped is False:
        words = "a hop buffers, though not these answers, for X-Accel-Buffering: no alone"
        yield Verdict(check, ADVICE, words, "buffered")
    else:
        taken = f"{FLOOD_MB * flood.part:.0f} MB" if flood.part else "less than 1 MB"
        yield Verdict(check, OK, f"is seen by the app: the way takes {taken}, and no more")


def _compression(seen: Measured) -> Iterator[Verdict]:
    found = {kind: encoding for kind, encoding in seen.encodings.items() if encoding not in ("", "identity")}
    found |= {kind: s.headers["content-encoding"] for kind, s in seen.paced.items() if "content-encoding" in s.headers}
    if not found:
        yield Verdict("compression", OK, "none, also for callers that take it")
    else:
        words = ", ".join(f"{kind} by {encoding}" for kind, encoding in found.items())
        words = f"{words}, against Cache-Control: no-transform: each piece waits for a compressor to flush it"
        yield Verdict("compression", BROKEN, words, "compressed")


def _versions_of_http(seen: Measured) -> Iterator[Verdict]:
    near, behind = _first(seen).http, seen.report["request"]["protocol"]
    words = f"{near} to the caller, {behind} to the app"
    if near < "HTTP/1.1" or behind == "HTTP/1.0":
        words += ": an answer ends where its connection ends, and only a reset shows a cut"
        yield Verdict("HTTP version", ADVICE, words, "http10")
    elif seen.http2 is False:
        yield Verdict("HTTP version", ADVICE, f"{words}; HTTP/2 is not offered to browsers", "http2")
    else:
        yield Verdict("HTTP version", OK, words)


def _first(seen: Measured) -> Stream:
    return next(iter(seen.paced.values()))


# The header, and what must stand in it.
SENT = {
    "cache-control": "no-transform",
    "x-content-type-options": "nosniff",
    "x-response-id": "",
    "x-accel-buffering": "no",
}


def _headers(seen: Measured) -> Iterator[Verdict]:
    wrong = [f"{kind} became {s.headers.get('content-type')}" for kind, s in seen.paced.items() if not _typed(kind, s)]
    if wrong:
        yield Verdict("headers", BROKEN, f"Content-Type: {', '.join(wrong)}", "headers")
    headers = _first(seen).headers
    lost = [name for name, part in SENT.items() if name not in headers or part not in headers[name]]
    if "content-length" in headers:
        yield Verdict("headers", BROKEN, "a hop gave the stream a Content-Length: it collects all of it", "buffered")
    if lost:
        yield Verdict("headers", ADVICE, f"lost on the way: {', '.join(lost)}", "headers")
    elif not wrong:
        yield Verdict("headers", OK, "all came through")


def _typed(kind: str, stream: Stream) -> bool:
    return stream.headers.get("content-type", "").startswith(kind)


def _cuts(seen: Measured) -> Iterator[Verdict]:
    yield _cut("cut by the app", seen.cut, "swallowed", seen)
    yield _cut("cut by a dying hop", seen.lapse, "http10", seen)


def _cut(check: str, stream: Stream, finding: str, seen: Measured) -> Verdict:
    if not stream.whole:
        return Verdict(check, OK, f"visible: {stream.fault} after {len(stream.came)} pieces")
    words = "swallowed: the caller takes it for a whole answer"
    old = seen.report["request"]["protocol"] == "HTTP/1.0"
    return Verdict(check, BROKEN, words + (", since a hop speaks HTTP/1.0 to the app" if old else ""), finding)


def _silence(seen: Measured) -> Iterator[Verdict]:
    stream = seen.silence
    if stream.status == 200 and stream.whole and len(stream.came) == 2:
        words = f"{seen.gap:g} s pass"
        longest = seen.report["settings"]["first_token_timeout"]
        if seen.gap < longest:
            words += f" (text/plain has no heartbeat: --gap {longest:g} tries the longest that a model may take)"
        yield Verdict("silence", OK, words)
    else:
        after = stream.ended - (stream.came[0] if stream.came else 0.0)
        how = f"status {stream.status}" if stream.status not in (0, 200) else stream.fault or "a clean end"
        yield Verdict("silence", BROKEN, f"cut after {after:.1f} s of {seen.gap:g} s ({how})", "silence")


def _departure(seen: Measured) -> Iterator[Verdict]:
    left = seen.departure
    if left.state == "left" and left.after is not None:
        level = OK if left.after <= 1.0 else ADVICE
        yield Verdict("hang-up", level, f"noticed in {_ms(left.after)}", "" if level == OK else "hangup")
    elif left.state == "unknown":
        words = "not known: the machine that served the stream could not be asked"
        yield Verdict("hang-up", ADVICE, words, "hangup")
    else:
        words = f"not noticed within {seen.patience:g} s: the model goes on, and is paid for"
        yield Verdict("hang-up", BROKEN, words, "hangup")


# Others that are not in here serve answers, but were never measured.
WORKERS = {
    "gevent": (OK, "gevent: a greenlet an answer"),
    "gthread": (ADVICE, "gthread: a thread an answer, as many as --threads"),
    "flask run": (ADVICE, "flask run: the development server"),
    "sync": (BROKEN, "sync: one answer at a time, and the worker is killed after `timeout`"),
}


def _worker(seen: Measured) -> Iterator[Verdict]:
    name = str(seen.report["worker"])
    level, words = WORKERS.get(name, (ADVICE, f"{name}: not tested with streamchat"))
    yield Verdict("worker", level, words, "" if level == OK else "worker")
    if name != "gevent":
        return
    late = seen.report["late_modules"]
    if late:
        words = f"imported before gevent's patch, so their sockets and TLS block or fail: {', '.join(late)}"
        yield Verdict("monkey-patching", BROKEN, words, "patched_late")
    else:
        yield Verdict("monkey-patching", OK, "before everything that needs it")


def _limits(seen: Measured) -> Iterator[Verdict]:
    limits: dict[str, Any] = seen.report["limits"]
    files, most, connections = (limits[name] for name in ("open_files", "max_streams", "worker_connections"))
    words = f"{most} answers a worker, {connections or 'unknown'} connections, {files or 'unlimited'} open files"
    short = files is not None and files < most * FILES_A_STREAM + OTHER_FILES
    full = connections is not None and most >= connections
    level = ADVICE if short or full else OK
    yield Verdict("limits", level, words, "limits" if level == ADVICE else "")


CHECKS: tuple[Callable[[Measured], Iterator[Verdict]], ...] = (
    _delivery,
    _backpressure,
    _compression,
    _versions_of_http,
    _headers,
    _cuts,
    _silence,
    _departure,
    _worker,
    _limits,
)


def proxies_of(seen: Measured) -> list[str]:
    """Those that made themselves known on the way."""
    return seen_proxies(dict(_first(seen).headers), list(seen.report["request"]["added"]))
