"""What an OpenAI client asks, against what the settings name: several answers, and probabilities."""

from __future__ import annotations

import json
from typing import Any

import pytest

from streamchat.client_schema import MOST_CHOICES, Delivery, parse_gateway_request
from streamchat.errors import InvalidRequest
from streamchat.schema import ChatRequest
from streamchat.settings import Settings

NAMES = ("n", "logprobs", "top_logprobs")
ASK = {"model": "gpt-4.1-mini", "messages": [{"role": "user", "content": "hi"}]}
NAMED = Settings.from_mapping({"STREAMCHAT_PARAMS": NAMES})
NOT_A_COUNT: list[Any] = [0, -1, MOST_CHOICES + 1, 10**30, "2", 2.0, 1.5, True, False, [2], {}]
NOT_A_FLAG: list[Any] = [1, 0, "true", 5, [], {}]
NOT_SO_MANY: list[Any] = [-1, 21, "5", 5.0, True, [1], {}, 10**30]
RESPONSES = Settings.from_mapping({"STREAMCHAT_PARAMS": NAMES, "STREAMCHAT_UPSTREAM_API": "responses"})


def parsed(settings: Settings, **more: Any) -> tuple[ChatRequest, Delivery]:
    return parse_gateway_request(json.dumps({**ASK, **more}).encode(), settings)


def refusal(settings: Settings, **more: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        parsed(settings, **more)
    return caught.value.detail


@pytest.mark.parametrize(
    "asked",
    [
        {"n": 2},
        {"n": MOST_CHOICES},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 0},
        {"n": 3, "logprobs": True, "top_logprobs": 20},
    ],
)
def test_what_the_settings_name_is_passed_on(asked: dict[str, Any]) -> None:
    request, delivery = parsed(NAMED, **asked)
    assert request.params == asked
    assert delivery.choices == asked.get("n", 1)


@pytest.mark.parametrize("name", NAMES)
def test_each_name_allows_itself_alone(name: str) -> None:
    asked = {"n": 2, "logprobs": True, "top_logprobs": 1}
    others = Settings.from_mapping({"STREAMCHAT_PARAMS": [other for other in NAMES if other != name]})
    assert refusal(others, **asked) == f'The field "{name}" may not be set here.'


@pytest.mark.parametrize("settings", [Settings(), NAMED, RESPONSES], ids=["none", "named", "responses"])
@pytest.mark.parametrize(
    "asked", [{"n": 1}, {"n": None}, {"logprobs": False}, {"logprobs": None}, {"top_logprobs": None}]
)
def test_what_says_no_more_than_the_default_is_always_taken_and_never_sent(
    settings: Settings, asked: dict[str, Any]
) -> None:
    request, delivery = parsed(settings, **asked)
    assert (request.params, delivery.choices) == ({}, 1)


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        *(({"n": value}, "n") for value in NOT_A_COUNT),
        *(({"logprobs": value}, "logprobs") for value in NOT_A_FLAG),
        *(({"logprobs": True, "top_logprobs": value}, "top_logprobs") for value in NOT_SO_MANY),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"top_logprobs": 0}, "top_logprobs"),
        ({"top_logprobs": 5, "logprobs": False}, "top_logprobs"),
    ],
)
def test_what_is_out_of_range_is_refused_by_the_fields_name(asked: dict[str, Any], field: str) -> None:
    assert refusal(NAMED, **asked).startswith(f'The field "{field}"')


@pytest.mark.parametrize("asked", [{"n": 2}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 2}])
def test_the_responses_api_cannot_be_asked_for_them_and_the_client_is_told_why(asked: dict[str, Any]) -> None:
    told = refusal(RESPONSES, **asked)
    assert told == f'The field "{next(iter(asked))}" cannot be used here: the model is asked by the Responses API.'
