"""The table of settings: defaults, checks, and the sentence that stops a start."""

from __future__ import annotations

import dataclasses
import math
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamchat.errors import SettingsError
from streamchat.settings import TABLE, Settings, key, read_environ

CANARY = "canary-7f3a"

DEFAULTS = {
    "STREAMCHAT_MODEL": "gpt-4.1-mini",
    "STREAMCHAT_MODELS": (),
    "STREAMCHAT_PARAMS": (),
    "STREAMCHAT_SYSTEM_PROMPT": "",
    "STREAMCHAT_MAX_OUTPUT_TOKENS": 4096,
    "STREAMCHAT_MAX_INPUT_CHARS": 100000,
    "STREAMCHAT_MAX_BODY_BYTES": 1000000,
    "STREAMCHAT_COALESCE_MS": 40,
    "STREAMCHAT_MAX_STREAMS": 900,
    "STREAMCHAT_MAX_STREAMS_PER_USER": 20,
    "STREAMCHAT_MAX_STREAMS_IN_ALL": 0,
    "STREAMCHAT_TOKENS_PER_DAY": 0,
    "STREAMCHAT_STORE_URL": "",
    "STREAMCHAT_ON_DISCONNECT": "cancel",
    "STREAMCHAT_LEASE": 15,
    "STREAMCHAT_RETENTION": 86400,
    "STREAMCHAT_KEPT_BYTES": 0,
    "STREAMCHAT_KEPT_BYTES_PER_USER": 0,
    "STREAMCHAT_PUBLIC": False,
    "STREAMCHAT_TOKENS": (),
    "STREAMCHAT_ORIGINS": (),
    "STREAMCHAT_HTTP": "auto",
    "STREAMCHAT_UPSTREAM_API": "chat",
    "STREAMCHAT_GATEWAY": False,
    "STREAMCHAT_DIAGNOSTICS": False,
    "STREAMCHAT_METRICS": False,
    "STREAMCHAT_TRACING": False,
    "STREAMCHAT_TRACING_TEXT": False,
    "STREAMCHAT_CONNECT_TIMEOUT": 5,
    "STREAMCHAT_FIRST_TOKEN_TIMEOUT": 120,
    "STREAMCHAT_IDLE_TIMEOUT": 60,
    "STREAMCHAT_TOTAL_TIMEOUT": 570,
    "STREAMCHAT_MAX_RETRIES": 2,
    "STREAMCHAT_STATUS_HOLD": 2,
    "STREAMCHAT_HEARTBEAT": 15,
    "STREAMCHAT_WRITE_TIMEOUT": 30,
    "STREAMCHAT_BACKGROUND": False,
    "STREAMCHAT_BACKGROUND_TIMEOUT": 3600.0,
    "STREAMCHAT_WEBHOOK_URL": "",
    "STREAMCHAT_WEBHOOK_TEXT": False,
    "STREAMCHAT_WEBHOOK_SECRETS": (),
    "STREAMCHAT_WEBHOOK_HOSTS": (),
    "STREAMCHAT_WEBHOOK_LOOPBACK": False,
    "STREAMCHAT_GRACE": 120,
}
WHOLE = ["MAX_OUTPUT_TOKENS", "MAX_INPUT_CHARS", "MAX_BODY_BYTES", "COALESCE_MS", "MAX_STREAMS", "MAX_RETRIES"]
SECONDS = [
    "CONNECT_TIMEOUT", "FIRST_TOKEN_TIMEOUT", "IDLE_TIMEOUT", "TOTAL_TIMEOUT",
    "STATUS_HOLD", "HEARTBEAT", "WRITE_TIMEOUT", "GRACE", "LEASE", "RETENTION",
]  # fmt: skip
NAMES = ["MODELS", "PARAMS", "ORIGINS", "WEBHOOK_HOSTS"]
NOT_A_NUMBER: list[object] = [
    "many",
    "",
    None,
    [],
    [5],
    {},
    True,
    False,
    math.nan,
    math.inf,
    -math.inf,
    -1,
    10**12,
    1e300,
]

NOT_A_LIST_OF_NAMES: list[object] = ["gpt-4.1", 5, None, True, [5], [None], [[]]]
NOT_AN_ORIGIN = [
    "*", "null", "other.example", "https://", "https://other.example/path", "ftp://other.example",
    "https://other.example?x", "https://other.example#x", "https://user@other.example", "https://*.example",
    "https://other.example:99999", "http://[::1", "https://a b", "",
]  # fmt: skip
NOT_A_TARGET = [
    "shop.example", "http://shop.example/", "https://", "https://user@shop.example/", "https://shop.example/#x",
    "https://10.0.0.1/", "https://0x7f000001/", "https://shop/", "ftp://shop.example/", 5, True, ["https://shop.example"],
]  # fmt: skip
NOT_A_SECRET = [
    "whsec_",
    "whsec_c2hvcnQ=",
    "c2VjcmV0IHRoYXQgaGFzIG5vIHByZWZpeCBhdCBhbGw=",
    "whsec_not base64!",
    "whsec_" + "A" * 100,
]
NOT_A_HOST = [
    "*.shop.example",
    "https://shop.example",
    "shop.example/",
    "shop.example:443",
    ".",
    "..",
    ".com",
    "127.1",
    "10.0.0.1",
]
NOT_A_FLAG: list[object] = ["true", "false", "yes", "", 1, 0, None, [], 0.0]
NOT_A_WAY: list[object] = ["slow", "", "AUTO", None, 1, ["auto"]]

# (key, value, words of the cure)
BAD: list[tuple[str, Any, str]] = [
    *((name, value, r"number|between|from \d") for name in WHOLE + SECONDS for value in NOT_A_NUMBER),
    *((name, 2.5, r"whole") for name in WHOLE),
    ("MODEL", "", "name|text"),
    ("MODEL", "  ", "name|text"),
    ("MODEL", 4, "name|text"),
    ("MODEL", None, "name|text"),
    ("MODEL", ["gpt-4.1-mini"], "name|text"),
    ("MAX_STREAMS", 0, r"1"),
    ("MAX_OUTPUT_TOKENS", 0, r"1"),
    ("CONNECT_TIMEOUT", 0, r"0\.01"),
    ("HEARTBEAT", 0, r"0\.05"),
    *((name, value, "list") for name in NAMES for value in NOT_A_LIST_OF_NAMES),
    ("MODELS", [""], "list"),
    ("MODELS", ["a", " "], "list"),
    ("PARAMS", ["temprature"], "temperature"),
    ("PARAMS", ["model"], "temperature"),
    *(("ORIGINS", [value], "https://") for value in NOT_AN_ORIGIN),
    *(("PUBLIC", value, "(?i)true") for value in NOT_A_FLAG),
    *(("WEBHOOK_LOOPBACK", value, "(?i)true") for value in NOT_A_FLAG),
    *(("WEBHOOK_HOSTS", [value], "shop.example") for value in NOT_A_HOST),
    *(("HTTP", value, "auto.*fast.*sdk") for value in NOT_A_WAY),
]  # fmt: skip


@pytest.mark.parametrize(("name", "default"), DEFAULTS.items())
def test_the_defaults_are_the_documented_ones(name: str, default: object) -> None:
    found = getattr(Settings(), name.removeprefix("STREAMCHAT_").lower())
    assert found == default
    assert Settings.from_mapping({}) == Settings()


def test_the_table_holds_each_setting_once_with_its_key_and_a_sentence() -> None:
    assert {key(name) for name in TABLE} == set(DEFAULTS)
    for setting in TABLE.values():
        sentences = [value for value in setting.metadata.values() if isinstance(value, str)]
        assert any(text.endswith(".") and " " in text for text in sentences), setting.name


@pytest.mark.parametrize("name", TABLE)
def test_every_default_passes_its_own_check(name: str) -> None:
    default = getattr(Settings(), name)
    assert getattr(Settings.from_mapping({key(name): default}), name) == default


@pytest.mark.parametrize(("name", "value", "cure"), BAD, ids=lambda part: repr(part)[:40])
def test_a_bad_value_is_told_by_key_value_and_cure(name: str, value: object, cure: str) -> None:
    with pytest.raises(SettingsError, match=cure) as caught:
        Settings.from_mapping({f"STREAMCHAT_{name}": value})
    assert f"STREAMCHAT_{name}" in str(caught.value)
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [5, None, [], ["x"], {}, True, b"text"])
def test_a_bad_system_prompt_is_told_by_key_and_cure(value: object) -> None:
    with pytest.raises(SettingsError, match=r"STREAMCHAT_SYSTEM_PROMPT.*text"):
        Settings.from_mapping({"STREAMCHAT_SYSTEM_PROMPT": value})


@pytest.mark.parametrize(
    "value",
    [
        CANARY,
        5,
        None,
        True,
        [""],
        [CANARY, ""],
        [5],
        [[CANARY]],
        {"alice": ""},
        {"alice": " "},
        {"alice": 5},
        {"alice": None},
        {"alice": [CANARY]},
        {"": CANARY},
        {"alice": f"{CANARY} with spaces"},
        {"alice": f"{CANARY}\n"},
        [f"{CANARY}-schl\u00fcssel"],
    ],
    ids=repr,
)
def test_bad_tokens_are_told_by_key_and_cure_and_never_by_value(value: object) -> None:
    with pytest.raises(SettingsError, match=r"STREAMCHAT_TOKENS.*(token|list)") as caught:
        Settings.from_mapping({"STREAMCHAT_TOKENS": value})
    assert "canary" not in shown(caught.value)


def shown(error: BaseException) -> str:
    """All that a log could show of an error."""
    return "".join(traceback.format_exception(error)) + repr(error) + repr(error.args) + repr(vars(error))


def test_secrets_have_no_repr() -> None:
    settings = Settings.from_mapping(
        {"STREAMCHAT_TOKENS": {"alice": CANARY}, "STREAMCHAT_SYSTEM_PROMPT": f"You are {CANARY}."}
    )
    assert settings.tokens == (("alice", CANARY),)
    assert CANARY in settings.system_prompt
    assert "canary" not in repr(settings) + str(settings) + f"{settings}"


SECRET = "whsec_" + "Y2FuYXJ5LTdmM2E" + "A" * 28
WEBHOOKS = {
    "STREAMCHAT_WEBHOOK_URL": f"https://shop.example/hook?token={CANARY}",
    "STREAMCHAT_WEBHOOK_SECRETS": [SECRET],
    "STREAMCHAT_WEBHOOK_HOSTS": ["Shop.example", ".shop.example", "93.184.215.14"],
}


def test_webhooks_settings_are_taken_as_they_are_and_their_secrets_have_no_repr() -> None:
    settings = Settings.from_mapping(WEBHOOKS)
    assert settings.webhook_url == WEBHOOKS["STREAMCHAT_WEBHOOK_URL"]
    assert settings.webhook_secrets == (SECRET,)
    assert settings.webhook_hosts == ("shop.example", ".shop.example", "93.184.215.14")
    assert CANARY not in repr(settings) and SECRET not in repr(settings)
    assert Settings.from_mapping({"STREAMCHAT_WEBHOOK_URL": None}).webhook_url == ""


@pytest.mark.parametrize("value", NOT_A_TARGET)
def test_a_bad_webhook_url_is_told_by_key_and_cure_and_never_by_value(value: object) -> None:
    with pytest.raises(SettingsError, match=r"STREAMCHAT_WEBHOOK_URL must .*, not its value\.$"):
        Settings.from_mapping(WEBHOOKS | {"STREAMCHAT_WEBHOOK_URL": value})


@pytest.mark.parametrize("value", [*NOT_A_SECRET, f"whsec_{CANARY}"])
def test_a_bad_webhook_secret_is_told_by_key_and_cure_and_never_by_value(value: str) -> None:
    for given_value in ([value], [SECRET, value], value):
        with pytest.raises(SettingsError, match="STREAMCHAT_WEBHOOK_SECRETS must") as caught:
            Settings.from_mapping(WEBHOOKS | {"STREAMCHAT_WEBHOOK_SECRETS": given_value})
        assert CANARY not in shown(caught.value)


@pytest.mark.parametrize("name", ["STREAMCHAT_WEBHOOK_URL", "STREAMCHAT_WEBHOOK_HOSTS"])
def test_webhooks_need_a_secret(name: str) -> None:
    with pytest.raises(SettingsError, match="need STREAMCHAT_WEBHOOK_SECRETS"):
        Settings.from_mapping({name: WEBHOOKS[name]})


@pytest.mark.parametrize("url", ["http://localhost:5001/hook", "https://127.0.0.1/", "http://[::1]:5001/"])
def test_webhooks_go_to_this_machine_only_where_that_is_said(url: str) -> None:
    with pytest.raises(SettingsError, match="needs STREAMCHAT_WEBHOOK_LOOPBACK"):
        Settings.from_mapping(WEBHOOKS | {"STREAMCHAT_WEBHOOK_URL": url})
    given_too = WEBHOOKS | {"STREAMCHAT_WEBHOOK_URL": url, "STREAMCHAT_WEBHOOK_LOOPBACK": True}
    assert Settings.from_mapping(given_too).webhook_url == url


def test_tokens_may_be_a_list_without_names() -> None:
    assert Settings.from_mapping({"STREAMCHAT_TOKENS": ["a1", "b2"]}).tokens == ((None, "a1"), (None, "b2"))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("STREAMCHAT_MODLE", "STREAMCHAT_MODEL"),
        ("STREAMCHAT_MAX_STREAM", "STREAMCHAT_MAX_STREAMS"),
        ("STREAMCHAT_HEARTBEATS", "STREAMCHAT_HEARTBEAT"),
        ("STREAMCHAT_IDLE_TIMOUT", "STREAMCHAT_IDLE_TIMEOUT"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_mapping({name: "x"})
    assert name in str(caught.value)
    assert nearest in str(caught.value).replace(name, "", 1)
    with pytest.raises(SettingsError, match=nearest):
        Settings.from_mapping(read_environ({name: '"x"'}))


def test_an_unknown_key_is_refused_also_where_none_is_near_and_its_value_is_not_shown() -> None:
    for name in ("STREAMCHAT_TOKEN", "STREAMCHAT_ZZZZZZ", "STREAMCHAT_"):
        with pytest.raises(SettingsError, match=name) as caught:
            Settings.from_mapping({name: CANARY})
        assert "canary" not in shown(caught.value)


def test_keys_of_others_are_nobodys_business() -> None:
    assert Settings.from_mapping({"SECRET_KEY": "x", "DEBUG": True, "STREAM": 1, "streamchat_model": 5}) == Settings()


def test_overrides_win_and_are_checked_too() -> None:
    config = {"STREAMCHAT_MODEL": "a", "STREAMCHAT_HEARTBEAT": 5}
    settings = Settings.from_mapping(config, {"model": "b"})
    assert (settings.model, settings.heartbeat) == ("b", 5)
    with pytest.raises(SettingsError, match="STREAMCHAT_HEARTBEAT"):
        Settings.from_mapping(config, {"heartbeat": -1})


def test_an_unknown_override_suggests_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"(?i)max_stream\b.*max_streams"):
        Settings.from_mapping({}, {"max_stream": 5})


def test_settings_are_frozen_and_keep_no_hold_of_the_configuration() -> None:
    models = ["a"]
    settings = Settings.from_mapping({"STREAMCHAT_MODELS": models})
    models.append("b")
    assert settings.models == ("a",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.model = "b"  # type: ignore[misc]


def test_what_an_openai_client_may_send_besides_is_named_with_the_parameters() -> None:
    names = ("n", "logprobs", "top_logprobs", "tools", "temperature")
    assert Settings.from_mapping({"STREAMCHAT_PARAMS": list(names)}).params == names


def test_seconds_may_be_whole_or_not() -> None:
    for value in (1, 1.5):
        assert Settings.from_mapping({"STREAMCHAT_IDLE_TIMEOUT": value}).idle_timeout == value


def test_the_coalescing_and_the_hold_and_the_retries_can_be_turned_off() -> None:
    settings = Settings.from_mapping({}, {"coalesce_ms": 0, "status_hold": 0, "max_retries": 0})
    assert (settings.coalesce_ms, settings.status_hold, settings.max_retries) == (0, 0, 0)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("https://other.example", "https://other.example"),
        ("https://Other.Example", "https://other.example"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
    ],
)
def test_an_origin_is_kept_as_browsers_send_it(written: str, meant: str) -> None:
    assert Settings.from_mapping({"STREAMCHAT_ORIGINS": [written]}).origins == (meant,)


# Environment variables


def test_variables_are_text_for_text_and_json_for_the_rest() -> None:
    environ = {
        "STREAMCHAT_MODEL": "gpt-4.1",
        "STREAMCHAT_SYSTEM_PROMPT": '{"not": "json to us"}',
        "STREAMCHAT_HTTP": "sdk",
        "STREAMCHAT_MODELS": '["a", "b"]',
        "STREAMCHAT_PUBLIC": "true",
        "STREAMCHAT_MAX_STREAMS": "7",
        "STREAMCHAT_HEARTBEAT": "0.5",
        "STREAMCHAT_TOKENS": '{"alice": "t1"}',
        "STREAMCHAT_ORIGINS": '["https://other.example"]',
        "PATH": "/bin",
        "OPENAI_API_KEY": "sk",
    }
    config = read_environ(environ)
    assert set(config) == {name for name in environ if name.startswith("STREAMCHAT_")}
    settings = Settings.from_mapping(config)
    assert settings == Settings(
        model="gpt-4.1",
        system_prompt='{"not": "json to us"}',
        http="sdk",
        models=("a", "b"),
        public=True,
        max_streams=7,
        heartbeat=0.5,
        tokens=(("alice", "t1"),),
        origins=("https://other.example",),
    )


@pytest.mark.parametrize(("written", "meant"), [("true", True), ("True", True), ("false", False), ("FALSE", False)])
def test_a_flag_may_be_written_as_python_does(written: str, meant: bool) -> None:
    assert Settings.from_mapping(read_environ({"STREAMCHAT_PUBLIC": written})).public is meant


def test_a_model_whose_name_looks_like_json_stays_text() -> None:
    assert Settings.from_mapping(read_environ({"STREAMCHAT_MODEL": "5"})).model == "5"


@pytest.mark.parametrize("name", TABLE)
def test_an_empty_variable_is_one_that_is_not_set(name: str) -> None:
    assert Settings.from_mapping(read_environ({key(name): ""})) == Settings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("STREAMCHAT_PUBLIC", "yes"),
        ("STREAMCHAT_PUBLIC", "2"),
        ("STREAMCHAT_MAX_STREAMS", "many"),
        ("STREAMCHAT_MODELS", "gpt-4.1"),
        ("STREAMCHAT_MODELS", "['a']"),
        ("STREAMCHAT_HEARTBEAT", "15s"),
        ("STREAMCHAT_HEARTBEAT", "1" * 5000),
    ],
    ids=lambda part: part[:24],
)
def test_a_variable_that_cannot_be_read_is_told_by_key_value_and_what_would_be_right(name: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.from_mapping(read_environ({name: value}))
    assert name in str(caught.value)
    assert value[:100] in str(caught.value)
    right = {
        "STREAMCHAT_PUBLIC": "true or false",
        "STREAMCHAT_MODELS": 'JSON, such as ["a", "b"]',
        "STREAMCHAT_MAX_STREAMS": "a whole number from 1 to 1000000",
        "STREAMCHAT_HEARTBEAT": "a number of seconds from 0.05 to 3600",
    }
    assert f"must be {right[name]}, not " in str(caught.value)


@pytest.mark.parametrize(
    "value", [f"{{{CANARY}", CANARY, f'["{CANARY}', f'{{"a": "{CANARY}"', f"'{CANARY}'", "[" * 100_000 + CANARY]
)
def test_a_variable_with_unreadable_tokens_does_not_show_them(value: str) -> None:
    with pytest.raises(SettingsError, match="STREAMCHAT_TOKENS") as caught:
        Settings.from_mapping(read_environ({"STREAMCHAT_TOKENS": value}))
    assert "canary" not in shown(caught.value)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_variable_that_only_python_takes_for_a_number_is_refused(value: str) -> None:
    with pytest.raises(SettingsError, match="STREAMCHAT_HEARTBEAT"):
        Settings.from_mapping(read_environ({"STREAMCHAT_HEARTBEAT": value}))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def refusal(config: Callable[[], dict[str, Any]]) -> str:
    """What a start with this configuration is refused with, "" where it is taken."""
    try:
        Settings.from_mapping(config())
    except SettingsError as error:
        return str(error)
    return ""


@given(st.sampled_from(sorted(TABLE)), anything)
def test_any_value_is_either_taken_or_refused_by_name(name: str, value: Any) -> None:
    told = refusal(lambda: {key(name): value})
    assert not told or key(name) in told


@given(st.sampled_from(sorted(TABLE)), st.text(max_size=20))
def test_any_variable_is_either_taken_or_refused_by_name(name: str, value: str) -> None:
    told = refusal(lambda: read_environ({key(name): value}))
    assert not told or key(name) in told
