"""Bytes -> the ways in which a network may cut them. For everything that must not care."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

from hypothesis import strategies as st

# Two cuts are tried at every pair of places up to this length: 120 bytes are 7,140 pairs.
SHORT = 120

Pieces = list[bytes]


def cut(data: bytes, places: tuple[int, ...]) -> Pieces:
    edges = (0, *places, len(data))
    return [data[start:end] for start, end in pairwise(edges) if start < end]


def every_split(data: bytes) -> Iterator[Pieces]:
    """Whole, byte by byte, cut at every byte; short input also at every two bytes."""
    yield [data]
    yield [data[at : at + 1] for at in range(len(data))]
    for at in range(1, len(data)):
        yield cut(data, (at,))
    if len(data) <= SHORT:
        for places in combinations(range(1, len(data)), 2):
            yield cut(data, places)


def random_splits(data: bytes) -> st.SearchStrategy[Pieces]:
    """A strategy: any number of cuts anywhere."""
    places = st.lists(st.integers(0, len(data)), max_size=12)
    return places.map(lambda chosen: cut(data, tuple(sorted(chosen))))


# What has broken readers of streams before: line ends, other line separators, BOM, NUL, lone halves of emoji.
TRAPS = (
    "\x00", "\n", "\r", "\r\n", "\n\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029", "\ufeff", "\ufffd",
    "\ud83d", "\ude00", "😀", "👩‍👩‍👧", "é", "e\u0301", "data: x", ": x", "[DONE]", '"', "\\", "{", " ", "",
)  # fmt: skip
any_text = st.text(st.characters(exclude_categories=()), max_size=12)
any_deltas = st.lists(st.one_of(st.sampled_from(TRAPS), any_text), max_size=12)


def as_read(deltas: list[str]) -> str:
    """The text that deltas mean: halves of a pair joined, what stays alone is U+FFFD."""
    return "".join(deltas).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
