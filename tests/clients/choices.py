"""What an upstream sends that is asked for several answers, or for the probabilities of tokens: rows of the fake one.

Chat Completions only. By hand from the documented format; each row is a list of HTTP chunks without the last one.
"""

from __future__ import annotations

from typing import Any

from tests.fake_upstream import Fin, Hang, Rst, Step, done, head, http_chunk, last_chunk, sse, usage_chunk

# The answers, by their index: the first ends while the others go on.
TEXTS = {0: "Yes, \U0001f30a", 1: "No, not at all."}
REASONS = {0: "stop", 1: "length"}


def part(index: int, delta: dict[str, Any], finish_reason: str | None = None, logprobs: Any = None) -> bytes:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    body = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1790000000, "model": "gpt-4.1-mini"}
    return http_chunk(sse({**body, "choices": [choice]}))


def token(word: str, logprob: float, other: str) -> dict[str, Any]:
    best = {"token": word, "logprob": logprob, "bytes": list(word.encode())}
    return {**best, "top_logprobs": [best, {"token": other, "logprob": -9999.0, "bytes": None}]}


def tokens(*told: dict[str, Any]) -> dict[str, Any]:
    return {"content": list(told), "refusal": None}


HELLO, WORLD = token("Hello", -0.25, "Hi"), token(", world", -1.5, "!")

_ROLES = [part(index, {"role": "assistant", "content": "", "refusal": None}) for index in (0, 1)]
# The two halves of an emoji of the first answer, with a piece of the second between them.
_BOTH = [
    *_ROLES,
    part(0, {"content": "Yes, "}),
    part(1, {"content": "No, "}),
    part(0, {"content": "\ud83c"}),
    part(1, {"content": "not at"}),
    part(0, {"content": "\udf0a"}),
    part(0, {}, "stop"),
]
_REST = [part(1, {"content": " all."}), part(1, {}, "length")]
_END = [usage_chunk(19, 10), done()]
_SURE = [
    part(0, {"role": "assistant", "content": ""}, None, tokens()),
    part(0, {"content": "Hello"}, None, tokens(HELLO)),
    part(0, {"content": ", world"}, None, tokens(WORLD)),
    part(0, {}, "stop"),
]
_BOTH_SURE = [
    *_ROLES,
    part(1, {"content": ", world"}, "stop", tokens(WORLD)),
    part(0, {"content": "Hello"}, "stop", tokens(HELLO)),
]

ROWS: dict[str, list[Step]] = {
    "two answers": [head(), *_BOTH, *_REST, *_END, last_chunk()],
    "two answers that nobody counted": [head(), *_BOTH, *_REST, done(), last_chunk()],
    "probabilities": [head(), *_SURE, *_END, last_chunk()],
    "two probable answers": [head(), *_BOTH_SURE, *_END, last_chunk()],
}
# The first answer has ended, the second has not: code and status of what the client is told.
CUT: dict[str, tuple[list[Step], str, int]] = {
    "end mark after one of two answers": ([head(), *_BOTH, *_END, last_chunk()], "upstream_incomplete", 502),
    "end of file after one of two answers": ([head(), *_BOTH, last_chunk()], "upstream_incomplete", 502),
    "fin after one of two answers": ([head(), *_BOTH, Fin()], "upstream_incomplete", 502),
    "reset after one of two answers": ([head(), *_BOTH, Rst()], "upstream_incomplete", 502),
    "stall after one of two answers": ([head(), *_BOTH, Hang()], "upstream_stalled", 504),
    "words after the end of an answer": (
        [head(), *_BOTH, part(0, {"content": "more"}), *_REST, *_END, last_chunk()],
        "upstream_malformed",
        502,
    ),
    "one answer for two": ([head(), *_SURE, *_END, last_chunk()], "upstream_incomplete", 502),
}
SCRIPTS: dict[str, list[Step]] = ROWS | {name: script for name, (script, _, _) in CUT.items()}
