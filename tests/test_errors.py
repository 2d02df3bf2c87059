"""Every error against the table of codes and statuses that callers are promised."""

from __future__ import annotations

import re
from http import HTTPStatus

import pytest

from streamchat import errors
from streamchat.errors import StreamChatError

# code -> status, whether a retry may help. A code stands in this table or is never sent to a caller.
TABLE = {
    "invalid_request": (400, False),
    "unauthorized": (401, False),
    "forbidden": (403, False),
    "not_found": (404, False),
    "not_acceptable": (406, False),
    "payload_too_large": (413, False),
    "unsupported_media_type": (415, False),
    "input_too_long": (413, False),
    "refused": (422, False),
    "idempotency_mismatch": (422, False),
    "too_many_streams": (429, True),
    "budget_exhausted": (429, True),
    "overloaded": (503, True),
    "draining": (503, True),
    "upstream_rate_limited": (503, True),
    "upstream_quota": (503, False),
    "upstream_auth": (502, False),
    "upstream_rejected": (502, False),
    "upstream_error": (502, True),
    "upstream_unreachable": (502, True),
    "upstream_malformed": (502, True),
    "upstream_incomplete": (502, True),
    "upstream_timeout": (504, True),
    "upstream_stalled": (504, True),
}
IN_STREAM_ONLY = {"interrupted", "gap", "cancelled"}
# The same to a caller as the error above them; told apart in the code.
KINDS = {"StoreDown": "overloaded", "LeaseLost": "interrupted"}
# Outcomes in the ledger; nobody is there to read them.
LEDGER_ONLY = {"caller_left": 499, "caller_stalled": 499}


def subclasses(base: type[StreamChatError]) -> list[type[StreamChatError]]:
    direct = [cls for cls in base.__subclasses__() if cls.__module__ == errors.__name__]
    return direct + [deeper for cls in direct for deeper in subclasses(cls)]


# SettingsError stops the start and Refused and UpstreamFailure are only bases: none of them is ever sent.
SENT = [
    cls for cls in subclasses(StreamChatError) if cls.__name__ not in ("SettingsError", "Refused", "UpstreamFailure")
]
by_code = {cls.code: cls for cls in SENT if cls.__name__ not in KINDS}


@pytest.mark.parametrize("code", TABLE)
def test_each_code_has_the_promised_status_and_says_whether_a_retry_helps(code: str) -> None:
    assert (by_code[code].status, by_code[code].retryable) == TABLE[code]


def test_there_is_no_code_outside_the_table() -> None:
    assert set(by_code) == set(TABLE) | IN_STREAM_ONLY | set(LEDGER_ONLY)
    assert {code: by_code[code].status for code in LEDGER_ONLY} == LEDGER_ONLY


def test_no_two_errors_share_a_code() -> None:
    assert {cls.__name__: cls.code for cls in SENT if cls.__name__ in KINDS} == KINDS
    codes = [cls.code for cls in SENT if cls.__name__ not in KINDS]
    assert sorted(codes) == sorted(set(codes))


@pytest.mark.parametrize("cls", SENT, ids=lambda cls: cls.__name__)
def test_each_error_has_public_words_of_its_own(cls: type[StreamChatError]) -> None:
    assert re.fullmatch(r"[A-Z].{5,}\.|[A-Z].{5,}'\.", cls.text)
    assert str(cls()) == cls.text
    assert re.fullmatch(r"[a-z_]{3,40}", cls.code)


@pytest.mark.parametrize("cls", SENT, ids=lambda cls: cls.__name__)
def test_the_title_is_the_status_in_words(cls: type[StreamChatError]) -> None:
    expected = "Client Closed Request" if cls.status == 499 else HTTPStatus(cls.status).phrase
    assert cls().title == expected


def test_a_detail_replaces_the_words_and_a_wait_is_kept() -> None:
    error = errors.Overloaded("Full.", retry_after=7)
    assert (str(error), error.retry_after) == ("Full.", 7)
    assert errors.InvalidRequest("The field x is missing.").code == "invalid_request"


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    told = re.findall(r"-- (\w+) +(\d{3}) (\w+)", errors.__doc__ or "")
    assert {(name, int(status), code) for name, status, code in told} == {
        (cls.__name__, cls.status, cls.code) for cls in SENT
    }
    named = set(re.findall(r"-- (\w+)", errors.__doc__ or ""))
    assert named == {cls.__name__ for cls in subclasses(StreamChatError)}


def test_our_checks_and_the_upstreams_failures_are_told_apart() -> None:
    upstream = {cls.code for cls in subclasses(errors.UpstreamFailure)} | {"upstream_error"}
    assert upstream == {code for code in TABLE if code.startswith("upstream_")} | {"input_too_long", "refused"}
    refused = {cls.code for cls in subclasses(errors.Refused)}
    assert refused == {code for code, (status, _) in TABLE.items() if status < 500} - {"input_too_long", "refused"}
