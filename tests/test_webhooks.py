"""Signatures by the Standard Webhooks specification: other libraries take ours, and ours takes theirs."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import openai
import pytest
from flask import Flask, request
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook, WebhookVerificationError
from werkzeug.datastructures import Headers

from streamchat.webhooks import (
    EVENTS,
    InvalidWebhook,
    Message,
    MissingHeader,
    WrongBody,
    WrongSignature,
    WrongTime,
    compose,
    key_of,
    new_secret,
    sign,
    verify,
)

NOW = 1_790_000_000.0
SECRET, OTHER = (f"whsec_{base64.b64encode(bytes([n]) * 32).decode()}" for n in (1, 2))
DATA = {
    "id": "resp_1",
    "status": "completed",
    "usage": {"output_tokens": 3},
    "text": 'ünïcode "quoted" \U0001f600 \ud83d',
}
EVENT = {"type": "response.completed", "timestamp": "2026-09-21T14:13:20.250Z", "data": DATA}
MESSAGE = compose("msg_1", "response.completed", NOW + 0.25, DATA)


def signed(now: float = NOW, *secrets: str) -> dict[str, str]:
    return sign(MESSAGE, secrets or [SECRET], now)


# --- the bytes -------------------------------------------------------------------------------------------


def test_the_payload_has_type_timestamp_and_data() -> None:
    assert json.loads(MESSAGE.body) == EVENT
    assert list(json.loads(MESSAGE.body)) == ["type", "timestamp", "data"]
    assert MESSAGE.body.isascii() and b"\n" not in MESSAGE.body


def test_the_bytes_are_the_same_each_time_they_are_made() -> None:
    assert compose("msg_1", "response.completed", NOW + 0.25, DATA) == MESSAGE


@pytest.mark.parametrize("id", ["", "a.b", "a b", "a\n", "ü", "x" * 129, "a/b"])
def test_an_id_that_would_blur_what_is_signed_is_refused(id: str) -> None:
    with pytest.raises(ValueError, match=r"^an id is"):
        compose(id, EVENTS[0], NOW, {})


def test_later_attempts_have_the_same_id_and_another_time_and_signature() -> None:
    first, second = signed(NOW), signed(NOW + 5)
    assert first["webhook-id"] == second["webhook-id"] == "msg_1"
    assert (first["webhook-timestamp"], second["webhook-timestamp"]) == ("1790000000", "1790000005")
    assert first["webhook-signature"] != second["webhook-signature"]


def test_the_signature_is_the_one_of_the_specifications_example() -> None:
    message = Message("msg_p5jXN8AQM9LWM0D4loKWxJek", b'{"test": 2432232314}')
    headers = sign(message, ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"], 1614265330)
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_each_secret_makes_a_signature() -> None:
    both = signed(NOW, SECRET, OTHER)["webhook-signature"].split(" ")
    assert both == [signed(NOW, SECRET)["webhook-signature"], signed(NOW, OTHER)["webhook-signature"]]


def test_nothing_is_signed_without_a_secret() -> None:
    with pytest.raises(ValueError, match="needs a secret"):
        sign(MESSAGE, [], NOW)


# --- the check -------------------------------------------------------------------------------------------


def test_a_signed_event_is_returned() -> None:
    assert verify(MESSAGE.body, signed(), SECRET, now=NOW) == EVENT
    assert verify(MESSAGE.body, signed(), [SECRET], now=NOW) == EVENT


@pytest.mark.parametrize("sent", [[SECRET], [OTHER], [SECRET, OTHER], [OTHER, SECRET]])
def test_while_secrets_are_rotated_either_side_may_have_both(sent: list[str]) -> None:
    assert verify(MESSAGE.body, signed(NOW, *sent), [SECRET, OTHER], now=NOW) == EVENT
    if SECRET in sent:
        assert verify(MESSAGE.body, signed(NOW, *sent), SECRET, now=NOW) == EVENT


@pytest.mark.parametrize("kind", [dict, Headers, lambda pairs: {name.title(): value for name, value in pairs.items()}])
def test_headers_may_be_written_in_any_case(kind: Callable[[Mapping[str, str]], Mapping[str, str]]) -> None:
    assert verify(MESSAGE.body, kind(signed()), SECRET, now=NOW) == EVENT


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp", "webhook-signature"])
def test_a_header_that_is_missing_or_empty_is_told(name: str) -> None:
    headers = signed()
    for broken in ({key: value for key, value in headers.items() if key != name}, headers | {name: ""}):
        with pytest.raises(MissingHeader, match="webhook-id"):
            verify(MESSAGE.body, broken, SECRET, now=NOW)


@pytest.mark.parametrize(("off", "taken"), [(0, True), (299, True), (-299, True), (301, False), (-301, False)])
def test_a_signature_is_good_for_five_minutes(off: float, taken: bool) -> None:
    if taken:
        assert verify(MESSAGE.body, signed(), SECRET, now=NOW + off) == EVENT
    else:
        with pytest.raises(WrongTime, match="5 minutes"):
            verify(MESSAGE.body, signed(), SECRET, now=NOW + off)


@pytest.mark.parametrize(
    "timestamp", ["soon", "1790000000.0", "+1790000000", "-1", " ", "١٧٩٠٠٠٠٠٠٠", "9" * 400, "nan"]
)
def test_a_time_that_is_none_is_told(timestamp: str) -> None:
    with pytest.raises(WrongTime):
        verify(MESSAGE.body, signed() | {"webhook-timestamp": timestamp}, SECRET, now=NOW)


FORGED: list[dict[str, str]] = [
    {"webhook-id": "msg_2"},
    {"webhook-timestamp": "1790000001"},
    {"webhook-signature": "v1,"},
    {"webhook-signature": "v1"},
    {"webhook-signature": ","},
    {"webhook-signature": " "},
    {"webhook-signature": "v1,ümlaut"},
    {"webhook-signature": "v1," + "A" * 44},
    {"webhook-signature": signed()["webhook-signature"].replace("v1,", "v2,")},
    {"webhook-signature": signed()["webhook-signature"].replace("v1,", "v1a,")},
    {"webhook-signature": signed()["webhook-signature"].replace("v1,", "")},
    {"webhook-signature": signed()["webhook-signature"][:-1]},
    {"webhook-signature": signed(NOW, OTHER)["webhook-signature"]},
    {"webhook-signature": signed(NOW + 1)["webhook-signature"]},
]


@pytest.mark.parametrize("change", FORGED, ids=str)
def test_a_forged_header_is_told(change: dict[str, str]) -> None:
    with pytest.raises(WrongSignature):
        verify(MESSAGE.body, signed() | change, SECRET, now=NOW)


@given(st.integers(0, len(MESSAGE.body) * 8 - 1))
def test_one_flipped_bit_of_the_body_is_told(bit: int) -> None:
    body = bytearray(MESSAGE.body)
    body[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WrongSignature):
        verify(bytes(body), signed(), SECRET, now=NOW)


def test_signatures_of_other_versions_are_passed_over() -> None:
    headers = signed()
    headers["webhook-signature"] = f"v1a,xyz nonsense {headers['webhook-signature']} v9"
    assert verify(MESSAGE.body, headers, SECRET, now=NOW) == EVENT


@pytest.mark.parametrize("body", [b"", b"hello", b"[1]", b'"text"', b"null", b"\xff", b"{", b"[" * 100_000])
def test_a_signed_body_that_is_no_object_is_told(body: bytes) -> None:
    with pytest.raises(WrongBody):
        verify(body, sign(Message("msg_1", body), [SECRET], NOW), SECRET, now=NOW)


@given(
    st.dictionaries(st.sampled_from(["webhook-id", "webhook-timestamp", "webhook-signature"]), st.text()), st.binary()
)
def test_whatever_comes_unsigned_is_an_invalid_webhook(headers: dict[str, str], body: bytes) -> None:
    with pytest.raises(InvalidWebhook):
        verify(body, headers, SECRET, now=NOW)


@pytest.mark.parametrize(
    "secret",
    [
        "", "whsec_", "secret", SECRET.removeprefix("whsec_"), "whsec_c2hvcnQ=", "whsec_" + "A" * 100, "whsec_ü",
        "whsec_!" + "A" * 32,
    ],
)  # fmt: skip
def test_a_secret_that_is_none_is_told_without_showing_it(secret: str) -> None:
    for call in (
        lambda: key_of(secret),
        lambda: sign(MESSAGE, [secret], NOW),
        lambda: verify(b"", {}, [SECRET, secret]),
    ):
        with pytest.raises(ValueError, match=r"^must hold secrets") as caught:
            call()
        assert str(caught.value) == "must hold secrets of the form whsec_... with Base64 of 24 to 64 bytes"


def test_a_new_secret_is_one_and_another_each_time() -> None:
    made = {new_secret() for _ in range(10)}
    assert len(made) == 10
    assert all(len(key_of(secret)) == 32 for secret in made)


def test_without_padding_a_secret_is_the_same() -> None:
    assert key_of(SECRET.rstrip("=")) == key_of(SECRET) == bytes([1]) * 32


def test_in_a_flask_view_a_refused_webhook_is_a_400() -> None:
    app = Flask("shop")

    @app.post("/hook")
    def hook() -> str:
        return str(verify(request.get_data(), request.headers, SECRET)["type"])

    client, headers = app.test_client(), signed(time.time())
    taken = client.post("/hook", data=MESSAGE.body, headers=headers)
    assert (taken.status_code, taken.text) == (200, "response.completed")
    refused = client.post("/hook", data=MESSAGE.body + b" ", headers=headers)
    assert refused.status_code == 400 and "another secret" in refused.text


# --- other libraries -------------------------------------------------------------------------------------


def test_standardwebhooks_takes_ours() -> None:
    assert Webhook(SECRET).verify(MESSAGE.body, signed(time.time())) == EVENT
    for secret in (SECRET, OTHER):
        assert Webhook(secret).verify(MESSAGE.body, signed(time.time(), SECRET, OTHER)) == EVENT


@pytest.mark.parametrize("headers", [lambda: signed(time.time(), OTHER), lambda: signed(time.time() - 301)])
def test_standardwebhooks_refuses_a_wrong_and_an_old_one(headers: Callable[[], dict[str, str]]) -> None:
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(MESSAGE.body, headers())


def test_ours_takes_what_standardwebhooks_signs() -> None:
    body = json.dumps(EVENT, ensure_ascii=True)
    headers = {
        "webhook-id": "msg_2",
        "webhook-timestamp": str(int(NOW)),
        "webhook-signature": Webhook(SECRET).sign("msg_2", datetime.fromtimestamp(NOW, UTC), body),
    }
    assert verify(body.encode(), headers, SECRET, now=NOW) == EVENT
    with pytest.raises(WrongSignature):
        verify(body.encode(), headers, OTHER, now=NOW)


def test_the_openai_sdk_takes_ours() -> None:
    def check(headers: dict[str, str], secret: str = SECRET) -> Any:
        with openai.OpenAI(api_key="none") as client:
            return client.webhooks.verify_signature(MESSAGE.body.decode(), headers, secret=secret)

    check(signed(time.time()))
    check(signed(time.time(), SECRET, OTHER), OTHER)
    for headers in (signed(time.time(), OTHER), signed(time.time() - 301)):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            check(headers)
