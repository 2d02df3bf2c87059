"""The table of layers against the code: imports go down only, and each foreign library has its one place."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "streamchat"
MODULE_LINES = 299
FUNCTION_LINES = 60


@dataclass(frozen=True)
class Layer:
    level: int
    own: str = ""
    foreign: str = ""


# A module may import modules that stand above it. Own and foreign imports are exact, not an upper bound.
LAYERS = {
    "errors": Layer(0),
    "events": Layer(0),
    "waits": Layer(0),
    "thread_loop": Layer(0, "waits"),
    "gevent_loop": Layer(0, "waits", "gevent"),
    "loop": Layer(0, "gevent_loop thread_loop waits"),
    "addresses": Layer(1),
    "webhooks": Layer(1, foreign="werkzeug"),
    "attempts": Layer(1),
    "checks": Layer(1, "addresses webhooks"),
    "settings": Layer(1, "addresses checks errors"),
    "schema": Layer(1, "addresses checks errors settings", "pydantic"),
    "client_schema": Layer(1, "checks errors schema settings", "pydantic"),
    "encoders": Layer(1, "errors events", "werkzeug"),
    "client_encoders": Layer(1, "encoders events"),
    "dialects": Layer(1, "client_encoders client_schema encoders errors schema settings"),
    "sse_decoder": Layer(1, "errors"),
    "decoder": Layer(1, "errors events sse_decoder", "jiter"),
    "responses_decoder": Layer(1, "decoder events"),
    "choices_decoder": Layer(1, "decoder errors events"),
    "prompt": Layer(1, "choices_decoder decoder responses_decoder"),
    "access": Layer(1, "errors", "werkzeug"),
    "cancellation": Layer(1, "errors"),
    "pinned_connection": Layer(2, "attempts cancellation", "requests urllib3"),
    "delivery": Layer(2, "addresses attempts cancellation errors pinned_connection", "requests urllib3"),
    "ledger": Layer(1, foreign="blinker"),
    "letters": Layer(1, "attempts"),
    "store": Layer(2, "events ledger letters"),
    "envelopes": Layer(2, "events letters store webhooks"),
    "bookkeeping": Layer(2, "envelopes errors events ledger store"),
    "redis_lua": Layer(2),
    "redis_scripts": Layer(2, "redis_lua"),
    "redis_queue_scripts": Layer(2, "redis_lua"),
    "redis_outbox_scripts": Layer(2, "redis_lua"),
    "redis_link": Layer(2, "errors redis_lua", "redis"),
    "redis_listener": Layer(2, "errors redis_link store"),
    "redis_rows": Layer(2, "bookkeeping events letters store"),
    "redis_doubts": Layer(2, "errors"),
    "redis_outbox": Layer(
        2, "attempts errors letters redis_doubts redis_link redis_lua redis_outbox_scripts redis_rows"
    ),
    "redis_store": Layer(
        2,
        "bookkeeping errors ledger redis_doubts redis_link redis_listener redis_lua redis_outbox redis_queue_scripts"
        " redis_rows redis_scripts store",
    ),
    "memory_listener": Layer(2, "store"),
    "memory_outbox": Layer(2, "attempts errors letters"),
    "memory_answers": Layer(2, "bookkeeping store"),
    "memory_store": Layer(2, "bookkeeping errors ledger memory_answers memory_listener memory_outbox store"),
    "sqlite_schema": Layer(2, "errors", "apsw"),
    "sqlite_file": Layer(2, "errors ledger loop sqlite_schema"),
    "sqlite_leases": Layer(2, "errors sqlite_schema"),
    "sqlite_listener": Layer(2, "sqlite_file sqlite_schema store"),
    "sqlite_taking": Layer(2, "sqlite_file sqlite_leases sqlite_schema"),
    "sqlite_queue": Layer(2, "sqlite_file sqlite_leases sqlite_schema store"),
    "sqlite_outbox": Layer(2, "attempts letters sqlite_file sqlite_leases sqlite_schema sqlite_taking"),
    "sqlite_endings": Layer(2, "bookkeeping ledger sqlite_file sqlite_outbox sqlite_schema store"),
    "sqlite_upkeep": Layer(2, "sqlite_endings sqlite_file sqlite_leases sqlite_outbox sqlite_schema store"),
    "sqlite_store": Layer(
        2,
        "bookkeeping errors events ledger loop sqlite_endings sqlite_file sqlite_leases sqlite_listener sqlite_outbox"
        " sqlite_queue sqlite_schema sqlite_taking sqlite_upkeep store",
    ),
    "connection": Layer(1, "cancellation loop", "httpx2 httptools"),
    "transport": Layer(1, "cancellation connection loop", "httpx2"),
    "template": Layer(2, "connection transport", "httpx2 openai"),
    "sdk_transport": Layer(1, "cancellation loop transport", "httpx2"),
    "faults": Layer(2, "decoder errors ledger", "httpx2 openai"),
    "upstream": Layer(
        2,
        "cancellation connection decoder errors events faults ledger loop prompt sdk_transport settings template"
        " transport",
        "httpx2 openai",
    ),
    "carrier": Layer(2, "errors loop redis_link", "huey"),
    "hangup": Layer(2, "cancellation loop"),
    "live": Layer(2, "cancellation errors hangup loop"),
    "stores": Layer(2, "carrier errors loop memory_store redis_store settings sqlite_schema sqlite_store store"),
    "sheet": Layer(2, "cancellation errors events loop store"),
    "tail": Layer(2, "errors events loop sheet store"),
    "lease": Layer(2, "errors loop store tail"),
    "pruning": Layer(2, "errors loop"),
    "log": Layer(2, "bookkeeping cancellation errors lease ledger loop pruning sheet store tail"),
    "opening": Layer(3, "cancellation events loop"),
    "tally": Layer(3, "events ledger"),
    "order": Layer(3, "errors events prompt"),
    "ending": Layer(3, "envelopes errors events ledger order store"),
    "pull": Layer(3, "errors events loop opening settings tally"),
    "absence": Layer(3, "cancellation errors loop sheet"),
    "answer": Layer(
        3,
        "absence cancellation encoders ending errors events hangup ledger live loop opening order pull settings sheet"
        " store tally",
    ),
    "replay": Layer(3, "cancellation encoders ending errors events hangup live log loop settings store tail"),
    "document": Layer(3, "ending events store"),
    "admission": Layer(3, "answer errors log order schema settings store tally"),
    "metric_table": Layer(1),
    "metrics": Layer(3, "errors ledger live metric_table prompt settings store", "prometheus_client"),
    "tracing": Layer(3, "ending errors ledger prompt settings", "opentelemetry"),
    "departures": Layer(1),
    "inspection": Layer(3, "live loop settings"),
    "diagnostics": Layer(3, "cancellation departures encoders errors events hangup live", "itsdangerous"),
    "hooks": Layer(3, "ledger schema upstream", "flask"),
    "process": Layer(3, "diagnostics hooks live log loop metrics settings stores upstream"),
    "mount": Layer(
        4,
        "access admission answer encoders errors hangup hooks ledger log loop metrics order process prompt schema"
        " settings store stores tracing upstream",
        "flask",
    ),
    "jobs": Layer(3, "prompt"),
    "sender": Layer(3, "attempts delivery errors letters log loop settings webhooks"),
    "background": Layer(
        4,
        "cancellation encoders ending errors hangup jobs live log loop mount order schema sender sheet store",
        "flask",
    ),
    "spending": Layer(3, "store"),
    "measurements": Layer(1),
    "remedies": Layer(1),
    "findings": Layer(2, "measurements remedies"),
    "diagnosis": Layer(3, "findings measurements remedies"),
    "doctor": Layer(2, "measurements", "httpx2"),
    "opened_logs": Layer(4, "errors loop mount settings store stores", "click flask"),
    "mailroom": Layer(4, "letters opened_logs settings store", "click flask"),
    "worker": Layer(5, "background errors mount", "flask"),
    "cli": Layer(
        5,
        "diagnosis diagnostics doctor mailroom mount opened_logs settings spending store stores worker",
        "click flask",
    ),
    "page": Layer(4, "mount", "flask"),
    "responses": Layer(5, "access dialects encoders errors hangup mount", "flask werkzeug"),
    "reading": Layer(
        5,
        "client_encoders dialects document encoders ending errors events hangup mount replay responses store",
        "flask",
    ),
    "scraping": Layer(5, "metrics mount responses store", "flask"),
    "probing": Layer(
        5,
        "departures diagnostics dialects encoders errors hangup inspection mount responses",
        "flask werkzeug",
    ),
    "views": Layer(
        5,
        "background cli dialects errors hangup hooks ledger mount page probing reading responses schema upstream",
        "flask werkzeug",
    ),
    "extension": Layer(6, "mount responses views", "flask"),
    "__init__": Layer(7, "errors extension ledger schema scraping settings views"),
}  # fmt: skip
# Names that only one module may touch.
VIEWS = {"probing", "reading", "responses", "scraping", "views"}
ONLY_IN_VIEWS = {"request", "Response", "stream_with_context", "g", "session"}
ONLY_IN = {
    "openai": {"faults", "template", "upstream"},
    "apsw": {"sqlite_schema"},
    "httptools": {"connection"},
    "huey": {"carrier"},
    "gevent": {"gevent_loop"},
    "opentelemetry": {"tracing"},
    "prometheus_client": {"metrics"},
    "pydantic": {"client_schema", "schema"},
    "redis": {"redis_link"},
    "requests": {"delivery", "pinned_connection"},
    "urllib3": {"delivery", "pinned_connection"},
}

modules = sorted(path.stem for path in PACKAGE.glob("*.py"))


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text())


@dataclass(frozen=True)
class Import:
    module: str
    names: tuple[str, ...]
    own: bool


def imports(node: ast.AST) -> Iterator[Import]:
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            for alias in part.names:
                yield Import(alias.name, (), alias.name.split(".")[0] == "streamchat")
        elif isinstance(part, ast.ImportFrom):
            names = tuple(alias.name for alias in part.names)
            if part.level and not part.module:  # from . import errors
                yield from (Import(name, (), True) for name in names)
            else:
                module = part.module or ""
                yield Import(module, names, bool(part.level) or module.split(".")[0] == "streamchat")


def own_imports(module: str) -> set[str]:
    return {found.module.removeprefix("streamchat.").split(".")[0] for found in imports(tree(module)) if found.own}


def foreign_imports(node: ast.AST) -> set[str]:
    tops = {found.module.split(".")[0] for found in imports(node) if not found.own}
    return tops - set(sys.stdlib_module_names)


def test_every_module_stands_in_the_table() -> None:
    assert modules == sorted(LAYERS)


def test_the_table_itself_only_goes_down() -> None:
    above: list[str] = []
    for module, layer in LAYERS.items():
        assert set(layer.own.split()) <= set(above), module
        assert all(LAYERS[name].level <= layer.level for name in layer.own.split()), module
        above.append(module)


@pytest.mark.parametrize("module", LAYERS)
def test_a_module_imports_what_its_row_says(module: str) -> None:
    assert own_imports(module) == set(LAYERS[module].own.split())
    assert foreign_imports(tree(module)) == set(LAYERS[module].foreign.split())


@pytest.mark.parametrize(("library", "places"), ONLY_IN.items())
def test_a_foreign_library_has_its_one_place(library: str, places: set[str]) -> None:
    assert {module for module in modules if library in foreign_imports(tree(module))} == places


def test_gevent_is_imported_inside_functions_only() -> None:
    functions = [node for node in ast.walk(tree("loop")) if isinstance(node, ast.FunctionDef)]
    inside = [found for function in functions for found in imports(function) if found.module.startswith("gevent")]
    everywhere = [found for found in imports(tree("loop")) if found.module.startswith("gevent")]
    assert inside and len(inside) == len(everywhere)


@pytest.mark.parametrize("module", [name for name in LAYERS if name not in VIEWS])
def test_only_the_views_touch_the_request_and_the_response(module: str) -> None:
    found = {name for part in imports(tree(module)) if part.module == "flask" for name in part.names}
    assert not found & ONLY_IN_VIEWS
    attributes = {
        node.attr
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "flask"
    }
    assert not attributes & ONLY_IN_VIEWS


def test_nothing_is_imported_by_its_name_as_text() -> None:
    for module in modules:
        called = {
            node.func.id
            for node in ast.walk(tree(module))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not called & {"__import__", "import_module", "exec", "eval"}, module
        assert "importlib" not in {found.module.split(".")[0] for found in imports(tree(module))}, module


@pytest.mark.parametrize("module", modules)
def test_a_module_stays_below_three_hundred_lines(module: str) -> None:
    assert len((PACKAGE / f"{module}.py").read_text().splitlines()) <= MODULE_LINES


@pytest.mark.parametrize("module", modules)
def test_a_function_stays_within_sixty_lines(module: str) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= FUNCTION_LINES, node.name


@pytest.mark.parametrize("module", modules)
def test_a_module_opens_with_what_it_is(module: str) -> None:
    assert ast.get_docstring(tree(module))


def test_contributors_are_told_of_no_module_that_is_gone() -> None:
    named = set(re.findall(r"`(\w+)\.py`", (PACKAGE.parent / "CONTRIBUTING.md").read_text()))
    assert named and named <= set(modules)
