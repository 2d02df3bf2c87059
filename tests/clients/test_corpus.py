"""Each stream of the corpus, from either API, becomes exactly the expected bytes of every format."""

from __future__ import annotations

import base64
import json
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from streamchat.client_encoders import OpenAiEncoder, OpenAiWholeEncoder, UiEncoder
from streamchat.decoder import ChatDecoder, StreamDecoder
from streamchat.encoders import Encoder, JsonEncoder, NdjsonEncoder, SseEncoder, TextEncoder
from streamchat.errors import UpstreamFailure
from streamchat.events import Event, Failure, Start
from streamchat.responses_decoder import ResponsesDecoder
from tests.clients.corpus import APIS, CASES, FOLDER, FORMATS, STREAMS, cut, expected, upstream_bytes
from tests.clients.node import Node

START = Start("resp_corpus", "gpt-4.1-mini", 1790000000)
DECODERS: dict[str, Callable[[], StreamDecoder]] = {"chat": ChatDecoder, "responses": ResponsesDecoder}
ENCODERS: dict[str, Callable[[], Encoder]] = {
    "text.txt": TextEncoder,
    "events.sse": SseEncoder,
    "events.ndjson": NdjsonEncoder,
    "answer.json": JsonEncoder,
    "ui.sse": UiEncoder,
    "openai.sse": OpenAiEncoder,
    "openai-usage.sse": lambda: OpenAiEncoder(include_usage=True),
    "openai.json": OpenAiWholeEncoder,
}
SPLITS: dict[str, Callable[[bytes], Iterable[bytes]]] = {
    "whole": lambda data: [data],
    "byte by byte": lambda data: [bytes([byte]) for byte in data],
}
# Types, or fields, that the SDK's own models do not have, and other providers' streams do.
OTHERS_FIELDS = {"reasoning_content"}

each_stream = pytest.mark.parametrize(("case", "api"), STREAMS)
each_case = pytest.mark.parametrize("case", CASES)


def decoded(decoder: StreamDecoder, parts: Iterable[bytes]) -> list[Event]:
    events: list[Event] = [START]
    try:
        for part in [*parts, b""]:
            events += decoder.feed(part)
            if decoder.finished:
                return events
        raise AssertionError("the decoder ended neither way")
    except UpstreamFailure as failure:
        return [*events, Failure(failure.code, failure.detail, failure.retryable)]


def encoded(encoder: Encoder, events: list[Event]) -> bytes:
    """As an answer is told: what a format cannot say in band breaks the connection instead."""
    told = [event for event in events if encoder.in_band or not isinstance(event, Failure)]
    return b"".join(encoder.encode(seq, event) for seq, event in enumerate(told))


def sse_data(body: bytes) -> list[str]:
    """What the lines `data:` say."""
    return [line[6:] for line in body.decode().split("\n") if line.startswith("data: ")]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("split", SPLITS)
@each_stream
def test_a_recorded_stream_becomes_exactly_these_bytes(case: str, api: str, split: str, name: str) -> None:
    events = decoded(DECODERS[api](), SPLITS[split](upstream_bytes(case, api)))
    assert encoded(ENCODERS[name](), events) == expected(case, name)


def test_the_corpus_holds_no_file_that_no_test_reads() -> None:
    known = {f"{case}/{api}.sse" for case, api in STREAMS} | {
        f"{case}/expected/{name}" for case in CASES for name in FORMATS
    }
    found = {file.relative_to(FOLDER).as_posix() for file in FOLDER.rglob("*") if file.is_file()}
    whole = {f"{case}/expected/{name}" for case in CASES if cut(case) for name in ("answer.json", "openai.json")}
    assert found == known - whole
    assert {api for _, api in STREAMS} == set(APIS)


# --- the corpus itself is judged by others ----------------------------------------------------------------


@each_stream
def test_the_sdks_own_types_know_every_event_of_the_upstream_streams(case: str, api: str) -> None:
    kinds: dict[str, TypeAdapter[Any]] = {
        "chat": TypeAdapter(ChatCompletionChunk),
        "responses": TypeAdapter(ResponseStreamEvent),
    }
    for line in sse_data(upstream_bytes(case, api)):
        if line == "[DONE]" or line.startswith('{"error"') or "[}" in line or '"error":{"type"' in line:
            continue  # no types: the end, Chat Completions' error, broken JSON, and the second shape of an error
        value = json.loads(line)
        parsed = kinds[api].validate_python(value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of unions, which the SDK parses without checking
            written = kinds[api].dump_python(parsed, mode="json", by_alias=True, exclude_unset=True)
        assert written == value


@each_case
def test_the_sdks_own_types_know_every_chunk_that_we_write(case: str) -> None:
    for name in ("openai.sse", "openai-usage.sse"):
        for line in sse_data(expected(case, name)):
            if line != "[DONE]" and not line.startswith('{"error"'):
                parsed = ChatCompletionChunk.model_validate_json(line)
                known = [set(choice.delta.model_extra or {}) for choice in parsed.choices]
                assert set().union(*known) <= OTHERS_FIELDS and not parsed.model_extra
    if not cut(case):
        completion = ChatCompletion.model_validate_json(expected(case, "openai.json"))
        assert set(completion.choices[0].message.model_extra or {}) <= OTHERS_FIELDS and not completion.model_extra


@pytest.mark.parametrize("version", ["ai5", "ai6", "ai7"])
@each_case
def test_every_ai_sdk_reads_every_ui_stream_to_its_end(case: str, version: str, node: Node) -> None:
    body = expected(case, "ui.sse")
    seen = node.run("read", version=version, say="hi", bytes=base64.b64encode(body).decode())
    assert seen["broken"] is None
    assert seen["chunks"] == [json.loads(line) for line in sse_data(body)[:-1]]
    types = [chunk["type"] for chunk in seen["chunks"]]
    assert types[-1] == ("error" if cut(case) else "finish")
    assert types.count("error") + types.count("finish") == 1
    assert [error["message"] for error in seen["errors"]] == [
        chunk["errorText"] for chunk in seen["chunks"] if chunk["type"] == "error"
    ]
