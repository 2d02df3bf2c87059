"""What answers leave in the figures, and how they are told to Prometheus: scraped from real answers, one process."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families

from streamchat import SettingsError, StreamChat, answer_finished, metrics_view
from streamchat.errors import StoreDown
from streamchat.memory_store import MemoryStore
from streamchat.metric_table import METRICS, STORED
from streamchat.metrics import OTHER, OUTCOMES, UPSTREAMS, Figures, StoreFigures
from streamchat.mount import check_environ
from streamchat.prompt import Prompt
from tests.documents import closing_mounts
from tests.fake_upstream import FakeUpstream, Gate, Hang, answer, done, error, finish, head, last_chunk, text
from tests.shop import KEY, SSE, call, open_shop, post_bytes, read_until, serve, wait_until
from tests.test_ledger import RECORD

ROOT = Path(__file__).parent.parent
CHAT = "gen_ai_operation_name=chat gen_ai_provider_name=openai gen_ai_request_model=m1"


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield server


def parsed(body: str) -> dict[str, float]:
    """The samples by name and labels: `name label=value label=value`; without buckets."""
    return {
        " ".join([sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))]): sample.value
        for family in text_string_to_metric_families(body)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


def view(app: Flask, accept: str = "", several: bool = False) -> Response:
    environ = {"wsgi.multiprocess": several}
    with app.test_request_context("/metrics", headers={"Accept": accept}, environ_overrides=environ):
        return metrics_view()()


def scraped(app: Flask) -> dict[str, float]:
    response = view(app)
    assert response.status_code == 200, response.get_data(as_text=True)
    return parsed(response.get_data(as_text=True))


class Counted:
    """What a fresh set of figures says of records; the one of this process has no part in it."""

    def __init__(self, *models: str) -> None:
        self.registry = CollectorRegistry()
        self.figures = Figures(self.registry)
        self.figures.know(models)

    def begin(self) -> None:
        self.figures.begin("resp_1", Prompt([], "m1", {}), None)

    def count(self, **changes: Any) -> dict[str, float]:
        self.figures.end(replace(RECORD, **{"model": "m1", **changes}), "")
        return self.told()

    def told(self) -> dict[str, float]:
        return parsed(generate_latest(self.registry).decode())


@pytest.fixture
def counted() -> Counted:
    return Counted("m1", "m2")


def test_an_answer_is_counted_when_it_starts_and_by_its_outcome_when_it_ends(counted: Counted) -> None:
    counted.begin()
    assert counted.told()["streamchat_answers_started_total gen_ai_request_model=m1"] == 1
    counted.count(outcome="completed")
    told = counted.count(outcome="draining")
    assert told["streamchat_answers_total gen_ai_request_model=m1 outcome=completed"] == 1
    assert told["streamchat_answers_total gen_ai_request_model=m1 outcome=draining"] == 1


def test_times_are_observed_once_an_answer(counted: Counted) -> None:
    told = counted.count(duration=4.0, first_piece=1.0, pieces=7, output_tokens=13, estimated=False)
    assert told[f"gen_ai_server_request_duration_seconds_sum error_type= {CHAT}"] == 4.0
    assert told[f"gen_ai_server_time_to_first_token_seconds_sum {CHAT}"] == 1.0
    assert told["streamchat_time_between_pieces_seconds_sum gen_ai_request_model=m1"] == 0.5
    assert told[f"gen_ai_server_time_per_output_token_seconds_sum {CHAT}"] == 0.25
    assert {value for name, value in told.items() if "_seconds_count" in name} == {1}


def test_an_answer_without_a_piece_has_no_pace(counted: Counted) -> None:
    told = counted.count(first_piece=None, pieces=0, output_tokens=0, outcome="upstream_timeout")
    assert f"gen_ai_server_time_to_first_token_seconds_count {CHAT}" not in told
    assert told[f"gen_ai_server_request_duration_seconds_count error_type=upstream_timeout {CHAT}"] == 1
    told = counted.count(first_piece=0.5, pieces=1, output_tokens=1)
    assert f"gen_ai_server_time_to_first_token_seconds_count {CHAT}" in told
    assert not [name for name in told if "between_pieces_seconds_count" in name or "output_token_seconds_count" in name]


def test_the_pace_of_a_token_is_that_of_completed_answers_that_were_counted(counted: Counted) -> None:
    counted.count(first_piece=0.5, pieces=9, output_tokens=9, estimated=True)
    told = counted.count(first_piece=0.5, pieces=9, output_tokens=9, estimated=False, outcome="caller_left")
    assert told["streamchat_time_between_pieces_seconds_count gen_ai_request_model=m1"] == 2
    assert not [name for name in told if name.startswith("gen_ai_server_time_per_output_token_seconds_count")]


def test_tokens_that_were_counted_and_estimates_stand_apart(counted: Counted) -> None:
    counted.count(input_tokens=19, output_tokens=10, estimated=False)
    told = counted.count(input_tokens=5, output_tokens=0, estimated=True)
    usage = "gen_ai_client_token_usage"
    model = CHAT.split()[-1]
    assert told[f"{usage}_sum {CHAT} gen_ai_token_type=input"] == 19
    assert told[f"{usage}_sum {CHAT} gen_ai_token_type=output"] == 10
    assert told[f"{usage}_count {CHAT} gen_ai_token_type=input"] == 1
    assert told[f"streamchat_estimated_tokens_total {model} gen_ai_token_type=input"] == 5


@pytest.mark.parametrize("code", sorted(UPSTREAMS))
def test_what_the_upstreams_side_ended_is_counted_by_code_and_status(code: str, counted: Counted) -> None:
    told = counted.count(outcome=code, upstream_status=500, upstream_code="a word of theirs", attempts=3)
    assert told[f"streamchat_upstream_errors_total error_type={code} http_response_status_code=500"] == 1
    assert told["streamchat_upstream_attempts_total gen_ai_request_model=m1"] == 3
    assert "a word of theirs" not in str(told)


def test_an_upstream_that_did_not_answer_has_no_status(counted: Counted) -> None:
    told = counted.count(outcome="upstream_unreachable", upstream_status=None, attempts=0)
    assert told["streamchat_upstream_errors_total error_type=upstream_unreachable http_response_status_code="] == 1


@pytest.mark.parametrize("outcome", ["caller_left", "caller_stalled"])
def test_a_hangup_is_counted_by_what_it_was(outcome: str, counted: Counted) -> None:
    told = counted.count(outcome=outcome)
    assert told[f"streamchat_hangups_total outcome={outcome}"] == 1
    assert not [name for name in told if name.startswith("streamchat_upstream_errors_total")]


def test_labels_have_values_of_the_settings_and_of_our_code_only(counted: Counted) -> None:
    told = counted.count(model="what a caller wrote", outcome="what nobody knows", user="ann", id="resp_secret")
    assert told[f"streamchat_answers_total gen_ai_request_model={OTHER} outcome={OTHER}"] == 1
    assert not [word for word in ("caller wrote", "nobody knows", "ann", "resp_") if word in str(told)]


def test_every_figure_of_the_table_is_told_once_there_is_something_to_tell(counted: Counted) -> None:
    counted.begin()
    counted.figures.beat()
    counted.figures._count("streamchat_hangups_total", outcome="went_on")
    counted.count(outcome="completed", pieces=2, output_tokens=2, first_piece=0.1, estimated=False, attempts=1)
    told = counted.count(outcome="upstream_error", estimated=True, input_tokens=1)
    names = {name.split()[0] for name in told}
    own = {metric.name for metric in METRICS if metric.kind != "store"}
    assert own == {name.removesuffix("_sum").removesuffix("_count") for name in names}
    assert {metric.name for metric in METRICS if metric.kind == "store"} == {*STORED.values(), "streamchat_store_up"}


def test_outcomes_are_all_codes_that_an_answer_can_end_with() -> None:
    assert {"completed", "interrupted", "cancelled", "caller_left", "overloaded", "upstream_stalled"} <= OUTCOMES
    assert "caller_left" not in UPSTREAMS and "overloaded" not in UPSTREAMS


# --- real answers ---------------------------------------------------------------------------------------


def test_a_real_answer_is_in_the_figures_of_the_process(upstream: FakeUpstream) -> None:
    upstream.script = answer(["Hel", "lo"])
    with open_shop(metrics=True, model="m-real") as shop:
        shop.ask()
        shop.the_record()
        told = scraped(shop.app)
    assert told["streamchat_answers_started_total gen_ai_request_model=m-real"] == 1
    assert told["streamchat_answers_total gen_ai_request_model=m-real outcome=completed"] == 1
    model = CHAT.replace("m1", "m-real")
    assert told[f"gen_ai_client_token_usage_sum {model} gen_ai_token_type=input"] == 19
    assert 0 < told[f"gen_ai_server_request_duration_seconds_sum error_type= {model}"] < 5
    assert told["streamchat_live_answers"] == 0
    assert told["streamchat_upstream_connections state=idle"] == 1


def test_a_running_answer_is_live_and_holds_its_connection(upstream: FakeUpstream) -> None:
    gate = Gate()
    upstream.script = [head(), text("Hel"), gate, finish(), done(), last_chunk()]
    with open_shop(metrics=True, max_streams=7) as shop, serve(shop.app) as port:
        with call(port, post_bytes()) as caller:
            read_until(caller, b"Hel")
            told = scraped(shop.app)
            assert (told["streamchat_live_answers"], told["streamchat_most_live_answers"]) == (1, 7)
            assert told["streamchat_upstream_connections state=active"] == 1
            gate.open()
            read_until(caller, b"0\r\n\r\n")
        shop.the_record()
        assert scraped(shop.app)["streamchat_live_answers"] == 0


def test_a_mount_that_is_closed_holds_nothing(upstream: FakeUpstream) -> None:
    for most in (7, 8):
        with open_shop(metrics=True, max_streams=most) as shop:
            shop.ask()
            assert scraped(shop.app)["streamchat_most_live_answers"] == most


def test_an_answer_that_goes_on_without_its_caller_is_a_hangup_too(upstream: FakeUpstream) -> None:
    gate = Gate()
    upstream.script = [head(), text("Hel"), gate, text("lo"), finish(), done(), last_chunk()]
    with open_shop(metrics=True, model="m-alone", on_disconnect="finish") as shop, serve(shop.app) as port:
        before = scraped(shop.app).get("streamchat_hangups_total outcome=went_on", 0)
        with call(port, post_bytes()) as caller:
            read_until(caller, b"Hel")
        live = shop.mounts[0].process.live
        wait_until(lambda: any(answer.absence.since for answer in live._running), "nobody saw the caller leave")  # type: ignore[attr-defined]
        gate.open()
        shop.the_record()
        told = scraped(shop.app)
    assert told["streamchat_answers_total gen_ai_request_model=m-alone outcome=completed"] == 1
    assert told["streamchat_hangups_total outcome=went_on"] == before + 1


def test_an_upstream_that_refuses_is_counted_with_its_status(upstream: FakeUpstream) -> None:
    upstream.script = error(429)
    with open_shop(metrics=True, model="m-429") as shop:
        name = "streamchat_upstream_errors_total error_type=upstream_rate_limited http_response_status_code=429"
        before = scraped(shop.app).get(name, 0)
        shop.ask()
        assert scraped(shop.app)[name] == before + 1


def test_a_caller_that_left_is_counted(upstream: FakeUpstream) -> None:
    upstream.script = [head(), text("Hel"), Hang()]
    with open_shop(metrics=True, model="m-left") as shop, serve(shop.app) as port:
        with call(port, post_bytes()) as caller:
            read_until(caller, b"Hel")
        shop.the_record()
        told = scraped(shop.app)
    assert told["streamchat_answers_total gen_ai_request_model=m-left outcome=caller_left"] == 1


def test_without_the_setting_nothing_is_counted_and_the_view_says_so(upstream: FakeUpstream) -> None:
    with open_shop(model="m-off") as shop:
        shop.ask()
        response = view(shop.app)
    assert response.status_code == 503
    assert response.get_data(as_text=True) == "Nothing is counted: set STREAMCHAT_METRICS to true.\n"
    with open_shop(metrics=True) as other:
        assert "m-off" not in str(scraped(other.app))


def test_of_two_mounts_the_one_is_counted_that_asks_for_it(upstream: FakeUpstream) -> None:
    def build(app: Flask) -> None:
        for name, metrics in (("two", True), ("three", True), ("none", False)):
            StreamChat(app, name=name, url_prefix=f"/{name}", public=True, model=f"m-{name}", metrics=metrics)

    with open_shop(build) as shop:
        for name in ("two", "none"):
            shop.ask(url=f"/{name}/get-response")
        shop.wait_records(2)
        told = scraped(shop.app)
    assert told["streamchat_answers_total gen_ai_request_model=m-two outcome=completed"] == 1
    assert "m-none" not in str(told)


def test_a_receiver_of_the_shop_that_raises_keeps_nothing_from_being_counted(
    upstream: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    def receive(app: Flask, **_: Any) -> None:
        raise ZeroDivisionError

    with open_shop(metrics=True, model="m-raises") as shop, answer_finished.connected_to(receive, shop.app):
        shop.ask()
        shop.expect_nothing_held()
        told = scraped(shop.app)
    assert told["streamchat_answers_total gen_ai_request_model=m-raises outcome=completed"] == 1
    assert "a hook of the application failed" in caplog.text


def test_a_long_answer_is_counted_as_often_as_a_short_one(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done once a piece would be seen here: the figures are touched at an answer's two ends only."""
    touched: list[str] = []
    child = Figures._child

    def counting(self: Figures, name: str, labels: dict[str, str]) -> Any:
        touched.append(name)
        return child(self, name, labels)

    monkeypatch.setattr(Figures, "_child", counting)
    monkeypatch.setattr(Figures, "beat", lambda _: None)  # once a second
    with open_shop(metrics=True, coalesce_ms=0) as shop:
        counts: list[Any] = []
        for pieces in (3, 300):
            upstream.script = answer(["word "] * pieces)
            shop.ask()
            assert shop.wait_records(len(counts) + 1)[-1].pieces == pieces
            counts.append(len(touched))
    assert counts[0] > 0 and counts[1] == 2 * counts[0]


# --- stores ---------------------------------------------------------------------------------------------


def test_the_store_is_asked_at_each_scrape(upstream: FakeUpstream) -> None:
    with open_shop(metrics=True, store_url="memory://") as shop:
        assert scraped(shop.app)["streamchat_store_answers"] == 0
        shop.ask()
        shop.the_record()
        told = scraped(shop.app)
    assert (told["streamchat_store_up"], told["streamchat_store_answers"], told["streamchat_store_live"]) == (1, 1, 0)
    assert told["streamchat_store_bytes"] > 0 and told["streamchat_store_owners"] == 1
    assert (told["streamchat_webhooks_waiting"], told["streamchat_webhooks_dead"]) == (0, 0)


def test_where_there_is_no_store_nothing_is_said_of_one(upstream: FakeUpstream) -> None:
    with open_shop(metrics=True) as shop:
        assert not [name for name in scraped(shop.app) if "store" in name or "webhooks" in name]


def test_mounts_that_share_a_store_ask_it_once(upstream: FakeUpstream, tmp_path: Path) -> None:
    def build(app: Flask) -> None:
        for name in ("one", "two"):
            StreamChat(app, name=name, url_prefix=f"/{name}", **given)

    given: dict[str, Any] = {"metrics": True, "public": True, "store_url": f"sqlite:///{tmp_path}/log.db"}
    with open_shop(build) as shop:
        shop.ask(url="/one/get-response")
        shop.wait_records()
        assert scraped(shop.app)["streamchat_store_answers"] == 1


class Away:
    def gauges(self) -> dict[str, int]:
        raise StoreDown


def test_a_store_that_is_away_is_told_and_the_rest_is_too() -> None:
    store: Any = MemoryStore(15)
    both = {family.name: family.samples[0].value for family in StoreFigures([store, Away()]).collect()}  # type: ignore[list-item]
    assert both.pop("streamchat_store_up") == 0
    assert both.pop("streamchat_store_answers") == 0
    alone = [(family.name, family.samples[0].value) for family in StoreFigures([Away()]).collect()]  # type: ignore[list-item]
    assert alone == [("streamchat_store_up", 0)]


# --- the view -------------------------------------------------------------------------------------------


def test_the_text_is_what_prometheus_asks_for(upstream: FakeUpstream) -> None:
    with open_shop(metrics=True, model="m-form") as shop:
        shop.ask()
        plain, wanted = view(shop.app), view(shop.app, "application/openmetrics-text; version=1.0.0")
    assert plain.content_type.startswith("text/plain; version=")
    assert plain.headers["Cache-Control"] == "no-store"
    assert wanted.content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert "streamchat_answers" in {family.name for family in open_metrics(wanted.get_data(as_text=True))}


def test_the_figures_of_one_worker_of_several_are_refused(upstream: FakeUpstream) -> None:
    with open_shop(metrics=True) as shop:
        response = view(shop.app, several=True)
    assert response.status_code == 503
    assert "PROMETHEUS_MULTIPROC_DIR" in response.get_data(as_text=True) and "STREAMCHAT_METRICS" in response.get_data(
        as_text=True
    )


def test_what_fails_to_count_does_not_touch_the_sweep(upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with open_shop(metrics=True) as shop:
        shop.ask()
        monkeypatch.setattr(Figures, "_set", fail)
        shop.mounts[0].process.live.sweep()
        monkeypatch.undo()


def test_what_fails_to_count_does_not_touch_the_answer(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with open_shop(metrics=True) as shop:
        monkeypatch.setattr(Figures, "_count", fail)
        assert shop.ask().data == b"Hello, world!"
        assert shop.the_record().outcome == "completed"
        monkeypatch.undo()
    assert "a hook of the application failed" in caplog.text


# --- the start ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "module", "extra"),
    [
        ("metrics", "prometheus_client", "flask-streamchat[metrics]"),
        ("tracing", "opentelemetry.trace", "flask-streamchat[tracing]"),
    ],
)
def test_a_missing_library_stops_the_start_and_is_named(
    setting: str, module: str, extra: str, upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    environ = {"STREAMCHAT_PUBLIC": "true", f"STREAMCHAT_{setting.upper()}": "true"}
    options: dict[str, Any] = {setting: True}
    with pytest.raises(SettingsError, match=re.escape(extra)) as caught, open_shop(**options):
        pass
    assert str(caught.value).startswith(f"STREAMCHAT_{setting.upper()} needs ")
    with pytest.raises(SettingsError, match=re.escape(str(caught.value))):
        check_environ(environ)
    with open_shop():
        pass


def test_neither_library_is_loaded_unless_it_is_wanted() -> None:
    code = "import sys, wsgi; print([name for name in ('prometheus_client', 'opentelemetry') if name in sys.modules])"
    environ = {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "STREAMCHAT_PUBLIC": "true"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)
    assert result.stdout == "[]\n", result.stderr


def test_a_folder_of_figures_that_is_none_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, upstream: FakeUpstream
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path / "missing"))
    with (
        pytest.raises(SettingsError, match=r"PROMETHEUS_MULTIPROC_DIR names \S+missing, which is no folder"),
        open_shop(metrics=True),
    ):
        pass


def test_wsgi_has_the_route_only_where_the_setting_is_on(
    upstream: FakeUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STREAMCHAT_PUBLIC", "true")
    import wsgi

    statuses = []
    for value in ("", "false", "1"):
        with closing_mounts(wsgi.create_app({"STREAMCHAT_PUBLIC": "true", "STREAMCHAT_METRICS": value})) as app:
            statuses.append(app.test_client().get("/metrics").status_code)
    assert statuses == [404, 404, 200]


def test_a_format_that_counts_each_event_counts_pieces_alike(upstream: FakeUpstream) -> None:
    with open_shop(metrics=True, model="m-sse") as shop:
        shop.ask(accept=SSE)
        shop.the_record()
        told = scraped(shop.app)
    assert told["streamchat_time_between_pieces_seconds_count gen_ai_request_model=m-sse"] == 1
