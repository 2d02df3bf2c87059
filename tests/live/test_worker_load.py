"""500 background answers at once on one worker: all end and are told, and cost what live ones without a caller cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.live.worker_load import compare

pytestmark = [pytest.mark.live, pytest.mark.long]

ANSWERS = 500
NOISE = 1.5  # CPU time and memory of the same work differ as much on a busy machine


def test_500_background_answers_cost_what_500_live_ones_without_a_caller_cost(tmp_path: Path) -> None:
    loads = compare(tmp_path, ANSWERS)
    live, jobs = loads["live"], loads["jobs"]
    print(live.line(), jobs.line(), sep="\n")
    assert live.failed == jobs.failed == 0
    assert jobs.told == ANSWERS + 1  # and the one before them
    assert jobs.kib < NOISE * live.kib
    assert jobs.microseconds < NOISE * live.microseconds
