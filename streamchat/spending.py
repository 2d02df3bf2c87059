"""The ledger's sums become a table for people, or CSV. Plain values in, text out."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

from .store import Spent

COLUMNS = ("answers", "completed", "input_tokens", "output_tokens")
NOBODY = "(no user)"
ESTIMATED = "~"


def table(by: str, sums: Sequence[Spent]) -> str:
    """Aligned columns, a line of totals; tokens that hold estimates are marked."""
    total = replace(reduce(_sum, sums, Spent("", 0, 0, 0, 0, 0)), name="total")
    rows = [
        (by, *(column.replace("_", " ") for column in COLUMNS), "tokens"),
        *(_row(each) for each in sums),
        _row(total),
    ]
    widths = [max(len(row[nr]) for row in rows) for nr in range(len(rows[0]))]
    lines = [_line(row, widths) for row in rows]
    if total.estimated:
        lines.append(
            f"{ESTIMATED} The tokens of {_count(total.estimated)} are estimated: the model did not count them."
        )
    return "\n".join(lines)


def csv_rows(store: str, by: str, sums: Sequence[Spent]) -> list[tuple[object, ...]]:
    """The first row names the columns. `estimated` is how many answers' tokens are."""
    head = ("blueprints", by, *COLUMNS, "estimated")
    return [head, *((store, _encodable(each.name), *(getattr(each, name) for name in head[2:])) for each in sums)]


def as_csv(rows: Sequence[Sequence[object]]) -> str:
    out = io.StringIO()
    # Without quotes a lone "\r" in a name would end its row: the csv of Python 3.11 looks at its own line ends only.
    csv.writer(out, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC).writerows(rows)
    return out.getvalue().rstrip("\n")


def _encodable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


def _sum(one: Spent, other: Spent) -> Spent:
    return Spent(
        "",
        one.answers + other.answers,
        one.completed + other.completed,
        one.input_tokens + other.input_tokens,
        one.output_tokens + other.output_tokens,
        one.estimated + other.estimated,
    )


def _row(spent: Spent) -> tuple[str, ...]:
    mark = ESTIMATED if spent.estimated else ""
    counted = (f"{getattr(spent, name):,}" for name in COLUMNS)
    return (_shown(spent.name), *counted, f"{mark}{spent.input_tokens + spent.output_tokens:,}")


def _shown(name: str) -> str:
    """A user id is the shop's, and may hold anything: one row stays one line, and no terminal obeys it."""
    return (name if name.isprintable() else repr(name)) or NOBODY


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    name, *counts = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    return "  ".join([row[0].ljust(len(name)), *counts])


def _count(answers: int) -> str:
    return "1 answer" if answers == 1 else f"{answers:,} answers"
