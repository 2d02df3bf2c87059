"""What becomes of an answer whose caller leaves: it is stopped, finished, or kept for those who may read on."""

from __future__ import annotations

import time

from .cancellation import Cancellation
from .errors import CallerGone, StreamChatError
from .loop import NEVER, Loop
from .sheet import Sheet


class Absence:
    """One answer's. `since`: monotonic, when its caller left and it went on; 0.0 until then.

    `findable`: somebody may come back to it, by its key, by its chat, or by its id, which the headers tell.
    """

    def __init__(self, policy: str | float, loop: Loop, cancellation: Cancellation) -> None:
        self._policy, self._loop, self._cancellation = policy, loop, cancellation
        self.sheet: Sheet | None = None
        self.findable = False
        self.since = 0.0

    @property
    def is_survived(self) -> bool:
        """Whether the answer goes on when its caller leaves; to wait for one who reads on needs the log."""
        return self._policy == "finish" or (
            isinstance(self._policy, float) and self.sheet is not None and self.sheet.can_be_read
        )

    def begin(self, error: StreamChatError | None = None) -> None:
        """The caller has left; `error` is why an answer ends that does not go on. Idempotent, and does not wait.

        Nobody comes back to what nobody can find: it goes on only where somebody reads it already.
        """
        if not self.is_survived:
            self._cancellation.cancel(error or CallerGone())
        elif not self.since:
            self.since = time.monotonic()
            if self._policy != "finish" and not self.findable:
                self._loop.spawn(self._look_for_readers)

    def tick(self, now: float) -> None:
        """For the sweep: an answer that waits for one who reads on does so for its time."""
        if self.since and isinstance(self._policy, float) and now - self.since > self._policy:
            self.since = now
            self._loop.spawn(self._look_for_readers)

    def _look_for_readers(self) -> None:
        idle = self.sheet.idle() if self.sheet is not None else NEVER
        if idle > float(self._policy):
            self._cancellation.cancel(CallerGone())
        else:
            self.since = time.monotonic() - idle
