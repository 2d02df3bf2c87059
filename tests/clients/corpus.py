"""The corpus: streams of both APIs, written by hand from the documented formats, and the bytes that each format makes.

corpus/<case>/chat.sse and responses.sse are what an upstream sends, corpus/<case>/expected/ what callers get: the same
for both APIs. A format without a file there writes nothing: a whole answer that was cut.
"""

from __future__ import annotations

from pathlib import Path

from tests.fake_upstream import Step, head, http_chunk, last_chunk

FOLDER = Path(__file__).parent / "corpus"
CASES = sorted(folder.name for folder in FOLDER.iterdir())
APIS = ("chat", "responses")
STREAMS = [(case, api) for case in CASES for api in APIS if (FOLDER / case / f"{api}.sse").exists()]
FORMATS = (
    "text.txt",
    "events.sse",
    "events.ndjson",
    "answer.json",
    "ui.sse",
    "openai.sse",
    "openai-usage.sse",
    "openai.json",
)


def upstream_bytes(case: str, api: str) -> bytes:
    return (FOLDER / case / f"{api}.sse").read_bytes()


def expected(case: str, name: str) -> bytes:
    file = FOLDER / case / "expected" / name
    return file.read_bytes() if file.exists() else b""


def cut(case: str) -> bool:
    """Whether the answer never came to its end."""
    return not (FOLDER / case / "expected" / "answer.json").exists()


def pieces(case: str, api: str) -> list[bytes]:
    """The stream as HTTP chunks, an event each, without the last chunk."""
    events = upstream_bytes(case, api).split(b"\n\n")
    return [http_chunk(event + b"\n\n") for event in events if event]


def played(case: str, api: str) -> list[Step]:
    """The stream as an upstream sends it, to a clean end."""
    return [head(), *pieces(case, api), last_chunk()]
