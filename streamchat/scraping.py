"""The view that Prometheus asks: the figures of all workers, and what the stores of this app hold."""

from __future__ import annotations

from collections.abc import Callable

from flask import Response, current_app, request

from .metrics import counts_together, figures
from .mount import Mount
from .responses import EXTENSION
from .store import Store

ALONE = (
    "These would be the figures of one worker of several: set PROMETHEUS_MULTIPROC_DIR to an empty folder before the "
    "server starts; conf/gunicorn.conf.py does so where STREAMCHAT_METRICS is set in the environment.\n"
)
OFF = "Nothing is counted: set STREAMCHAT_METRICS to true.\n"


def metrics_view() -> Callable[[], Response]:
    """A view for a rule of the app's own: `app.add_url_rule("/metrics", view_func=metrics_view())`. Asks nobody who
    they are.
    """
    return metrics


def metrics() -> Response:
    mounts: list[Mount] = [each for each in current_app.extensions.get(EXTENSION, {}).values() if each.settings.metrics]
    if not mounts:
        return _refused(OFF)
    if request.environ.get("wsgi.multiprocess") and not counts_together():
        return _refused(ALONE)
    body, content_type = figures().told(_stores(mounts), request.headers.get("Accept", ""))
    return Response(body, content_type=content_type, headers={"Cache-Control": "no-store"})


def _stores(mounts: list[Mount]) -> list[Store]:
    """Each once: mounts may share one."""
    logs = {mount.settings.store_url: mount.process.log for mount in mounts}
    return [log.store for log in logs.values() if log is not None]


def _refused(why: str) -> Response:
    return Response(why, 503, content_type="text/plain; charset=utf-8")
