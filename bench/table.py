"""Figures of all servers become one table, for the terminal and for RESULTS.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .measure import Figures, Sizes

BASE = "express"
LEGEND = """\
CPU is user and system time of the server's processes (gunicorn's and nginx's masters too), one worker each; in brackets
the ratio to Express. Delays are from the upstream's sending to the caller's reading. "x of y whole": answers were cut
or too slow, and no figure counts. Memory is the proportional set size, over what the idle server had. "*": others had
the server's core for over 5 % of the time; pieces then pile up and cost less each, and the figure means little."""
BUSY = 0.05
MANY = 1000  # streams, below which what a server grows by once hides what a stream takes


@dataclass
class Row:
    """One server's figures, by load, one entry a repetition; `faults` stand in the place of figures."""

    title: str
    figures: dict[str, list[Figures]] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    missing: str | None = None

    def median(self, load: str, name: str) -> float:
        """NaN where it was not measured."""
        found = [each[name] for each in self.figures.get(load, ())]
        return statistics.median(found) if found else math.nan


@dataclass(frozen=True)
class Column:
    load: str
    heading: str
    cell: Callable[[Row, Row], str]


def columns(sizes: Sizes) -> list[Column]:
    many = f"{sizes.many:,}"
    found = [
        Column("piece50", "50 ms apart, us a piece", _ratio("piece50", "us", ".0f")),
        Column("piece50", "p50/p99 ms", _delays("piece50")),
        Column("piece10", "10 ms apart, us a piece", _ratio("piece10", "us", ".0f")),
        Column("piece10", "p50/p99 ms", _delays("piece10")),
        Column("full", "full speed, us a piece", _ratio("full", "us", ".1f")),
        Column("single", "one piece, CPU ms", _ratio("single", "ms", ".2f")),
        Column("single", "a CPU second", _plain("single", "per_cpu_second", ".0f")),
        Column("single", "first piece ms", _plain("single", "first", ".1f")),
        Column("open", f"{many} open, us a piece", _ratio("open", "us", ".0f")),
        Column("open", f"against {sizes.streams}", _against_few),
        Column("open", "p99 ms", _plain("open", "p99", ".0f")),
        Column("open", "KB a stream", _plain("open", "kb", ".0f")) if sizes.many >= MANY else None,
        Column("silent", f"{many} silent, % of a core", _plain("silent", "percent", ".1f")),
    ]
    return [column for column in found if column is not None]


def _plain(load: str, name: str, form: str) -> Callable[[Row, Row], str]:
    return lambda row, _: f"{_number(row.median(load, name), form)}{_star(row, load)}"


def _star(row: Row, load: str) -> str:
    return "*" if row.median(load, "waited") > BUSY else ""


def _ratio(load: str, name: str, form: str) -> Callable[[Row, Row], str]:
    """The figure, and how many times that of Express it is."""

    def cell(row: Row, base: Row) -> str:
        value, other = row.median(load, name), base.median(load, name)
        ratio = "" if math.isnan(value) or math.isnan(other) else f" ({value / other:.2f})"
        return f"{_number(value, form)}{_star(row, load)}{ratio}"

    return cell


def _delays(load: str) -> Callable[[Row, Row], str]:
    return lambda row, _: "/".join(_number(row.median(load, name), ".1f") for name in ("p50", "p99"))


def _against_few(row: Row, _: Row) -> str:
    ratio = row.median("open", "us") / row.median("piece50", "us")
    return _number(ratio, ".2f")


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def cells(rows: Mapping[str, Row], loads: Sequence[str], sizes: Sizes) -> list[list[str]]:
    """The heading and a line for each server; only what was measured has columns."""
    shown = [column for column in columns(sizes) if column.load in loads]
    base = rows.get(BASE, Row(BASE))
    return [["server", *(column.heading for column in shown)], *(_line(row, base, shown) for row in rows.values())]


def _line(row: Row, base: Row, shown: Sequence[Column]) -> list[str]:
    if row.missing is not None:
        return [row.title, f"missing: {row.missing}", *[""] * (len(shown) - 1)]
    return [row.title, *(row.faults.get(column.load) or column.cell(row, base) for column in shown)]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    heading, *rest = lines
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heading, rule, *rest))


def plain(lines: Sequence[Sequence[str]]) -> str:
    """For a terminal: headings are broken into short lines, columns are as narrow as they can be."""
    heading, *rest = lines
    broken = [_words(title) for title in heading]
    height = max(map(len, broken))
    tops = [[*[""] * (height - len(title)), *title] for title in broken]
    grid = [*map(list, zip(*tops, strict=True)), *rest]
    counted = [line for line in grid if not line[1].startswith("missing")]
    widths = [max(len(line[column]) for line in counted) for column in range(len(heading))]
    widths[0] = max(len(line[0]) for line in grid)
    return "\n".join("  ".join(_aligned(line, widths)).rstrip() for line in grid)


def _words(title: str) -> list[str]:
    """Lines of at most 12 characters."""
    lines = [""]
    for word in title.split():
        if len(lines[-1]) + len(word) > 11:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *rest = zip(line, widths, strict=True)
    return [first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]
