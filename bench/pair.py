"""Two gunicorns over one Redis behind one nginx, counted: `python -m bench.pair`, with what requirements-dev.txt has.

Counts of commands, bytes and descriptors, and CPU time: a busy machine changes the first not at all, the second little.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.live.servers import ROOT, Server, gunicorn, listens, nginx, wait_for
from tests.redis_server import RedisServer

from .load import Load, Question
from .machine import cpu_seconds, describe, memory_bytes, raise_file_limit, tree

OVERDUE = 60.0  # seconds beyond what an answer takes
OPENINGS_A_SECOND = 100.0
WARM = 20  # answers that nobody counts
# What comes over the wire in this measurement; all else that Redis counts is done inside its scripts.
WIRE = ("evalsha", "eval", "ping", "subscribe", "unsubscribe")
OWN = ("info", "client|list", "client|id", "config|set")  # asked by the measurement itself


@dataclass(frozen=True)
class Pair:
    """`redis` is None where nothing is kept."""

    instances: tuple[Server, Server]
    front: Server
    redis: RedisServer | None


@dataclass(frozen=True)
class Seen:
    """What Redis has done so far, by its own INFO."""

    commands: dict[str, int]
    cpu: float
    received: int
    sent: int
    memory: int

    def since(self, before: Seen) -> Seen:
        names = {name: count - before.commands.get(name, 0) for name, count in self.commands.items()}
        return Seen(
            {name: count for name, count in names.items() if count and name not in OWN},
            self.cpu - before.cpu,
            self.received - before.received,
            self.sent - before.sent,
            self.memory - before.memory,
        )

    @property
    def wire(self) -> int:
        return sum(self.commands.get(name, 0) for name in WIRE)

    @property
    def inside(self) -> int:
        return sum(self.commands.values()) - self.wire


def look(redis: RedisServer) -> Seen:
    told: dict[str, Any] = redis.client.info("all")
    stats = {name.removeprefix("cmdstat_"): told[name]["calls"] for name in told if name.startswith("cmdstat_")}
    cpu = told["used_cpu_user"] + told["used_cpu_sys"]
    return Seen(stats, cpu, told["total_net_input_bytes"], told["total_net_output_bytes"], told["used_memory"])


@contextlib.contextmanager
def upstream() -> Iterator[str]:
    command = [sys.executable, "-m", "bench.upstream"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        process.terminate()


@contextlib.contextmanager
def running(folder: Path, url: str, keeps: bool) -> Iterator[Pair]:
    """Both instances have one worker and the shipped configuration; nginx has the shipped one and a second server."""
    with ExitStack() as stack:
        # As most run it: what a second holds may be lost.
        redis = stack.enter_context(RedisServer(folder, "--appendfsync", "everysec")) if keeps else None
        kept = {"store_url": redis.url, "on_disconnect": "finish"} if redis is not None else {}
        first, second = (stack.enter_context(gunicorn(url, folder, "-w", "1", **kept)) for _ in range(2))

        def both(text: str) -> str:
            line = f"server 127.0.0.1:{first.port};"
            assert line in text
            changed = text.replace(line, f"{line} server 127.0.0.1:{second.port};")
            # What was not sent yet may go to the other: that spends nothing.
            return changed.replace("proxy_next_upstream off;", "proxy_next_upstream error;")

        yield Pair((first, second), stack.enter_context(nginx(first, folder, both)), redis)


def files(server: Server) -> int:
    """Open descriptors of the server's processes."""
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in tree(server.process.pid))


def stream(port: int, answers: int, pieces: int, pause: float, between: Callable[[], None] = lambda: None) -> None:
    """So many answers, begun one after the other; `between` is called while all of them run."""
    ramp = answers / OPENINGS_A_SECOND
    with closing(Load(Question(port, pieces, pause))) as load:
        load.plan(answers, ramp)
        assert load.run(lambda: load.begun, ramp + OVERDUE)
        assert load.open == answers, "the first ended before the last began: give them more pieces"
        between()
        assert load.run(lambda: load.open == 0, pieces * pause + OVERDUE)
        assert load.tally.whole == answers, f"{load.tally.whole} of {answers} whole"


def measure(pair: Pair, answers: int, pieces: int, pause: float) -> None:
    servers = {"first instance": pair.instances[0], "second instance": pair.instances[1], "nginx": pair.front}
    opened = {name: files(server) for name, server in servers.items()}  # before any connection is kept
    stream(pair.front.port, WARM, 100, 0.02)
    idle = {name: (opened[name], memory_bytes(server.process.pid)) for name, server in servers.items()}
    print("  idle: " + ", ".join(f"{name} {memory / 1e6:.0f} MB" for name, (_, memory) in idle.items()))
    known = {name: len(server.records()) for name, server in servers.items()}
    cpu = {name: cpu_seconds(server.process.pid) for name, server in servers.items()}
    before = look(pair.redis) if pair.redis is not None else None
    busy: dict[str, tuple[int, int]] = {}

    def note() -> None:
        busy.update({name: (files(server), memory_bytes(server.process.pid)) for name, server in servers.items()})

    stream(pair.front.port, answers, pieces, pause, note)
    wait_for(lambda: sum(len(server.records()) - known[name] for name, server in servers.items()) == answers)
    spent = {name: cpu_seconds(server.process.pid) - cpu[name] for name, server in servers.items()}
    for name, server in servers.items():
        own = server.records()[known[name] :]
        count = len(own) or answers
        made = sum(int(record["pieces"]) for record in own) or answers * pieces
        descriptors, memory = (after - idle_ for after, idle_ in zip(busy[name], idle[name], strict=True))
        print(
            f"  {name:15} {count:5} answers, {made:6} pieces, CPU {spent[name] / made * 1e6:5.0f} us a piece, "
            f"{descriptors / count:.2f} descriptors and {memory / count / 1e3:.0f} KB a stream"
        )
    if pair.redis is not None and before is not None:
        ended = pair.redis.client
        wait_for(lambda: ended.zcard("streamchat:ended") == answers + WARM, what="the end of all answers in the log")
        tell_redis(look(pair.redis).since(before), answers, answers * pieces)


def tell_redis(done: Seen, answers: int, pieces: int) -> None:
    print(
        f"  Redis: {done.wire} commands over the wire ({done.wire / answers:.2f} an answer, {done.wire / pieces:.3f} a "
        f"piece), {done.inside} inside scripts ({done.inside / answers:.1f} an answer, {done.inside / pieces:.2f} a "
        f"piece)\n"
        f"         CPU {done.cpu / pieces * 1e6:.1f} us a piece, {done.cpu / answers * 1e3:.2f} ms an answer; "
        f"{done.received / pieces:.0f} bytes in and {done.sent / pieces:.0f} out a piece; "
        f"{done.memory / answers / 1e3:.1f} KB kept of an answer"
    )
    print("         " + ", ".join(f"{name} {count}" for name, count in sorted(done.commands.items())))


def measure_idle(redis: RedisServer, seconds: float) -> None:
    before = look(redis)
    time.sleep(seconds)
    done = look(redis).since(before)
    print(f"  idle: {done.wire / seconds:.1f} commands a second over the wire, CPU {done.cpu / seconds:.2%} of a core")
    others = redis.connections()
    print(
        f"  Redis has {len(others)} connections of the two workers: "
        + ", ".join(sorted(each["cmd"] for each in others))
    )


def resume(pair: Pair, answers: int, pieces: int, pause: float) -> None:
    """Asked on the first instance, left after some pieces, read on at the second: every event once."""
    assert pair.redis is not None
    before, whole = look(pair.redis), 0
    for _ in range(answers):
        id, last = leave_after(pair.instances[0].port, pieces, pause)
        seqs = read_on(pair.instances[1].port, id, last)
        # Start, the pieces and finish.
        whole += seqs == list(range(last + 1, pieces + 2))
    done = look(pair.redis).since(before)
    print(
        f"  read on at the other instance: {whole} of {answers} answers of {pieces} pieces whole; "
        f"{sum(done.commands.values()) / answers:.1f} commands an answer in all, {done.sent / answers / pieces:.0f} "
        f"bytes out a piece, CPU {done.cpu / answers * 1e3:.2f} ms an answer"
    )
    print("         " + ", ".join(f"{name} {count}" for name, count in sorted(done.commands.items())))


def lose_one(pair: Pair, questions: int) -> None:
    """One instance is told to stop; who asks meanwhile."""
    pair.instances[0].terminate()
    wait_for(lambda: not listens(pair.instances[0].port), what="the end of the first instance")
    seen: Counter[int] = Counter()
    for _ in range(questions):
        with closing(http.client.HTTPConnection("127.0.0.1", pair.front.port, timeout=OVERDUE)) as connection:
            body = json.dumps({"message": "pieces=1;pause=0.01;hold=0"})
            connection.request("POST", "/api/get-response", body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            reply.read()
            seen[reply.status] += 1
    print(f"  with one instance gone, {questions} questions to nginx, by status: {dict(seen)}")


def leave_after(port: int, pieces: int, pause: float) -> tuple[str, int]:
    body = json.dumps({"message": f"pieces={pieces};pause={pause:.6f};hold=0"})
    headers = {"Content-Type": "application/json", "Accept": "application/x-ndjson"}
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=OVERDUE)) as connection:
        connection.request("POST", "/api/get-response", body, headers)
        reply = connection.getresponse()
        id, seq = str(reply.headers["X-Response-Id"]), -1
        while seq < pieces // 4:
            seq = json.loads(reply.readline()).get("seq", seq)
        return id, seq


def read_on(port: int, id: str, after: int) -> list[int]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=OVERDUE)) as connection:
        headers = {"Accept": "application/x-ndjson"}
        connection.request("GET", f"/api/responses/{id}/stream?after={after}", headers=headers)
        events = [json.loads(line) for line in connection.getresponse()]
        return [event["seq"] for event in events if "seq" in event]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.pair", description=__doc__)
    parser.add_argument("--answers", type=int, default=200, help="at a time (200)")
    parser.add_argument("--pieces", type=int, default=200, help="of an answer (200)")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds between two pieces (0.05)")
    given = parser.parse_args()
    raise_file_limit()
    print(f"{describe()}; load {os.getloadavg()[0]:.1f} at the beginning")
    for keeps in (True, False):
        print(f"{given.answers} answers of {given.pieces} pieces, {given.pause * 1000:.0f} ms apart, ", end="")
        print("kept in Redis:" if keeps else "not kept:")
        with tempfile.TemporaryDirectory() as folder, upstream() as url, running(Path(folder), url, keeps) as pair:
            measure(pair, given.answers, given.pieces, given.pause)
            if pair.redis is not None:
                measure_idle(pair.redis, 10.0)
                resume(pair, 20, 100, 0.02)
                lose_one(pair, 40)
    print(f"load {os.getloadavg()[0]:.1f} at the end")


if __name__ == "__main__":
    main()
