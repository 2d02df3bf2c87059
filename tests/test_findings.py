"""What is seen of a chain becomes verdicts, and each finding has its remedy for every proxy."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from streamchat.diagnosis import TITLES, as_json, as_text, findings_of, remedies_of
from streamchat.findings import ADVICE, BROKEN, OK, Verdict, exit_status, judge
from streamchat.measurements import Departure, Flood, Measured, Stream, quantile
from streamchat.remedies import OWN, PROXIES, REMEDIES, seen_proxies

SSE, TEXT, NDJSON = "text/event-stream", "text/plain", "application/x-ndjson"
MADE = tuple(number / 10 for number in range(20))
REPORT: dict[str, Any] = {
    "worker": "gevent",
    "late_modules": [],
    "limits": {"open_files": 20_000, "worker_connections": 1000, "max_streams": 900},
    "request": {"protocol": "HTTP/1.1", "added": []},
    "settings": {"heartbeat": 15.0, "first_token_timeout": 120.0},
    "versions": {"python": "3.13.1"},
}
HEADERS = {
    "cache-control": "no-cache, no-transform",
    "x-content-type-options": "nosniff",
    "x-response-id": "resp_1",
    "x-accel-buffering": "no",
    "server": "nginx",
}


def paced(kind: str = SSE, late: float = 0.01, **changes: Any) -> Stream:
    headers = HEADERS | {"content-type": f"{kind}; charset=utf-8"}
    fine = Stream(headers=headers, made=MADE, came=tuple(at + late for at in MADE), ended=2.0)
    return dataclasses.replace(fine, **changes)


CUT = Stream(made=MADE[:3], came=MADE[:3], whole=False, fault="RemoteProtocolError")
FINE = Measured(
    url="https://shop.example/api",
    report=REPORT,
    round_trip=0.01,
    interval=0.1,
    pieces=20,
    gap=20.0,
    patience=5.0,
    paced={kind: paced(kind) for kind in (SSE, TEXT, NDJSON)},
    flood=Flood(0.0, True),
    flood_unasked=Flood(0.0, True),
    encodings={SSE: "", TEXT: "", NDJSON: ""},
    silence=Stream(made=(0.0, 20.0), came=(0.01, 20.01), ended=20.02),
    cut=CUT,
    lapse=CUT,
    departure=Departure("left", 0.004),
)


def changed(**changes: Any) -> Measured:
    return dataclasses.replace(FINE, **changes)


def reported(**changes: Any) -> Measured:
    return changed(report=REPORT | changes)


def with_paced(stream: Stream) -> Measured:
    return changed(paced={SSE: stream, TEXT: paced(TEXT), NDJSON: paced(NDJSON)})


def without(header: str) -> Stream:
    return paced(headers={name: value for name, value in paced().headers.items() if name != header})


def not_ok(seen: Measured) -> list[tuple[str, str, str]]:
    return [(each.check, each.level, each.finding) for each in judge(seen) if each.level != OK]


def test_a_chain_that_streams_has_nothing_but_fine_lines() -> None:
    assert not_ok(FINE) == []
    assert exit_status(judge(FINE)) == 0


PIECES = f"pieces, {SSE}"
ALL_AT_ONCE = tuple(2.0 for _ in MADE)
IN_FOURS = tuple(number // 4 * 0.4 + 0.4 for number in range(20))
CASES: dict[str, tuple[Measured, list[tuple[str, str, str]]]] = {
    "all at the end": (with_paced(paced(came=ALL_AT_ONCE)), [(PIECES, BROKEN, "buffered")]),
    "in fours": (with_paced(paced(came=IN_FOURS)), [(PIECES, BROKEN, "buffered")]),
    "each held until the next": (
        with_paced(paced(came=tuple(min(at + 0.1, MADE[-1]) for at in MADE))),
        [(PIECES, BROKEN, "buffered")],
    ),
    "all late": (with_paced(paced(late=0.3)), [(PIECES, ADVICE, "buffered")]),
    "on a long line": (changed(round_trip=0.3, paced={SSE: paced(late=0.3)}), []),
    "broken off": (
        with_paced(paced(came=MADE[:5], whole=False, fault="ReadError")),
        [(PIECES, BROKEN, "silence")],
    ),
    "ended early as if whole": (with_paced(paced(came=MADE[:5])), [(PIECES, BROKEN, "swallowed")]),
    "compressed for some": (changed(encodings={SSE: "", TEXT: "br"}), [("compression", BROKEN, "compressed")]),
    "compressed": (
        with_paced(paced(headers={**paced().headers, "content-encoding": "gzip"})),
        [("compression", BROKEN, "compressed")],
    ),
    "a hop takes a flood": (changed(flood=Flood(1.0, False)), [("a caller that stops reading", BROKEN, "buffered")]),
    "a hop would take a flood": (
        changed(flood_unasked=Flood(0.5, False)),
        [("a caller that stops reading", ADVICE, "buffered")],
    ),
    "nobody knows of the flood": (changed(flood=Flood(0.0, None)), [("a caller that stops reading", ADVICE, "")]),
    "HTTP/1.0 to the app": (
        reported(request={"protocol": "HTTP/1.0", "added": []}),
        [("HTTP version", ADVICE, "http10")],
    ),
    "HTTP/1.0 to the caller": (with_paced(paced(http="HTTP/1.0")), [("HTTP version", ADVICE, "http10")]),
    "no HTTP/2": (changed(http2=False), [("HTTP version", ADVICE, "http2")]),
    "HTTP/2": (changed(http2=True), []),
    "no-transform lost": (with_paced(without("cache-control")), [("headers", ADVICE, "headers")]),
    "the id lost": (with_paced(without("x-response-id")), [("headers", ADVICE, "headers")]),
    "another type": (
        with_paced(paced(headers={**paced().headers, "content-type": "text/html"})),
        [("headers", BROKEN, "headers")],
    ),
    "a length": (
        with_paced(paced(headers={**paced().headers, "content-length": "99"})),
        [("headers", BROKEN, "buffered")],
    ),
    "the app's cut swallowed": (
        changed(cut=dataclasses.replace(CUT, whole=True, fault="")),
        [("cut by the app", BROKEN, "swallowed")],
    ),
    "a hop's cut swallowed": (
        changed(lapse=dataclasses.replace(CUT, whole=True, fault="")),
        [("cut by a dying hop", BROKEN, "http10")],
    ),
    "silence cut": (
        changed(silence=Stream(made=(0.0,), came=(0.01,), ended=10.0, whole=False, fault="RemoteProtocolError")),
        [("silence", BROKEN, "silence")],
    ),
    "silence ended cleanly": (changed(silence=Stream(came=(0.01,), ended=10.0)), [("silence", BROKEN, "silence")]),
    "silence ended by a status": (changed(silence=Stream(status=504, ended=10.0)), [("silence", BROKEN, "silence")]),
    "a slow hang-up": (changed(departure=Departure("left", 1.5)), [("hang-up", ADVICE, "hangup")]),
    "no hang-up": (changed(departure=Departure("running")), [("hang-up", BROKEN, "hangup")]),
    "a hang-up after the end": (changed(departure=Departure("stayed")), [("hang-up", BROKEN, "hangup")]),
    "nobody knows of the hang-up": (changed(departure=Departure("unknown")), [("hang-up", ADVICE, "hangup")]),
    "a sync worker": (reported(worker="sync"), [("worker", BROKEN, "worker")]),
    "threads": (reported(worker="gthread"), [("worker", ADVICE, "worker")]),
    "another server": (reported(worker="waitress"), [("worker", ADVICE, "worker")]),
    "patched late": (reported(late_modules=["urllib3"]), [("monkey-patching", BROKEN, "patched_late")]),
    "few files": (
        reported(limits={"open_files": 1024, "worker_connections": 1000, "max_streams": 900}),
        [("limits", ADVICE, "limits")],
    ),
    "any number of files": (
        reported(limits={"open_files": None, "worker_connections": None, "max_streams": 900}),
        [],
    ),
    "more answers than connections": (
        reported(limits={"open_files": 20_000, "worker_connections": 900, "max_streams": 900}),
        [("limits", ADVICE, "limits")],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_fault_has_its_verdict_and_no_other(name: str) -> None:
    seen, expected = CASES[name]
    assert not_ok(seen) == expected


@pytest.mark.parametrize("name", CASES)
def test_advice_never_changes_the_exit_status(name: str) -> None:
    seen, expected = CASES[name]
    status = int(any(level == BROKEN for _, level, _ in expected))
    assert (as_text(seen)[1], as_json(seen)[1], as_json(seen)[0]["exit"]) == (status, status, status)


@pytest.mark.parametrize("name", CASES)
def test_the_table_and_the_json_say_the_same(name: str) -> None:
    seen, expected = CASES[name]
    text, document = " ".join(as_text(seen)[0].split()), as_json(seen)[0]
    for each in document["verdicts"]:
        assert each["words"] in text
    for _, _, finding in expected:
        assert not finding or finding in document["remedies"]
    assert json.loads(json.dumps(document)) == document


def test_the_header_that_was_lost_is_named_where_pieces_are_held_back() -> None:
    seen = with_paced(paced(came=ALL_AT_ONCE, headers=without("x-accel-buffering").headers))
    assert "X-Accel-Buffering was lost" in judge(seen)[0].words


def test_every_finding_of_a_case_has_a_title_and_a_remedy_for_each_proxy_or_for_the_app() -> None:
    findings = {finding for _, expected in CASES.values() for _, _, finding in expected if finding}
    assert findings == {*REMEDIES, *OWN} == set(TITLES)
    for finding in REMEDIES:
        assert set(remedies_of(finding, [])) == set(PROXIES)
        assert all(remedies_of(finding, []).values())
    for finding in OWN:
        assert remedies_of(finding, ["nginx"]) == {"app": OWN[finding]}


def test_proxies_that_were_seen_stand_first() -> None:
    assert next(iter(remedies_of("silence", ["Heroku"]))) == "Heroku"
    assert len(remedies_of("silence", ["Heroku"])) == len(PROXIES)


def test_what_breaks_is_cured_before_what_is_advised() -> None:
    verdicts = [Verdict("a", ADVICE, "", "headers"), Verdict("b", BROKEN, "", "silence"), Verdict("c", OK, "")]
    assert findings_of([*verdicts, verdicts[0]]) == ["silence", "headers"]


@pytest.mark.parametrize(
    ("headers", "added", "found"),
    [
        ({"server": "nginx/1.22.1"}, [], ["nginx"]),
        ({"server": "cloudflare", "cf-ray": "1"}, ["CF-Ray"], ["Cloudflare"]),
        ({"server": "gunicorn", "cf-ray": "1"}, [], ["Cloudflare"]),
        ({"via": "1.1 Caddy"}, [], ["Caddy"]),
        ({"via": "1.1 vegur", "server": "Apache/2.4"}, [], ["Apache", "Heroku"]),
        ({}, ["Via"], []),
    ],
)
def test_a_proxy_is_known_by_what_it_leaves(headers: dict[str, str], added: list[str], found: list[str]) -> None:
    assert seen_proxies(headers, added) == found


@pytest.mark.parametrize(
    ("values", "part", "found"), [([], 0.5, 0.0), ([3.0], 0.99, 3.0), ([4, 1, 2, 3], 0.5, 2), ([4, 1, 2, 3], 0.99, 4)]
)
def test_a_quantile_is_one_of_the_values(values: list[float], part: float, found: float) -> None:
    assert quantile(values, part) == found


def test_no_line_of_the_table_is_too_wide_to_read() -> None:
    seen, _ = CASES["compressed for some"]
    assert max(len(line) for line in as_text(seen)[0].splitlines()) <= 110
