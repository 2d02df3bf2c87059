"""`bench/run`: every chosen server under every chosen load, one after another in the same run, becomes one table."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import plot, soak, stored, table, tails
from .machine import Cores, choose_cores, describe, raise_file_limit
from .measure import FULL, LOADS, QUICK, Incomplete, Sizes, repeats, warm_up
from .peers import BENCH, PEERS, ROOT, Peer, PeerFailure, Server, find_nginx, running

RESULTS = BENCH / "RESULTS.md"
VERSIONS = ("flask", "gunicorn", "gevent", "openai", "fastapi", "uvicorn", "uvloop")
FILES = 5000  # two for each of 2,000 streams, in the server


@dataclass(frozen=True)
class Bench:
    """What all servers of a run have in common."""

    upstream: str
    folder: Path
    cores: Cores
    authority: Path | None

    def start(self, peer: Peer) -> contextlib.AbstractContextManager[Server]:
        folder = self.folder / peer.name
        folder.mkdir(exist_ok=True)
        cores = self.cores.server | self.cores.load if peer.anywhere else self.cores.server
        return running(peer, self.upstream, folder, cores, self.authority)


def main() -> None:
    chosen = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench/run: told to stop"))  # by way of every cleanup
    if (limit := raise_file_limit()) < FILES:
        print(f"Only {limit} open files are allowed: loads with many streams may not be whole.", file=sys.stderr)
    gc.freeze()
    gc.disable()  # the callers' own collections would be seen as delay
    try:
        with _bench(chosen.tls) as bench:
            if chosen.plot is not None:
                plot.draw(chosen.plot, plot.measure(bench.start, chosen.only, _progress), describe())
                return
            if chosen.soak is not None:
                print(
                    "MB after each minute:", *(f"{megabytes:.1f}" for megabytes in soak.soak(bench.start, chosen.soak))
                )
                return
            if chosen.store or chosen.tails:
                _measure_log(bench, chosen)
                return
            report = _compare(bench, chosen)
    except PeerFailure as failure:
        sys.exit(f"bench/run: {failure}")
    if chosen.write:
        RESULTS.write_text(report)
        print(f"written: {RESULTS.relative_to(ROOT)}", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run", description=__doc__)
    names, loads = ", ".join(PEERS), ", ".join(LOADS)
    parser.add_argument("--quick", action="store_true", help="under two minutes: smaller loads, no repetitions")
    parser.add_argument("--only", type=_names(PEERS), default=list(PEERS), help=f"servers, with commas: {names}")
    parser.add_argument("--load", type=_names(LOADS), default=list(LOADS), help=f"loads, with commas: {loads}")
    parser.add_argument("--repeat", type=int, help="how often each of the smaller loads is measured")
    parser.add_argument("--tls", action="store_true", help="the upstream speaks TLS, with a certificate of our own")
    parser.add_argument("--write", action="store_true", help="write bench/RESULTS.md, as a full run does")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw CPU per piece against streams, no table")
    parser.add_argument(
        "--store", action="store_true", help="streamchat with its log in SQLite beside itself without; then --tails"
    )
    parser.add_argument(
        "--tails",
        action="store_true",
        help=f"{FULL.tails:,} readers ({QUICK.tails} if quick) of running answers that another server makes, over one "
        "log in SQLite; and a long answer read there after its end",
    )
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="50 streams for so long: memory by the minute")
    chosen = parser.parse_args()
    everything = chosen.only == list(PEERS) and chosen.load == list(LOADS)
    chosen.write = chosen.write or (
        everything and not (chosen.quick or chosen.tls or chosen.plot or chosen.soak or chosen.store or chosen.tails)
    )
    return chosen


def _names(known: Mapping[str, object]) -> Callable[[str], list[str]]:
    """Names with commas between, in the order in which they are known."""

    def parse(text: str) -> list[str]:
        given = text.split(",")
        for name in given:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return [name for name in known if name in given]

    return parse


@contextlib.contextmanager
def _bench(tls: bool) -> Iterator[Bench]:
    """The fake upstream runs beside us, on the cores of the load, until the block ends."""
    cores = choose_cores()
    os.sched_setaffinity(0, cores.load)
    with tempfile.TemporaryDirectory(prefix="streamchat-bench-") as name:
        folder = Path(name)
        certificate, authority = _certificate(folder) if tls else (None, None)
        command = [sys.executable, "-m", "bench.upstream", *([str(certificate)] if certificate else [])]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            yield Bench(f"{'https' if tls else 'http'}://127.0.0.1:{port}/v1", folder, cores, authority)
        finally:
            process.terminate()
            process.wait()


def _certificate(folder: Path) -> tuple[Path, Path]:
    """The upstream's chain with its key, and the authority that the servers are told to trust."""
    import trustme  # only with --tls

    authority, both = trustme.CA(), folder / "upstream.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(both))
    authority.cert_pem.write_to_path(str(folder / "authority.pem"))
    return both, folder / "authority.pem"


def _measure_log(bench: Bench, chosen: argparse.Namespace) -> None:
    sizes = QUICK if chosen.quick else FULL
    if chosen.store:
        print(stored.compare(bench.start, sizes, _progress), flush=True)
    try:
        print(tails.measure(bench.start, sizes, _progress))
    except (Incomplete, OSError) as failure:
        sys.exit(f"bench/run: {failure}")


def _compare(bench: Bench, chosen: argparse.Namespace) -> str:
    sizes = QUICK if chosen.quick else FULL
    rows = {name: table.Row(PEERS[name].title, missing=PEERS[name].missing()) for name in chosen.only}
    for group, turn in _turns(chosen, sizes):
        for name, row in rows.items():
            if row.missing is None:
                _measure_group(bench, PEERS[name], row, group, sizes, turn)
    lines = table.cells(rows, chosen.load, sizes)
    caption = _caption(bench, chosen)
    print(f"{table.plain(lines)}\n\n{table.LEGEND}\n\n{caption}")
    return f"# Results\n\n{table.markdown(lines)}\n\n{table.LEGEND}\n\n{caption}\n"


def _turns(chosen: argparse.Namespace, sizes: Sizes) -> Iterator[tuple[list[str], int]]:
    """Groups of loads, as often as they are to be repeated: all servers take their turn before the next."""
    for group in sizes.groups:
        wanted = [load for load in group if load in chosen.load]
        times = chosen.repeat or repeats(group[0], sizes)
        for turn in range(times if wanted else 0):
            yield wanted, turn + 1


def _measure_group(bench: Bench, peer: Peer, row: table.Row, loads: Sequence[str], sizes: Sizes, turn: int) -> None:
    """A load that fails leaves the others as they are; a server that fails to warm up has none."""
    with bench.start(peer) as server:
        try:
            warm_up(server, sizes)
        except (Incomplete, OSError) as failure:
            row.faults |= dict.fromkeys(loads, str(failure))
            return
        for load in loads:
            begin = time.monotonic()
            try:
                row.figures.setdefault(load, []).append(LOADS[load](server, sizes))
            except (Incomplete, OSError) as failure:
                row.faults[load] = str(failure)
            _progress(f"{peer.name}: {load}, turn {turn}, {time.monotonic() - begin:.1f} s")


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _caption(bench: Bench, chosen: argparse.Namespace) -> str:
    command = " ".join(["bench/run", *sys.argv[1:]])
    upstream = "TLS" if chosen.tls else "plain HTTP"
    return f"""\
Made on {datetime.date.today().isoformat()} by `{command}` on {describe()}; {bench.cores}; upstream: {upstream}.
{_versions()}."""


def _versions() -> str:
    found = [f"{name} {importlib.metadata.version(name)}" for name in VERSIONS]
    express = json.loads((BENCH / "express" / "package.json").read_text())["dependencies"]
    found += [f"npm {name} {version}" for name, version in express.items()]
    programs = [_said("node", "--version").replace("v", "Node "), _said(find_nginx(), "-v")]
    return ", ".join([f"Python {sys.version.split()[0]}", *found, *filter(None, programs)])


def _said(program: str | None, option: str) -> str:
    """A program's own line about its version, "" where there is no such program."""
    if program is None or shutil.which(program) is None:
        return ""
    run = subprocess.run([program, option], capture_output=True, text=True)
    return (run.stdout + run.stderr).strip().removeprefix("nginx version: ")


if __name__ == "__main__":
    main()
