"""What a setting may be: each check returns the value to keep, or raises ValueError with words that begin "must be"."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from .addresses import check_host, parse_target
from .webhooks import key_of

Check = Callable[[Any], Any]

PARAMS = ("temperature", "top_p", "max_output_tokens")
# What an OpenAI client may send besides, where the operator names it.
GATEWAY_PARAMS = (
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_format",
    "stop",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "reasoning_effort",
    "verbosity",
    "service_tier",
    "n",
    "logprobs",
    "top_logprobs",
    "metadata",
    "user",
)


def text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text")
    return value


def name(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be text that is not empty")
    return value.strip()


def names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, (list, tuple, set, frozenset)):
        raise ValueError('must be a list of names, such as ["a", "b"]')
    if not all(isinstance(item, str) and item.strip() for item in value):
        raise ValueError('must be a list of names that are not empty, such as ["a", "b"]')
    return tuple(item.strip() for item in value)


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def whole(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return check


def seconds(low: float, high: float) -> Check:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"must be a number of seconds from {low:g} to {high:g}")
        return float(value)

    return check


def one_of(*allowed: str) -> Check:
    def check(value: Any) -> str:
        if value not in allowed:
            raise ValueError(f"must be one of: {', '.join(allowed)}")
        return str(value)

    return check


def store(value: Any) -> str:
    if value in (None, ""):
        return ""
    scheme, _, rest = str(value).partition("://")
    has_path = rest.startswith("/") and not rest.endswith("/")
    if scheme not in ("memory", "sqlite", "redis", "rediss") or (scheme == "sqlite" and not has_path):
        raise ValueError("must be sqlite:///path, redis://host or memory://")
    return str(value)


def on_disconnect(value: Any) -> str | float:
    """What an answer does whose caller left; a number is how many seconds it waits for somebody to read on."""
    if value in ("cancel", "finish"):
        return str(value)
    with contextlib.suppress(TypeError, ValueError):  # a variable of the environment is text
        if not isinstance(value, bool) and 0 < float(value) <= 86_400:
            return float(value)
    raise ValueError('must be "cancel", "finish" or a number of seconds up to 86400')


def params(value: Any) -> tuple[str, ...]:
    listed = names(value)
    if not set(listed) <= {*PARAMS, *GATEWAY_PARAMS}:
        raise ValueError(f"must be a list of some of: {', '.join((*PARAMS, *GATEWAY_PARAMS))}")
    return listed


def tokens(value: Any) -> tuple[tuple[str | None, str], ...]:
    """(name, token) pairs; a list of tokens has no names."""
    pairs = list(value.items()) if isinstance(value, Mapping) else [(None, token) for token in _listed(value)]
    for name, token in pairs:
        if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError("must hold tokens of printable ASCII without spaces")
        if name is not None and not str(name).strip():
            raise ValueError("must name every token")
    return tuple((None if name is None else str(name), token) for name, token in pairs)


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        raise ValueError('must be {"name": "token"} or a list of tokens')
    return list(value)


def origins(value: Any) -> tuple[str, ...]:
    try:
        return tuple(_origin(item) for item in names(value))
    except ValueError:  # urlsplit's too
        raise ValueError(
            'must be a list of origins, such as ["https://shop.example"], without path or final slash'
        ) from None


def _origin(value: str) -> str:
    parts = urlsplit(value.lower())
    port = "" if parts.port is None else f":{parts.port}"
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    if parts.scheme not in ("http", "https") or not host or set(host) & set(" *@"):
        raise ValueError
    if value.lower() != f"{parts.scheme}://{host}{port}":
        raise ValueError
    return value.lower()


def webhook_url(value: Any) -> str:
    """Whether it may lead to this machine is another setting's: STREAMCHAT_WEBHOOK_LOOPBACK."""
    if value in (None, ""):
        return ""
    if not isinstance(value, str):
        raise ValueError("must be a URL such as https://shop.example/hook")
    parse_target(value, loopback=True)
    return value


def webhook_secrets(value: Any) -> tuple[str, ...]:
    listed = names(value)
    for secret in listed:
        key_of(secret)
    return listed


def webhook_hosts(value: Any) -> tuple[str, ...]:
    """Names that are compared with a target's host, and suffixes that begin with a dot."""
    listed = tuple(host.lower() for host in names(value))
    for host in listed:
        try:
            check_host(host.removeprefix("."), bracketed=":" in host)
        except ValueError:
            raise ValueError('must be a list of hosts, such as ["shop.example", ".shop.example"]') from None
    return listed
