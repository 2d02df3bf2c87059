"""How probes went whose callers left or do not read, in files of this machine's temporary folder.

So any of its workers may be asked. A file is named after a hash of the probe's id and is readable by its owner alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

PREFIX = "streamchat-departure-"
OLD_SECONDS = 300.0


class Departures:
    """`folder` is shared by the workers of a machine."""

    def __init__(self, folder: str | None = None) -> None:
        self._folder = Path(folder or tempfile.gettempdir())

    def begin(self, id: str) -> None:
        """Raises FileExistsError for an id that was used."""
        self._sweep()
        descriptor = os.open(self._file(id), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with open(descriptor, "w") as file:
            file.write('{"state": "running"}')

    def advance(self, id: str, part: float) -> None:
        """How much of a probe has been taken, of 1."""
        self._write(id, {"state": "running", "part": part})

    def end(self, id: str, after: float | None) -> None:
        """`after`: how many seconds the caller had been there when it was seen to leave; None if it never was."""
        self._write(id, {"state": "stayed"} if after is None else {"state": "left", "after": round(after, 6)})

    def _write(self, id: str, told: dict[str, object]) -> None:
        descriptor, name = tempfile.mkstemp(prefix=PREFIX, dir=self._folder)
        with open(descriptor, "w") as file:
            file.write(json.dumps(told))
        os.replace(name, self._file(id))  # whole or not at all

    def find(self, id: str) -> dict[str, object]:
        """`state` is unknown (here), running, left or stayed; with `left` goes `after`, with running maybe `part`."""
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(self._file(id).read_text())
            if isinstance(found, dict):
                return found
        return {"state": "unknown"}

    def _file(self, id: str) -> Path:
        return self._folder / (PREFIX + hashlib.sha256(id.encode()).hexdigest()[:32])

    def _sweep(self) -> None:
        before = time.time() - OLD_SECONDS
        for file in self._folder.glob(PREFIX + "*"):
            with contextlib.suppress(OSError):
                if file.stat().st_mtime < before:
                    file.unlink()
