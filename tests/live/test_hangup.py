"""A caller that leaves ends the model's work at once, in every state and way, through gunicorn and nginx.

A few trials of each; `python -m tests.live.hangup_trials` runs as many as the promise is about, and prints a table.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.live.hangup_trials import STATES, TARGET, WAYS, Chain, State, Trial, chain, quantile, run_all, trials_of

pytestmark = pytest.mark.live

TRIALS = len(WAYS)  # of each state, hop and kind of upstream: every way is among them once


@pytest.fixture(
    scope="module",
    params=[(False, "auto"), (True, "auto"), (False, "sdk"), (True, "sdk")],
    ids=["plain", "TLS", "plain by the SDK's HTTP", "TLS by the SDK's HTTP"],
)
def tls_and_chain(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[bool, Chain]]:
    tls, http = request.param
    with chain(tmp_path_factory.mktemp("hangup"), tls, http=http) as servers:
        yield tls, servers


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.name.replace(" ", "_"))
def test_a_leaving_caller_closes_the_upstream_connection(state: State, tls_and_chain: tuple[bool, Chain]) -> None:
    tls, servers = tls_and_chain
    trials = trials_of([state], servers.hops, tls, TRIALS)
    run_all(trials, servers)
    assert [story(trial) for trial in trials if not as_promised(trial)] == []
    times = [trial.seconds for trial in trials]
    # Of so few trials p99 would be the slowest one: a neighbour of this machine may have that.
    assert quantile(times, 0.9) <= TARGET, sorted(times)


def as_promised(trial: Trial) -> bool:
    return trial.outcome == "caller_left" and trial.posts == 1 and not trial.clean_end and trial.seconds < 1


def story(trial: Trial) -> str:
    return (
        f"{trial.hop}, {trial.way.name}, {trial.accept}: {trial.outcome}, {trial.posts} POSTs, "
        f"{'a clean' if trial.clean_end else 'no'} end, {trial.seconds * 1000:.1f} ms"
    )


def test_nothing_of_a_leaving_stands_in_the_log_as_an_error(tls_and_chain: tuple[bool, Chain]) -> None:
    tls, servers = tls_and_chain
    run_all(trials_of(STATES, ["direct"], tls, 2, "log"), servers)
    assert "ERROR" not in servers.gunicorn.log
    assert "Traceback" not in servers.gunicorn.log


def test_a_leaving_caller_is_seen_by_a_worker_of_threads_too(tmp_path: Path) -> None:
    with chain(tmp_path, False, "-k", "gthread", "--threads", "20") as servers:
        trials = trials_of(STATES, ["direct"], False, len(WAYS))
        run_all(trials, servers)
        assert [story(trial) for trial in trials if not as_promised(trial)] == []
