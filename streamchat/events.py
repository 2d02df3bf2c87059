"""What an answer is made of: frozen values, and their JSON form. Knows no format, no HTTP, no clock.

One delta of the upstream is one event with one `seq`; whoever numbers them counts from 0 without gaps. `choice` says
which of several answers to one question it belongs to; only OpenAI's clients may ask for more than the one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

# As Chat Completions has them: {"content": [...] or None, "refusal": [...] or None}. Fields of it stay out of an
# event's hash, since a dict has none.
Logprobs = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Start:
    """Opens every answer."""

    type: ClassVar[str] = "start"
    id: str
    model: str
    created_at: int


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of the answer."""

    type: ClassVar[str] = "text"
    text: str
    choice: int = 0
    logprobs: Logprobs | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thinks before it answers."""

    type: ClassVar[str] = "reasoning"
    text: str
    choice: int = 0
    logprobs: Logprobs | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A piece of the words in which the model declines."""

    type: ClassVar[str] = "refusal"
    text: str
    choice: int = 0
    logprobs: Logprobs | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A piece of a tool call; `id` and `name` stand in its first piece only, `arguments` is JSON text in parts."""

    type: ClassVar[str] = "tool_call"
    index: int
    id: str | None
    name: str | None
    arguments: str
    choice: int = 0
    logprobs: Logprobs | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """One of several answers is whole. Finish still ends them all, when each of them has ended."""

    type: ClassVar[str] = "choice_end"
    finish_reason: str
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens; `estimated` where the upstream did not say."""

    input_tokens: int
    output_tokens: int
    estimated: bool = False

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens


INCOMPLETE = ("length", "content_filter")  # finish reasons: the model was stopped


@dataclass(frozen=True, slots=True)
class Finish:
    """The upstream said that the answer is whole. `usage` is None until somebody counted.

    Of several answers, `finish_reason` is that of the first.
    """

    type: ClassVar[str] = "finish"
    finish_reason: str
    usage: Usage | None = None

    @property
    def status(self) -> Literal["completed", "incomplete"]:
        """What has become of the answer: the object of a whole answer and the log say the same."""
        return "incomplete" if self.finish_reason in INCOMPLETE else "completed"


@dataclass(frozen=True, slots=True)
class Failure:
    """The answer ends here and is not whole."""

    type: ClassVar[str] = "error"
    code: str
    message: str
    retryable: bool


Event = Start | Text | Reasoning | Refusal | ToolCall | ChoiceEnd | Finish | Failure
ENDS = (Finish, Failure)
UNSAID = frozenset({"choice", "logprobs"})  # left out of the JSON form where they are 0 and None


def usage_json(usage: Usage | None) -> dict[str, object] | None:
    """The JSON form of a usage; total_tokens is input_tokens plus output_tokens."""
    if usage is None:
        return None
    return {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "total_tokens": usage.total_tokens,
        "estimated": usage.estimated,
    }


def to_json(seq: int, event: Event) -> dict[str, object]:
    """The JSON object of one event: type, seq, then its own fields in their order; UNSAID where they say nothing."""
    body: dict[str, object] = {"type": event.type, "seq": seq}
    if isinstance(event, Finish):
        return body | {"finish_reason": event.finish_reason, "usage": usage_json(event.usage)}
    for name in event.__slots__:
        value = getattr(event, name)
        if value or name not in UNSAID:
            body[name] = value
    return body
