"""One answer as a memory store keeps it, and what others are told of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from .bookkeeping import Unfinished, chars_of
from .store import LIVE, Batch, Ending, Entry, Kept, Status


@dataclass(slots=True)
class MemoryAnswer:
    entry: Entry
    status: Status
    batches: list[Batch] = field(default_factory=list)
    ending: Ending | None = None
    ended_at: float = 0.0  # Unix time
    attended_at: float | None = None
    is_cancelled: bool = False
    owner: str = ""  # of a queued one nobody, until it is claimed
    claims: int = 0

    @property
    def is_live(self) -> bool:
        return self.status in LIVE

    @property
    def next(self) -> int:
        return self.batches[-1].last + 1 if self.batches else 0

    @property
    def size(self) -> int:
        return sum(len(batch.payload) for batch in self.batches)


def unfinished(answer: MemoryAnswer) -> Unfinished:
    entry = answer.entry
    told = (entry.id, entry.user, entry.model, entry.created_at)
    chars = chars_of(batch.payload for batch in answer.batches)
    return Unfinished(*told, answer.next, chars, entry.queue, entry.target)


def kept_of(answer: MemoryAnswer) -> Kept:
    entry, ending = answer.entry, answer.ending
    return Kept(
        id=entry.id,
        user=entry.user,
        chat=entry.chat,
        model=entry.model,
        created_at=entry.created_at,
        status=answer.status,
        owner=answer.owner,
        next=answer.next,
        finish_reason=ending.finish_reason if ending else None,
        usage=ending.usage if ending else None,
        error=ending.error if ending else None,
    )
