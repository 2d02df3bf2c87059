"""The table of metrics: what each is called, what it counts and by what. Pure.

Names after OpenTelemetry's GenAI conventions, as Prometheus writes them; streamchat_ where they have no name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MODEL = "gen_ai_request_model"
OPERATION, PROVIDER = "gen_ai_operation_name", "gen_ai_provider_name"
WHAT = (OPERATION, PROVIDER, MODEL)  # the conventions require all three

# The conventions' boundaries, and what our own time limits need above them.
DURATION = (
    0.01,
    0.02,
    0.04,
    0.08,
    0.16,
    0.32,
    0.64,
    1.28,
    2.56,
    5.12,
    10.24,
    20.48,
    40.96,
    81.92,
    163.84,
    327.68,
    655.36,
)
FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0, 120.0)
PACE = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16_384, 65_536, 262_144, 1_048_576, 4_194_304, 16_777_216, 67_108_864)


@dataclass(frozen=True)
class Metric:
    """One row. A `store` figure is read out of the store at each scrape, the others are a process's own."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "store"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


METRICS = (
    Metric("streamchat_live_answers", "gauge", "Answers that are being made."),
    Metric("streamchat_most_live_answers", "gauge", "Answers that may be made at a time."),
    Metric("streamchat_answers_started_total", "counter", "Answers that got a slot.", (MODEL,)),
    Metric(
        "streamchat_answers_total",
        "counter",
        "Answers that ended, by outcome: completed, or the code of the error.",
        (MODEL, "outcome"),
    ),
    Metric("gen_ai_server_request_duration_seconds", "histogram", "An answer's time.", (*WHAT, "error_type"), DURATION),
    Metric(
        "gen_ai_server_time_to_first_token_seconds",
        "histogram",
        "Time until the model's first piece, where one came.",
        WHAT,
        FIRST,
    ),
    Metric(
        "gen_ai_server_time_per_output_token_seconds",
        "histogram",
        "Time per token after the first: the mean of each completed answer whose tokens the upstream counted.",
        WHAT,
        PACE,
    ),
    Metric(
        "streamchat_time_between_pieces_seconds",
        "histogram",
        "Time between pieces: the mean of each answer that had two or more. Single pieces are not timed.",
        (MODEL,),
        PACE,
    ),
    Metric(
        "gen_ai_client_token_usage",
        "histogram",
        "Tokens of each answer as the upstream counted them.",
        (*WHAT, "gen_ai_token_type"),
        TOKENS,
    ),
    Metric(
        "streamchat_estimated_tokens_total",
        "counter",
        "Tokens of the answers that the upstream did not count: estimates.",
        (MODEL, "gen_ai_token_type"),
    ),
    Metric("streamchat_upstream_attempts_total", "counter", "Requests to the upstream, repeated ones too.", (MODEL,)),
    Metric(
        "streamchat_upstream_errors_total",
        "counter",
        "Answers that the upstream's side ended, by our code and its HTTP status; none where it did not answer.",
        ("error_type", "http_response_status_code"),
    ),
    Metric(
        "streamchat_hangups_total",
        "counter",
        "Callers that left or did not read, by what became of the answer: ended so, or went_on without them.",
        ("outcome",),
    ),
    Metric(
        "streamchat_upstream_connections",
        "gauge",
        "Connections to the upstream, active or idle. None of STREAMCHAT_HTTP=sdk and of a client_factory.",
        ("state",),
    ),
    Metric("streamchat_log_waiting_bytes", "gauge", "Bytes that the response log has yet to write."),
    Metric("streamchat_store_up", "store", "Whether the store answered this scrape: 1 or 0."),
    Metric("streamchat_store_live", "store", "Answers in the store that have not ended, queued ones too."),
    Metric("streamchat_store_queued", "store", "Background answers that wait for a worker."),
    Metric("streamchat_store_reserved_tokens", "store", "Tokens that are reserved for answers that have not ended."),
    Metric("streamchat_store_owners", "store", "Processes that hold a lease."),
    Metric("streamchat_store_answers", "store", "Answers that are kept."),
    Metric("streamchat_store_bytes", "store", "Bytes of the answers that are kept."),
    Metric("streamchat_webhooks_waiting", "store", "Webhooks that wait for their next attempt."),
    Metric("streamchat_webhooks_dead", "store", "Webhooks that were given up, kept for a replay by hand."),
)
TABLE = {metric.name: metric for metric in METRICS}
# By the store's own names of its gauges.
STORED = {
    "live": "streamchat_store_live",
    "queued": "streamchat_store_queued",
    "reserved": "streamchat_store_reserved_tokens",
    "owners": "streamchat_store_owners",
    "answers": "streamchat_store_answers",
    "bytes": "streamchat_store_bytes",
    "waiting": "streamchat_webhooks_waiting",
    "dead": "streamchat_webhooks_dead",
}
