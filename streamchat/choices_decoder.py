"""Chat Completions chunks of several answers to one question, and of tokens with their probabilities, become events.

Pure. Only for who asked for either: plain answers are read by decoder.py, which looks for neither.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .decoder import ChatDecoder, SurrogateJoiner, mended, rest_of, string
from .errors import UpstreamMalformed
from .events import ChoiceEnd, Event, Logprobs, Text

LEAST = -9999.0  # what OpenAI says for "very unlikely"; other servers say -Infinity, which is not JSON


class ChoicesDecoder(ChatDecoder):
    """Bytes of a Chat Completions stream to events. The answer is whole when each of its choices has ended."""

    def __init__(self, choices: int, logprobs: bool) -> None:
        super().__init__()
        self._joins = [SurrogateJoiner() for _ in range(choices)]
        self._logprobs = logprobs
        self._ends: dict[int, str] = {}  # finish_reason of each choice that has ended

    def _events(self, chunk: dict[str, Any]) -> list[Event]:
        self._count(chunk.get("usage"))
        events: list[Event] = []
        for choice in chunk.get("choices") or ():
            index = choice.get("index") or 0
            if type(index) is int and 0 <= index < len(self._joins):  # any other one is nobody's
                events += self._choice(index, choice)
        return events

    def _choice(self, index: int, choice: dict[str, Any]) -> list[Event]:
        self._join = self._joins[index]
        events = self._delta(choice.get("delta") or {})
        logprobs = logprobs_of(choice.get("logprobs") or {}) if self._logprobs else None
        if logprobs is not None:
            events = _with_logprobs(events, logprobs)
        if events and index in self._ends:
            raise UpstreamMalformed  # its reader has been told that it is whole
        if choice.get("finish_reason") and index not in self._ends:
            events += self._end(index, string(choice["finish_reason"]))
        # The union holds Start and others, which no choice has.
        return [replace(event, choice=index) for event in events] if index else events  # type: ignore[arg-type]

    def _end(self, index: int, reason: str) -> list[Event]:
        self._ends[index] = reason
        if len(self._ends) == len(self._joins):
            self._finish_reason = self._ends[0]
        rest = [rest_of(kind, text) for kind, text in self._join.rest()]
        return [*rest, ChoiceEnd(reason)] if len(self._joins) > 1 else rest


def _with_logprobs(events: list[Event], logprobs: Logprobs) -> list[Event]:
    """They stand with the first piece of their delta. Half an emoji makes no piece, but is a token."""
    first, *others = events or [Text("")]
    return [replace(first, logprobs=logprobs), *others]  # type: ignore[arg-type]


def logprobs_of(sent: dict[str, Any]) -> Logprobs | None:
    """Those of the tokens of one delta; None where there are none. A wrong shape raises what means malformed."""
    told = {kind: [_token(token) for token in sent.get(kind) or ()] or None for kind in ("content", "refusal")}
    return told if any(told.values()) else None


def _token(token: dict[str, Any]) -> dict[str, Any]:
    return {**_probability(token), "top_logprobs": [_probability(other) for other in token.get("top_logprobs") or ()]}


def _probability(token: dict[str, Any]) -> dict[str, Any]:
    logprob, raw = token["logprob"], token.get("bytes")
    return {
        "token": mended(string(token["token"])),
        "logprob": logprob if LEAST <= logprob <= -LEAST else LEAST,  # NaN is in no range
        "bytes": list(bytes(raw)) if isinstance(raw, list) else None,
    }
