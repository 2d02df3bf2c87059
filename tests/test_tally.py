"""What a question may cost is estimated before anybody has counted it: text, tools, calls, images."""

from __future__ import annotations

from typing import Any

import pytest

from streamchat.events import Finish
from streamchat.tally import IMAGE_TOKENS, Tally, tokens_of

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 400_000}}
TEXT = {"type": "text", "text": "é" * 100}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Oslo"}'}}


@pytest.mark.parametrize(
    ("message", "tokens"),
    [
        ({"role": "user", "content": "abcd"}, 1),
        ({"role": "user", "content": "abcde"}, 2),
        ({"role": "user", "content": "é" * 8}, 2),
        ({"role": "assistant", "content": None}, 0),
        ({"role": "user", "content": [IMAGE]}, IMAGE_TOKENS),
        ({"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}, IMAGE]}, 2 * IMAGE_TOKENS),
        ({"role": "user", "content": ["abcd", TEXT]}, 33),  # as JSON: 28 characters more than its text
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, 28),
        (object(), 0),  # a shop's own; its client knows it
    ],
)
def test_a_message_is_estimated_by_all_that_is_sent_of_it(message: Any, tokens: int) -> None:
    assert tokens_of([message]) == tokens


def test_tools_are_part_of_what_is_asked() -> None:
    messages = [{"role": "user", "content": "abcd"}]
    assert tokens_of(messages, [TOOL]) > tokens_of(messages) + 20
    tally = Tally(messages, [TOOL], keep_text=False)
    tally.trail.attempts = 1
    tally.count(Finish("stop"))
    assert tally.record("resp_1", None, "m").input_tokens == tokens_of(messages, [TOOL])
