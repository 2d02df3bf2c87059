"""Packed events: whatever was packed comes back, and half of it is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamchat.events import Event, Failure, Finish, Reasoning, Refusal, Start, Text, ToolCall, Usage
from streamchat.store import Batch, pack, unpack


def joined(text: str) -> str:
    """Two halves that meet are one character, in JSON as in UTF-16."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


REFUSED = "."  # the words are json's or ours; the type is the promise
# Halves of surrogate pairs and NUL among them.
words = (
    st.text(st.characters(categories=["L", "N", "P", "S", "Z", "C"]), max_size=20)
    | st.text(st.characters(categories=["Cs"]), max_size=3)
).map(joined)
numbers = st.integers(0, 2**53)
usages = st.none() | st.builds(Usage, numbers, numbers, st.booleans())
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(Start, words, words, numbers),
    st.builds(Text, words),
    st.builds(Reasoning, words),
    st.builds(Refusal, words),
    st.builds(ToolCall, numbers, st.none() | words, st.none() | words, words),
    st.builds(Finish, words, usages),
    st.builds(Failure, words, words, st.booleans()),
)


@given(st.lists(events, max_size=8))
def test_whatever_was_packed_comes_back(given_events: list[Event]) -> None:
    payload = pack(given_events)
    assert payload.isascii()
    assert b"\n" not in payload
    assert unpack(payload) == given_events


@given(st.lists(events, min_size=1, max_size=4), st.data())
def test_a_part_of_a_payload_is_refused(given_events: list[Event], data: st.DataObject) -> None:
    payload = pack(given_events)
    with pytest.raises(ValueError, match=REFUSED):
        unpack(payload[: data.draw(st.integers(0, len(payload) - 1))])


@pytest.mark.parametrize(
    "payload",
    [b"", b"null", b"7", b'[["text"]]', b'[["text","a","b"]]', b'[["unknown","a"]]', b"[[]]", b"[7]", b'[["finish"]]'],
)
def test_what_is_no_list_of_events_is_refused(payload: bytes) -> None:
    with pytest.raises(ValueError, match=REFUSED):
        unpack(payload)


def test_the_halves_of_an_emoji_stay_apart_in_two_events() -> None:
    halves: list[Event] = [Text("\ud83d"), Text("\ude00")]
    assert unpack(pack(halves)) == halves


def test_a_batch_knows_its_last_seq() -> None:
    assert Batch("resp_1", 3, 4, b"").last == 6
