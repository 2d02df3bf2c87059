"""How answers end: the final state by the last event and the outcome, and the error that a logged failure was."""

from __future__ import annotations

import logging

import pytest

from streamchat import errors
from streamchat.ending import broken, ending_of, error_of, failure_of
from streamchat.errors import CallerGone, CallerStalled, Cancelled, Draining, StreamChatError
from streamchat.events import Failure, Finish, Usage
from streamchat.store import Status
from tests.store_contract import entry, record


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        ("stop", "completed"),
        ("tool_calls", "completed"),
        ("length", "incomplete"),
        ("content_filter", "incomplete"),
    ],
)
def test_a_finish_says_whether_the_model_was_stopped(reason: str, status: Status) -> None:
    made = ending_of(record(entry("owner")), Finish(reason, Usage(1, 2)))
    assert (made.status, made.finish_reason, made.usage, made.error) == (status, reason, Usage(1, 2), None)


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        ("cancelled", "cancelled"),
        ("caller_left", "cancelled"),
        ("caller_stalled", "cancelled"),
        ("draining", "failed"),
        ("interrupted", "failed"),
        ("upstream_incomplete", "failed"),
    ],
)
def test_what_did_not_finish_was_cancelled_or_failed(outcome: str, status: Status) -> None:
    made = ending_of(record(entry("owner"), outcome=outcome), Failure("code", "words", False))
    assert (made.status, made.finish_reason, made.usage, made.error) == (status, None, None, "code")


@pytest.mark.parametrize("error", [CallerGone(), CallerStalled(), Cancelled()])
def test_that_somebody_left_is_nobody_elses_business(error: StreamChatError) -> None:
    assert failure_of(error, lambda told: told.code) == Failure("cancelled", "cancelled", False)


def test_a_failure_is_told_in_the_shops_words() -> None:
    assert failure_of(Draining(), lambda error: error.code.upper()) == Failure("draining", "DRAINING", True)


def kinds(base: type[StreamChatError]) -> list[type[StreamChatError]]:
    return [base, *(deeper for kind in base.__subclasses__() for deeper in kinds(kind))]


@pytest.mark.parametrize("kind", [kind for kind in kinds(errors.UpstreamFailure) if kind is not errors.UpstreamFailure])
def test_a_logged_failure_becomes_the_error_that_it_was(kind: type[StreamChatError]) -> None:
    error = error_of(failure_of(kind("words"), lambda error: error.detail))
    assert (error.status, error.code, error.retryable, error.detail) == (
        kind.status,
        kind.code,
        kind.retryable,
        "words",
    )


@pytest.mark.parametrize("kind", kinds(StreamChatError))
def test_a_logged_failure_that_passes_by_itself_says_when_to_try_again(kind: type[StreamChatError]) -> None:
    passes = kind.code in ("overloaded", "draining", "upstream_rate_limited")
    assert (error_of(failure_of(kind(), lambda error: error.detail)).retry_after is not None) == passes


def test_a_code_that_nobody_knows_was_an_interruption() -> None:
    assert error_of(Failure("of_tomorrow", "words", False)).status == 500


def test_a_fault_of_our_own_is_logged_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "streamchat"):
        with pytest.raises(ValueError, match="secret") as caught:
            raise ValueError("sk-secret")
        assert broken("resp_1", caught.value).code == "interrupted"
    assert "ValueError" in caplog.text and "test_ending.py" in caplog.text
    assert "sk-secret" not in caplog.text
