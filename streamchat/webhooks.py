"""Standard Webhooks 1.0.0: the bytes that are sent, their signatures, and the check that a receiver makes of them.

Does no I/O. A receiver needs one line: `event = verify(request.get_data(), request.headers, SECRETS)`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import secrets as randomness
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from werkzeug.exceptions import BadRequest

PREFIX = "whsec_"
KEY_BYTES = (24, 64)  # as the specification wants them
NEW_KEY_BYTES = 32
TOLERANCE = 300.0  # seconds that a signature's time may be off, either way; every verifier's number
ID = re.compile(r"[A-Za-z0-9_-]{1,128}")  # without a dot, which parts what is signed
EVENTS = ("response.completed", "response.failed", "response.cancelled", "response.incomplete")
HEADERS = ("webhook-id", "webhook-timestamp", "webhook-signature")


class Headers(Protocol):
    """A request's headers: a mapping, or werkzeug's own kind, which is none."""

    def items(self) -> Iterable[tuple[str, str]]: ...


class InvalidWebhook(BadRequest):
    """A request that is not a webhook of ours. Flask answers 400 where nobody catches it."""

    description = "This is no webhook that can be trusted."


class MissingHeader(InvalidWebhook):
    description = "webhook-id, webhook-timestamp and webhook-signature are needed."


class WrongTime(InvalidWebhook):
    description = "webhook-timestamp is no time, or more than 5 minutes off."


class WrongSignature(InvalidWebhook):
    description = "webhook-signature is made with another secret, or for another body."


class WrongBody(InvalidWebhook):
    description = "The body is no JSON object."


@dataclass(frozen=True, slots=True)
class Message:
    """What one delivery carries at every attempt: the receiver knows a repeated one by its id."""

    id: str
    body: bytes


def compose(id: str, type: str, at: float, data: Mapping[str, Any]) -> Message:
    """An event of the Unix time `at` as bytes. Raises ValueError for an id that could not be signed."""
    if not ID.fullmatch(id):
        raise ValueError("an id is 1 to 128 letters, digits, _ and -")
    timestamp = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    payload = {"type": type, "timestamp": timestamp, "data": dict(data)}
    return Message(id, json.dumps(payload, ensure_ascii=True, separators=(",", ":")).encode("ascii"))


def sign(message: Message, secrets: Sequence[str], now: float) -> dict[str, str]:
    """The headers of one attempt at the Unix time `now`: a signature by each secret, so that they can be rotated."""
    if not secrets:
        raise ValueError("a webhook needs a secret")
    seconds = str(int(now))
    signatures = [_signature(key_of(secret), message.id, seconds, message.body) for secret in secrets]
    return dict(zip(HEADERS, (message.id, seconds, " ".join(signatures)), strict=True))


def verify(body: bytes, headers: Headers, secrets: str | Sequence[str], *, now: float | None = None) -> dict[str, Any]:
    """The event in a request's raw body, where one of the secrets signed it within the last 5 minutes.

    Raises MissingHeader, WrongTime, WrongSignature or WrongBody, which are InvalidWebhook; and ValueError for a secret
    that is none. An event may come twice: its webhook-id is the same then.
    """
    keys = [key_of(secret) for secret in ([secrets] if isinstance(secrets, str) else secrets)]
    found = {name.lower(): value for name, value in headers.items()}
    id, timestamp, signatures = (found.get(name, "") for name in HEADERS)
    if not (id and timestamp and signatures):
        raise MissingHeader
    _check_time(timestamp, time.time() if now is None else now)
    expected = [_signature(key, id, timestamp, body) for key in keys]
    # Every pair is compared: how long it takes tells nothing.
    matches = [_equal(given, own) for given in signatures.split(" ") for own in expected]
    if not any(matches):
        raise WrongSignature
    return _read(body)


def key_of(secret: str) -> bytes:
    """The key in a secret, `whsec_` and Base64. Raises ValueError, whose words begin "must"."""
    text = secret.removeprefix(PREFIX)
    try:
        key = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        key = b""
    if text == secret or not KEY_BYTES[0] <= len(key) <= KEY_BYTES[1]:
        raise ValueError(f"must hold secrets of the form {PREFIX}... with Base64 of 24 to 64 bytes")
    return key


def new_secret() -> str:
    return PREFIX + base64.b64encode(randomness.token_bytes(NEW_KEY_BYTES)).decode()


def _signature(key: bytes, id: str, timestamp: str, body: bytes) -> str:
    signed = b"%s.%s.%s" % (id.encode("utf-8", "replace"), timestamp.encode("ascii"), body)
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


def _equal(given: str, own: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), own.encode("ascii"))


def _check_time(timestamp: str, now: float) -> None:
    if not re.fullmatch(r"[0-9]{1,12}", timestamp) or abs(now - int(timestamp)) > TOLERANCE:
        raise WrongTime


def _read(body: bytes) -> dict[str, Any]:
    try:
        event = json.loads(body)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise WrongBody
    return event
