"""The logs of an app's blueprints, opened for one command and closed at its end. What is wrong is one sentence."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click
from flask import current_app

from .errors import SettingsError, StoreDown
from .loop import choose_loop
from .mount import Mount
from .settings import Settings, key
from .store import Store
from .stores import check_store, file_of, open_store

URL = key("store_url")

of_mount = click.option("--mount", metavar="NAME", help="Only the blueprint of this name; all by default.")


def mounts_of_app() -> dict[str, Mount]:
    mounts: dict[str, Mount] = current_app.extensions.get("streamchat", {})
    return mounts


def ask_logs(only: str | None, ask: Callable[[str, Store, list[Settings]], None]) -> bool:
    """Asks each log, by the names of the blueprints that share it, with the settings of those that are chosen.

    Of several one that cannot be asked is told on stderr and stops no other; False then. Raises click.ClickException.
    """
    logs, all_told = _chosen(only), True
    for names, chosen in logs.items():
        try:
            with _opened(names, chosen[0]) as store:
                ask(names, store, chosen)
        except click.ClickException as error:
            if len(logs) == 1:
                raise
            error.show()
            all_told = False
    return all_told


def finish(all_told: bool) -> None:
    """Ends the command, with the status 1 where something is missing from what it told."""
    if not all_told:
        click.get_current_context().exit(1)


def _chosen(only: str | None) -> dict[str, list[Settings]]:
    mounts = mounts_of_app()
    if only is not None and only not in mounts:
        raise click.ClickException(f"There is no blueprint {only}; there is: {', '.join(mounts)}.")
    logs: dict[str, list[str]] = {}
    for name, mount in mounts.items():
        if mount.settings.store_url:
            logs.setdefault(_place(mount.settings), []).append(name)
    chosen = {
        " ".join(names): [mounts[name].settings for name in names if only in (None, name)] for names in logs.values()
    }
    if not any(chosen.values()):
        raise click.ClickException(f"No answers are kept: set {URL}, such as sqlite:///streamchat.db.")
    return {names: settings for names, settings in chosen.items() if settings}


def _place(settings: Settings) -> str:
    """The same for two spellings of one file."""
    file = file_of(settings)
    return settings.store_url if file is None else str(file.resolve())


@contextmanager
def _opened(names: str, settings: Settings) -> Iterator[Store]:
    """The log's store, closed at the end. What is wrong with it is told in one sentence."""
    _check_lasting(names, settings)
    try:
        check_store(settings, choose_loop())
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
    if file is not None and file.is_file() and not os.access(file, os.R_OK | os.W_OK):
        raise click.ClickException(
            f"The log of {names}, {file.absolute()}, may not be opened by this account: "
            "run the command as the server's."
        )
    if settings.store_url.startswith("memory:"):
        raise click.ClickException(
            f"The log of {names} is in the server's memory: for this, {URL} must name a file or a Redis."
        )
