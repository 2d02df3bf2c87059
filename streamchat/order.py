"""What is to be answered, for whom, and in whose words failures are told. Plain values."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .errors import StreamChatError
from .events import Start
from .prompt import Prompt


def detail_of(error: StreamChatError) -> str:
    """Our own words for a failure."""
    return error.detail


@dataclass(frozen=True, slots=True)
class Notice:
    """The webhook that tells the end of a queue's answer."""

    queue: str
    target: str
    with_text: bool


@dataclass(frozen=True)
class Order:
    """One answer before it is begun."""

    id: str
    user: str | None
    prompt: Prompt
    words: Callable[[StreamChatError], str] = detail_of  # what the caller is told of a failure
    notice: Notice | None = None
    created_at: float = field(default_factory=time.time)  # when it was asked for: of one that was queued long ago

    @property
    def start(self) -> Start:
        """The first event."""
        return Start(self.id, self.prompt.model, int(self.created_at))
