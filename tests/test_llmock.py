"""llmock, somebody else's judge of clients: its faults become our codes, its verdict on us is strict."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from llmock.pytest_plugin import LLMock

from streamchat.errors import StreamChatError
from streamchat.events import Finish, Text
from tests.asking import Asking, asking, read_all

REPLY = "The quick brown fox jumps over the lazy dog and is gone before it has seen the answer."


@pytest.fixture(params=["fast", "sdk"])
def asked(request: pytest.FixtureRequest, llmock: LLMock) -> Iterator[Asking]:
    with asking(llmock.base_url(), http=request.param, first_token_timeout=10) as found:
        yield found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backoffs that grow from a tenth of a second."""
    monkeypatch.setattr("streamchat.upstream.FIRST_BACKOFF", 0.1)


def code_of(asked: Asking) -> str:
    with pytest.raises(StreamChatError) as caught:
        asked.ask()
    return caught.value.code


def test_a_scripted_answer_arrives_whole(asked: Asking, llmock: LLMock) -> None:
    llmock.reply(REPLY)
    events = asked.ask()
    assert "".join(event.text for event in events if isinstance(event, Text)) == REPLY
    assert isinstance(events[-1], Finish)
    assert events[-1].usage is not None
    llmock.assert_resilient(strict=True)


@pytest.mark.parametrize("after", [1, 3])
def test_a_truncated_stream_is_incomplete(asked: Asking, llmock: LLMock, after: int) -> None:
    llmock.reply(REPLY).truncate(after_chunks=after)
    assert code_of(asked) == "upstream_incomplete"
    assert len(llmock.requests) == 1


@pytest.mark.parametrize("after", [1, 3])
def test_a_disconnect_is_incomplete(asked: Asking, llmock: LLMock, after: int) -> None:
    llmock.reply(REPLY).disconnect(after_chunks=after)
    assert code_of(asked) == "upstream_incomplete"
    assert len(llmock.requests) == 1


@pytest.mark.parametrize("after", [1, 3])
def test_a_corrupt_chunk_is_malformed(asked: Asking, llmock: LLMock, after: int) -> None:
    llmock.reply(REPLY).corrupt(after_chunks=after)
    assert code_of(asked) == "upstream_malformed"
    assert len(llmock.requests) == 1


def test_a_stalled_stream_can_be_told_and_left(asked: Asking, llmock: LLMock) -> None:
    """The limit between pieces is the reader's: a read ends in time, and closing ends the request."""
    llmock.reply(REPLY).stall(after_chunks=3, seconds=5)
    reply = asked.open()
    started, events = time.monotonic(), []
    while (read := reply.read(time.monotonic() + 0.3)) is not None:
        events += read
    reply.close()
    assert any(isinstance(event, Text) for event in events)
    assert time.monotonic() - started < 2
    [request] = llmock.requests
    assert not request.completed


def test_a_model_that_is_silent_for_too_long_is_a_timeout_and_is_not_asked_again(llmock: LLMock) -> None:
    llmock.delay(3)
    with asking(llmock.base_url(), first_token_timeout=0.3) as asked:
        assert code_of(asked) == "upstream_timeout"
        assert asked.trail.attempts == 1


def test_a_slow_first_token_is_waited_for(asked: Asking, llmock: LLMock) -> None:
    llmock.reply(REPLY).slow_first_token(0.5)
    reply = asked.open()
    assert isinstance(read_all(reply)[-1], Finish)
    reply.close()
    llmock.assert_resilient(strict=True)


def test_a_rate_limit_is_waited_out_as_long_as_it_says(asked: Asking, llmock: LLMock) -> None:
    llmock.rate_limit(times=2, retry_after=1.0).reply(REPLY)
    assert isinstance(asked.ask()[-1], Finish)
    assert [request.status for request in llmock.requests] == [429, 429, 200]
    llmock.assert_resilient(strict=True)


def test_a_rate_limit_that_outlasts_the_deadline_is_told_at_once(llmock: LLMock) -> None:
    llmock.rate_limit(times=None, retry_after=60)
    with asking(llmock.base_url(), first_token_timeout=5) as asked:
        started = time.monotonic()
        assert code_of(asked) == "upstream_rate_limited"
        assert time.monotonic() - started < 1
    assert len(llmock.requests) == 1


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "upstream_rejected"),
        (401, "upstream_auth"),
        (403, "upstream_auth"),
        (404, "upstream_rejected"),
        (422, "upstream_rejected"),
    ],
)
def test_what_no_retry_can_fix_is_never_retried(asked: Asking, llmock: LLMock, status: int, code: str) -> None:
    llmock.fail(status, times=None)
    assert code_of(asked) == code
    assert len(llmock.requests) == 1
    llmock.assert_resilient(strict=True)


@pytest.mark.parametrize("status", [408, 409, 500, 502, 503])
def test_an_outage_is_retried_with_growing_pauses_and_given_up(
    quick: None, asked: Asking, llmock: LLMock, status: int
) -> None:
    llmock.fail(status, times=None)
    assert code_of(asked) == "upstream_error"
    assert len(llmock.requests) == 3
    llmock.assert_resilient(strict=True)


def test_a_short_outage_is_outlived(quick: None, asked: Asking, llmock: LLMock) -> None:
    llmock.fail(503, times=2).reply(REPLY)
    assert isinstance(asked.ask()[-1], Finish)
    llmock.assert_resilient(strict=True)


def test_a_conversation_that_is_too_long_is_told_as_that(asked: Asking, llmock: LLMock) -> None:
    llmock.context_overflow(times=None)
    assert code_of(asked) == "input_too_long"
    assert len(llmock.requests) == 1
    llmock.assert_resilient(strict=True)
