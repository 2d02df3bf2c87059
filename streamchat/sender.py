"""Letters that are due become webhooks: signed anew at each attempt, posted, and settled by what came of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from .attempts import Reply, after
from .delivery import Courier
from .errors import LeaseLost, StoreDown
from .letters import Letter
from .log import Log
from .loop import Loop
from .settings import Settings
from .webhooks import Message, sign

logger = logging.getLogger("streamchat")

AT_ONCE = 20  # that one process delivers; each takes 10 s at most
AGAIN = 0.5  # seconds until the store is told again what it did not hear


class Sender:
    """For the letters of one queue. Its deliveries run beside the caller, at most AT_ONCE of them."""

    def __init__(
        self,
        log: Log,
        loop: Loop,
        settings: Settings,
        queue: str,
        courier: Courier | None = None,
        clock: Callable[[], float] = time.time,
        room: Callable[[], object] = lambda: None,
    ) -> None:
        """`room` is called when one of AT_ONCE is done, and others may wait for its place."""
        self._log = log
        self._loop = loop
        self._secrets = settings.webhook_secrets
        self._queue = queue
        self._courier = courier or Courier(loopback=settings.webhook_loopback)
        self._clock = clock
        self._room = room
        self._full = False
        self.sending: set[str] = set()

    def send_due(self) -> None:
        """Begins to deliver what is due. Raises StoreDown, LeaseLost."""
        room = AT_ONCE - len(self.sending)
        if not self._secrets or room <= 0:
            return

        def taken(owner: str) -> list[tuple[str, Letter]]:
            letters = self._log.store.outbox.take(owner, self._queue, self._clock(), room)
            return [(owner, letter) for letter in letters]

        found = self._log.lease.ask(taken)
        self._full = len(found) == room
        for owner, letter in found:
            self.sending.add(letter.id)
            self._loop.spawn(lambda owner=owner, letter=letter: self._send(owner, letter))  # type: ignore[misc]

    def _send(self, owner: str, letter: Letter) -> None:
        try:
            self._settle(owner, letter, self._posted(letter))
        except LeaseLost:
            self._log.lease.lose(owner)  # somebody else delivers it again: its receiver knows it by its id
        except Exception:  # a bug: the letter is taken again when this process has ended
            logger.exception("webhook %s cannot be delivered", letter.id)
        finally:
            self.sending.discard(letter.id)
            if self._full:
                self._room()

    def _posted(self, letter: Letter) -> Reply:
        headers = sign(Message(letter.id, letter.body), self._secrets, self._clock())
        return self._courier.post(letter.target, headers, letter.body)

    def _settle(self, owner: str, letter: Letter, reply: Reply) -> None:
        """Until the store has heard it: what it does not know is delivered again."""
        next, told = after(reply, letter.attempts + 1, self._clock()), str(reply.status or reply.fault)
        logger.info("webhook id=%s answer=%s told=%s state=%s", letter.id, letter.answer, told, next.state)
        while True:
            try:
                return self._log.store.outbox.settle(owner, letter.id, next, told)
            except StoreDown:
                if self._log.lease.owner != owner:
                    raise LeaseLost from None
                self._loop.pause(time.monotonic() + AGAIN)
