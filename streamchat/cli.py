"""`flask streamchat ...`: what an operator asks of an app from its shell. Opens stores of its own, and closes them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal

import click
from flask import current_app
from flask.cli import AppGroup

from .diagnosis import as_json, as_text
from .diagnostics import make_token
from .doctor import CouldNotTest, Doctor
from .errors import SettingsError, StoreDown
from .loop import choose_loop
from .mount import Mount
from .settings import TABLE, Settings, key
from .spending import as_csv, csv_rows, table
from .store import Store
from .stores import file_of, open_store, prune

SECONDS = {"h": 3600, "d": 86_400}
AGO = re.compile(r"([0-9]{1,6})([hd])")
URL = key("store_url")

commands = AppGroup("streamchat", help="Look at the streamchat blueprints of this app.")


def _since(context: click.Context, parameter: click.Parameter, value: str) -> float:
    """A day, or how long ago; becomes a Unix time."""
    if ago := AGO.fullmatch(value):
        return max(0.0, time.time() - int(ago[1]) * SECONDS[ago[2]])
    try:
        return datetime.strptime(value, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise click.BadParameter("write a day, such as 2026-11-01, or how long ago, such as 24h or 7d.") from None


of_mount = click.option("--mount", metavar="NAME", help="Only the blueprint of this name; all by default.")


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
    for name, mount in _mounts().items():
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
    for names, (settings, *_) in _logs(mount).items():
        with _opened(names, settings) as store:
            sums = store.usage(since, by)
        if is_csv:
            rows += csv_rows(names, by, sums)[bool(rows) :]
        else:
            click.echo(f"# {names}, since {datetime.fromtimestamp(since, UTC):%Y-%m-%d %H:%M} UTC")
            click.echo(table(by, sums))
    if is_csv:
        click.echo(as_csv(rows))


@commands.command("prune")
@of_mount
def forget(mount: str | None) -> None:
    """Forget old answers now: those past STREAMCHAT_RETENTION, and the oldest above STREAMCHAT_KEPT_BYTES.

    Running servers do so by themselves, once a minute. Running answers and the ledger stay.
    """
    for names, (settings, *others) in _logs(mount).items():
        with _opened(names, settings) as store:
            gone = sum(prune(store, each) for each in (settings, *others))
        click.echo(f"# {names}: {gone:,} {'answer' if gone == 1 else 'answers'} forgotten")


def _mounts() -> dict[str, Mount]:
    mounts: dict[str, Mount] = current_app.extensions.get("streamchat", {})
    return mounts


def _logs(only: str | None) -> dict[str, list[Settings]]:
    """The settings of each log by the names of its blueprints: several may share one."""
    mounts = _mounts()
    if only is not None and only not in mounts:
        raise click.ClickException(f"There is no blueprint {only}; there is: {', '.join(mounts)}.")
    chosen = {name: mount.settings for name, mount in mounts.items() if only in (None, name)}
    names: dict[str, list[str]] = {}
    for name, settings in chosen.items():
        if settings.store_url:
            names.setdefault(settings.store_url, []).append(name)
    if not names:
        raise click.ClickException(f"No answers are kept: set {URL}, such as sqlite:///streamchat.db.")
    return {" ".join(those): [chosen[name] for name in those] for those in names.values()}


@contextmanager
def _opened(names: str, settings: Settings) -> Iterator[Store]:
    """The log's store, closed at the end. What is wrong with it is told in one sentence."""
    _check_lasting(names, settings)
    try:
        store = open_store(settings, choose_loop())
        assert store is not None
        try:
            yield store
        finally:
            store.close()
    except SettingsError as error:
        raise click.ClickException(error.detail) from None
    except StoreDown:
        raise click.ClickException(f"The log of {names} does not answer: see {URL}.") from None


def _check_lasting(names: str, settings: Settings) -> None:
    """Opening would make an empty file: where the path is meant from another folder, that would hide the log."""
    file = file_of(settings)
    if file is not None and not file.exists():
        raise click.ClickException(
            f"The log of {names} is not there yet: {URL} names {file.absolute()}. "
            "A relative path counts from the folder that the command runs in."
        )
    if settings.store_url.startswith("memory:"):
        raise click.ClickException(f"The log of {names} is in the server's memory: for this, {URL} must name a file.")


def _shown(mount: Mount, name: str) -> str:
    value = getattr(mount.settings, name)
    if TABLE[name].metadata["secret"]:
        return "(set)" if value else "(not set)"
    return repr(list(value) if isinstance(value, tuple) else value)
