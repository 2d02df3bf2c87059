"""docs/operations.md is true: its table is the code's, its Python runs, its alerts ask for what there is.

`python -m tests.test_operations_docs` writes the table anew.
"""

from __future__ import annotations

import json
import logging
import logging.config
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import requests

from streamchat import tracing
from streamchat.ledger import log_record
from streamchat.metric_table import METRICS, OPERATION, PROVIDER
from streamchat.metrics import OUTCOMES, UPSTREAMS
from tests.documents import blocks
from tests.fake_upstream import FakeUpstream
from tests.live.servers import gunicorn, wait_for
from tests.shop import KEY
from tests.test_ledger import RECORD

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "operations.md"
BLOCKS = blocks(PAGE.read_text())
(ALERTS,) = [block for block in blocks(PAGE.read_text(), "yaml") if block.startswith("groups:")]
MARKED = re.compile(r"(<!-- metrics -->\n)(.*?)(<!-- /metrics -->)", re.DOTALL)
SUFFIXES = ("_bucket", "_sum", "_count")


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeUpstream]:
    with FakeUpstream() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        yield server


def metrics_table() -> str:
    rows = []
    for each in METRICS:
        labels = ", ".join(f"`{label}`" for label in each.labels if label not in (OPERATION, PROVIDER))
        rows.append(f"| `{each.name}` | {'gauge' if each.kind == 'store' else each.kind} | {labels} | {each.help} |")
    return "\n".join(["| name | | labels | |", "|---|---|---|---|", *rows])


def block(holding: str) -> str:
    (found,) = [each for each in BLOCKS if holding in each]
    return str(found)


def test_the_table_of_metrics_is_what_the_code_says() -> None:
    found = MARKED.search(PAGE.read_text())
    assert found is not None
    assert found[2].strip() == metrics_table(), "run: python -m tests.test_operations_docs"


def test_every_figure_that_the_page_names_is_one() -> None:
    names = {each.name for each in METRICS} | {"streamchat_"}
    said = set(re.findall(r"\b(?:streamchat|gen_ai)_\w*\w\b", PAGE.read_text()))
    labels = {label for each in METRICS for label in each.labels}
    plain = {name.removesuffix(suffix) for suffix in SUFFIXES for name in said if name.endswith(suffix)}
    assert {name for name in said if not name.endswith(SUFFIXES)} | plain <= names | labels
    assert {name for name in names if name != "streamchat_"} <= said


def test_alerts_ask_for_codes_that_there_are() -> None:
    outcomes = re.findall(r'outcome!~"([^"]*)"', ALERTS) + re.findall(r'outcome=~"([^"]*)"', ALERTS)
    errors = re.findall(r'error_type=~"([^"]*)"', ALERTS)
    assert outcomes and errors
    assert {code for listed in outcomes for code in listed.split("|")} <= OUTCOMES
    assert {code for listed in errors for code in listed.split("|")} <= UPSTREAMS
    assert ALERTS.count("(") == ALERTS.count(")") and ALERTS.count("- alert:") == ALERTS.count("expr:")


def test_every_attribute_of_a_span_stands_on_the_page() -> None:
    """Whole, or as `.rest` beside another of the same beginning."""
    rows = re.search(r"\| attribute \|.*?\n\n", PAGE.read_text(), re.DOTALL)
    assert rows is not None
    names = [*tracing._asked("m"), *tracing.PARAMS.values(), *tracing._answered(RECORD)]
    names += ["server.address", "server.port", "error.type", "streamchat.upstream.code"]
    for name in names:
        rests = [name, *("." + name.split(".", n)[n] for n in range(1, name.count(".") + 1))]
        assert any(f"`{rest}`" in rows[0] for rest in rests), name


def test_the_app_of_the_page_tells_its_figures(upstream: FakeUpstream) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    exec(block("metrics_view"), names)
    client = names["app"].test_client()
    assert client.post("/api/get-response", json={"message": "hi"}).data == b"Hello, world!"
    assert "streamchat_answers_total" in client.get("/metrics").text
    for mount in names["app"].extensions["streamchat"].values():
        mount.close()


ASK = """
from streamchat.extension import mounts_of
app.test_client().post("/api/get-response", json={"message": "hi"}, buffered=True).close()
provider.shutdown()
for mount in mounts_of(app):
    mount.close()
"""


def test_the_traced_app_of_the_page_prints_its_spans(upstream: FakeUpstream) -> None:
    environ = {"PATH": os.environ["PATH"], "OPENAI_BASE_URL": upstream.base_url, "STREAMCHAT_PUBLIC": "true"}
    command = [sys.executable, "-c", block("TracerProvider") + ASK]
    told = subprocess.run(
        command, cwd=ROOT, env=environ | {"STREAMCHAT_TRACING": "true"}, capture_output=True, text=True, timeout=60
    )
    assert told.returncode == 0, told.stderr
    spans = {each["name"]: each for each in json.loads("[" + re.sub(r"\}\s*\n\{", "},{", told.stdout) + "]")}
    assert set(spans) == {"chat gpt-4.1-mini", "POST /api/get-response"}
    own, request = spans["chat gpt-4.1-mini"], spans["POST /api/get-response"]
    assert own["parent_id"] == request["context"]["span_id"]
    assert own["attributes"]["streamchat.outcome"] == "completed"


@pytest.fixture
def json_lines(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("json_lines")
    exec(block("class JsonLines"), module.__dict__)
    monkeypatch.setitem(sys.modules, "json_lines", module)
    return module


def test_the_recipe_makes_each_answer_one_json_object(json_lines: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.setFormatter(json_lines.JsonLines())
    with caplog.at_level(logging.INFO, "streamchat"):
        log_record(RECORD)
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            logging.getLogger("streamchat").exception("two\nlines")
    answered, failed = (json.loads(line) for line in caplog.text.splitlines())
    assert answered["answer"] == asdict(RECORD)
    assert (answered["logger"], answered["level"], "message" in answered) == ("streamchat", "INFO", False)
    assert failed["message"] == "two\nlines" and "ZeroDivisionError" in failed["exception"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", failed["time"])


@pytest.mark.live
@pytest.mark.long
def test_gunicorn_logs_json_by_the_configuration_of_the_page(upstream: FakeUpstream, tmp_path: Path) -> None:
    (tmp_path / "json_lines.py").write_text(block("class JsonLines"))
    (tmp_path / "json.conf.py").write_text(block("run_path"))
    arguments = ("-c", str(tmp_path / "json.conf.py"))
    with gunicorn(upstream.base_url, tmp_path, *arguments, extra={"PYTHONPATH": str(tmp_path)}) as server:
        id = requests.post(f"{server.url}/api/get-response", json={"message": "hi"}, timeout=10).headers[
            "X-Response-Id"
        ]
        wait_for(lambda: id in server.log, what="the answer's line")
        lines = [json.loads(line) for line in server.log.splitlines()]
    assert [line["answer"]["id"] for line in lines if "answer" in line] == [id]


if __name__ == "__main__":
    PAGE.write_text(MARKED.sub(lambda found: f"{found[1]}{metrics_table()}\n{found[3]}", PAGE.read_text()))
