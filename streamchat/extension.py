"""`StreamChat`: the blueprint for those who want it mounted in one line; and what a gunicorn worker is told."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from flask import Flask

from .mount import Mount
from .responses import EXTENSION
from .views import create_blueprint

BEAT = 0.1  # seconds between two looks whether a worker may end


class StreamChat:
    """`StreamChat(app)`, or `StreamChat().init_app(app)` in a factory. Holds no app.

    Keyword arguments are those of `create_blueprint`, and `url_prefix` ("/api").
    """

    def __init__(self, app: Flask | None = None, *, url_prefix: str = "/api", **options: Any) -> None:
        self._url_prefix = url_prefix
        self._options = options
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask, **options: Any) -> None:
        """Mounts the blueprint. app.config must be complete by then. Raises SettingsError for what cannot be used."""
        prefix = options.pop("url_prefix", self._url_prefix)
        app.register_blueprint(create_blueprint(**{**self._options, **options}), url_prefix=prefix)


def follow_worker(
    application: Any,
    is_stopping: Callable[[], bool],
    most: int,
    drain_seconds: float,
    connections: int | None = None,
) -> None:
    """Tells every mount in a WSGI application, wrapped by middleware or not, about its worker.

    `is_stopping` says whether the worker has been told to stop, `most` how many answers it may run at a time; those
    that still run `drain_seconds` after the stop end with the error `draining`. `connections` is
    what the worker takes at a time, for the doctor to tell.
    """
    for mount in mounts_of(application):
        mount.follow(is_stopping, most, drain_seconds, connections)


def end_worker(application: Any, beat: Callable[[], None]) -> None:
    """The worker's connections have ended: answers whose callers left may go on while it drains. Then all is closed."""
    mounts = mounts_of(application)
    while any(mount.keeps_worker for mount in mounts):
        beat()
        time.sleep(BEAT)
    for mount in mounts:
        mount.close()


def mounts_of(application: Any) -> list[Mount]:
    """The mounts of the Flask application under any middleware that keeps it as `app`, `application` or `wsgi_app`."""
    seen: list[int] = []
    while application is not None and id(application) not in seen:
        seen.append(id(application))
        application = getattr(application, "__self__", application)  # a bound wsgi_app: its Flask
        if isinstance(application, Flask):
            return list(application.extensions.get(EXTENSION, {}).values())
        names = ("app", "application", "wsgi_app")
        application = next((getattr(application, name) for name in names if hasattr(application, name)), None)
    return []
