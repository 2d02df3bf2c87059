"""`bench/faults`: every fault in every format on real processes, held against what is promised; writes docs/faults.md.

Exit status 1 where a cell is not as promised, an honest caller suffers under a slow attack, or a restart loses an
answer without an ending. Takes about six minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from . import rolling, slow
from .cells import Cell
from .report import page
from .rows import Row
from .run import groups, run_group
from .table import ROWS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "faults.md"
ATTACKS, RESTARTS = "slow attacks", "restarts under load"
NAMES = (*ROWS, ATTACKS, RESTARTS)


def main() -> None:
    chosen = _arguments()
    if chosen.list:
        print("\n".join(NAMES))
        return
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}:/usr/sbin"  # where Debian keeps nginx
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench/faults: told to stop"))  # by way of every cleanup
    wanted = chosen.only or list(NAMES)
    cells = run_rows([ROWS[name] for name in ROWS if name in wanted])
    attacks = slow.run() if ATTACKS in wanted else []
    restarts = rolling.run() if RESTARTS in wanted else []
    if not chosen.only:
        PAGE.write_text(page(cells, attacks, restarts))
        _progress(f"written: docs/{PAGE.name}")
    complaints = complaints_of(cells)
    outcomes: list[slow.Outcome | rolling.Outcome] = [*attacks, *restarts]
    for outcome in outcomes:
        _progress(f"{outcome.name}: {'as promised' if not outcome.faults() else 'NOT as promised'}")
        complaints += [f"{outcome.name}: {fault}" for fault in outcome.faults()]
    print("\n".join(complaints) or "All is as promised.")
    sys.exit(1 if complaints else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="the names of all rows")
    parser.add_argument(
        "--only", action="append", choices=NAMES, metavar="ROW", help="this row, may be repeated; writes nothing"
    )
    return parser.parse_args()


def run_rows(rows: Sequence[Row]) -> list[Cell]:
    return [cell for group in groups(rows) for cell in run_group(group, _progress)]


def complaints_of(cells: Sequence[Cell]) -> list[str]:
    """One line for each thing that is not as promised."""
    return [f"{cell.row}, {cell.format}: {fault}" for cell in cells for fault in cell.faults(ROWS[cell.row].whole)]


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
