"""The app that is deployed as it is: environment variables in, a streamchat blueprint under /api out, its page at /."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Mapping

from flask import Flask

from streamchat import SettingsError, StreamChat, metrics_view
from streamchat.settings import read_environ


def create_app(environ: Mapping[str, str] = os.environ) -> Flask:
    """A Flask app configured by STREAMCHAT_..., SECRET_KEY, OPENAI_API_KEY and OPENAI_BASE_URL.

    Raises SettingsError, in one sentence, for what cannot be used.
    """
    app = Flask(__name__)
    app.config.update(read_environ(environ))
    app.secret_key = environ.get("SECRET_KEY") or secrets.token_hex(32)
    StreamChat(app, page="/")
    if app.config.get("STREAMCHAT_METRICS"):
        app.add_url_rule("/metrics", "metrics", metrics_view())
    return app


def _app_or_end() -> Flask:
    try:
        return create_app()
    except SettingsError as error:
        print(f"streamchat cannot start: {error}", file=sys.stderr)
        sys.exit(4)  # gunicorn's code for an app that cannot be loaded: it ends, and does not start it again


app = _app_or_end()
