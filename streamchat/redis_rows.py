"""Answers and letters as what goes to Redis and what comes from it. Does no I/O."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime

from .bookkeeping import Unfinished, unseen
from .events import Usage
from .letters import OFF, Letter
from .store import Batch, Ending, Entry, Kept

AT_ONCE = 500  # ids or records in one command: Redis serves nobody else meanwhile
ROW = ("user", "chat", "model", "created", "status", "owner", "next", "told")
RETRACTED = "retracted"  # in place of a status: redis_scripts.WRITE
UNFINISHED = ("owner", "user", "model", "created", "next", "queue", "target")


def name_of(*names: str | None) -> str:
    """Strangers' text as a name that is short, and has no separators of ours in it."""
    return hashlib.sha256(json.dumps(names).encode("ascii")).hexdigest()[:32]


def day_of(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def fields_of(entry: Entry) -> list[str]:
    row = {
        "user": entry.user,
        "chat": entry.chat,
        "model": entry.model,
        "status": entry.status,
        "queue": entry.queue or None,
        "target": entry.target or None,
    }
    if entry.status == "queued":
        row |= {"queue": entry.queue, "queuekey": name_of(entry.queue), "request": entry.request, "claims": "0"}
        row["target"] = entry.target
    return [text for name, value in row.items() if value is not None for text in (name, value)]


def settled(ending: Ending) -> list[str | int | bytes]:
    """The id, the status, what the row is told, the day that the tokens belong to, how many, the record, the letter."""
    usage, record = ending.usage, ending.record
    counted = [usage.input_tokens, usage.output_tokens, usage.estimated] if usage else None
    told = json.dumps([ending.finish_reason, counted, ending.error])
    tokens = record.input_tokens + record.output_tokens
    letter = _posted(ending.letter) if ending.letter else []
    day = day_of(record.started)
    status = RETRACTED if ending.retracted else ending.status
    return [ending.id, status, told, day, tokens, json.dumps(asdict(record)), len(letter), *letter]


def _posted(letter: Letter) -> list[str | bytes]:
    """The values of `post`: what it reckons with, then fields."""
    keys = (letter.id, name_of(letter.queue), name_of(letter.target), repr(letter.created_at), repr(letter.due), OFF)
    return [*keys, "answer", letter.answer, "queue", letter.queue, "target", letter.target, "body", letter.body]


def letter_of(id: bytes, *row: bytes) -> Letter:
    """The row's values in the order of redis_outbox_scripts.FIELDS."""
    answer, queue, target, body, created, state, attempts, due, told = row
    return Letter(
        id=_text(id),
        answer=_text(answer),
        queue=_text(queue),
        target=_text(target),
        body=body,
        created_at=float(created),
        state=state.decode(),  # type: ignore[arg-type]  # written from a State
        attempts=int(attempts),
        due=float(due),
        told=_text(told),
    )


def claimed_of(owner: str, row: Sequence[bytes | None]) -> Entry:
    """What CLAIM tells of an answer."""
    id, user, chat, model, created, reserve, queue, request, target = (each and _text(each) for each in row)
    return Entry(
        id=id or "",
        owner=owner,
        user=None if row[1] is None else user or "",
        chat=None if row[2] is None else chat or "",
        model=model or "",
        created_at=float(created or 0),
        reserve=int(reserve or 0),
        status="queued",
        queue=queue or "",
        request=request or "",
        target=target or "",
    )


def unfinished_of(id: str, row: Sequence[bytes | None]) -> tuple[str, Unfinished]:
    """An answer's owner, and the answer, by UNFINISHED; what it said is not counted yet."""
    owner, user, model, created, next, queue, target = (None if each is None else _text(each) for each in row)
    told = (id, user, model or "", float(created or 0), int(next or 0), 0, queue or "", target or "")
    return owner or "", Unfinished(*told)


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogatepass")


def kept_of(id: str, row: dict[str, bytes | None]) -> Kept:
    text = {name: None if value is None else _text(value) for name, value in row.items()}
    reason, counted, error = json.loads(text["told"]) if text["told"] else (None, None, None)
    return Kept(
        id=id,
        user=text["user"],
        chat=text["chat"],
        model=text["model"] or "",
        created_at=float(text["created"] or 0),
        status=text["status"],  # type: ignore[arg-type]  # written from a Status
        owner=text["owner"] or "",
        next=int(text["next"] or 0),
        finish_reason=reason,
        usage=Usage(*counted) if counted else None,
        error=error,
    )


def without(batches: Sequence[Batch], overlaps: Sequence[int]) -> list[Batch]:
    """The batches less the events that are kept: places in them, each with the seq that is to come next."""
    known = dict(zip(overlaps[::2], overlaps[1::2], strict=True))
    cut = (unseen(batch, known.get(place, 0)) for place, batch in enumerate(batches))
    return [batch for batch in cut if batch is not None]


def batches_of(id: str, told: bytes) -> Iterator[Batch]:
    line, _, payloads = told.partition(b"\n")
    numbers, at = map(int, line.split()), 0
    for last, count, size in zip(numbers, numbers, numbers, strict=True):
        yield Batch(id, last - count + 1, count, payloads[at : at + size])
        at += size


def size_of(value: bytes | None) -> tuple[int, bytes]:
    size, _, user = (value or b"0 ").partition(b" ")
    return int(size), user


def oldest(sizes: dict[bytes, int], cap: int) -> list[bytes]:
    """The first ones, until the rest is within the cap. 0 is none."""
    total, found = sum(sizes.values()), []
    for id, size in sizes.items():
        if not cap or total <= cap:
            break
        found.append(id)
        total -= size
    return found


def parts_of(ids: list[bytes]) -> Iterator[list[bytes]]:
    return (ids[start : start + AT_ONCE] for start in range(0, len(ids), AT_ONCE))
