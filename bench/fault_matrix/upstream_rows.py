"""What the model's side does wrong. Statuses and codes are DESIGN.md's section 4; so is who is asked again."""

from __future__ import annotations

from tests.fake_upstream import (
    Fin,
    Hang,
    Pause,
    Repeat,
    Rst,
    Step,
    answer,
    done,
    error,
    finish,
    head,
    http_chunk,
    sse,
    text,
)
from tests.fake_upstream import key_echoing_401 as unauthorized
from tests.fake_upstream import last_chunk as end

from .cells import amid, before, changed, finished, opened
from .model import FIRST, PIECES, Script
from .rows import Row

CUT = [head(), text(FIRST), text("lo, ")]  # what comes before a fault in the middle
FIRST_TOKEN, IDLE, TOTAL = 4.0, 1.0, 3.0  # seconds; chain.LIMITS and the plan "tight"
BACKOFF = 1.5  # seconds before the second and the third attempt: at most 0.5 and 1


def after(*steps: Step) -> tuple[Script, ...]:
    return (lambda mark: [*CUT, mark, *steps],)


def first(*steps: Step) -> tuple[Script, ...]:
    return (lambda mark: [mark, *steps],)


def _said(kind: str) -> Step:
    return http_chunk(sse({"error": {"message": "The fake upstream says no.", "type": kind, "code": None}}))


LINE = http_chunk(b"data: " + b"x" * 60_000)
HUGE = Repeat(http_chunk(b"x" * 60_000), 40)
HTML = b"<html><body>The fake upstream says no.</body></html>"


def page(kind: str, coding: str | None = None) -> bytes:
    fields = {"Content-Length": str(len(HTML))} | ({"Content-Encoding": coding} if coding else {})
    return head(200, fields, content_type=kind, chunked=False) + HTML


UNREACHABLE = before(502, "upstream_unreachable", posts=0, within=BACKOFF + 0.5)

ROWS = (
    Row("refused connection", "Nobody listens where the model should be.", UNREACHABLE, plan="refused"),
    Row("no such host", "The model's name does not resolve.", UNREACHABLE, plan="dns"),
    Row("TLS failure", "The model's certificate is of an unknown authority.", UNREACHABLE, plan="tls"),
    Row("401", "The model refuses the key, and quotes it.", before(502, "upstream_auth"), first(unauthorized)),
    Row("400", "The model rejects the request.", before(502, "upstream_rejected"), first(error(400, "bad_thing"))),
    Row(
        "429, soon well",
        "429 with Retry-After: 1, then an answer.",
        finished(posts=2),
        (lambda mark: error(429, "rate_limit_exceeded", headers={"Retry-After": "1"}), lambda mark: answer(PIECES)),
    ),
    Row(
        "429 for long",
        "429 with Retry-After: 30, more than there is time.",
        changed(before(503, "upstream_rate_limited"), notes=frozenset({"Retry-After"})),
        first(error(429, "rate_limit_exceeded", headers={"Retry-After": "30"})),
    ),
    Row("quota", "429 insufficient_quota.", before(503, "upstream_quota"), first(error(429, "insufficient_quota"))),
    Row(
        "500, then well",
        "500 once, before the first piece.",
        finished(posts=2),
        (lambda mark: error(500), lambda mark: answer(PIECES)),
    ),
    Row(
        "500 for ever",
        "500 to every attempt.",
        before(502, "upstream_error", posts=3, within=BACKOFF + 0.5),
        first(error(500)),
    ),
    Row(
        "context too long",
        "400 context_length_exceeded.",
        before(413, "input_too_long"),
        first(error(400, "context_length_exceeded")),
    ),
    Row(
        "content policy",
        "400 content_policy_violation.",
        before(422, "refused"),
        first(error(400, "content_policy_violation")),
    ),
    Row(
        "slow headers",
        f"Silence instead of headers, for longer than the {FIRST_TOKEN:.0f} s of the first piece.",
        opened("upstream_timeout", 504, FIRST_TOKEN),
        first(Hang()),
    ),
    Row(
        "first piece late",
        f"Headers, then silence for longer than {FIRST_TOKEN:.0f} s.",
        opened("upstream_timeout", 504, FIRST_TOKEN),
        (lambda mark: [mark, head(), Hang()],),
    ),
    Row(
        "first piece late, status held",
        "The same with a limit of 1 s, below the 2 s for which the status waits.",
        before(504, "upstream_timeout", within=1.0),
        (lambda mark: [mark, head(), Hang()],),
        plan="tight",
    ),
    Row(
        "answer too long",
        f"Pieces without end; an answer may take {TOTAL:.0f} s in all.",
        amid("upstream_timeout", 504, TOTAL),
        (lambda mark: [mark, head(), text(FIRST), Repeat([Pause(0.1), text("x")], 600)],),
        plan="tight",
        whole=FIRST + "x" * 600,
    ),
    Row(
        "silence between pieces",
        f"Two pieces, then silence for longer than {IDLE:.0f} s.",
        amid("upstream_stalled", 504, IDLE),
        after(Hang()),
    ),
    Row(
        "reset before headers",
        "The connection is reset by the model, each time.",
        before(502, "upstream_incomplete", posts=3, within=BACKOFF + 0.5),
        first(Rst()),
    ),
    Row(
        "FIN before the first piece",
        "Headers, then the end of the connection.",
        before(502, "upstream_incomplete"),
        (lambda mark: [head(), mark, Fin()],),
    ),
    Row(
        "cut in a chunk, before the first piece",
        "Headers and half a chunk.",
        before(502, "upstream_incomplete"),
        (lambda mark: [head(), b'80\r\ndata: {"id":', mark, Fin()],),
    ),
    Row("FIN after pieces", "Two pieces, then FIN.", amid("upstream_incomplete", 502), after(Fin())),
    Row("reset after pieces", "Two pieces, then RST.", amid("upstream_incomplete", 502), after(Rst())),
    Row(
        "cut in a chunk",
        "Two pieces, then half a chunk and FIN.",
        amid("upstream_incomplete", 502),
        after(b'80\r\ndata: {"id":', Fin()),
    ),
    Row(
        "clean end, no reason",
        "Two pieces, [DONE] and a clean end, but no finish_reason.",
        amid("upstream_incomplete", 502),
        after(done(), end()),
    ),
    Row(
        "[DONE] missing",
        "A whole answer with its finish_reason; the connection ends before [DONE].",
        finished(),
        (lambda mark: [head(), *map(text, PIECES), finish(), mark, Fin()],),
    ),
    Row(
        "malformed JSON at once",
        "The first event is no JSON.",
        before(502, "upstream_malformed"),
        (lambda mark: [head(), mark, http_chunk(b'data: {"choices": [}\n\n'), Hang()],),
    ),
    Row(
        "malformed JSON",
        "The third event is no JSON.",
        amid("upstream_malformed", 502),
        after(http_chunk(b'data: {"choices": [}\n\n'), Hang()),
    ),
    Row("not SSE", "200 and an HTML page.", before(502, "upstream_malformed"), first(page("text/html"))),
    Row(
        "compressed",
        "200 with Content-Encoding: gzip, though identity was asked for.",
        before(502, "upstream_malformed"),
        first(page("text/event-stream", "gzip")),
    ),
    Row(
        "error in the stream",
        "Two pieces, then an error object.",
        amid("upstream_error", 502),
        after(_said("server_error"), Hang()),
    ),
    Row(
        "ended by length",
        "The model stops at its limit: finish_reason length.",
        finished("length"),
        (lambda mark: answer(PIECES, finish_reason="length"),),
    ),
    Row(
        "ended by content filter",
        "The provider's filter stops the model: finish_reason content_filter.",
        finished("content_filter"),
        (lambda mark: answer(PIECES, finish_reason="content_filter"),),
    ),
    Row(
        "huge line",
        "Two pieces, then a line of 2.4 MB; an event may have 1 MiB.",
        amid("upstream_malformed", 502, None),
        after(LINE, HUGE, Hang()),
        plan="patient",
    ),
)
