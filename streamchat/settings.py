"""One table of settings becomes one frozen `Settings`; a bad value stops the start and names key, value and cure.

The table is the fields of `Settings`: default, check and sentence stand side by side. Nothing is read later.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from . import checks
from .addresses import parse_target
from .checks import Check
from .errors import SettingsError

PREFIX = "STREAMCHAT_"


def _setting(default: Any, check: Check, sentence: str, secret: bool = False) -> Any:
    return field(default=default, repr=not secret, metadata={"check": check, "help": sentence, "secret": secret})


@dataclass(frozen=True)
class Settings:
    """The settings of one mounted blueprint; each field `name` is the key STREAMCHAT_NAME. Times are seconds."""

    model: str = _setting("gpt-4.1-mini", checks.name, "The model that answers.")
    models: tuple[str, ...] = _setting((), checks.names, "Further models that callers may choose by name.")
    params: tuple[str, ...] = _setting(
        (),
        checks.params,
        "Request fields that callers may set: temperature, top_p, max_output_tokens; by the gateway also tools, n, "
        "logprobs and others.",
    )
    system_prompt: str = _setting("", checks.text, "What the model is told before the conversation.", secret=True)
    max_output_tokens: int = _setting(4096, checks.whole(1, 10_000_000), "The longest answer, in tokens.")
    max_input_chars: int = _setting(100_000, checks.whole(1, 100_000_000), "The longest conversation, in characters.")
    max_body_bytes: int = _setting(1_000_000, checks.whole(100, 1_000_000_000), "The largest request body, in bytes.")
    max_streams: int = _setting(900, checks.whole(1, 1_000_000), "Answers that one worker runs at a time.")
    max_streams_per_user: int = _setting(
        20, checks.whole(0, 1_000_000), "Answers of one user at a time; 0 is no limit."
    )
    max_streams_in_all: int = _setting(
        0, checks.whole(0, 10_000_000), "Answers of all workers at a time, where there is a store; 0 is no limit."
    )
    tokens_per_day: int = _setting(
        0, checks.whole(0, 10**12), "Tokens of one user in a day (UTC), where there is a store; 0 is no limit."
    )
    store_url: str = _setting(
        "",
        checks.store,
        "The response log: sqlite:///path, redis://host or memory://; nothing is kept without.",
        secret=True,
    )
    on_disconnect: str | float = _setting(
        "cancel", checks.on_disconnect, "When a caller leaves: cancel, finish, or seconds to wait for one who reads on."
    )
    lease: float = _setting(15.0, checks.seconds(0.2, 3600), "Seconds after which a silent process counts as dead.")
    retention: float = _setting(
        86_400.0, checks.seconds(1, 10**9), "Seconds that the response log keeps an ended answer."
    )
    kept_bytes: int = _setting(0, checks.whole(0, 10**15), "The largest response log, in bytes; 0 is no limit.")
    kept_bytes_per_user: int = _setting(0, checks.whole(0, 10**15), "The same of one user.")
    public: bool = _setting(False, checks.flag, "Anyone may ask: there is no authorize hook and no token.")
    tokens: tuple[tuple[str | None, str], ...] = _setting(
        (), checks.tokens, "Bearer tokens that may ask: {name: token}, or a list of tokens.", secret=True
    )
    origins: tuple[str, ...] = _setting((), checks.origins, "Other sites whose pages may ask from a browser.")
    http: str = _setting(
        "auto", checks.one_of("auto", "fast", "sdk"), "How the upstream is reached: fast is ours, sdk is the SDK's own."
    )
    upstream_api: str = _setting(
        "chat", checks.one_of("chat", "responses"), "The upstream's API: Chat Completions or Responses."
    )
    gateway: bool = _setting(
        False, checks.flag, "POST /v1/chat/completions and GET /v1/models answer OpenAI's own clients."
    )
    diagnostics: bool = _setting(
        False, checks.flag, "POST /diagnostics/stream lets `flask streamchat doctor` test the way to this app."
    )
    metrics: bool = _setting(
        False, checks.flag, "Answers are counted; /metrics of wsgi.py and streamchat.metrics_view() tell it."
    )
    tracing: bool = _setting(False, checks.flag, "Each answer is a span of OpenTelemetry.")
    tracing_text: bool = _setting(False, checks.flag, "Spans hold what was asked and answered.")
    connect_timeout: float = _setting(5.0, checks.seconds(0.01, 600), "Longest wait for a connection, all addresses.")
    first_token_timeout: float = _setting(120.0, checks.seconds(0.01, 86_400), "Longest wait for the first piece.")
    idle_timeout: float = _setting(60.0, checks.seconds(0.01, 86_400), "Longest silence between two pieces.")
    total_timeout: float = _setting(570.0, checks.seconds(0.01, 86_400), "Longest time of one answer.")
    max_retries: int = _setting(2, checks.whole(0, 10), "Further attempts before the first piece.")
    status_hold: float = _setting(2.0, checks.seconds(0, 60), "How long the status waits for the first piece.")
    heartbeat: float = _setting(15.0, checks.seconds(0.05, 3600), "Silence after which a heartbeat is written.")
    coalesce_ms: int = _setting(40, checks.whole(0, 1000), "Milliseconds in which pieces are joined; 0 turns it off.")
    write_timeout: float = _setting(30.0, checks.seconds(1, 3600), "How long a caller may leave a piece unread.")
    background: bool = _setting(
        False, checks.flag, "Callers may ask for answers that nobody waits for; `flask streamchat worker` makes them."
    )
    background_timeout: float = _setting(
        3600.0, checks.seconds(0.01, 604_800), "Longest time of one background answer, from when it is begun."
    )
    webhook_url: str = _setting(
        "", checks.webhook_url, "Where webhooks go, such as https://shop.example/hook; none without.", secret=True
    )
    webhook_secrets: tuple[str, ...] = _setting(
        (), checks.webhook_secrets, "What webhooks are signed with, whsec_...; each of several signs.", secret=True
    )
    webhook_hosts: tuple[str, ...] = _setting(
        (),
        checks.webhook_hosts,
        "Hosts to which a request may have webhooks sent; .shop.example is all names under it.",
    )
    webhook_text: bool = _setting(False, checks.flag, "Webhooks carry the answer's text.")
    webhook_loopback: bool = _setting(False, checks.flag, "Webhooks may go to this machine, also by http: to try them.")
    grace: float = _setting(
        120.0, checks.seconds(1, 86_400), "Seconds that a stopping worker has; gunicorn's graceful_timeout."
    )

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Settings:
        """Settings out of app.config and `create_blueprint`'s keyword arguments, which win.

        Raises SettingsError for a value that a check refuses and for a key STREAMCHAT_... that is no setting.
        """
        given = {key[len(PREFIX) :].lower(): value for key, value in config.items() if key.startswith(PREFIX)}
        given |= overrides or {}
        return _fitting(cls(**{name: _checked(name, value) for name, value in given.items()}))


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


NEED_STORE = ("max_streams_in_all", "tokens_per_day", "background")


def _fitting(settings: Settings) -> Settings:
    """Raises SettingsError where one setting needs another."""
    wanting = [name for name in NEED_STORE if getattr(settings, name)]
    if isinstance(settings.on_disconnect, float):
        wanting.append("on_disconnect")
    if wanting and not settings.store_url:
        raise SettingsError(f"{key(wanting[0])} needs {key('store_url')}, such as sqlite:///streamchat.db.")
    if settings.background and settings.store_url.startswith("memory:"):
        raise SettingsError(f"{key('background')} needs a {key('store_url')} that the worker can open: not memory://.")
    if settings.tracing_text and not settings.tracing:
        raise SettingsError(f"{key('tracing_text')} needs {key('tracing')}.")
    return _webhooks_fitting(settings)


def _webhooks_fitting(settings: Settings) -> Settings:
    if not settings.webhook_secrets and (settings.webhook_url or settings.webhook_hosts):
        raise SettingsError(
            f"{key('webhook_url')} and {key('webhook_hosts')} need {key('webhook_secrets')}, such as one that "
            "streamchat.webhooks.new_secret() makes."
        )
    local = settings.webhook_url and parse_target(settings.webhook_url, loopback=True).local
    if local and not settings.webhook_loopback:
        raise SettingsError(f"{key('webhook_url')} leads to this machine, which needs {key('webhook_loopback')}.")
    return settings


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
        if isinstance(setting.default, (int, float)):
            return value  # its check says what would be one
        shown = "its value" if setting.metadata["secret"] else repr(value)
        example = '{"name": "token"}' if setting.name == "tokens" else '["a", "b"]'
        raise SettingsError(f"{name} must be JSON, such as {example}, not {shown}.") from None
