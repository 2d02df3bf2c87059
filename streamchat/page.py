"""The chat page: a template, and headers under which it may load and ask nothing but what is this server's own.

Knows no answer and no upstream: the page's script asks the blueprint's API as any other caller does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from flask import Blueprint, Flask, render_template
from flask.blueprints import BlueprintSetupState

from .mount import Mount

HEADERS = {
    # The last line of defence behind the page's own cleaning of what a model writes.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'; "
    "object-src 'none'; require-trusted-types-for 'script'; trusted-types dompurify",
    # Looking a link's host up would already tell its owner something: models can be made to write secrets into it.
    "X-DNS-Prefetch-Control": "off",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def add_page(blueprint: Blueprint, place: str | bool, mount: Callable[[], Mount]) -> None:
    """Serves the page at the root of the blueprint, or at `place`, a path of the whole app such as "/".

    `mount` returns that of the current request.
    """

    def show() -> tuple[str, dict[str, str]]:
        settings, hooks = mount().settings, mount().hooks
        asks_token = hooks.authorize is None and bool(settings.tokens)
        return render_template("streamchat/page.html", asks_token=asks_token), HEADERS

    def at_place(state: BlueprintSetupState) -> None:
        endpoint = f"{state.name_prefix}.{state.name}.page".lstrip(".")
        cast(Flask, state.app).add_url_rule(str(place), endpoint, show)

    if place is True:
        blueprint.add_url_rule("/", "page", show)
    else:
        blueprint.record(at_place)
