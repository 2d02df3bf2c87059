"""CPU per piece against the number of open streams, as a picture. The only user of matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from .measure import FULL, paced, warm_up
from .peers import PEERS, Peer, Server

SHOWN = ("streamchat", "streamchat-0", "express", "gevent")
STREAMS = (1, 10, 50, 200, 1000, 2000)
PIECES_A_SECOND = 1000.0  # of all streams together: what changes is only over how many they are spread
SECONDS = 5.0
MANY, TURNS = 1000, 3  # from so many streams on once is enough: opening them takes the longest

Curves = dict[str, list[tuple[int, float]]]


def measure(
    start: Callable[[Peer], AbstractContextManager[Server]], chosen: Sequence[str], progress: Callable[[str], None]
) -> Curves:
    """Microseconds for each number of streams, by the servers' titles; those that are missing here are left out."""
    peers = [PEERS[name] for name in SHOWN if name in chosen and PEERS[name].missing() is None]
    curves: Curves = {peer.title: [] for peer in peers}
    for peer in peers:
        with start(peer) as server:
            warm_up(server, FULL)
            for streams in STREAMS:
                progress(f"{peer.name}: {streams} streams")
                found = [
                    paced(server, streams, streams / PIECES_A_SECOND, SECONDS)["us"] for _ in range(_turns(streams))
                ]
                curves[peer.title].append((streams, statistics.median(found)))
    return curves


def _turns(streams: int) -> int:
    return 1 if streams >= MANY else TURNS


def draw(file: Path, curves: Curves, machine: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for title, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=title)
    axes.set_xscale("log")
    axes.set_xticks(STREAMS, map(str, STREAMS))
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"open streams, {PIECES_A_SECOND:,.0f} pieces a second in all")
    axes.set_ylabel("CPU microseconds a piece")
    axes.set_title(machine, fontsize=8)
    axes.legend(fontsize=8)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
