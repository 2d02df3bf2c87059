"""npm's standardwebhooks takes our signatures, and we take its."""

from __future__ import annotations

import base64
import time

import pytest

from streamchat.webhooks import WrongSignature, compose, sign, verify
from tests.clients.node import Node

SECRET, OTHER = (f"whsec_{base64.b64encode(bytes([n]) * 32).decode()}" for n in (1, 2))
DATA = {"id": "resp_1", "text": "ü \U0001f600"}
EVENT = {"type": "response.completed", "timestamp": "2026-09-21T14:13:20.000Z", "data": DATA}
MESSAGE = compose("msg_1", "response.completed", 1_790_000_000, DATA)


@pytest.mark.parametrize("secrets", [[SECRET], [SECRET, OTHER], [OTHER, SECRET]])
def test_it_takes_ours(node: Node, secrets: list[str]) -> None:
    headers = sign(MESSAGE, secrets, time.time())
    assert node.run("verifyWebhook", secret=SECRET, body=MESSAGE.body.decode(), headers=headers) == {"event": EVENT}


def test_it_refuses_wrong_changed_and_old_ones(node: Node) -> None:
    good, body = sign(MESSAGE, [SECRET], time.time()), MESSAGE.body.decode()
    cases = [
        (sign(MESSAGE, [OTHER], time.time()), body, "No matching signature"),
        (good, body.replace("resp_1", "resp_2"), "No matching signature"),
        (good | {"webhook-id": "msg_2"}, body, "No matching signature"),
        (sign(MESSAGE, [SECRET], time.time() - 301), body, "too old"),
        (sign(MESSAGE, [SECRET], time.time() + 330), body, "too new"),
    ]
    for headers, sent, words in cases:
        seen = node.run("verifyWebhook", secret=SECRET, body=sent, headers=headers)
        assert words in seen["refused"]


def test_we_take_its(node: Node) -> None:
    seconds, body = int(time.time()), MESSAGE.body.decode()
    signature = node.run("signWebhook", secret=SECRET, message="msg_3", seconds=seconds, body=body)
    headers = {"webhook-id": "msg_3", "webhook-timestamp": str(seconds), "webhook-signature": signature}
    assert verify(MESSAGE.body, headers, SECRET) == EVENT
    with pytest.raises(WrongSignature):
        verify(MESSAGE.body, headers, OTHER)
