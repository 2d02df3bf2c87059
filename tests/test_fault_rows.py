"""The fault matrix: its table is whole, its page tells every row, it sees what is not as promised, and it runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bench.fault_matrix import __main__ as command
from bench.fault_matrix.cells import NAMES, OPENAI, SSE, TEXT, UI, Cell, Promise, before
from bench.fault_matrix.chain import PLANS
from bench.fault_matrix.formats import CUT_SHORT, FORMATS, Wire, understood
from bench.fault_matrix.rows import Row
from bench.fault_matrix.run import groups, run_group
from bench.fault_matrix.table import ROWS, SECTIONS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "faults.md").read_text()

# --- the table and its page -----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_a_row_promises_something_for_each_format_on_servers_that_there_are(row: Row) -> None:
    assert tuple(sorted(row.promises)) == tuple(sorted(NAMES))
    assert row.plan in PLANS
    assert row.done.endswith(".")
    assert "|" not in row.name + row.done  # it stands in a table


def test_no_two_rows_share_a_name() -> None:
    assert len(ROWS) == sum(len(rows) for rows in SECTIONS.values())


def test_rows_are_run_in_order_and_what_ends_its_servers_has_its_own() -> None:
    made = list(groups(list(ROWS.values())))
    assert [row for group in made for row in group] == list(ROWS.values())
    assert all(len(group) == 1 for group in made if any(row.own for row in group))
    assert all(len({row.plan for row in group}) == 1 for group in made)


@pytest.mark.parametrize("name", [*ROWS, "slow headers", "slow body", "slow read", "rolling restart"])
def test_the_page_tells_every_row(name: str) -> None:
    assert f"| **{name}**: " in PAGE or f"| {name}: " in PAGE


def test_the_page_is_of_a_run_in_which_all_was_as_promised() -> None:
    assert f"{len(ROWS) * len(NAMES)} cells, 0 not as promised." in PAGE
    assert "not as promised**" not in PAGE
    assert "by `bench/faults`" in PAGE


def test_the_command_lists_its_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench/faults", "--list"])
    command.main()
    assert capsys.readouterr().out.splitlines() == [*ROWS, "slow attacks", "restarts under load"]
    assert os.access(ROOT / "bench" / "faults", os.X_OK)


# --- its judgement --------------------------------------------------------------------------------------------

PROMISE = Promise("error upstream_stalled", told=("upstream_stalled",), kept=("upstream_stalled",), within=1.0)
AS_PROMISED = Cell(
    "row",
    SSE,
    PROMISE,
    saw="error upstream_stalled",
    text="Hel",
    posts=1,
    told=("upstream_stalled",),
    kept=("upstream_stalled",),
    seconds=1.0,
    freed=0.0,
)


def test_a_cell_as_promised_has_no_fault() -> None:
    assert AS_PROMISED.faults("Hello") == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"saw": "finish stop"}, "saw: finish stop, not error upstream_stalled"),
        ({"saw": CUT_SHORT}, "saw: ends without an end"),
        ({"text": "Help"}, "the text is no beginning of the answer"),
        ({"posts": 2}, "upstream calls: 2, not 1"),
        ({"told": ()}, "log lines: ()"),
        ({"kept": ("upstream_stalled",) * 2}, "ledger rows: "),
        ({"seconds": 1.4}, "seconds: 1.4, not 1.0 s"),
        ({"freed": None}, "slot free after: None, not 0.5 s"),
        ({"freed": 0.9}, "slot free after: 0.9"),
        ({"notes": frozenset({"warning"})}, "notes: ['warning'], not []"),
        ({"leaked": ("sk-canary",)}, "the caller read 'sk-canary'"),
    ],
)
def test_a_cell_that_is_not_as_promised_says_in_what(values: dict[str, object], words: str) -> None:
    found = replace(AS_PROMISED, **values).faults("Hello")  # type: ignore[arg-type]
    assert any(words in fault for fault in found), found


def test_a_whole_answer_must_have_all_its_text() -> None:
    whole = replace(AS_PROMISED, promise=replace(PROMISE, saw="whole"), saw="whole")
    assert whole.faults("Hello") == ["whole, but the text is 'Hel'"]
    assert replace(whole, text="Hello").faults("Hello") == []


def test_a_machine_that_stood_still_is_not_the_servers_fault() -> None:
    assert replace(AS_PROMISED, seconds=1.9, late=0.7).faults("Hello") == []


# --- its callers ----------------------------------------------------------------------------------------------

START = b'data: {"type":"start","messageId":"r"}\n\n'
CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":"Hi"},"finish_reason":%b}]}\n\n'
EVENT = b'event: text\ndata: {"type":"text","seq":1,"text":"Hi"}\n\n'


@pytest.mark.parametrize(
    ("name", "body", "whole", "saw"),
    [
        (TEXT, b"Hi", True, "whole"),
        (TEXT, b"Hi", False, "broken"),
        (SSE, EVENT, True, CUT_SHORT),
        (SSE, EVENT, False, "broken"),
        (SSE, EVENT + b'data: {"type":"error","seq":2,"code":"gap"}\n\n', True, "error gap"),
        (SSE, EVENT + b'data: {"type":"finish","seq":2,"finish_reason":"stop"}\n\n', False, "finish stop, broken"),
        (UI, START, True, CUT_SHORT),
        (UI, START + b'data: {"type":"error","errorText":"The answer was cut off."}\n\n', True, CUT_SHORT),
        (
            UI,
            START + b'data: {"type":"error","errorText":"The answer was cut off."}\n\ndata: [DONE]\n\n',
            True,
            "error upstream_incomplete",
        ),
        (OPENAI, CHUNK % b"null" + b"data: [DONE]\n\n", True, CUT_SHORT),
        (OPENAI, CHUNK % b'"stop"', True, CUT_SHORT),
        (OPENAI, CHUNK % b'"stop"' + b"data: [DONE]\n\n", True, "finish stop"),
        (OPENAI, b'data: {"error":{"code":"gap"}}\n\ndata: [DONE]\n\n', True, "error gap, [DONE]"),
    ],
)
def test_a_caller_takes_nothing_for_an_end_that_is_none(name: str, body: bytes, whole: bool, saw: str) -> None:
    assert understood(FORMATS[name], Wire(200, {}, body, whole)).saw == saw


def test_a_caller_tells_our_errors_from_those_of_nginx() -> None:
    assert understood(FORMATS[SSE], Wire(502, {}, b'{"code":"upstream_error"}', True)).saw == "502 upstream_error"
    assert understood(FORMATS[SSE], Wire(502, {}, b"<center>nginx</center>", True)).saw == "502 nginx"
    assert understood(FORMATS[SSE], Wire()).saw == "no reply"


# --- it runs --------------------------------------------------------------------------------------------------


def faulty(cells: Sequence[Cell], row: Row) -> list[str]:
    return [fault for cell in cells if cell.row == row.name for fault in cell.faults(row.whole)]


@pytest.mark.live
def test_rows_run_on_real_servers_and_a_broken_promise_is_seen() -> None:
    told: list[str] = []
    broken = replace(ROWS["401"], promises=before(503, "upstream_auth"))
    # On one server; two take longer to start.
    rows = [replace(row, plan="tight") for row in (ROWS["FIN after pieces"], ROWS["hang-up by FIN"], broken)]
    cells = run_group(rows, told.append)
    assert len(cells) == len(rows) * len(NAMES)
    assert faulty(cells, rows[0]) == []
    assert faulty(cells, rows[1]) == []
    assert faulty(cells, rows[2]) == ["saw: 502 upstream_auth, not 503 upstream_auth"] * len(NAMES)
    assert [line.rpartition(",")[0] for line in told] == [
        "FIN after pieces: as promised",
        "hang-up by FIN: as promised",
        "401: 6 cells NOT as promised",
    ]
