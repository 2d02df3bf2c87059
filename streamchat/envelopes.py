"""The end of an answer becomes the letter that tells it: what a receiver reads of it, as one JSON object. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from .events import Failure, Finish, usage_json
from .letters import Letter
from .store import Ending
from .webhooks import compose


def enclose(
    ending: Ending,
    event: Finish | Failure,
    queue: str,
    target: str,
    text: str | None = None,
    created_at: float | None = None,
) -> Ending:
    """The ending with its letter; as it is where nobody is to be told. `created_at` is the record's unless it is given.

    `data` is the object of `GET /responses/<id>`; its text only where one is given. An answer ends once: the id of its
    letter follows from its own.
    """
    if not target:
        return ending
    record = ending.record
    at = record.started + record.duration
    data = {
        "id": ending.id,
        "status": ending.status,
        "model": record.model,
        "created_at": int(record.started if created_at is None else created_at),
        "finish_reason": ending.finish_reason,
        "usage": usage_json(ending.usage),
        "error": _error(event),
    } | ({} if text is None else {"text": text})
    message = compose(letter_id(ending.id), f"response.{ending.status}", at, data)
    return replace(ending, letter=Letter(message.id, ending.id, queue, target, message.body, at, due=at))


def letter_id(answer: str) -> str:
    """A shop makes ids of its own, which may hold what a webhook's may not."""
    return "msg_" + hashlib.sha256(answer.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _error(event: Finish | Failure) -> dict[str, object] | None:
    if isinstance(event, Finish):
        return None
    return {"code": event.code, "message": event.message, "retryable": event.retryable}
