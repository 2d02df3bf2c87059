"""Measured costs of one answer become machines: `python -m bench.scale` prints the table of docs/scale.md.

Arithmetic only. Each figure says where it comes from; each assumption has a name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SIZES = (10_000, 100_000, 1_000_000)


@dataclass(frozen=True)
class Measured:
    """Of RESULTS.md where no other place is named. CPU seconds, bytes."""

    piece: float = 97e-6  # gunicorn, pieces 50 ms apart, as shipped
    request: float = 1.10e-3  # gunicorn, a request of one piece: what an answer costs once
    kept: float = 1.4  # by how much the log raises both: bench.pair, 146 us a piece to 103
    relay: float = 23e-6  # nginx alone, pieces 50 ms apart
    worker: float = 108e6  # a gunicorn that has answered, master and worker: bench.pair
    stream: float = 37e3  # gunicorn's memory of an answer that is kept: bench.pair
    relayed: float = 15e3  # nginx's of an answer: bench.pair
    upstream_bytes: float = 328  # of the model's stream, a piece: bench/upstream.py, as OpenAI's
    batches: float = 0.75  # writes to the log a piece: bench.pair
    batch: float = 17e-6  # Redis's CPU for one: bench.pair
    kept_bytes: float = 10.5e3  # in Redis, of an answer of 200 pieces: bench.pair


@dataclass(frozen=True)
class Assumed:
    """Put your own in."""

    pieces: float = 20.0  # a second of each answer, all the time: none waits for its first piece
    seconds: float = 20.0  # an answer lasts
    busy: float = 0.6  # of a core; the rest is for peaks
    cores: int = 16  # of a machine
    retention: float = 3600.0  # seconds that an ended answer is kept; the default is a day
    ports: int = 64_512  # of one address of a NAT gateway, to one address of the model


def machines_table(measured: Measured | None = None, assumed: Assumed | None = None) -> str:
    """Rows of what is needed, a column for each number of answers at a time."""
    m, a = measured or Measured(), assumed or Assumed()
    app = m.piece * a.pieces + m.request / a.seconds
    relay = m.relay * a.pieces
    redis = m.batches * a.pieces * m.batch
    kept = {n: math.ceil(n * app * m.kept / a.busy) for n in SIZES}
    rows: list[tuple[str, list[str]]] = [
        ("new answers a second", [_count(n / a.seconds) for n in SIZES]),
        ("pieces a second", [_count(n * a.pieces) for n in SIZES]),
        ("cores of gunicorn, a worker each", [_ceil(n * app / a.busy) for n in SIZES]),
        ("the same, answers kept", [_count(workers) for workers in kept.values()]),
        ("cores of nginx", [_ceil(n * relay / a.busy) for n in SIZES]),
        (f"machines of {a.cores} cores", [_ceil(n * (app + relay) / a.busy / a.cores) for n in SIZES]),
        ("the same, answers kept", [_ceil(n * (app * m.kept + relay) / a.busy / a.cores) for n in SIZES]),
        ("memory of answers and workers, GB", [_count(_memory(n, workers, m) / 1e9) for n, workers in kept.items()]),
        ("open files of gunicorn, and as many of nginx", [_count(2 * n) for n in SIZES]),
        ("from the model, Gbit/s", [_count(n * a.pieces * m.upstream_bytes * 8 / 1e9, 1) for n in SIZES]),
        ("addresses of a NAT gateway", [_ceil(n / a.ports) for n in SIZES]),
        ("Redis servers, answers kept", [_ceil(n * redis / a.busy) for n in SIZES]),
        (
            f"kept in them for {a.retention / 3600:.0f} h, GB",
            [_count(n / a.seconds * a.retention * _kept(m, a) / 1e9) for n in SIZES],
        ),
    ]
    head = ["answers at a time", *(_count(n) for n in SIZES)]
    lines = [head, ["---", *("---:" for _ in SIZES)], *([name, *cells] for name, cells in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _memory(answers: int, workers: int, m: Measured) -> float:
    return answers * (m.stream + m.relayed) + workers * m.worker


def _kept(m: Measured, a: Assumed) -> float:
    return m.kept_bytes * a.pieces * a.seconds / 200


def _ceil(value: float) -> str:
    return f"{math.ceil(value):,}"


def _count(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}"


if __name__ == "__main__":
    print(machines_table())
