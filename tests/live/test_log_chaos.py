"""Some hundred chaotic endings and a few killed workers leave every gauge at zero; log_chaos.py runs thousands."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.live.log_chaos import chaos, servers_over
from tests.live.pair import STORES

pytestmark = [pytest.mark.live, pytest.mark.long]

ENDINGS = 200
KILLS = 3


@pytest.mark.parametrize("kind", STORES)
def test_chaotic_endings_and_killed_workers_leave_every_gauge_at_zero(kind: str, tmp_path: Path) -> None:
    seed = int(os.environ.get("CHAOS_SEED") or random.randrange(1 << 32))
    print(f"CHAOS_SEED={seed}")
    with servers_over(kind, tmp_path) as pair:
        outcome = chaos(pair, ENDINGS, KILLS, seed)
        print("\n".join(outcome.lines()))
        assert outcome.is_clean
        assert outcome.kills == KILLS
        assert outcome.completed >= ENDINGS / 10
        for server in (pair.first, pair.second):
            assert "ERROR streamchat" not in server.log and "Traceback" not in server.log
