"""One Node process with every client in it: a job and its options in, what the client's user sees out."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
INSTALL = "run `npm ci --force` in tests/clients"


class Node:
    """jobs.mjs at the other end of two pipes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._numbers = itertools.count()

    def run(self, job: str, **options: Any) -> Any:
        return self.run_all([{"job": job, **options}])[0]

    def run_all(self, jobs: list[dict[str, Any]]) -> list[Any]:
        """What the clients see, in the order of the jobs. They run at the same time."""
        assert self._process.stdin and self._process.stdout
        numbers = [next(self._numbers) for _ in jobs]
        for number, job in zip(numbers, jobs, strict=True):
            self._process.stdin.write(json.dumps({"id": number, **job}) + "\n")
        self._process.stdin.flush()
        told = [json.loads(self._process.stdout.readline()) for _ in jobs]
        seen = {each["id"]: _judged(each) for each in told}
        return [seen[number] for number in numbers]


def _judged(told: dict[str, Any]) -> Any:
    assert "failed" not in told, told["failed"]
    assert told["unhandled"] == []
    return told["seen"]


@contextlib.contextmanager
def node() -> Iterator[Node]:
    program = shutil.which("node")
    assert program, "Node is missing: install Debian's package npm"
    assert (FOLDER / "node_modules").exists(), f"the clients are missing: {INSTALL}"
    command = [program, "jobs.mjs"]
    with subprocess.Popen(command, cwd=FOLDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Node(process)
        finally:
            process.terminate()
