"""What a queued answer is asked with survives its row."""

from __future__ import annotations

from typing import Any

import pytest

from streamchat.jobs import Job, pack_job, unpack_job
from streamchat.prompt import Prompt

MESSAGES: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "é \U0001f600 \ud83d \0"}, {"role": "user", "content": [{"type": "text"}]}],
    [],
]


@pytest.mark.parametrize("messages", MESSAGES)
def test_a_job_is_unpacked_as_it_was_packed(messages: list[dict[str, Any]]) -> None:
    packed = pack_job(Prompt(messages, "m", {"temperature": 0.5, "n": 2}), "de-CH")
    assert packed.isascii()
    job = unpack_job(packed)
    assert job == Job(messages, {"temperature": 0.5, "n": 2}, "de-CH")
    assert job.prompt("m") == Prompt(messages, "m", {"temperature": 0.5, "n": 2})


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError):
        pack_job(Prompt([{"role": "user", "content": object()}], "m", {}), None)


@pytest.mark.parametrize("text", ["", "{", "[[]", "3", "[]", "[1,2,3,4]", "null"])
def test_what_is_no_job_is_not_unpacked(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        unpack_job(text)
