"""Cells, attacks and restarts become docs/faults.md. Figures only from the run that is reported."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import version

from . import rolling, slow
from .cells import NAMES, Cell
from .rows import Row
from .table import SECTIONS

PACKAGES = ("flask", "gunicorn", "gevent", "openai", "apsw", "redis")
PROGRAMS = (("nginx", "-v"), ("redis-server", "--version"), ("slowhttptest", "-h"))

HEAD = """\
# What happens when something fails

`bench/faults` does each of these to real processes (gunicorn with `conf/gunicorn.conf.py` and `wsgi:app`, nginx with
`conf/nginx.conf`, Redis, SQLite, a fake model on a socket) while six callers on raw sockets, one a format, ask through
nginx. It writes this page, and fails where one cell is not as promised. The rule:

- Before the first byte a failure has its true status, in every format.
- After it: an error in the stream where the format has room for one, a broken connection in `text/plain`, and still
  the true status in JSON, which has written nothing yet. Never an end that looks whole.
- Each answer has one record, its slot is free, and the model is asked no more than the table says.
"""

LEGEND = """\
`finish R`: a whole answer, with the reason R for which the model ended; in `text/plain` that is a clean end (`whole`).
`error C`: the error C in the stream. `broken`: the connection ends without HTTP's own end. `no reply`: it ends before
a status line. `left`: the caller left. A number is a status; `nginx` means nginx's own page. **Calls**: POSTs that
reached the model. **Ledger**: the outcome in the log line and in the response log's ledger, `-` for none; both have it
once. **Seconds**: how long until the caller knew, or, where it left, until the model's connection was closed; `-` where
an answer only takes its time. **Slot**: seconds after that until the same user, who may run one answer at a time, was
admitted again; it is asked every 20 ms. Of six formats the longest.

The time limits of this run are short, so that it takes minutes: 4 s for the first piece, 1 s between pieces, 3 s for a
reader who does not read, 8 s for a stopping worker, leases of 2 s (15 s where the log is in trouble). All else is as
shipped, and so is every promise that names a setting."""


def page(cells: Sequence[Cell], attacks: Sequence[slow.Outcome], restarts: Sequence[rolling.Outcome]) -> str:
    by_row: dict[str, list[Cell]] = {}
    for cell in cells:
        by_row.setdefault(cell.row, []).append(cell)
    parts = [HEAD, _run_it()]
    for title, rows in SECTIONS.items():
        parts.append(f"## {title}\n\n{_table(rows, by_row)}")
    parts += [f"## How to read it\n\n{LEGEND}", _slow(attacks), _rolling(restarts), f"## This run\n\n{_caption(cells)}"]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _run_it() -> str:
    return """\
    bench/faults                          # all rows, the attacks and the restarts; writes this page
    bench/faults --list                   # the names of the rows
    bench/faults --only 'worker killed'   # one row, and nothing is written

nginx, redis-server, slowhttptest and util-linux are Debian's."""


def _table(rows: Iterable[Row], cells: Mapping[str, list[Cell]]) -> str:
    lines = [
        f"| fault | {' | '.join(NAMES)} | calls | ledger | seconds | slot |",
        f"|---|{'---|' * len(NAMES)}---|---|---:|---:|",
    ]
    return "\n".join([*lines, *(_line(row, cells[row.name]) for row in rows)])


def _line(row: Row, cells: Sequence[Cell]) -> str:
    seen = [f"{cell.saw}{_noted(cell)}{' **not as promised**' if cell.faults(row.whole) else ''}" for cell in cells]
    columns = [
        _each(cells, lambda cell: str(cell.posts)),
        _each(cells, _ledger),
        _longest(cell.seconds for cell in cells),
        _longest(cell.freed for cell in cells),
    ]
    return f"| **{row.name}**: {row.done} | {' | '.join([*seen, *columns])} |"


def _noted(cell: Cell) -> str:
    words = {"warning": "after a `warning`", "Retry-After": "with Retry-After"}
    return "".join(f", {words[note]}" for note in sorted(cell.notes & set(words)))


def _ledger(cell: Cell) -> str:
    told, kept = (", ".join(each) or "-" for each in (cell.told, cell.kept))
    return told if told == kept else f"log line {told}, row {kept}"


def _each(cells: Sequence[Cell], value: Callable[[Cell], str]) -> str:
    """One value where all formats have the same; else who has which."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        found.setdefault(value(cell), []).append(cell.format)
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{value} ({', '.join(names)})" for value, names in found.items())


def _longest(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{max(known):.2f}" if max(known) >= 0.1 else f"{max(known):.3f}"


def _slow(attacks: Sequence[slow.Outcome]) -> str:
    lines = [
        "| attack | honest answers | not whole | longest wait for a first byte | attackers still held | server found |",
        "|---|---:|---:|---:|---:|---|",
        *(
            f"| {each.attack.name}: {each.attack.done} | {each.honest} | {len(each.ends)} | {each.first:.2f} s "
            f"| {each.held} | {'available' if each.available else '**unavailable**'} |"
            for each in attacks
        ),
    ]
    return f"""\
## Slow attacks

`slowhttptest` with {slow.CONNECTIONS} connections, {slow.RATE} new ones a second, {slow.SECONDS} s each, against the
shipped `conf/nginx.conf` with its limits. Honest callers come from another address: one in each format streams all the
time, and six new ones ask each second.

{chr(10).join(lines)}"""


def _rolling(restarts: Sequence[rolling.Outcome]) -> str:
    lines = [
        "| restart | answers asked for | without an ending | endings |",
        "|---|---:|---:|---|",
        *(
            f"| {each.name}: {each.done} | {each.ends.total()} | {each.lost} "
            f"| {', '.join(f'{number} x {kind}' for kind, number in each.ends.most_common())} |"
            for each in restarts
        ),
    ]
    return f"""\
## Restarts under load

{rolling.CALLERS} callers ask again and again through nginx, in every format in turn, for answers that take a second. An
ending is a whole answer (`finish`), an error, a refusal with its status, or a break that HTTP shows.

{chr(10).join(lines)}

A client that is refused may ask again at once: nothing was sent to the model. nginx does not do it by itself, since it
cannot know that (`proxy_next_upstream off`). Between the two restarts lie {rolling.HELD_FOR_DEAD} s: a server that
refused nginx once is dead to it for 10 s (`fail_timeout`), and with both dead it refuses everybody."""


def _caption(cells: Sequence[Cell]) -> str:
    bad = sum(
        bool(cell.faults(row.whole))
        for rows in SECTIONS.values()
        for row in rows
        for cell in cells
        if cell.row == row.name
    )
    command = " ".join(["bench/faults", *sys.argv[1:]])
    versions = [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES), *_programs()]
    return (
        f"{len(cells)} cells, {bad} not as promised. Made on {date.today().isoformat()} by `{command}` on "
        f"{os.cpu_count()} cores, Linux {platform.release().split('-')[0]}.\n{', '.join(versions)}."
    )


def _programs() -> list[str]:
    found = []
    for program, option in PROGRAMS:
        said = subprocess.run([program, option], capture_output=True, text=True, check=False)
        number = re.search(r"\d+\.\d+(\.\d+)?", said.stdout + said.stderr)
        found.append(f"{program} {number[0] if number else ''}")
    return found
