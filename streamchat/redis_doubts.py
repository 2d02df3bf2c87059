"""What a process asked Redis to give it and never heard of: the next attempt names it. Does no I/O."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import StoreDown

# Seconds. A Redis that hung may do what it was sent after what it was sent later: each is named so long, and once more.
NAMED_FOR = 60.0


class Doubts:
    """Of one kind of attempt. `unknown` is what is raised where one may have been done."""

    def __init__(self, unknown: type[StoreDown], clock: Callable[[], float] = time.monotonic) -> None:
        self._unknown = unknown
        self._clock = clock
        self._numbers = itertools.count()
        self._random = secrets.token_hex(4)
        self._lost: dict[tuple[str, str], float] = {}  # owner and attempt: when it failed

    @contextmanager
    def attempt(self, owner: str) -> Iterator[tuple[str, list[str]]]:
        """The name of a new attempt, and those of the owner that are in doubt."""
        name = f"{self._random}-{next(self._numbers)}"
        lost = {each: at for each, at in list(self._lost.items()) if each[0] == owner}
        now = self._clock()
        try:
            yield name, [attempt for _, attempt in lost]
        except self._unknown:
            self._lost[owner, name] = self._clock()
            raise
        for each in [each for each, at in lost.items() if at < now - NAMED_FOR]:
            self._lost.pop(each, None)
