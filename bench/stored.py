"""`bench/run --store`: what the response log costs, turn by turn beside the same server without it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager

from .measure import LOADS, QUICK, Sizes, warm_up
from .peers import PEERS, STORED, Peer, Server

TURNS = 5
FIGURES = {"piece10": ("us", "us a piece"), "single": ("ms", "ms a request of one piece")}


def compare(
    start: Callable[[Peer], AbstractContextManager[Server]], sizes: Sizes, progress: Callable[[str], None]
) -> str:
    """A line a load: the medians without and with the log, their ratio, and the delay of a piece where it is timed."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for turn in range(TURNS):
        for peer in (PEERS["streamchat"], STORED):
            with start(peer) as server:
                warm_up(server, QUICK)
                for load in FIGURES:
                    found.setdefault((peer.name, load), []).append(LOADS[load](server, sizes))
            progress(f"{peer.name}, turn {turn + 1} of {TURNS}")
    return "\n".join(_line(load, found) for load in FIGURES)


def _line(load: str, found: dict[tuple[str, str], list[dict[str, float]]]) -> str:
    name, unit = FIGURES[load]
    without, stored = (
        statistics.median(each[name] for each in found[peer.name, load]) for peer in (PEERS["streamchat"], STORED)
    )
    line = f"{unit}: {without:.2f} without, {stored:.2f} with the log, ratio {stored / without:.2f}"
    if load == "piece10":
        delays = (
            statistics.median(each["p99"] for each in found[peer.name, load]) for peer in (PEERS["streamchat"], STORED)
        )
        line += "; p99 of the delay {:.1f} and {:.1f} ms".format(*delays)
    return line
