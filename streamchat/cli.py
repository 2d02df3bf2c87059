"""`flask streamchat ...`: what an operator asks of an app from its shell."""

from __future__ import annotations

import json

import click
from flask import current_app
from flask.cli import AppGroup

from .diagnosis import as_json, as_text
from .diagnostics import make_token
from .doctor import CouldNotTest, Doctor
from .mount import Mount
from .settings import TABLE, key

commands = AppGroup("streamchat", help="Look at the streamchat blueprints of this app.")


@commands.command("doctor")
@click.argument("url")
@click.option("--gap", type=click.FloatRange(0.1, 3600), help="Seconds of silence to try.  [default: heartbeat + 5]")
@click.option("--timeout", type=click.FloatRange(0.1, 600), default=10.0, show_default=True, help="For each reply.")
@click.option("--token", help="Made by `flask streamchat doctor-token` where the SECRET_KEY is.")
@click.option("--json", "as_document", is_flag=True, help="One JSON object instead of the table.")
@click.pass_context
def doctor(
    context: click.Context, url: str, gap: float | None, timeout: float, token: str | None, as_document: bool
) -> None:
    """Prove that the chain in front of an app streams.

    URL is the blueprint's address with its prefix, as callers use it: https://shop.example/api. The app there needs
    STREAMCHAT_DIAGNOSTICS, and the same SECRET_KEY as this one. No model is asked.

    It takes the heartbeat and 5 s more, and tells what to change for nginx, Apache, Caddy, HAProxy, ALB, Cloudflare
    and Heroku.

    \b
    Exit status: 0  nothing breaks streaming (advice does not count)
                 1  something does
                 2  it could not be tested
    """
    try:
        seen = Doctor(url, token or _token(), timeout).examine(gap)
    except CouldNotTest as error:
        if as_document:
            click.echo(json.dumps({"url": url, "exit": 2, "error": str(error)}))
        click.echo(f"could not test: {error}", err=True)
        context.exit(2)
    if as_document:
        document, status = as_json(seen)
        text = json.dumps(document, indent=2)
    else:
        text, status = as_text(seen)
    click.echo(text)
    context.exit(status)


@commands.command("doctor-token")
def doctor_token() -> None:
    """Print a token for `doctor --token` on another machine; it is good for five minutes."""
    try:
        click.echo(_token())
    except CouldNotTest as error:
        raise click.ClickException(str(error)) from None


def _token() -> str:
    if not current_app.secret_key:
        raise CouldNotTest("This app has no SECRET_KEY to sign with: set the one of the app at the address.")
    return make_token(current_app.secret_key)


@commands.command("settings")
def show_settings() -> None:
    """Show every setting of every mounted blueprint, with its value. Secrets are not shown."""
    mounts: dict[str, Mount] = current_app.extensions.get("streamchat", {})
    for name, mount in mounts.items():
        click.echo(f"# blueprint {name}")
        for setting in TABLE.values():
            click.echo(f"{key(setting.name):34} {_shown(mount, setting.name):24} {setting.metadata['help']}")


def _shown(mount: Mount, name: str) -> str:
    value = getattr(mount.settings, name)
    if TABLE[name].metadata["secret"]:
        return "(set)" if value else "(not set)"
    return repr(list(value) if isinstance(value, tuple) else value)
