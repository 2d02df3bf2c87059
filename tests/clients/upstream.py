"""What the fake upstream does for each question of a client: the name of a row in the question chooses its script.

Rows are those of the corpus, played to their clean end, and faults of the wire, in both APIs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.clients.choices import SCRIPTS
from tests.clients.corpus import CASES, pieces, played, upstream_bytes
from tests.fake_upstream import (
    Fin,
    Hang,
    Pause,
    RecordedRequest,
    Rst,
    Step,
    error,
    head,
    http_chunk,
    key_echoing_401,
    last_chunk,
)

# Words of the upstream that nobody outside may read.
WORDS = ("sk-canary", "org-4f2a", "said no", "Incorrect API key")


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and what the client is told. `text` is what its user has read by then."""

    script: Callable[[str], Step]
    code: str
    status: int  # of an answer that is told whole, and of all answers where `early`
    message: str
    early: bool = False
    text: str = "Hello, w\u00f6rld \U0001f30a"


def _after_two_pieces(*steps: Step) -> Callable[[str], Step]:
    return lambda api: [head(), *pieces("cut", api), *steps]


def _at_once(step: Step) -> Callable[[str], Step]:
    return lambda api: step


FAILED = "The model's provider failed."
CUT = "The answer was cut off."
MALFORMED = "The model's provider sent something that is not an answer."
BUSY = "The model is asked too often at the moment. Try again later."
QUOTA = "The model's quota is used up."
SAID_NO = "org-4f2a and key sk-canary-0123456789 said no."

FAULTS = {
    "401": Fault(
        _at_once(key_echoing_401), "upstream_auth", 502, "The model's provider does not accept this server's key.", True
    ),
    "429": Fault(_at_once(error(429, "rate_limit_exceeded", SAID_NO)), "upstream_rate_limited", 503, BUSY, True),
    "quota": Fault(_at_once(error(429, "insufficient_quota", SAID_NO)), "upstream_quota", 503, QUOTA, True),
    "500": Fault(_at_once(error(500, None, SAID_NO, kind="server_error")), "upstream_error", 502, FAILED, True),
    "400": Fault(
        _at_once(error(400, "unknown_parameter", SAID_NO)),
        "upstream_rejected",
        502,
        "The model's provider rejected the request.",
        True,
    ),
    "context overflow": Fault(
        _at_once(error(400, "context_length_exceeded", SAID_NO)),
        "input_too_long",
        413,
        "The conversation is too long for the model.",
        True,
    ),
    "early reset": Fault(_at_once(Rst()), "upstream_incomplete", 502, CUT, True),
    "cut_before_text": Fault(lambda api: played("cut_before_text", api), "upstream_incomplete", 502, CUT, True),
    "fin in a chunk": Fault(_after_two_pieces(b'80\r\ndata: {"id":', Fin()), "upstream_incomplete", 502, CUT),
    "reset": Fault(_after_two_pieces(Rst()), "upstream_incomplete", 502, CUT),
    "cut": Fault(_after_two_pieces(last_chunk()), "upstream_incomplete", 502, CUT),
    "cut_reasoning": Fault(lambda api: played("cut_reasoning", api), "upstream_incomplete", 502, CUT, text=""),
    "cut_tool": Fault(lambda api: played("cut_tool", api), "upstream_incomplete", 502, CUT, text=""),
    "stall": Fault(
        _after_two_pieces(Hang()), "upstream_stalled", 504, "The model stopped in the middle of the answer."
    ),
    "malformed then silence": Fault(
        _after_two_pieces(http_chunk(b'data: {"choices": [}\n\n'), Hang()), "upstream_malformed", 502, MALFORMED
    ),
    "error": Fault(lambda api: played("error", api), "upstream_error", 502, FAILED),
    "error_rate_limit": Fault(
        lambda api: played("error_rate_limit", api), "upstream_rate_limited", 503, BUSY, text="Hello"
    ),
    "error_quota": Fault(lambda api: played("error_quota", api), "upstream_quota", 503, QUOTA, text="Hello"),
}


def _slow(api: str) -> Step:
    """Longer silent than the status of the server "hasty" waits, and again after the first piece of text."""
    first, *others = pieces("text", api)
    paused: list[Step] = [[step, Pause(0.2)] if b'"Hello"' in step else step for step in others]
    return [head(), first, Pause(0.4), *paused, last_chunk()]


def _broken_arguments(api: str) -> Step:
    """A tool call that ends well, but whose arguments are not JSON: small models do that."""
    body = upstream_bytes("text_then_tool", api).replace(rb'\"}"', rb'\""')
    return [head(), http_chunk(body), last_chunk()]


SPECIAL: dict[str, Callable[[str], Step]] = {
    "slow": _slow,
    "silent": lambda api: [head(), Hang()],
    "endless": _after_two_pieces(Hang()),
    "broken arguments": _broken_arguments,
}


def api_of(request: RecordedRequest) -> str:
    return "responses" if request.path.endswith("/responses") else "chat"


def messages_of(request: RecordedRequest) -> list[Any]:
    """What was sent to the model, in either API."""
    return list(request.body["input" if api_of(request) == "responses" else "messages"])


def script_of(request: RecordedRequest) -> Step:
    name, api = str(messages_of(request)[-1]["content"]), api_of(request)
    if name in FAULTS:
        return FAULTS[name].script(api)
    if name in SCRIPTS:
        return SCRIPTS[name]
    if name in SPECIAL:
        return SPECIAL[name](api)
    return played(name if name in CASES else "text", api)
