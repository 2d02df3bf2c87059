"""What is to be answered, for whom, and in whose words failures are told. Plain values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .errors import StreamChatError
from .prompt import Prompt


def detail_of(error: StreamChatError) -> str:
    """Our own words for a failure."""
    return error.detail


@dataclass(frozen=True)
class Order:
    """One answer before it is begun."""

    id: str
    user: str | None
    prompt: Prompt
    words: Callable[[StreamChatError], str] = detail_of  # what the caller is told of a failure
