"""A shop that mounts streamchat in an app it already has: its users are in a database with a pool of five connections.

SHOP_DATABASE names the SQLite file.
"""

from __future__ import annotations

import os

from flask import Flask, Request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import Mapped, mapped_column
from sqlalchemy.pool import QueuePool

from streamchat import StreamChat
from streamchat.settings import read_environ

POOL = {"poolclass": QueuePool, "pool_size": 5, "max_overflow": 0, "pool_timeout": 2}

database = SQLAlchemy()


class User(database.Model):  # type: ignore[name-defined, misc]  # Flask-SQLAlchemy makes the class at run time
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


def authorize(request: Request) -> str | None:
    """Loads the user, as a login extension does: this takes a connection out of the pool."""
    user = database.session.get(User, request.headers.get("X-User", 0, type=int))
    return None if user is None else user.name


def create_app() -> Flask:
    app = Flask(__name__)
    app.config.update(read_environ(os.environ))
    app.config.setdefault("STREAMCHAT_MAX_STREAMS_PER_USER", 0)  # all its callers are one user
    app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{os.environ['SHOP_DATABASE']}"
    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = POOL
    database.init_app(app)
    StreamChat(app, authorize=authorize)
    app.add_url_rule("/users", view_func=count_users)
    with app.app_context():
        database.create_all()
        if database.session.get(User, 1) is None:
            database.session.add(User(id=1, name="ada"))
            database.session.commit()
    return app


def count_users() -> dict[str, int]:
    return {"users": database.session.query(User).count()}
