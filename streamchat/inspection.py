"""What a worker says of itself: its server, what gevent replaced too late, its limits, its versions. No Flask."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .live import Live
from .loop import late_modules
from .settings import Settings

# gunicorn loads the module of the worker class that it runs, and no other.
WORKERS = {
    "gunicorn.workers.ggevent": "gevent",
    "gunicorn.workers.gthread": "gthread",
    "gunicorn.workers.gtornado": "tornado",
    "gunicorn.workers.sync": "sync",
}
PACKAGES = ("streamchat", "flask", "werkzeug", "gunicorn", "gevent", "openai", "httpx2", "httptools")
DISTRIBUTIONS = {"streamchat": "flask_streamchat"}
# What proxies add to a request; of most of them the names alone say enough.
ADDED = ("Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Real-IP", "CF-Ray")
TOLD = ("heartbeat", "first_token_timeout", "total_timeout", "write_timeout", "max_streams")


def inspect(environ: Mapping[str, Any], settings: Settings, live: Live, connections: int | None) -> dict[str, Any]:
    """As it goes into JSON. `connections` is what the worker takes at a time, where its server says so."""
    soft, hard = (None if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(_NOFILE))
    return {
        "worker": worker_class(environ),
        "late_modules": late_modules(),
        "limits": {
            "open_files": soft,
            "open_files_hard": hard,
            "worker_connections": connections,
            "max_streams": live.most,
            "live": len(live),
        },
        "request": {
            "protocol": environ.get("SERVER_PROTOCOL"),
            "scheme": environ.get("wsgi.url_scheme"),
            "added": [name for name in ADDED if f"HTTP_{name.upper().replace('-', '_')}" in environ],
        },
        "settings": {name: getattr(settings, name) for name in TOLD},
        "versions": versions(),
    }


_NOFILE = resource.RLIMIT_NOFILE


def worker_class(environ: Mapping[str, Any]) -> str:
    if "werkzeug.socket" in environ:
        return "flask run"
    if str(environ.get("SERVER_SOFTWARE", "")).startswith("gunicorn"):
        return next((name for module, name in WORKERS.items() if module in sys.modules), "gunicorn")
    return str(environ.get("SERVER_SOFTWARE") or "unknown").partition("/")[0]


def versions() -> dict[str, str]:
    """Of what is loaded, by the folders that pip leaves beside it; a checkout has none."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        module = sys.modules.get(name)
        if module is not None and module.__file__:
            found[name] = _version(Path(module.__file__).parent.parent, DISTRIBUTIONS.get(name, name))
    return found


def _version(folder: Path, name: str) -> str:
    left = [path.name for path in folder.glob(f"{name}-*.dist-info")]
    return left[0].removeprefix(f"{name}-").removesuffix(".dist-info") if left else "checkout"
