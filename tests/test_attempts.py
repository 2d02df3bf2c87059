"""The schedule of a webhook's attempts, walked by a clock that is not the machine's."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamchat.attempts import LONGEST_RETRY_AFTER, PAUSES, Fault, Next, Reply, after, first_due, seconds_of

HOUR = 3600.0
NOW = 1_790_000_000.0


def walk(replies: Iterator[Reply], chance: float = 0.0) -> tuple[list[float], Next]:
    """The hours at which attempts are made, and what becomes of the message."""
    now, made = first_due(0.0), []
    while True:
        made.append(now / HOUR)
        then = after(next(replies), len(made), now, lambda: chance)
        if then.state != "waiting":
            return made, then
        assert then.due is not None and then.due > now
        now = then.due


def always(reply: Reply) -> Iterator[Reply]:
    while True:
        yield reply


FAULTS: list[Fault] = ["address", "dns", "connection", "tls", "timeout", "protocol"]
STATUSES = [100, 199, 300, 301, 302, 308, 400, 401, 403, 404, 408, 409, 500, 501, 599]
FAILURES = [*(Reply(fault=fault) for fault in FAULTS), *(Reply(status=status) for status in STATUSES)]


@pytest.mark.parametrize("reply", FAILURES, ids=str)
def test_what_fails_is_tried_ten_times_over_75_hours_and_then_dead(reply: Reply) -> None:
    made, then = walk(always(reply))
    assert len(made) >= 10
    assert 75 <= made[-1] <= 76
    assert then == Next("dead")


def test_the_schedule_is_that_of_the_specification() -> None:
    made, _ = walk(always(Reply(status=500)))
    seconds = [round(hours * HOUR) for hours in made]
    gaps = [later - sooner for sooner, later in pairwise(seconds)]
    assert [seconds[0], *gaps] == [0, 5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400]


def test_chance_only_adds_and_at_most_a_fifth() -> None:
    early, _ = walk(always(Reply(status=500)), 0.0)
    late, _ = walk(always(Reply(status=500)), 1.0)
    assert late == pytest.approx([hours * 1.2 for hours in early])


def test_two_messages_that_failed_together_are_not_tried_together_again() -> None:
    dues = {after(Reply(status=500), 3, NOW).due for _ in range(100)}
    assert len(dues) > 90
    assert all(due is not None and 1800 <= due - NOW <= 1800 * 1.2 for due in dues)


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
@pytest.mark.parametrize("attempts", [1, 5, len(PAUSES)])
def test_any_2xx_is_a_delivery_at_any_attempt(status: int, attempts: int) -> None:
    assert after(Reply(status=status), attempts, NOW) == Next("delivered")


@pytest.mark.parametrize("attempts", [1, len(PAUSES)])
def test_410_is_final_and_switches_the_target_off(attempts: int) -> None:
    assert after(Reply(status=410, retry_after=5), attempts, NOW) == Next("dead", switch_off=True)


def test_a_target_that_is_none_is_not_tried_again() -> None:
    assert after(Reply(fault="target"), 1, NOW) == Next("dead")


def test_an_address_in_a_private_network_is_tried_again_since_names_are_repaired() -> None:
    assert after(Reply(fault="address"), 1, NOW).state == "waiting"


@pytest.mark.parametrize(
    ("status", "asked", "attempts", "pause"),
    [
        (500, 120, 1, 120),  # longer than the schedule's 5 s
        (429, 120, 1, 120),
        (500, 1, 2, 300),  # never sooner than the schedule
        (503, 1800, 3, 1800),
        (503, 10**9, 1, LONGEST_RETRY_AFTER),  # within limits
        (503, 10**9, 5, 18_000),
        (429, None, 1, 60),  # the specification: slow down
        (502, None, 1, 60),
        (503, None, 1, 60),
        (504, 5, 1, 60),
        (429, None, 4, 7200),
        (500, None, 1, 5),
        (500, 0, 1, 5),
    ],
)
def test_retry_after_is_honoured_within_limits(status: int, asked: float | None, attempts: int, pause: float) -> None:
    then = after(Reply(status=status, retry_after=asked), attempts, NOW, lambda: 0.0)
    assert then == Next("waiting", due=NOW + pause)


def test_a_receiver_that_asks_for_ages_each_time_gets_its_ten_attempts_within_five_days() -> None:
    made, then = walk(always(Reply(status=429, retry_after=1e12)), 1.0)
    assert (len(made), then.state) == (10, "dead")
    assert 75 <= made[-1] <= 5 * 24


def test_a_failure_that_passes_ends_in_one_delivery() -> None:
    replies: list[Reply] = [Reply(fault="dns"), Reply(status=429, retry_after=30), Reply(status=302), Reply(status=204)]
    made, then = walk(iter(replies))
    assert (len(made), then) == (4, Next("delivered"))


anything = st.builds(
    Reply,
    status=st.none() | st.integers(100, 599),
    fault=st.sampled_from([None, *FAULTS, "target"]),
    retry_after=st.none() | st.floats(0, 1e15),
)


@given(anything, st.integers(1, len(PAUSES)), st.floats(0, 1))
def test_the_next_attempt_is_never_sooner_than_the_schedule_nor_much_later(
    reply: Reply, attempts: int, chance: float
) -> None:
    then = after(reply, attempts, NOW, lambda: chance)
    assert (then.due is not None) == (then.state == "waiting")
    if then.due is not None:
        assert PAUSES[attempts] <= then.due - NOW <= 1.2 * max(PAUSES[attempts], LONGEST_RETRY_AFTER)


def date(seconds: float) -> str:
    return format_datetime(datetime.fromtimestamp(NOW + seconds, UTC), usegmt=True)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120.0),
        (" 0 ", 0.0),
        ("9" * 400, 999_999_999_999.0),
        (date(90), 90.0),
        (date(-90), 0.0),
        (None, None),
        ("", None),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("٣", None),
        ("inf", None),
        ("Wed, 99 Xxx 2026 99:99:99 GMT", None),
        ("Wed, 01 Jan 99999999999999999999 00:00:00 GMT", None),
    ],
)
def test_retry_after_is_a_number_or_a_date(header: str | None, seconds: float | None) -> None:
    assert seconds_of(header, NOW) == seconds


@given(st.text(max_size=40))
def test_any_retry_after_is_read_or_left_alone(text: str) -> None:
    found = seconds_of(text, NOW)
    assert found is None or found >= 0
