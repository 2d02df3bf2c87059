"""The extensions that shops have beside streamchat: each with how a shop mounts it, and what a test may look at.

A neighbour is imported where it is mounted: a server of one neighbour loads no other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flask import Blueprint, Flask, Request, jsonify, request

POOL = {"pool_size": 5, "max_overflow": 0, "pool_timeout": 2}
POT = "X-Pot"  # a request with this header has the small limit
SMALL, LARGE = "3 per hour", "100000 per hour"
ORIGIN = "https://pages.example"
# Without these two Sentry is sent the body of a request, and the variables of each frame: the conversation.
SENTRY: dict[str, Any] = {"max_request_body_size": "never", "include_local_variables": False}


def named_user(request: Request) -> str | None:
    return request.headers.get("X-User", "guest")


@dataclass
class Plan:
    """A shop's app while it is put together. `looks` are what /seen tells, `on_blueprint` what is done to the chat."""

    app: Flask
    folder: Path
    authorize: Callable[[Request], str | None] = named_user
    looks: dict[str, Callable[[], Any]] = field(default_factory=dict)
    before_model: list[Callable[[], None]] = field(default_factory=list)
    on_blueprint: list[Callable[[Blueprint], Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def login(plan: Plan) -> None:
    from flask_login import LoginManager, UserMixin, current_user, login_user

    class Somebody(UserMixin):  # type: ignore[misc]  # no types
        def __init__(self, id: str) -> None:
            self.id = id

    manager = LoginManager(plan.app)
    plan.authorize = lambda _: current_user.get_id()

    @manager.user_loader  # type: ignore[untyped-decorator]
    def load(id: str) -> Somebody | None:
        for ask in plan.before_model:  # where there is a database, users are in it
            ask()
        return Somebody(id) if id.startswith("user-") else None

    @plan.app.post("/login")
    def log_in() -> Any:
        return jsonify(login_user(Somebody(request.headers["X-User"])))


def csrf(plan: Plan) -> None:
    from flask_wtf.csrf import CSRFError, CSRFProtect, generate_csrf

    CSRFProtect(plan.app)
    plan.app.add_url_rule("/token", "token", lambda: jsonify(generate_csrf()))

    def refused(error: CSRFError) -> Any:
        return {"code": "csrf", "detail": error.description}, 400

    plan.on_blueprint.append(lambda chat: chat.register_error_handler(CSRFError, refused))


def server_side_session(plan: Plan) -> None:
    from flask_session import Session

    config = plan.app.config
    if "sqlalchemy" in plan.app.extensions:
        config["SESSION_TYPE"] = "sqlalchemy"
        config["SESSION_SQLALCHEMY"] = plan.app.extensions["sqlalchemy"]
    else:
        from cachelib import FileSystemCache

        config["SESSION_TYPE"] = "cachelib"
        config["SESSION_CACHELIB"] = FileSystemCache(str(plan.folder / "sessions"))
    Session(plan.app)


def sqlalchemy(plan: Plan) -> None:
    from flask_sqlalchemy import SQLAlchemy
    from sqlalchemy import text

    plan.app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{plan.folder}/shop.sqlite"
    plan.app.config["SQLALCHEMY_ENGINE_OPTIONS"] = POOL
    database = SQLAlchemy(plan.app)

    def query() -> None:
        assert database.session.execute(text("select 1")).scalar() == 1

    def by_database(request: Request) -> str | None:
        query()
        return named_user(request)

    def checked_out() -> int:
        database.session.remove()
        return int(database.engine.pool.checkedout())  # type: ignore[attr-defined]  # a QueuePool

    plan.authorize = by_database
    plan.before_model.append(query)
    plan.looks["checked out"] = checked_out


def limiter(plan: Plan) -> None:
    from flask_limiter import Limiter

    limiter = Limiter(
        lambda: request.headers.get(POT, "all"), app=plan.app, headers_enabled=True, storage_uri="memory://"
    )
    limit = limiter.shared_limit(
        lambda: SMALL if POT in request.headers else LARGE, scope="questions", methods=["POST"]
    )
    plan.on_blueprint.append(limit)


def compress(plan: Plan) -> None:
    from flask_compress import Compress

    Compress(plan.app)


def cors(plan: Plan) -> None:
    from flask_cors import CORS

    CORS(plan.app, origins=[ORIGIN], supports_credentials=True)
    plan.settings["origins"] = [ORIGIN]


def talisman(plan: Plan) -> None:
    from flask_talisman import Talisman

    Talisman(plan.app)


def debug_toolbar(plan: Plan) -> None:
    from flask_debugtoolbar import DebugToolbarExtension

    plan.app.debug = True
    DebugToolbarExtension(plan.app)


def sentry(plan: Plan) -> None:
    import sentry_sdk
    from sentry_sdk.envelope import Envelope
    from sentry_sdk.transport import Transport

    sent: list[str] = []

    class Kept(Transport):
        def capture_envelope(self, envelope: Envelope) -> None:
            sent.append(envelope.serialize().decode(errors="replace"))

    sentry_sdk.init("https://key@sentry.invalid/1", transport=Kept, traces_sample_rate=1.0, **SENTRY)
    plan.looks["sentry"] = lambda: sent


def opentelemetry(plan: Plan) -> None:
    from opentelemetry.instrumentation.flask import FlaskInstrumentor
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider

    begun: list[str] = []
    ended: list[Any] = []

    class Kept(SpanProcessor):
        def on_start(self, span: ReadableSpan, parent_context: Any = None) -> None:
            begun.append(span.name)

        def on_end(self, span: ReadableSpan) -> None:
            ended.append(json.loads(span.to_json()))

    provider = TracerProvider()
    provider.add_span_processor(Kept())
    FlaskInstrumentor().instrument_app(plan.app, tracer_provider=provider, excluded_urls="/seen")
    plan.looks["spans"] = lambda: {"begun": begun, "ended": ended}


def proxy_fix(plan: Plan) -> None:
    from werkzeug.middleware.proxy_fix import ProxyFix

    plan.app.wsgi_app = ProxyFix(plan.app.wsgi_app, x_for=1, x_proto=1, x_host=1)  # type: ignore[method-assign]


@dataclass(frozen=True)
class Neighbour:
    distribution: str  # its name on PyPI
    mount: Callable[[Plan], None]


# In the order in which an app with all of them mounts them.
NEIGHBOURS = {
    "Flask-SQLAlchemy": Neighbour("flask-sqlalchemy", sqlalchemy),
    "Flask-Session": Neighbour("flask-session", server_side_session),
    "Flask-Login": Neighbour("flask-login", login),
    "Flask-WTF CSRFProtect": Neighbour("flask-wtf", csrf),
    "Flask-Limiter": Neighbour("flask-limiter", limiter),
    "Flask-Compress": Neighbour("flask-compress", compress),
    "Flask-CORS": Neighbour("flask-cors", cors),
    "Flask-Talisman": Neighbour("flask-talisman", talisman),
    "Flask-DebugToolbar": Neighbour("flask-debugtoolbar", debug_toolbar),
    "sentry-sdk": Neighbour("sentry-sdk", sentry),
    "opentelemetry-instrumentation-flask": Neighbour("opentelemetry-instrumentation-flask", opentelemetry),
    "ProxyFix": Neighbour("werkzeug", proxy_fix),
}
