"""Tokens and other sites' pages: who may ask, from plain header values."""

from __future__ import annotations

import contextlib
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug import exceptions

from streamchat.access import check_site, cors_headers, from_abort, preflight_headers, user_of_token
from streamchat.errors import Forbidden, Unauthorized

TOKENS = (("alice", "secret-a"), ("bob", "secret-b"), (None, "secret-c"))
SHOP = "shop.example"
OTHER = "https://other.example"


@pytest.mark.parametrize(
    ("header", "user"),
    [
        ("Bearer secret-a", "alice"),
        ("Bearer secret-b", "bob"),
        ("bearer secret-a", "alice"),
        ("BEARER secret-a", "alice"),
        ("Bearer secret-c", "token-" + hashlib.sha256(b"secret-c").hexdigest()[:8]),
    ],
)
def test_a_token_stands_for_its_name_or_for_eight_digits_of_its_hash(header: str, user: str) -> None:
    assert user_of_token(header, TOKENS) == user


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer secret-a2",
        "Bearer secret-",
        "Bearer SECRET-A",
        "Bearer secret-a secret-b",
        "Bearer secret-a,secret-b",
        "Basic secret-a",
        "secret-a",
        "Bearersecret-a",
        "Bearer alice",
        "Bearer None",
        "Bearer schl\u00fcssel",
        "Bearer \x00",
        "Bearer 👋",
    ],
)
def test_anything_else_is_unauthorized_and_repeats_nothing(header: str | None) -> None:
    with pytest.raises(Unauthorized) as caught:
        user_of_token(header, TOKENS)
    assert "secret" not in str(caught.value)
    assert "wrong" not in str(caught.value)


def test_no_token_is_valid_where_none_is_set() -> None:
    for header in (None, "Bearer ", "Bearer x"):
        with pytest.raises(Unauthorized):
            user_of_token(header, ())


# WSGI hands headers over as Latin-1.
latin = st.text(st.characters(max_codepoint=255))


@given(latin)
def test_no_header_is_an_accident(header: str) -> None:
    for value in (header, f"Bearer {header}"):
        with contextlib.suppress(Unauthorized):
            assert user_of_token(value, TOKENS) in ("alice", "bob")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
        {"Sec-Fetch-Site": "same-origin", "Origin": f"https://{SHOP}"},
        # The browser's own judgement counts: Host may have been rewritten on the way.
        {"Sec-Fetch-Site": "same-origin", "Origin": "https://shop.before.proxy"},
        {"Origin": f"https://{SHOP}"},
        # TLS ends at nginx, so the scheme is not compared.
        {"Origin": f"http://{SHOP}"},
        {"Origin": f"https://{SHOP.upper()}"},
    ],
)
def test_a_page_of_the_shop_and_a_caller_that_is_no_page_may_ask(headers: dict[str, str]) -> None:
    assert check_site(headers, SHOP, ()) is None


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://127.0.0.1:5000", "127.0.0.1:5000"),
        ("http://[::1]:5000", "[::1]:5000"),
        ("https://shop.example:8443", "shop.example:8443"),
        ("https://shop.example", "shop.example:443"),
        ("http://shop.example", "shop.example:80"),
        ("https://shop.example", "SHOP.example"),
    ],
)
def test_an_origin_without_sec_fetch_site_is_compared_by_host_and_port(origin: str, host: str) -> None:
    assert check_site({"Origin": origin}, host, ()) is None


REFUSED = [
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": ""},
    {"Sec-Fetch-Site": "anything"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"},
    {"Sec-Fetch-Site": "cross-site", "Origin": f"https://{SHOP}"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "null"},
    {"Sec-Fetch-Site": "same-site", "Origin": "https://blog.shop.example"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "https://evil.example"},
    {"Origin": f"https://{SHOP}.evil.example"},
    {"Origin": f"https://evil{SHOP}"},
    {"Origin": f"https://evil.example/{SHOP}"},
    {"Origin": f"https://evil.example#{SHOP}"},
    {"Origin": f"https://{SHOP}@evil.example"},
    {"Origin": f"https://{SHOP}:8443"},
    {"Origin": f"https://{SHOP}:99999"},
    {"Origin": f"https://{SHOP}:port"},
    {"Origin": "http://[::1"},
    {"Origin": "https://"},
    {"Origin": SHOP},
    {"Origin": "https://other.example:444"},
    {"Origin": "http://other.example"},
    {"Origin": "https://other.example.evil.example"},
]


@pytest.mark.parametrize("headers", REFUSED, ids=str)
@pytest.mark.parametrize("allowed", [(), (OTHER,)], ids=["none-listed", "one-listed"])
def test_a_page_of_another_site_may_not(headers: dict[str, str], allowed: tuple[str, ...]) -> None:
    with pytest.raises(Forbidden) as caught:
        check_site(headers, SHOP, allowed)
    assert "evil" not in str(caught.value)


@pytest.mark.parametrize("site", ["cross-site", "same-site", None])
def test_a_listed_origins_page_may_ask_and_is_named(site: str | None) -> None:
    headers = {"Origin": OTHER} if site is None else {"Origin": OTHER, "Sec-Fetch-Site": site}
    assert check_site(headers, SHOP, ("https://third.example", OTHER)) == OTHER


@given(latin, latin)
def test_no_origin_is_an_accident(origin: str, host: str) -> None:
    for value in (origin, f"http://{origin}", f"http://[{origin}", f"http://{host}:{origin}"):
        with contextlib.suppress(Forbidden):
            assert check_site({"Origin": value}, host, ()) is None


def test_only_a_listed_origin_gets_cors_headers_and_they_are_exact() -> None:
    headers = cors_headers(OTHER)
    assert headers["Access-Control-Allow-Origin"] == OTHER
    assert "Origin" in headers["Vary"]
    assert not [name for name in cors_headers(None) if name.startswith("Access-Control")]
    assert "*" not in headers.values()


def test_a_preflight_allows_the_post_that_will_follow() -> None:
    headers = preflight_headers(OTHER)
    assert headers["Access-Control-Allow-Origin"] == OTHER
    assert "POST" in headers["Access-Control-Allow-Methods"]
    allowed = {name.strip().lower() for name in headers["Access-Control-Allow-Headers"].split(",")}
    assert {"content-type", "authorization"} <= allowed
    assert "Origin" in headers["Vary"]
    assert "Access-Control-Allow-Origin" not in preflight_headers(None)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, "invalid_request"),
        (401, "unauthorized"),
        (403, "forbidden"),
        (404, "not_found"),
        (413, "payload_too_large"),
        (415, "unsupported_media_type"),
        (429, "too_many_streams"),
        (503, "overloaded"),
    ],
)
def test_a_shops_abort_becomes_the_error_of_its_status(status: int, code: str) -> None:
    with pytest.raises(exceptions.HTTPException) as aborted:
        exceptions.abort(status)
    error = from_abort(aborted.value)
    assert error is not None
    assert (error.status, error.code) == (status, code)


@pytest.mark.parametrize("status", [405, 410, 418, 500, 501])
def test_any_other_abort_stays_the_shops_own_page(status: int) -> None:
    with pytest.raises(exceptions.HTTPException) as aborted:
        exceptions.abort(status)
    assert from_abort(aborted.value) is None


def test_a_redirect_to_the_login_page_stays_the_shops() -> None:
    response = exceptions.HTTPException(response=exceptions.NotFound().get_response())
    assert from_abort(response) is None


@pytest.mark.parametrize(
    "aborted", [exceptions.TooManyRequests(retry_after=30), exceptions.ServiceUnavailable(retry_after=30)]
)
def test_the_wait_that_a_shop_asks_for_is_kept(aborted: exceptions.HTTPException) -> None:
    error = from_abort(aborted)
    assert error is not None
    assert error.retry_after == 30
