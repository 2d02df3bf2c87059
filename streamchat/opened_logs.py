"""The logs of an app's blueprints, opened for one command and closed at its end. What is wrong is one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click
from flask import current_app

from .errors import SettingsError, StoreDown
from .loop import choose_loop
from .mount import Mount
from .settings import Settings, key
from .store import Store
from .stores import file_of, open_store

URL = key("store_url")

of_mount = click.option("--mount", metavar="NAME", help="Only the blueprint of this name; all by default.")


def mounts_of_app() -> dict[str, Mount]:
    mounts: dict[str, Mount] = current_app.extensions.get("streamchat", {})
    return mounts


def chosen_logs(only: str | None) -> dict[str, list[Settings]]:
    """The settings of each log by the names of its blueprints: several may share one."""
    mounts = mounts_of_app()
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
def opened(names: str, settings: Settings) -> Iterator[Store]:
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
