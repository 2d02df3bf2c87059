"""`flask streamchat ...`: what an operator asks of an app from its shell. Opens stores of its own, and closes them."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from datetime import UTC, datetime
from typing import Literal

import click
from flask import current_app
from flask.cli import AppGroup, ScriptInfo

from .diagnosis import as_json, as_text
from .diagnostics import make_token
from .doctor import CouldNotTest, Doctor
from .mailroom import webhooks
from .mount import Mount
from .opened_logs import ask_logs, finish, mounts_of_app, of_mount
from .settings import TABLE, Settings, key
from .spending import as_csv, csv_rows, table
from .store import Store
from .stores import prune
from .worker import command

SECONDS = {"h": 3600, "d": 86_400}
AGO = re.compile(r"([0-9]{1,6})([hd])")

commands = AppGroup("streamchat", help="Look at the streamchat blueprints of this app.")
commands.add_command(webhooks)


def _since(context: click.Context, parameter: click.Parameter, value: str) -> float:
    """A day, or how long ago; becomes a Unix time."""
    if ago := AGO.fullmatch(value):
        return max(0.0, time.time() - int(ago[1]) * SECONDS[ago[2]])
    try:
        return datetime.strptime(value, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise click.BadParameter("write a day, such as 2026-11-01, or how long ago, such as 24h or 7d.") from None


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
    for name, mount in mounts_of_app().items():
        click.echo(f"# blueprint {name}")
        for setting in TABLE.values():
            click.echo(f"{key(setting.name):34} {_shown(mount, setting.name):24} {setting.metadata['help']}")


@commands.command("usage")
@click.option(
    "--since",
    metavar="WHEN",
    default="30d",
    show_default=True,
    callback=_since,
    help="A day (2026-11-01, UTC), or how long ago: 24h, 7d.",
)
@click.option(
    "--by", type=click.Choice(["user", "model", "day"]), default="user", show_default=True, help="One row each."
)
@click.option("--csv", "is_csv", is_flag=True, help="Comma-separated values, without totals, for programs.")
@of_mount
def show_usage(since: float, by: Literal["user", "model", "day"], is_csv: bool, mount: str | None) -> None:
    """Sum the ledger: answers and tokens of each user, model or day.

    The ledger has one row for each answer that has ended, whatever became of it. It stands in the response log and
    outlives the answers' texts. Days are UTC's.
    """
    rows: list[tuple[object, ...]] = []

    def show(names: str, store: Store, _: list[Settings]) -> None:
        sums = store.usage(since, by)
        if is_csv:
            rows.extend(csv_rows(names, by, sums)[bool(rows) :])
        else:
            click.echo(f"# {names}, since {datetime.fromtimestamp(since, UTC):%Y-%m-%d %H:%M} UTC")
            click.echo(table(by, sums))

    all_told = ask_logs(mount, show)
    if rows:
        click.echo(as_csv(rows))
    finish(all_told)


@commands.command("prune")
@of_mount
def forget(mount: str | None) -> None:
    """Forget old answers now: those past STREAMCHAT_RETENTION, and the oldest above STREAMCHAT_KEPT_BYTES.

    Running servers do so by themselves, once a minute. Running answers and the ledger stay.
    """

    def forget_old(names: str, store: Store, chosen: list[Settings]) -> None:
        gone = sum(prune(store, each) for each in chosen)
        click.echo(f"# {names}: {gone:,} {'answer' if gone == 1 else 'answers'} forgotten")

    finish(ask_logs(mount, forget_old))


@commands.command("worker", add_help_option=True)
@click.option("--mount", metavar="NAME", multiple=True, help="Only the blueprint of this name; may be given again.")
@click.pass_context
def work(context: click.Context, mount: tuple[str, ...]) -> None:
    """Make the background answers of this app and deliver its webhooks, until TERM or Ctrl-C.

    Needs STREAMCHAT_BACKGROUND and STREAMCHAT_STORE_URL, the same as the web server's. Any number of workers may run,
    with Redis on any number of machines. The signal lets running answers end for STREAMCHAT_GRACE seconds; a second
    one does not wait.
    """
    words = command(context.ensure_object(ScriptInfo).app_import_path, mount)
    sys.stdout.flush()
    os.execv(words[0], words)  # a fresh interpreter: gevent must patch before Flask is imported


def _shown(mount: Mount, name: str) -> str:
    value = getattr(mount.settings, name)
    if TABLE[name].metadata["secret"]:
        return "(set)" if value else "(not set)"
    return repr(list(value) if isinstance(value, tuple) else value)
