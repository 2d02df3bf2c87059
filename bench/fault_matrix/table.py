"""All rows, in the order of the report."""

from __future__ import annotations

from . import server_rows, store_rows, upstream_rows
from .rows import Row

SECTIONS: dict[str, tuple[Row, ...]] = {
    "The model's side": upstream_rows.ROWS,
    "Callers": server_rows.CALLERS,
    "gunicorn and nginx": server_rows.SERVERS,
    "The response log": store_rows.ROWS,
}
ROWS = {row.name: row for rows in SECTIONS.values() for row in rows}
