"""Verdicts become the table that is printed, with what to change, and the JSON object of the same."""

from __future__ import annotations

import textwrap
from typing import Any

from .findings import ADVICE, BROKEN, OK, Verdict, exit_status, judge, proxies_of
from .measurements import Measured
from .remedies import OWN, PROXIES, REMEDIES

WIDTH = 110
MARKS = {OK: "ok", ADVICE: "advice", BROKEN: "BROKEN"}
ENDS = {0: "Nothing breaks streaming.", 1: "Something breaks streaming."}
TITLES = {
    "buffered": "A hop buffers",
    "compressed": "A hop compresses the stream",
    "http10": "A hop speaks HTTP/1.0",
    "swallowed": "A cut answer looks whole",
    "silence": "A hop does not bear silence",
    "hangup": "A caller's leaving does not reach the app",
    "headers": "Headers are lost or changed",
    "worker": "The server",
    "patched_late": "gevent's patch came too late",
    "limits": "Limits",
    "http2": "HTTP/2",
}


def findings_of(verdicts: list[Verdict]) -> list[str]:
    """Each once: what breaks first."""
    found = [each.finding for level in (BROKEN, ADVICE) for each in verdicts if each.level == level and each.finding]
    return list(dict.fromkeys(found))


def remedies_of(finding: str, first: list[str]) -> dict[str, str]:
    """Proxy -> what to change, those that were seen on the way first. The server's own side has one line."""
    if finding in OWN:
        return {"app": OWN[finding]}
    return {name: REMEDIES[finding][name] for name in [*first, *(name for name in PROXIES if name not in first)]}


def as_text(seen: Measured) -> tuple[str, int]:
    """What is printed, and the exit status."""
    verdicts = judge(seen)
    status = exit_status(verdicts)
    wide = max(len(each.check) for each in verdicts)
    lines = [seen.url, *_server(seen), ""]
    for each in verdicts:
        lines += _wrapped(each.words, f"{MARKS[each.level]:8}{each.check:{wide}}  ")
    for finding in findings_of(verdicts):
        lines += ["", f"{TITLES[finding]}:"]
        for name, words in remedies_of(finding, proxies_of(seen)).items():
            lines += _wrapped(words, f"  {name:12}")
    return "\n".join([*lines, "", ENDS[status]]), status


def _server(seen: Measured) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in seen.report["versions"].items())
    proxies = ", ".join(proxies_of(seen)) or "none that says so"
    trip = f"{seen.round_trip * 1000:.0f} ms"
    return [*_wrapped(versions, "server:  "), f"proxies: {proxies}", f"round trip: {trip}"]


def _wrapped(words: str, head: str) -> list[str]:
    return textwrap.wrap(words, WIDTH, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)


def as_json(seen: Measured) -> tuple[dict[str, Any], int]:
    """The same for a program, with what was measured."""
    verdicts = judge(seen)
    status = exit_status(verdicts)
    proxies = proxies_of(seen)
    document = {
        "url": seen.url,
        "exit": status,
        "proxies": proxies,
        "round_trip": round(seen.round_trip, 6),
        "verdicts": [
            {"check": each.check, "level": each.level, "words": each.words, "finding": each.finding or None}
            for each in verdicts
        ],
        "remedies": {finding: remedies_of(finding, proxies) for finding in findings_of(verdicts)},
        "server": seen.report,
    }
    return document, status
