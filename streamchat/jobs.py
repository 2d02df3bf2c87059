"""What a queued answer is asked with, as the text that its row keeps until it has ended. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .prompt import Prompt


@dataclass(frozen=True, slots=True)
class Job:
    """`locale` is that of the words in which a failure is told."""

    messages: Sequence[Any]
    params: dict[str, Any]
    locale: str | None = None

    def prompt(self, model: str) -> Prompt:
        return Prompt(self.messages, model, self.params)


def pack_job(prompt: Prompt, locale: str | None) -> str:
    """Raises TypeError where a shop's `build_messages` gave what JSON cannot hold."""
    return json.dumps([list(prompt.messages), prompt.params, locale], separators=(",", ":"))


def unpack_job(request: str) -> Job:
    """Raises ValueError for what is no whole one."""
    try:
        return Job(*json.loads(request))
    except TypeError as error:
        raise ValueError("not a job of ours") from error
