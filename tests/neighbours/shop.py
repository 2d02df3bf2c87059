"""A shop's app with streamchat and the neighbours that SHOP_NEIGHBOURS names; what it holds is told under /seen.

SHOP_FOLDER is where it keeps its database and its sessions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flask import Flask, Request, request, session

from streamchat import Record, answer_finished, create_blueprint
from streamchat.schema import ChatRequest
from streamchat.settings import read_environ
from tests.neighbours.mounts import NEIGHBOURS, Plan

BREAK = "X-Break"  # names the hook that is to fail
BROKEN_END = "canary answer, and its end fails"  # an answer whose on_finish fails
PAGE = "<!doctype html><html><body>" + "<p>A page of the shop.</p>" * 50 + "</body></html>"


def create_app() -> Flask:
    app = Flask(__name__)
    app.secret_key = "a secret of this test"
    app.config.update(read_environ(os.environ))
    plan = Plan(app, Path(os.environ["SHOP_FOLDER"]))
    plan.settings["max_streams_per_user"] = 0  # all its callers are one user
    for name in json.loads(os.environ["SHOP_NEIGHBOURS"]):
        NEIGHBOURS[name].mount(plan)
    mount_chat(plan)
    add_views(plan)
    return app


def mount_chat(plan: Plan) -> None:
    def authorize(request: Request) -> str | None:
        break_where_asked("authorize")
        return plan.authorize(request)

    def build_messages(asked: ChatRequest, user: str | None) -> Sequence[Any]:
        for ask in plan.before_model:
            ask()
        break_where_asked("build_messages")
        session["asked"] = session.get("asked", 0) + 1
        return [{"role": "user", "content": asked.messages[-1].content}]

    def on_finish(record: Record, text: str) -> None:
        if text == BROKEN_END:
            raise RuntimeError("on_finish fails")

    chat = create_blueprint(
        authorize=authorize, build_messages=build_messages, on_finish=on_finish, page=True, **plan.settings
    )
    for act in plan.on_blueprint:
        act(chat)
    plan.app.register_blueprint(chat, url_prefix="/api")


def break_where_asked(hook: str) -> None:
    if request.headers.get(BREAK) == hook:
        raise RuntimeError(f"{hook} fails")


def add_views(plan: Plan) -> None:
    app, records = plan.app, list[Record]()
    answer_finished.connect(lambda _, record: records.append(record), app, weak=False)
    plan.looks["records"] = lambda: [vars(record) for record in records]

    @app.get("/seen")
    def seen() -> dict[str, Any]:
        return {name: look() for name, look in plan.looks.items()}

    @app.get("/page")
    def page() -> str:
        return PAGE

    @app.get("/basket")
    def basket() -> dict[str, Any]:
        """What is in the session; `?put=` puts something there."""
        if "put" in request.args:
            session["basket"] = request.args["put"]
        return {name: session.get(name) for name in ("basket", "asked")}

    @app.get("/who")
    def who() -> dict[str, Any]:
        return {"url": request.url, "address": request.remote_addr}

    if "sqlalchemy" in app.extensions:
        with app.app_context():
            app.extensions["sqlalchemy"].create_all()
