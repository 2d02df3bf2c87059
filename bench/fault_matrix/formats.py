"""The six formats as their callers ask for them and understand what they get. Shares no code with the encoders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from streamchat.errors import StreamChatError

from .cells import JSON, NDJSON, OPENAI, SSE, TEXT, UI

CUT_SHORT = "ends without an end"  # what no caller may ever see
Json = dict[str, Any]


@dataclass(frozen=True)
class Wire:
    """One response as it came. `whole` is False where HTTP itself says that something is missing."""

    status: int = 0  # 0: not even a head
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False


@dataclass(frozen=True)
class Told:
    """`saw`: `whole`, `finish REASON`, `error CODE`, `broken`, `no reply`, or a status and a code."""

    saw: str
    text: str = ""
    warned: bool = False


@dataclass(frozen=True)
class Format:
    name: str
    accept: str
    path: str
    ask: Callable[[str], Json]
    read: Callable[[Wire], Told]


def understood(format: Format, wire: Wire) -> Told:
    if not wire.status:
        return Told("no reply")
    if wire.status != 200:
        return Told(f"{wire.status} {_code(wire)}" if wire.whole else "broken")
    told = format.read(wire)
    return told if wire.whole or told.saw == "broken" else Told(f"{told.saw}, broken", told.text, told.warned)


def _code(wire: Wire) -> str:
    """The code of an error document, the product's or OpenAI's; nginx's own pages are HTML."""
    try:
        document = json.loads(wire.body)
    except ValueError:
        return "nginx" if b"nginx" in wire.body else "?"
    return str(document["error"]["code"] if "error" in document else document.get("code"))


# --- one reader a format ------------------------------------------------------------------------------------


def _text(wire: Wire) -> Told:
    return Told("whole" if wire.whole else "broken", wire.body.decode(errors="ignore"))


def _json(wire: Wire) -> Told:
    if not wire.whole:
        return Told("broken")
    document = json.loads(wire.body)
    return Told(f"finish {document['finish_reason']}", document["text"])


def _of_events(events: list[Json], whole: bool) -> Told:
    """Our own events: the last one is the end."""
    text = "".join(event["text"] for event in events if event["type"] == "text")
    warned = any(event["type"] == "warning" for event in events)
    last = events[-1] if events else {"type": ""}
    if last["type"] == "finish":
        return Told(f"finish {last['finish_reason']}", text, warned)
    if last["type"] == "error":
        return Told(f"error {last['code']}", text, warned)
    return Told(CUT_SHORT if whole else "broken", text, warned)


def _data(wire: Wire) -> list[str]:
    """The data of each complete server-sent event."""
    events = wire.body.decode(errors="ignore").split("\n\n")[:-1]
    lines = [line for event in events for line in event.split("\n")]
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def _sse(wire: Wire) -> Told:
    return _of_events([json.loads(data) for data in _data(wire)], wire.whole)


def _ndjson(wire: Wire) -> Told:
    lines = wire.body.decode(errors="ignore").split("\n")[:-1]
    events = [json.loads(line) for line in lines]
    return _of_events([event for event in events if event["type"] != "heartbeat"], wire.whole)


def _ui(wire: Wire) -> Told:
    """`useChat`: the error has words and no code, so the code is looked up by them."""
    data = _data(wire)
    chunks: list[Json] = [json.loads(each) for each in data if each != "[DONE]"]
    text = "".join(chunk["delta"] for chunk in chunks if chunk["type"] == "text-delta")
    ends = [chunk for chunk in chunks if chunk["type"] in ("finish", "error")]
    if not ends or data[-1] != "[DONE]":
        return Told(CUT_SHORT if wire.whole else "broken", text)
    if ends[0]["type"] == "error":
        return Told(f"error {_codes().get(ends[0]['errorText'], '?')}", text)
    return Told(f"finish {ends[0]['messageMetadata']['finishReason']}", text)


def _openai(wire: Wire) -> Told:
    """OpenAI's clients: `[DONE]` is the end of a whole answer; an error object is the last thing there is."""
    data = _data(wire)
    chunks: list[Json] = [json.loads(each) for each in data if each != "[DONE]"]
    choices = [choice for chunk in chunks for choice in chunk.get("choices", ())]
    text = "".join(choice["delta"].get("content", "") for choice in choices)
    reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    errors = [chunk["error"]["code"] for chunk in chunks if "error" in chunk]
    if errors:
        return Told(f"error {errors[0]}" + (", [DONE]" if "[DONE]" in data else ""), text)
    if reasons and data[-1] == "[DONE]":
        return Told(f"finish {reasons[0]}", text)
    return Told(CUT_SHORT if wire.whole else "broken", text)


def _codes() -> dict[str, str]:
    """Each error's public words and its code."""
    found: dict[str, str] = {}
    waiting = [StreamChatError]
    while waiting:
        error = waiting.pop()
        found.setdefault(error.text, error.code)
        waiting += error.__subclasses__()
    return found


# --- how each one asks ----------------------------------------------------------------------------------------


def _own(message: str) -> Json:
    return {"message": message}


def _chat(message: str) -> Json:
    turn = {"id": "m1", "role": "user", "parts": [{"type": "text", "text": message}]}
    return {"id": message, "messages": [turn], "trigger": "submit-message"}


def _gateway(message: str) -> Json:
    return {"model": "gpt-4.1-mini", "messages": [{"role": "user", "content": message}], "stream": True}


OWN = "/api/get-response"
FORMATS = {
    each.name: each
    for each in (
        Format(TEXT, "text/plain", OWN, _own, _text),
        Format(SSE, "text/event-stream", OWN, _own, _sse),
        Format(NDJSON, "application/x-ndjson", OWN, _own, _ndjson),
        Format(JSON, "application/json", OWN, _own, _json),
        Format(UI, "text/event-stream", "/api/chat", _chat, _ui),
        Format(OPENAI, "application/json", "/api/v1/chat/completions", _gateway, _openai),
    )
}
