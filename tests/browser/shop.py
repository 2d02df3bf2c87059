"""A shop's app, for the browser's tests: the page on its own path, a login, a limit, and a template of its own."""

from __future__ import annotations

from typing import Any

from flask import Flask, abort, render_template_string
from werkzeug.exceptions import TooManyRequests

from streamchat import create_blueprint

RETRY_AFTER = 3
# How a shop puts the client into a page of its own (docs/browser.md).
OWN_PAGE = """<!doctype html>
<title>Shop</title>
<p id="output"></p>
<script type="module">
  import {stream} from "{{ url_for('streamchat.static', filename='streamchat.js') }}";
  const headers = {"X-CSRFToken": "{{ csrf_token() }}"};
  for await (const event of stream("{{ url_for('streamchat.get_response') }}", {message: "Hello!", headers})) {
    if (event.type === "text") document.getElementById("output").textContent += event.text;
  }
</script>
"""


def authorize(request: Any) -> str:
    message = request.get_json()
    if "limited" in str(message):
        raise TooManyRequests(retry_after=RETRY_AFTER)
    if request.headers.get("X-CSRFToken") != csrf_token():
        abort(403)
    return "somebody"


def csrf_token() -> str:
    return "a-csrf-token"


def create_app() -> Flask:
    # Its templates are those of tests/browser/templates: one fills blocks of the page.
    app = Flask(__name__)
    app.jinja_env.globals["csrf_token"] = csrf_token
    app.register_blueprint(create_blueprint(authorize=authorize, page=True), url_prefix="/help/chat")
    app.add_url_rule("/own", "own", lambda: render_template_string(OWN_PAGE))
    return app
