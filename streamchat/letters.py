"""A webhook on its way: what an outbox keeps of it, and what every outbox promises. Does no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from .attempts import Next

State = Literal["waiting", "delivered", "dead"]
OFF = "the target is switched off"  # what the letter of a switched off target is told


@dataclass(frozen=True, slots=True)
class Letter:
    """One webhook: id, bytes and target are the same at every attempt. Times are Unix times."""

    id: str  # webhook-id
    answer: str
    queue: str  # whose secrets sign it
    target: str
    body: bytes
    created_at: float
    state: State = "waiting"
    attempts: int = 0
    due: float = 0.0  # of the next attempt, while it waits
    told: str = ""  # what came of the last attempt: a status, or a fault


class Outbox(Protocol):
    """A part of a store: a letter comes in by the transaction that ends its answer. Raises StoreDown as its store."""

    def take(self, owner: str, queue: str, now: float, most: int) -> list[Letter]:
        """The letters of a queue that are due, the first due first. Nobody else gets them until they are settled, or
        the owner is dead. Raises LeaseLost.
        """

    def settle(self, owner: str, id: str, next: Next, told: str) -> None:
        """One more attempt was made by who took it: what follows. Nothing where somebody else has it by now.

        With `switch_off` all waiting letters to its target are dead, and those that come later are born so.
        """

    def find(self, id: str) -> Letter | None: ...

    def letters(self, state: State | None, most: int) -> list[Letter]:
        """The newest first."""

    def replay(self, id: str, now: float) -> bool:
        """Has a letter delivered once more, from the first attempt on, and switches its target on. False: no such."""
