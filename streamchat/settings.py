"""One table of settings becomes one frozen `Settings`; a bad value stops the start and names key, value and cure.

The table is the fields of `Settings`: default, check and sentence stand side by side. Nothing is read later.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from .errors import SettingsError

PREFIX = "STREAMCHAT_"
Check = Callable[[Any], Any]  # returns the value to keep, raises ValueError with "must be ..."

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


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be text that is not empty")
    return value.strip()


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, (list, tuple, set, frozenset)):
        raise ValueError('must be a list of names, such as ["a", "b"]')
    if not all(isinstance(item, str) and item.strip() for item in value):
        raise ValueError('must be a list of names that are not empty, such as ["a", "b"]')
    return tuple(item.strip() for item in value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _whole(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return value

    return check


def _seconds(low: float, high: float) -> Check:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"must be a number of seconds from {low:g} to {high:g}")
        return float(value)

    return check


def _one_of(*allowed: str) -> Check:
    def check(value: Any) -> str:
        if value not in allowed:
            raise ValueError(f"must be one of: {', '.join(allowed)}")
        return str(value)

    return check


def _params(value: Any) -> tuple[str, ...]:
    names = _names(value)
    if not set(names) <= {*PARAMS, *GATEWAY_PARAMS}:
        raise ValueError(f"must be a list of some of: {', '.join((*PARAMS, *GATEWAY_PARAMS))}")
    return names


def _tokens(value: Any) -> tuple[tuple[str | None, str], ...]:
    """(name, token) pairs; a list of tokens has no names."""
    pairs = list(value.items()) if isinstance(value, Mapping) else [(None, token) for token in _list(value)]
    for name, token in pairs:
        if not isinstance(token, str) or not token or not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError("must hold tokens of printable ASCII without spaces")
        if name is not None and not str(name).strip():
            raise ValueError("must name every token")
    return tuple((None if name is None else str(name), token) for name, token in pairs)


def _list(value: Any) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        raise ValueError('must be {"name": "token"} or a list of tokens')
    return list(value)


def _origins(value: Any) -> tuple[str, ...]:
    try:
        return tuple(_origin(item) for item in _names(value))
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


def _setting(default: Any, check: Check, sentence: str, secret: bool = False) -> Any:
    return field(default=default, repr=not secret, metadata={"check": check, "help": sentence, "secret": secret})


@dataclass(frozen=True)
class Settings:
    """The settings of one mounted blueprint; each field `name` is the key STREAMCHAT_NAME. Times are seconds."""

    model: str = _setting("gpt-4.1-mini", _name, "The model that answers.")
    models: tuple[str, ...] = _setting((), _names, "Further models that callers may choose by name.")
    params: tuple[str, ...] = _setting(
        (),
        _params,
        "Request fields that callers may set: temperature, top_p, max_output_tokens; by the gateway also tools, n, "
        "logprobs and others.",
    )
    system_prompt: str = _setting("", _text, "What the model is told before the conversation.", secret=True)
    max_output_tokens: int = _setting(4096, _whole(1, 10_000_000), "The longest answer, in tokens.")
    max_input_chars: int = _setting(100_000, _whole(1, 100_000_000), "The longest conversation, in characters.")
    max_body_bytes: int = _setting(1_000_000, _whole(100, 1_000_000_000), "The largest request body, in bytes.")
    max_streams: int = _setting(900, _whole(1, 1_000_000), "Answers that one worker runs at a time.")
    public: bool = _setting(False, _flag, "Anyone may ask: there is no authorize hook and no token.")
    tokens: tuple[tuple[str | None, str], ...] = _setting(
        (), _tokens, "Bearer tokens that may ask: {name: token}, or a list of tokens.", secret=True
    )
    origins: tuple[str, ...] = _setting((), _origins, "Other sites whose pages may ask from a browser.")
    http: str = _setting(
        "auto", _one_of("auto", "fast", "sdk"), "How the upstream is reached: fast is ours, sdk is the SDK's own."
    )
    upstream_api: str = _setting(
        "chat", _one_of("chat", "responses"), "The upstream's API: Chat Completions or Responses."
    )
    gateway: bool = _setting(False, _flag, "POST /v1/chat/completions and GET /v1/models answer OpenAI's own clients.")
    connect_timeout: float = _setting(5.0, _seconds(0.01, 600), "Longest wait for a connection, all addresses.")
    first_token_timeout: float = _setting(120.0, _seconds(0.01, 86_400), "Longest wait for the first piece.")
    idle_timeout: float = _setting(60.0, _seconds(0.01, 86_400), "Longest silence between two pieces.")
    total_timeout: float = _setting(570.0, _seconds(0.01, 86_400), "Longest time of one answer.")
    max_retries: int = _setting(2, _whole(0, 10), "Further attempts before the first piece.")
    status_hold: float = _setting(2.0, _seconds(0, 60), "How long the status waits for the first piece.")
    heartbeat: float = _setting(15.0, _seconds(0.05, 3600), "Silence after which a heartbeat is written.")
    coalesce_ms: int = _setting(40, _whole(0, 1000), "Milliseconds in which pieces are joined; 0 turns it off.")
    write_timeout: float = _setting(30.0, _seconds(1, 3600), "How long a caller may leave a piece unread.")
    grace: float = _setting(
        120.0, _seconds(1, 86_400), "Seconds that a stopping worker has; gunicorn's graceful_timeout."
    )

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Settings:
        """Settings out of app.config and `create_blueprint`'s keyword arguments, which win.

        Raises SettingsError for a value that a check refuses and for a key STREAMCHAT_... that is no setting.
        """
        given = {key[len(PREFIX) :].lower(): value for key, value in config.items() if key.startswith(PREFIX)}
        given |= overrides or {}
        return cls(**{name: _checked(name, value) for name, value in given.items()})


TABLE = {setting.name: setting for setting in fields(Settings)}


def key(name: str) -> str:
    """The configuration key of a field."""
    return PREFIX + name.upper()


def _checked(name: str, value: Any) -> Any:
    setting = TABLE.get(name)
    if setting is None:
        near = difflib.get_close_matches(name, TABLE, n=1)
        raise SettingsError(
            f"{key(name)} is not a setting" + (f"; did you mean {key(near[0])}?" if near else "; remove it.")
        )
    try:
        return setting.metadata["check"](value)
    except ValueError as error:
        shown = "its value" if setting.metadata["secret"] else repr(value)
        raise SettingsError(f"{key(name)} {error}, not {shown}.") from None


def read_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    """The STREAMCHAT_... variables as configuration: text for settings that are text, JSON for all others.

    An empty variable is one that is not set. Raises SettingsError where JSON cannot be read.
    """
    return {name: _from_variable(name, value) for name, value in environ.items() if name.startswith(PREFIX) and value}


def _from_variable(name: str, value: str) -> Any:
    setting = TABLE.get(name[len(PREFIX) :].lower())
    if setting is None or isinstance(setting.default, str):
        return value
    if isinstance(setting.default, bool):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), value)
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        shown = "its value" if setting.metadata["secret"] else repr(value)
        raise SettingsError(f"{name} must be JSON, such as {_example(setting.default)}, not {shown}.") from None


def _example(default: Any) -> str:
    return '["a", "b"]' if isinstance(default, tuple) else json.dumps(default)
