"""The parts of the documents that are made from the code's own tables: settings, errors, events, routes, commands.

What the code does not say stands here, by the code's names: when an error comes and what to do, what a route is for.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import click

from streamchat import errors, events
from streamchat.cli import commands
from streamchat.client_encoders import OpenAiEncoder, UiEncoder
from streamchat.encoders import Encoder, JsonEncoder, NdjsonEncoder, SseEncoder, TextEncoder
from streamchat.mailroom import webhooks
from streamchat.settings import TABLE, key
from tests.documents import table

# --- settings ---------------------------------------------------------------------------------------------


def settings_table() -> str:
    rows = [(f"`{key(each.name)}`", f"`{_default(each)}`", each.metadata["help"]) for each in TABLE.values()]
    return table(("key", "default", ""), rows)


def all_settings() -> str:
    rows = [
        (f"`{key(each.name)}`", f"`{_default(each)}`", _allowed(each.metadata["check"]), each.metadata["help"])
        for each in TABLE.values()
    ]
    return table(("key", "default", "a value is", ""), rows)


def _default(setting: Any) -> str:
    return json.dumps(list(setting.default) if isinstance(setting.default, tuple) else setting.default)


def _allowed(check: Callable[[Any], Any]) -> str:
    """In the words in which the check refuses what is nothing."""
    try:
        check(object())
    except ValueError as error:
        return re.sub(r"(\d)(?=(\d{3})+\b)", r"\1,", str(error).removeprefix("must be ").replace("1e+09", "1000000000"))
    raise AssertionError("the check takes anything")


# --- errors -----------------------------------------------------------------------------------------------


def error_kinds() -> list[type[errors.StreamChatError]]:
    """One class a code that somebody may read. Of a code that several share, the first met: the general one."""
    kinds = {kind.code: kind for kind in reversed(list(leaves(errors.StreamChatError)))}
    return [kind for kind in sorted(kinds.values(), key=lambda kind: (kind.status, kind.code)) if kind.status != 499]


def leaves(kind: type[errors.StreamChatError]) -> Iterator[type[errors.StreamChatError]]:
    groups = (errors.StreamChatError, errors.Refused, errors.UpstreamFailure)
    if kind not in groups and kind is not errors.SettingsError:
        yield kind
    for child in kind.__subclasses__():
        yield from leaves(child)


def errors_table() -> str:
    rows = [(f"`{kind.code}`", str(kind.status), _again(kind), kind.text) for kind in error_kinds()]
    return table(("code", "status", "try again", ""), rows)


def _again(kind: type[errors.StreamChatError]) -> str:
    return "yes" if kind.retryable else "no"


def all_errors() -> str:
    rows = [(f"`{kind.code}`", str(kind.status), _again(kind), *ADVICE[kind.code]) for kind in error_kinds()]
    return table(("code", "status", "try again", "when", "what to do"), rows)


# By code: when it comes, and what whoever reads it, or whoever runs the server, does then.
ADVICE: dict[str, tuple[str, str]] = {
    "invalid_request": (
        "The body, a field or a header cannot be used; `detail` names it. Also what `authorize` aborts with as 400.",
        "Change the request. STREAMCHAT_PARAMS and STREAMCHAT_MODELS allow what callers may set.",
    ),
    "unauthorized": (
        "`authorize` returned None, or no token of STREAMCHAT_TOKENS came.",
        "Log in, or send the token.",
    ),
    "forbidden": (
        "`authorize` aborted with 403, or the page that asks is of another site.",
        "List the site in STREAMCHAT_ORIGINS if it may ask. If it is your own, the proxy changes `Host`.",
    ),
    "not_found": (
        "There is no such answer for this user, it was forgotten, or nothing is kept here.",
        "Ask anew. Set STREAMCHAT_STORE_URL to keep answers.",
    ),
    "not_acceptable": ("`Accept` names only formats that cannot be written.", "Send one of the four, or none."),
    "cancelled": ("Somebody stopped the answer by `POST /responses/<id>/cancel`. In a stream.", "Nothing."),
    "input_too_long": ("The model has no room for so long a conversation.", "Send fewer turns."),
    "payload_too_large": (
        "The body or its text is above STREAMCHAT_MAX_BODY_BYTES or STREAMCHAT_MAX_INPUT_CHARS.",
        "Send less, or raise the limit, and `client_max_body_size` in nginx with it.",
    ),
    "unsupported_media_type": (
        "The body is not said to be JSON.",
        "Send `Content-Type: application/json`. It is asked for so that no form of another site can spend money.",
    ),
    "idempotency_mismatch": ("The key was used for another question.", "Make a new key for each question."),
    "refused": ("The provider's policy refuses the request.", "Ask something else. Asking again will not help."),
    "budget_exhausted": (
        "STREAMCHAT_TOKENS_PER_DAY has no room for this question.",
        "Wait for `Retry-After`: midnight UTC. A budget must be larger than one answer's reserve (limits.md).",
    ),
    "too_many_streams": (
        "The user, or all of them, run as many answers as they may. nginx says the same of an address.",
        "Wait for an answer to end, then for `Retry-After`.",
    ),
    "gap": (
        "The log of this answer has a hole. In a stream that is read again.",
        "Ask anew. If it comes often, the store evicts: `maxmemory-policy noeviction` (resume.md).",
    ),
    "interrupted": (
        "What made the answer died: a killed worker, a bug, a lost lease. In a stream, or as a status.",
        "Ask anew. The model was not asked again. The server's log has the reason.",
    ),
    "upstream_auth": ("The provider answered 401 or 403.", "Whoever runs the server looks at OPENAI_API_KEY."),
    "upstream_error": (
        "The provider answered 5xx, or said in its stream that it failed.",
        "Try again later. The record has the provider's status and request id.",
    ),
    "upstream_incomplete": (
        "The provider's stream ended without a `finish_reason`: it was cut.",
        "Try again. What came so far is true, and not all.",
    ),
    "upstream_malformed": (
        "What came is no stream of events: a page of a proxy, broken JSON, an encoded body.",
        "Whoever runs the server looks at OPENAI_BASE_URL and at what stands before the provider.",
    ),
    "upstream_rejected": (
        "The provider answered 400, 404 or 422.",
        "Whoever runs the server looks at the model's name and at the parameters; `upstream_code` in the record says "
        "what was refused.",
    ),
    "upstream_unreachable": (
        "No connection: DNS, refused, TLS, or none within STREAMCHAT_CONNECT_TIMEOUT.",
        "Try again. Whoever runs the server looks at the network and OPENAI_BASE_URL.",
    ),
    "draining": (
        "The worker stops: a new question is refused, or an answer did not end within STREAMCHAT_GRACE.",
        "Try again: the next worker answers.",
    ),
    "overloaded": (
        "The worker runs STREAMCHAT_MAX_STREAMS answers; or the store is away, and the promise needs it.",
        "Try again in a second or two. More workers take more answers (scale.md).",
    ),
    "upstream_quota": ("The provider says that the account's quota is used up.", "Whoever runs the server pays."),
    "upstream_rate_limited": (
        "The provider answered 429, and its `Retry-After` did not fit into the time left.",
        "Wait for `Retry-After`.",
    ),
    "upstream_stalled": (
        "The model fell silent in the middle for STREAMCHAT_IDLE_TIMEOUT. In a stream.",
        "Try again.",
    ),
    "upstream_timeout": (
        "No first piece within STREAMCHAT_FIRST_TOKEN_TIMEOUT, or no end within STREAMCHAT_TOTAL_TIMEOUT.",
        "Try again, or ask for less. Raise the limit for a model that thinks longer.",
    ),
}


# --- events and formats -----------------------------------------------------------------------------------


def event_kinds() -> list[type[Any]]:
    return list(events.Event.__args__)


def events_table() -> str:
    rows = [(f"`{kind.type}`", _fields(kind), _sentence(kind)) for kind in event_kinds()]
    return table(("type", "fields after `type` and `seq`", ""), rows)


def _fields(kind: type[Any]) -> str:
    names = [field.name for field in dataclasses.fields(kind)]
    return ", ".join(f"`{name}`" + ("?" if name in events.UNSAID else "") for name in names)


def _sentence(thing: object) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


START = events.Start("resp_4f1c", "gpt-4.1-mini", 1_790_000_000)
FINISH = events.Finish("stop", events.Usage(19, 10))
WHOLE: tuple[Any, ...] = (START, events.Reasoning("Hm."), events.Text("Grüß "), events.Text("dich!"), FINISH)
CUT: tuple[Any, ...] = (
    START,
    events.Text("Grüß "),
    events.Failure("upstream_incomplete", "The answer was cut off.", True),
)


def whole_answer() -> str:
    return _examples(WHOLE, (TextEncoder, SseEncoder, NdjsonEncoder, JsonEncoder, UiEncoder, OpenAiEncoder))


def cut_answer() -> str:
    return _examples(CUT, (SseEncoder, NdjsonEncoder, UiEncoder, OpenAiEncoder))


TITLES: dict[type[Encoder], str] = {
    TextEncoder: "`text/plain`",
    SseEncoder: "`text/event-stream`",
    NdjsonEncoder: "`application/x-ndjson`",
    JsonEncoder: "`application/json`",
    UiEncoder: "`POST /chat`, the AI SDK's UI message stream",
    OpenAiEncoder: "`POST /v1/chat/completions`, streamed",
}


def _examples(told: tuple[Any, ...], kinds: tuple[type[Encoder], ...]) -> str:
    return "\n\n".join(f"{TITLES[kind]}:\n\n```text\n{_written(kind(), told).rstrip()}\n```" for kind in kinds)


def _written(encoder: Encoder, told: tuple[Any, ...]) -> str:
    return b"".join(encoder.encode(seq, event) for seq, event in enumerate(told)).decode()


# --- routes and commands ----------------------------------------------------------------------------------

# By endpoint, in the order in which they are shown. What is not there where a setting is off says so.
ROUTES = {
    "get_response": "Asks; the format is that of `Accept`.",
    "chat": "The same for the AI SDK: UI message stream, or `text/plain`.",
    "chat_completions": "The same for OpenAI's clients, streamed or whole. With `STREAMCHAT_GATEWAY`.",
    "models": "The models that the gateway offers. With `STREAMCHAT_GATEWAY`.",
    "response": "What became of an answer, and its text.",
    "response_stream": "Its events after `?after=N` or `Last-Event-ID`, then live; 204 where there are no more.",
    "cancel_response": "Stops it. Twice does no harm.",
    "chat_stream": "The answer of a chat that still runs, for `useChat`; 204 where there is none.",
    "healthz": "200 while the worker takes answers, 503 while it stops. Nobody is asked who they are.",
    "diagnostics_stream": "Where `flask streamchat doctor` asks. With `STREAMCHAT_DIAGNOSTICS`; takes a signed token.",
    "static": "The browser's client `streamchat.js`, and what the chat page loads.",
    "page": "The chat page, with `page=True` or a path. `wsgi.py` has it at `/`.",
    "metrics": "Figures in Prometheus' form. With the extra `metrics`.",
}


def rules() -> dict[str, list[Any]]:
    """The rules of wsgi.py with all that can be turned on, by the endpoint's last word."""
    switches = {"STREAMCHAT_PUBLIC": "true", "STREAMCHAT_GATEWAY": "true", "STREAMCHAT_DIAGNOSTICS": "true"}
    with patch.dict(os.environ, {**switches, "OPENAI_API_KEY": "sk-docs"}):
        import wsgi  # makes an app of its own when it is imported

        app = wsgi.create_app(switches)
    found: dict[str, list[Any]] = {}
    for rule in app.url_map.iter_rules():
        if rule.endpoint != "static":  # Flask's own, of the app
            found.setdefault(rule.endpoint.rpartition(".")[2], []).append(rule)
    return found


def routes_table() -> str:
    shown = rules()
    rows = [
        (f"`{_method(rule)}`", f"`{rule.rule}`", ROUTES[name])
        for name in sorted(shown, key=list(ROUTES).index)
        for rule in shown[name]
    ]
    return table(("method", "path in `wsgi.py`", ""), rows)


def _method(rule: Any) -> str:
    (method,) = rule.methods - {"HEAD", "OPTIONS"}
    return str(method)


def commands_table() -> str:
    rows = [
        (f"`{_usage(f'{before}{name}', command)}`", _sentence(command.callback))
        for before, group in (("", commands), ("webhooks ", webhooks))
        for name, command in sorted(group.commands.items())
        if command.callback is not None
    ]
    return table(("command", ""), rows)


def _usage(name: str, command: click.Command) -> str:
    words = [each.human_readable_name for each in command.params if isinstance(each, click.Argument)]
    options = [each.opts[0] for each in command.params if isinstance(each, click.Option)]
    return " ".join(["flask streamchat", name, *words, *(f"[{option}]" for option in options)])
