"""One span an answer: its attributes, its parent, its end however the answer ends; told by OpenTelemetry's own SDK."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from flask import Flask
from opentelemetry import trace
from opentelemetry.instrumentation.flask import FlaskInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from streamchat import SettingsError, StreamChat, answer_started
from streamchat.prompt import Prompt
from streamchat.tracing import Spans
from tests.fake_upstream import FakeUpstream, Gate, Hang, Rst, done, error, finish, head, last_chunk, text
from tests.shop import KEY, PROMPT, SSE, Shop, call, open_shop, post_bytes, read_until, serve, wait_until
from tests.test_ledger import RECORD

QUESTION, ANSWER = "what is for dinner", "Hello, world!"


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield server


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What an SDK exports; the process has one provider, which here is this test's."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return exporter


def the_span(exporter: InMemorySpanExporter, shop: Shop | None = None) -> ReadableSpan:
    wait_until(exporter.get_finished_spans, "no span has ended")
    (span,) = exporter.get_finished_spans()
    if shop is not None:
        shop.wait_records()
        assert not [each for mount in shop.mounts for each in mount._observers if isinstance(each, Spans) and len(each)]
    return span


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_an_answer_is_a_span_with_the_conventions_attributes(
    upstream: FakeUpstream, exporter: InMemorySpanExporter
) -> None:
    with open_shop(tracing=True, params=["temperature"]) as shop:
        response = shop.ask(json={"message": QUESTION, "temperature": 0.5})
        span = the_span(exporter, shop)
        record = shop.the_record()
    assert (span.name, span.kind, span.status.status_code) == ("chat gpt-4.1-mini", SpanKind.CLIENT, StatusCode.UNSET)
    told = attributes(span)
    assert told.pop("gen_ai.response.time_to_first_chunk") == record.first_piece
    assert told.pop("server.port") == int(upstream.base_url.rpartition(":")[2].partition("/")[0])
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-4.1-mini",
        "gen_ai.request.stream": True,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.id": response.headers["X-Response-Id"],
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 19,
        "gen_ai.usage.output_tokens": 10,
        "server.address": "127.0.0.1",
        "streamchat.outcome": "completed",
        "streamchat.pieces": record.pieces,
        "streamchat.tokens_estimated": False,
        "streamchat.upstream.attempts": 1,
        "streamchat.upstream.status": 200,
        **({"streamchat.upstream.request_id": record.upstream_request_id} if record.upstream_request_id else {}),
    }
    assert span.end_time is not None and span.start_time is not None
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(record.duration, abs=0.5)


def test_neither_question_nor_answer_stands_in_it(upstream: FakeUpstream, exporter: InMemorySpanExporter) -> None:
    with open_shop(tracing=True, system_prompt=PROMPT, authorize=lambda _: "ann@shop") as shop:
        shop.ask(QUESTION)
        told = the_span(exporter, shop).to_json()
    assert not [word for word in (QUESTION, "Hello", PROMPT, "ann@shop", KEY) if word in told]


def test_what_was_asked_and_answered_stands_in_it_where_that_is_wanted(
    upstream: FakeUpstream, exporter: InMemorySpanExporter
) -> None:
    with open_shop(tracing=True, tracing_text=True, system_prompt=PROMPT) as shop:
        shop.ask(QUESTION, accept=SSE)
        told = attributes(the_span(exporter, shop))
    said = [{"role": "user", "parts": [{"type": "text", "content": QUESTION}]}]
    answered = [{"role": "assistant", "parts": [{"type": "text", "content": ANSWER}], "finish_reason": "stop"}]
    assert json.loads(told["gen_ai.input.messages"]) == said
    assert json.loads(told["gen_ai.system_instructions"]) == [{"type": "text", "content": PROMPT}]
    assert json.loads(told["gen_ai.output.messages"]) == answered


def test_of_a_picture_only_that_it_was_one(exporter: InMemorySpanExporter) -> None:
    spans = Spans(with_text=True)
    picture = {"type": "image_url", "image_url": {"url": "data:secret"}}
    turns = [{"role": "user", "content": [{"type": "text", "text": "what is it"}, picture]}, {"role": "assistant"}]
    spans.begin(RECORD.id, Prompt(turns, "m1", {}), None)
    spans.end(RECORD, "a cat")
    told = json.loads(attributes(the_span(exporter))["gen_ai.input.messages"])
    parts = [{"type": "text", "content": "what is it"}, {"type": "image_url"}]
    assert told == [{"role": "user", "parts": parts}, {"role": "assistant", "parts": []}]


def test_text_without_tracing_stops_the_start(upstream: FakeUpstream) -> None:
    with (
        pytest.raises(SettingsError, match="STREAMCHAT_TRACING_TEXT needs STREAMCHAT_TRACING"),
        open_shop(tracing_text=True),
    ):
        pass


@pytest.mark.parametrize(
    ("script", "code"), [([head(), text("Hel"), Rst()], "upstream_incomplete"), (error(500), "upstream_error")]
)
def test_a_failure_is_an_error_of_its_code(
    script: Any, code: str, upstream: FakeUpstream, exporter: InMemorySpanExporter
) -> None:
    upstream.script = script
    with open_shop(tracing=True) as shop:
        shop.ask(accept=SSE)
        span = the_span(exporter, shop)
    assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, code)
    assert attributes(span)["error.type"] == attributes(span)["streamchat.outcome"] == code


def test_the_span_ends_where_the_caller_hangs_up(upstream: FakeUpstream, exporter: InMemorySpanExporter) -> None:
    upstream.script = [head(), text("Hel"), Hang()]
    with open_shop(tracing=True, tracing_text=True) as shop, serve(shop.app) as port:
        with call(port, post_bytes()) as caller:
            read_until(caller, b"Hel")
            assert not exporter.get_finished_spans()
        span = the_span(exporter, shop)
    told = attributes(span)
    assert (told["streamchat.outcome"], span.status.status_code) == ("caller_left", StatusCode.UNSET)
    assert "error.type" not in told and "gen_ai.response.finish_reasons" not in told
    assert json.loads(told["gen_ai.output.messages"])[0]["parts"] == [{"type": "text", "content": "Hel"}]


def test_the_span_ends_with_an_answer_that_goes_on_alone(
    upstream: FakeUpstream, exporter: InMemorySpanExporter
) -> None:
    gate = Gate()
    upstream.script = [head(), text("Hel"), gate, text("lo"), finish(), done(), last_chunk()]
    with open_shop(tracing=True, on_disconnect="finish") as shop, serve(shop.app) as port:
        with call(port, post_bytes()) as caller:
            read_until(caller, b"Hel")
        gate.open()
        span = the_span(exporter, shop)
    assert attributes(span)["streamchat.outcome"] == "completed"


def test_the_span_is_a_child_of_the_requests_and_never_current_itself(
    upstream: FakeUpstream, exporter: InMemorySpanExporter
) -> None:
    """The request's span may end before the answer does: its view has returned by then."""
    gate, seen = Gate(), list[Any]()

    def build(app: Flask) -> None:
        FlaskInstrumentor().instrument_app(app)
        StreamChat(app, public=True, tracing=True, build_messages=build_messages)

    def build_messages(asked: Any, user: str | None) -> list[dict[str, str]]:
        seen.append(trace.get_current_span().get_span_context().span_id)
        return [{"role": "user", "content": QUESTION}]

    def started(app: Flask, **_: Any) -> None:
        seen.append(trace.get_current_span().get_span_context().span_id)

    upstream.script = [head(), text("Hel"), gate, text("lo"), finish(), done(), last_chunk()]
    with open_shop(build) as shop, serve(shop.app) as port, answer_started.connected_to(started, shop.app):
        with call(port, post_bytes()) as caller:
            read_until(caller, b"Hel")
            gate.open()
            read_until(caller, b"0\r\n\r\n")
        shop.wait_records()
        wait_until(lambda: len(exporter.get_finished_spans()) == 2, "not both spans have ended")
        spans = {span.kind: span for span in exporter.get_finished_spans()}
        FlaskInstrumentor().uninstrument_app(shop.app)
    request, own = spans[SpanKind.SERVER], spans[SpanKind.CLIENT]
    assert request.context is not None and own.parent is not None and own.context is not None
    assert own.parent.span_id == request.context.span_id
    assert own.context.trace_id == request.context.trace_id
    assert seen == [request.context.span_id] * 2  # ours is not current, also not for the shop's receivers


def test_nothing_is_current_while_the_stream_is_read(upstream: FakeUpstream, exporter: InMemorySpanExporter) -> None:
    with open_shop(tracing=True) as shop:
        with shop.app.test_client() as client:
            response = client.post("/api/get-response", json={"message": QUESTION}, buffered=False)
            current = [trace.get_current_span() for _ in response.response]
            response.close()
        assert current and set(current) == {trace.INVALID_SPAN}
        assert trace.get_current_span() is trace.INVALID_SPAN
        the_span(exporter, shop)


def test_an_answer_that_was_begun_elsewhere_gets_its_span_at_its_end(exporter: InMemorySpanExporter) -> None:
    spans = Spans(with_text=False)
    spans.end(RECORD, "")
    span = the_span(exporter)
    assert span.start_time == int(RECORD.started * 1e9)
    assert attributes(span)["gen_ai.response.id"] == RECORD.id


def test_spans_of_many_answers_are_told_apart(exporter: InMemorySpanExporter) -> None:
    spans = Spans(with_text=False)
    ids = [f"resp_{n}" for n in range(8)]

    def run(id: str) -> None:
        spans.begin(id, Prompt([], id, {}), None)
        barrier.wait(5)
        spans.end(replace(RECORD, id=id), "")

    barrier = threading.Barrier(len(ids))
    workers = [threading.Thread(target=run, args=(id,)) for id in ids]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(5)
    told = [attributes(span) for span in exporter.get_finished_spans()]
    assert sorted(each["gen_ai.response.id"] for each in told) == ids
    assert all(each["gen_ai.request.model"] == each["gen_ai.response.id"] for each in told)
    assert len(spans) == 0


def test_a_client_that_does_not_say_whom_it_asks_has_no_address(exporter: InMemorySpanExporter) -> None:
    spans = Spans(with_text=False)
    spans.begin(RECORD.id, Prompt([], "m1", {}), object())
    spans.end(RECORD, "")
    assert "server.address" not in attributes(the_span(exporter))


def test_what_a_tracer_raises_does_not_touch_the_answer(
    upstream: FakeUpstream, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Spans, "_start", fail)
    with open_shop(tracing=True) as shop:
        assert shop.ask(QUESTION).data == ANSWER.encode()
        assert shop.the_record().outcome == "completed"
    assert caplog.text.count("a hook of the application failed") == 2


def test_without_the_setting_there_is_no_span(upstream: FakeUpstream, exporter: InMemorySpanExporter) -> None:
    with open_shop() as shop:
        shop.ask(QUESTION)
        shop.the_record()
    assert not exporter.get_finished_spans()
