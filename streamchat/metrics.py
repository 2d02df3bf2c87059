"""Answers become figures in Prometheus' form: counted once an answer, gauged once a second. Nothing is done a piece.

prometheus_client is imported where the figures are turned on, and keeps them for the whole process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

from .errors import SettingsError, StoreDown, StreamChatError, UpstreamFailure
from .ledger import Record
from .live import Live
from .metric_table import METRICS, MODEL, OPERATION, PROVIDER, STORED, TABLE, Metric
from .prompt import Prompt
from .settings import Settings
from .store import Store

FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # of the files by which the workers of one server count together
OTHER = "_OTHER"  # OpenTelemetry's word for what is not one of the known values
ALWAYS = {OPERATION: "chat", PROVIDER: "openai"}  # the provider: whose form the upstream's API has
COMPLETED = "completed"
HANGUPS = ("caller_left", "caller_stalled")
WENT_ON = "went_on"


class Log(Protocol):
    waiting_bytes: int


class Upstream(Protocol):
    def connections(self) -> Mapping[str, int]: ...


class Process(Protocol):
    """What one mount holds in one process."""

    pid: int
    live: Live

    @property
    def upstream(self) -> Upstream: ...

    @property
    def log(self) -> Log | None: ...


def _codes(kind: type[StreamChatError]) -> frozenset[str]:
    return frozenset({kind.code}).union(*(_codes(each) for each in kind.__subclasses__()))


OUTCOMES = _codes(StreamChatError) | {COMPLETED}
UPSTREAMS = _codes(UpstreamFailure)


def counts_together() -> bool:
    """Whether the workers of this server count into files of one folder: prometheus_client looks at its import."""
    from prometheus_client import values

    return bool(values.ValueClass._multiprocess)


def check_metrics(settings: Settings) -> None:
    """At the start. Raises SettingsError where the library is missing, or the folder of the workers' files."""
    if not settings.metrics:
        return
    try:
        import prometheus_client  # noqa: F401
    except ImportError:
        raise SettingsError(
            "STREAMCHAT_METRICS needs prometheus-client: pip install 'flask-streamchat[metrics]'."
        ) from None
    folder = os.environ.get(FOLDER)
    if folder and not Path(folder).is_dir():
        raise SettingsError(f"{FOLDER} names {folder}, which is no folder: make it before the start, and empty it.")


def open_figures(settings: Settings) -> Figures | None:
    """None where metrics are off. Raises SettingsError as check_metrics."""
    check_metrics(settings)
    if not settings.metrics:
        return None
    figures().know((settings.model, *settings.models))
    return figures()


@cache
def figures() -> Figures:
    """The figures of this process: prometheus_client has one set of them, whatever mounts there are."""
    from prometheus_client import REGISTRY

    return Figures(REGISTRY)


class Figures:
    def __init__(self, registry: Any) -> None:
        self._made = {metric.name: _make(metric, registry) for metric in METRICS if metric.kind != "store"}
        self._registry = registry
        self._models: set[str] = set()
        self._processes: WeakSet[Any] = WeakSet()

    def know(self, models: Iterable[str]) -> None:
        """Only these become labels: a caller's words do not."""
        self._models.update(models)

    def add(self, process: Process) -> None:
        self._processes.add(process)

    def drop(self, process: Process) -> None:
        self.beat()  # what it has to tell
        self._processes.discard(process)
        self.beat()

    def beat(self) -> None:
        """Once a second, in the event loop: raises nothing. What keeps the files from growing is told by the scrape."""
        with contextlib.suppress(Exception):
            self._gauge()

    def _gauge(self) -> None:
        """What stands in no record."""
        processes = self._here()
        self._set("streamchat_live_answers", sum(len(each.live) for each in processes))
        self._set("streamchat_most_live_answers", sum(each.live.most for each in processes))
        connections = [each.upstream.connections() for each in processes]
        for state in ("active", "idle"):
            self._set("streamchat_upstream_connections", sum(each.get(state, 0) for each in connections), state=state)
        self._set("streamchat_log_waiting_bytes", sum(each.log.waiting_bytes for each in processes if each.log))
        self._count("streamchat_hangups_total", sum(each.live.take_deserted() for each in processes), outcome=WENT_ON)

    def _here(self) -> list[Process]:
        """Without those that were made before a fork."""
        return [each for each in list(self._processes) if each.pid == os.getpid()]

    def begin(self, id: str, prompt: Prompt, client: Any) -> None:
        """An answer has its slot."""
        self._count("streamchat_answers_started_total", gen_ai_request_model=self._named(prompt.model))

    def end(self, record: Record, text: str) -> None:
        """It has its record."""
        model = self._named(record.model)
        outcome = record.outcome if record.outcome in OUTCOMES else OTHER
        self._count("streamchat_answers_total", gen_ai_request_model=model, outcome=outcome)
        self._count("streamchat_upstream_attempts_total", record.attempts, gen_ai_request_model=model)
        if outcome in UPSTREAMS:
            status = str(record.upstream_status or "")
            self._count("streamchat_upstream_errors_total", error_type=outcome, http_response_status_code=status)
        if outcome in HANGUPS:
            self._count("streamchat_hangups_total", outcome=outcome)
        self._spent(record, model)
        self._timed(record, model, "" if outcome == COMPLETED else outcome)

    def _spent(self, record: Record, model: str) -> None:
        """The conventions want tokens that were counted; estimates stand apart."""
        for kind, tokens in (("input", record.input_tokens), ("output", record.output_tokens)):
            labels = {MODEL: model, "gen_ai_token_type": kind}
            if record.estimated:
                self._count("streamchat_estimated_tokens_total", tokens, **labels)
            else:
                self._observe("gen_ai_client_token_usage", tokens, **labels)

    def _timed(self, record: Record, model: str, error: str) -> None:
        self._observe("gen_ai_server_request_duration_seconds", record.duration, **{MODEL: model}, error_type=error)
        if record.first_piece is None:
            return
        self._observe("gen_ai_server_time_to_first_token_seconds", record.first_piece, **{MODEL: model})
        rest = max(0.0, record.duration - record.first_piece)
        if record.pieces > 1:
            self._observe("streamchat_time_between_pieces_seconds", rest / (record.pieces - 1), **{MODEL: model})
        if record.output_tokens > 1 and not error and not record.estimated:
            a_token = rest / (record.output_tokens - 1)
            self._observe("gen_ai_server_time_per_output_token_seconds", a_token, **{MODEL: model})

    def _named(self, model: str) -> str:
        return model if model in self._models else OTHER

    def _child(self, name: str, labels: dict[str, str]) -> Any:
        known = ALWAYS | labels
        wanted = TABLE[name].labels
        return self._made[name].labels(*[known[label] for label in wanted]) if wanted else self._made[name]

    def _count(self, name: str, by: int = 1, **labels: str) -> None:
        if by:
            self._child(name, labels).inc(by)

    def _set(self, name: str, value: int, **labels: str) -> None:
        self._child(name, labels).set(value)

    def _observe(self, name: str, value: float, **labels: str) -> None:
        self._child(name, labels).observe(value)

    def told(self, stores: Iterable[Store], accept: str) -> tuple[bytes, str]:
        """The figures of all workers that count together, and of the stores; and their content type."""
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import choose_encoder
        from prometheus_client.multiprocess import MultiProcessCollector

        self._gauge()
        registry = CollectorRegistry()
        if counts_together():
            MultiProcessCollector(registry)
        else:
            registry.register(self._registry)
        registry.register(StoreFigures(stores))
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type


def _make(metric: Metric, registry: Any) -> Any:
    from prometheus_client import Counter, Gauge, Histogram

    given: dict[str, Any] = {"labelnames": metric.labels, "registry": registry}
    if metric.kind == "gauge":
        return Gauge(metric.name, metric.help, multiprocess_mode="livesum", **given)
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.help, buckets=metric.buckets, **given)
    return Counter(metric.name, metric.help, **given)


class StoreFigures:
    """What the stores say, at each scrape: they are the same whichever worker is asked, so they are never added up."""

    def __init__(self, stores: Iterable[Store]) -> None:
        self._stores = list(stores)

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        if not self._stores:
            return
        told = [_gauges(store) for store in self._stores]
        values = {"streamchat_store_up": int(None not in told)}
        for each in told:
            for name, value in (each or {}).items():
                if name in STORED:
                    values[STORED[name]] = values.get(STORED[name], 0) + value
        for name, value in values.items():
            yield GaugeMetricFamily(name, TABLE[name].help, value=value)


def _gauges(store: Store) -> Mapping[str, int] | None:
    try:
        return store.gauges()
    except StoreDown:
        return None
